"""A door: `python -m jaxfp8.generate` is `jaxfp8 generate`, jaxfp8/commands/generate.py."""

from jaxfp8.commands import command, generate

if __name__ == "__main__":
  command.run(generate.COMMAND)
