"""A door: `python -m jaxfp8.plan` is `jaxfp8 plan`, jaxfp8/commands/plan.py."""

from jaxfp8.commands import command, plan

if __name__ == "__main__":
  command.run(plan.COMMAND)
