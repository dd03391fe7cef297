"""A door: `python -m tools.convert_checkpoint` is `jaxfp8 convert`, jaxfp8/commands/convert.py."""

from jaxfp8.commands import command, convert

if __name__ == "__main__":
  command.run(convert.COMMAND)
