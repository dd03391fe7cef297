"""A door: `python -m tools.validate_gpu` is `jaxfp8 validate-gpu`, jaxfp8/commands/validate_gpu.py."""

from jaxfp8.commands import command, validate_gpu

if __name__ == "__main__":
  command.run(validate_gpu.COMMAND)
