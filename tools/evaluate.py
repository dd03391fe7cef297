"""A door: `python -m tools.evaluate` is `jaxfp8 evaluate`, jaxfp8/commands/evaluate.py."""

from jaxfp8.commands import command, evaluate

if __name__ == "__main__":
  command.run(evaluate.COMMAND)
