"""A door: `python -m tools.calibrate` is `jaxfp8 calibrate`, jaxfp8/commands/calibrate.py."""

from jaxfp8.commands import calibrate, command

if __name__ == "__main__":
  command.run(calibrate.COMMAND)
