"""A door: `python -m tools.export_checkpoint` is `jaxfp8 export`, jaxfp8/commands/export.py."""

from jaxfp8.commands import command, export

if __name__ == "__main__":
  command.run(export.COMMAND)
