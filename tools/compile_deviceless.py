"""A door: `python -m tools.compile_deviceless` is `jaxfp8 compile`, jaxfp8/commands/compile.py."""

from jaxfp8.commands import command, compile

if __name__ == "__main__":
  command.run(compile.COMMAND)
