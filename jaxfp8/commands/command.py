"""What every command shares: choosing the platform, parsing flags, turning mistakes into one sentence. Imports no jax.

A command's module imports what needs jax inside its `main`, after `run` has looked at the flags and chosen the platform:
a wrong flag is answered at once, and where the CUDA wheels are installed and no driver is, nobody sees JAX's traceback.
"""

import contextlib
import inspect
import logging
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable

from absl import flags

from jaxfp8.errors import InputError

DEFAULT_CACHE_DIR = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "jaxfp8")
INTERRUPTED, TERMINATED = 130, 143  # the exit codes of a program that Ctrl-C or SIGTERM ended
_excepthook = sys.excepthook
_SHOW_CURSOR = "\r\x1b[2K\x1b[?25h"  # on a cleared line: what a progress bar that was cut short leaves undone


def _quiet_excepthook(kind, error, traceback) -> None:
  """For Ctrl-C while a command's module is still being imported, before `run`."""
  if kind is KeyboardInterrupt:
    _say("Stopped.")
  else:
    _excepthook(kind, error, traceback)


sys.excepthook = _quiet_excepthook


def run(main: Callable[[list[str]], int | None], flag_values: flags.FlagValues) -> None:
  """Parses sys.argv into flag_values, runs main(arguments) and exits with its code.

  InputError and unusable flags give one sentence on stderr and code 1; --debug shows the traceback.
  Ctrl-C and SIGTERM end the process at once, and take half-written checkpoints with it.
  """
  if "debug" not in flag_values:
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.", flag_values=flag_values)
  choose_platform()
  for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
    if hasattr(stream, "reconfigure"):
      stream.reconfigure(errors=errors)
  if {"--help", "-h", "-help"} & set(sys.argv[1:]):
    print(inspect.getmodule(main).__doc__, flag_values.get_help(), sep="\n")
    sys.exit(0)
  try:
    arguments = flag_values(sys.argv)
    if not flag_values.debug:
      silence_libraries()
    code = _run_interruptibly(main, arguments)
    sys.stdout.flush()
  except (InputError, flags.Error) as error:
    if flag_values.is_parsed() and flag_values.debug:
      raise
    _say(_one_line(error) + ("" if isinstance(error, InputError) else ". Run with --help to see the flags."))
    code = 1
  except BrokenPipeError:  # the reader of our output has gone
    with contextlib.suppress(OSError):
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    code = 1
  except Exception:
    if not (hosts := sys.modules.get("jaxfp8.distributed.processes")) or hosts.count() == 1:
      raise
    traceback.print_exc()
    code = 1
  if hosts := sys.modules.get("jaxfp8.distributed.processes"):
    hosts.leave(code or 0)
  sys.exit(code or 0)


def _run_interruptibly(main: Callable[[list[str]], int | None], arguments: list[str]) -> int | None:
  """Runs main in a thread of its own.

  The first thread only waits, so that it hears Ctrl-C at once. In main's thread the exception would wait for the end of a
  compilation, and be lost where Python code is called back from C++.
  """
  outcome: list[tuple[int | None, BaseException | None]] = []

  def call() -> None:
    try:
      outcome.append((main(arguments), None))
    except BaseException as error:
      outcome.append((None, error))

  thread = threading.Thread(target=call, daemon=True)
  previous = signal.signal(signal.SIGTERM, lambda *_: _stop(TERMINATED))
  try:
    thread.start()
    while thread.is_alive():
      thread.join(0.1)  # not for ever: another thread may be the one that the system interrupts
  except KeyboardInterrupt:
    _stop(INTERRUPTED)
  finally:
    signal.signal(signal.SIGTERM, previous)
  code, error = outcome[0]
  if error is not None:
    raise error
  return code


def _stop(code: int) -> None:
  """Ends the process now. stderr is written past Python's buffers, which main's thread may hold."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  os.write(2, ((_SHOW_CURSOR if os.isatty(2) else "") + "Stopped.\n").encode())
  hosts = sys.modules.get("jaxfp8.distributed.processes")
  if hasattr(hosts, "announce"):
    hosts.announce("Stopped.")
  folders = sys.modules.get("jaxfp8.checkpoint.writer")
  if hasattr(folders, "abandon_unfinished"):
    folders.abandon_unfinished()
  os._exit(code)


def silence_libraries() -> None:
  """Orbax logs a damaged checkpoint in pages, and then we say it in a sentence."""
  for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def choose_platform() -> None:
  """The CPU where no NVIDIA driver is, unless JAX_PLATFORMS says otherwise. Call before jax is imported."""
  driver = any(pathlib.Path("/dev").glob("nvidia[0-9]*")) or any(
    pathlib.Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/dxg", "/dev/nvhost-gpu")
  )
  if not driver:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def keep_compiled_programs(cache_dir: str) -> None:
  """Keeps programs in `cache_dir`: on a CPU as jaxfp8.program_cache does, elsewhere by JAX's persistent compilation cache.

  Only one of them may be on (program_cache says why). Nothing for an empty cache_dir.
  """
  if not cache_dir:
    return
  import jax

  jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(cache_dir).expanduser() / "programs"))
  jax.config.update("jax_enable_compilation_cache", os.environ.get("JAX_PLATFORMS") != "cpu")
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())


def _say(sentence: str) -> None:
  print(sentence, file=sys.stderr)
