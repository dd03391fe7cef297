"""A door: `python -m tools.inspect_checkpoint` is `jaxfp8 inspect`, jaxfp8/commands/inspect.py."""

from jaxfp8.commands import command, inspect

if __name__ == "__main__":
  command.run(inspect.COMMAND)
