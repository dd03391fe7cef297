"""A door: `python -m tools.benchmark` is `jaxfp8 benchmark`, jaxfp8/commands/benchmark.py."""

from jaxfp8.commands import benchmark, command

if __name__ == "__main__":
  command.run(benchmark.COMMAND)
