"""What every command shares: choosing the platform, parsing flags, turning mistakes into one sentence. Imports no jax.

A command's module imports what needs jax inside its `main`, after `run` has looked at the flags and chosen the platform:
a wrong flag is answered at once, and where the CUDA wheels are installed and no driver is, nobody sees JAX's traceback.
"""

import contextlib
import inspect
import os
import pathlib
import sys
from collections.abc import Callable

from absl import flags

from jaxfp8.errors import InputError

DEFAULT_CACHE_DIR = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "jaxfp8")
INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended


def run(main: Callable[[list[str]], int | None], flag_values: flags.FlagValues) -> None:
  """Parses sys.argv into flag_values, runs main(arguments) and exits with its code.

  InputError and unusable flags give one sentence on stderr and code 1; --debug shows the traceback.
  """
  flags.DEFINE_bool("debug", False, "Show the traceback of an error.", flag_values=flag_values)
  choose_platform()
  if {"--help", "-h", "-help"} & set(sys.argv[1:]):
    print(inspect.getmodule(main).__doc__, flag_values.get_help(), sep="\n")
    sys.exit(0)
  try:
    code = main(flag_values(sys.argv))
    sys.stdout.flush()
  except (InputError, flags.Error) as error:
    if flag_values.is_parsed() and flag_values.debug:
      raise
    _say(_one_line(error) + ("" if isinstance(error, InputError) else ". Run with --help to see the flags."))
    code = 1
  except KeyboardInterrupt:
    _say("Stopped.")
    code = INTERRUPTED
  except BrokenPipeError:  # the reader of our output has gone
    with contextlib.suppress(OSError):
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    code = 1
  sys.exit(code or 0)


def choose_platform() -> None:
  """The CPU where no NVIDIA driver is, unless JAX_PLATFORMS says otherwise. Call before jax is imported."""
  driver = any(pathlib.Path("/dev").glob("nvidia[0-9]*")) or any(
    pathlib.Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/dxg", "/dev/nvhost-gpu")
  )
  if not driver:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def keep_compiled_programs(cache_dir: str) -> None:
  """JAX's persistent compilation cache in `cache_dir`, for every program however small. Nothing for an empty cache_dir."""
  if not cache_dir:
    return
  import jax

  jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(cache_dir).expanduser() / "programs"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())


def _say(sentence: str) -> None:
  print(sentence, file=sys.stderr)
