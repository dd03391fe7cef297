"""The one way to make a command: its flags, help, errors, exit codes and signals. Imports no jax.

    FLAGS = flags.FlagValues()
    _prompts = Topic("Prompts", FLAGS)
    _prompts(flags.DEFINE_string, "prompt", None, "Text to answer.")
    COMMAND = Command("generate", main, FLAGS, topics=(_prompts,))
    run(COMMAND)

Every command has --help, --version and --debug, and takes `-` and `_` alike in the names of its flags. A command's module
imports modules that load jax inside its `main`. `run` has then parsed the flags and chosen the platform: a wrong flag is
answered at once, and a machine with the CUDA wheels but no driver shows no traceback of JAX.
"""

import dataclasses
import inspect
import os
import pathlib
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence

from absl import flags

from jaxfp8 import private_files, stored_files, unfinished
from jaxfp8.child_process import INTERRUPTED
from jaxfp8.commands import platforms, streams
from jaxfp8.commands.platforms import choose_platform
from jaxfp8.distributed.environment import is_slurm_task
from jaxfp8.errors import InputError, silence_libraries
from jaxfp8.terminal import one_line, say, show

DEFAULT_CACHE_DIR = private_files.default_cache()
# It loads jax, and is asked to stop only in a process that has imported it. A test looks up the name.
PROCESSES_MODULE = "jaxfp8.distributed.processes"
# Flags that hold a path, or a list of paths: a shell leaves the ~ in --checkpoint=~/model to the program.
PATH_FLAGS = (
  "cache_dir", "calibration_text", "checkpoint", "device", "folder", "input", "model", "output", "plot", "profile",
  "prompt_file", "save", "text",
)  # fmt: skip
TERMINATED = 143  # the exit code of a program that SIGTERM ended
_excepthook = sys.excepthook
_SHOW_CURSOR = "\r\x1b[2K\x1b[?25h"  # clears the line and shows the cursor that an interrupted progress bar has hidden


def _quiet_excepthook(kind, error, traceback) -> None:
  """Handles Ctrl-C while the modules of a command are still being imported, before `run`."""
  if kind is KeyboardInterrupt:
    say("Stopped.")
  else:
    _excepthook(kind, error, traceback)


sys.excepthook = _quiet_excepthook


class Topic:
  """A titled group of flags in --help. Calling it defines a flag, as absl's DEFINE functions do."""

  def __init__(self, title: str, flag_values: flags.FlagValues):
    self.title = title
    self.names: list[str] = []
    self._flag_values = flag_values

  def __call__(self, define: Callable, name: str, default, *arguments, **options) -> None:
    define(name, default, *arguments, flag_values=self._flag_values, **options)
    self.names.append(name)


@dataclasses.dataclass(frozen=True)
class Command:
  """One command: `main` reads `flags`, returns the exit code, and raises InputError.

  positionals: names of the flags that arguments without a flag set, in this order. required: those that must be given.
  preset: arguments that stand before the user's.
  json_help: the help text of --json; empty for a command without this flag.
  uses_devices: whether it imports jax. keeps_cache: whether it goes on without a --cache_dir that cannot be written.
  first_only: whether of the tasks of a SLURM step only the first one runs it, and the others wait for that one.
  stray_advice: the last sentence of the error about an argument that no flag takes; {argument} stands for it.
  """

  name: str
  main: Callable[[], int | None]
  flags: flags.FlagValues
  topics: tuple[Topic, ...] = ()
  positionals: tuple[str, ...] = ()
  required: tuple[str, ...] = ()
  preset: tuple[str, ...] = ()
  json_help: str = ""
  uses_devices: bool = True
  keeps_cache: bool = False
  first_only: bool = False
  stray_advice: str = "Run with --help to see them."

  def __post_init__(self):
    if self.json_help and "json" not in self.flags:
      flags.DEFINE_bool("json", False, self.json_help, flag_values=self.flags)
    if "debug" not in self.flags:
      flags.DEFINE_bool("debug", False, "Show the traceback of an error.", flag_values=self.flags)

  @property
  def description(self) -> str:
    """The docstring of the module that defines the command."""
    return inspect.getdoc(inspect.getmodule(self.main)) or ""

  def parse(self, arguments: Sequence[str]) -> None:
    """Sets `flags` from the arguments. Raises InputError or flags.Error for unusable ones."""
    self.flags([self.name, *self._as_flags([*self.preset, *arguments])])
    for name in PATH_FLAGS:
      if name in self.flags and (value := self.flags[name].value):
        self.flags[name].value = (
          [os.path.expanduser(path) for path in value] if isinstance(value, list) else os.path.expanduser(value)
        )
    if self.keeps_cache:
      self.flags["cache_dir"].value = _usable_cache_dir(self.flags["cache_dir"].value or "")
    for name in self.required:
      if self.flags[name].value in (None, "", []):
        raise InputError(f"{self.name}: --{name} must be given. Run with --help to see the flags.")

  def _as_flags(self, arguments: list[str]) -> list[str]:
    """The arguments with `_` for `-` in the names of flags, and with positional arguments as --name=value."""
    named: list[str] = []
    strays: list[str] = []
    given: set[str] = set()
    pending = iter(arguments)
    for argument in pending:
      if argument == "--":
        strays += pending
      elif not argument.startswith("-") or argument == "-":
        strays.append(argument)
      else:
        name, equals, value = argument.lstrip("-").partition("=")
        name = self._flag_name(name)
        given.add(name)
        named.append(f"--{name}{equals}{value}")
        if not self._is_known(name):
          return named  # absl's parser refuses an unknown flag and names near ones
        if not equals and name in self.flags and not self.flags[name].boolean:
          named += [value for value in [next(pending, None)] if value is not None]
    free = [name for name in self.positionals if name not in given]
    if len(strays) > len(free):
      raise InputError(self._stray_error(strays[len(free)]))
    return [*named, *(f"--{name}={value}" for name, value in zip(free, strays, strict=False))]

  def _flag_name(self, name: str) -> str:
    underscored = name.replace("-", "_")
    negative = f"no{underscored.removeprefix('no_')}"
    return negative if underscored not in self.flags and self._is_known(negative) else underscored

  def _is_known(self, name: str) -> bool:
    positive = name.removeprefix("no")
    return name in self.flags or (positive in self.flags and self.flags[positive].boolean)

  def _stray_error(self, argument: str) -> str:
    advice = self.stray_advice.format(argument=repr(argument))
    if not self.positionals:
      return f"{self.name}: every argument is a flag; got {argument!r}. {advice}"
    places = " ".join(map(str.upper, self.positionals))
    return f"{self.name}: takes {places}, and every other argument is a flag; got also {argument!r}. {advice}"


def run(command: Command, arguments: Sequence[str] | None = None) -> None:
  """Parses the arguments (default: sys.argv[1:]), runs the command and exits with its code.

  InputError and unusable flags print one sentence on stderr and exit with code 1; --debug shows the traceback.
  Ctrl-C and SIGTERM end the process at once and remove half-written checkpoints.
  """
  streams.start_again_in_utf8()
  arguments = sys.argv[1:] if arguments is None else list(arguments)

  def main() -> int | None:
    choose_platform()
    if {"--help", "-h", "-help"} & set(arguments):
      from jaxfp8.commands.command_help import format_help

      show(format_help(command))
    elif {"--version", "-version"} & set(arguments):
      print_version()
    else:
      command.parse(arguments)
      if not command.flags.debug:
        silence_libraries()
      if command.uses_devices:
        platforms.check_xla_flags()
      if command.first_only and is_slurm_task():
        from jaxfp8.distributed import processes

        return _run_interruptibly(lambda: processes.first_only(command.main))
      return _run_interruptibly(command.main)
    return 0

  end_with(main, command.name, debug="--debug" in arguments)


def end_with(main: Callable[[], int | None], name: str, *, debug: bool = False) -> None:
  """Runs `main` with usable streams and exits with its code; an error is one sentence on stderr and code 1."""
  try:
    streams.prepare()
    code = main()
    sys.stdout.flush()
  except (InputError, flags.Error) as error:
    if debug:
      raise
    say(one_line(error) + ("" if isinstance(error, InputError) else ". Run with --help to see the flags."))
    streams.finish_stdout()
    code = 1
  except BrokenPipeError:  # the process that reads this one's output has ended
    streams.finish_stdout()
    code = 1
  except OSError as error:  # a disk, a terminal or a folder of the system
    if debug:
      raise
    place = f" ({error.filename})" if error.filename else ""
    say(f"{name}: the system refused: {error.strerror or one_line(error)}{place}. Run with --debug to see where.")
    code = 1
  except Exception as error:
    if not debug and (sentence := platforms.explain(error)):
      say(sentence)
    elif (processes := sys.modules.get(PROCESSES_MODULE)) and processes.count() > 1:
      traceback.print_exc()
    else:
      raise
    code = 1
  if processes := sys.modules.get(PROCESSES_MODULE):
    processes.leave(code or 0)
  sys.exit(code or 0)


def print_version() -> None:
  import jaxfp8

  show(f"jaxfp8 {jaxfp8.__version__}")


def _run_interruptibly(main: Callable[[], int | None]) -> int | None:
  """Runs main in a thread of its own and returns its exit code.

  The first thread only waits, and so hears Ctrl-C at once. In main's thread the exception would wait for the end of a
  compilation, and would be lost in Python code that C++ calls.
  """
  outcome: list[tuple[int | None, BaseException | None]] = []

  def call() -> None:
    try:
      outcome.append((main(), None))
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
  processes = sys.modules.get(PROCESSES_MODULE)  # while it is still being imported, it has no such functions
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  os.write(2, ((_SHOW_CURSOR if os.isatty(2) else "") + "Stopped.\n").encode())
  getattr(processes, "announce", str)("Stopped.")
  unfinished.abandon_unfinished()
  getattr(processes, "say_goodbye", str)()
  os._exit(code)


def _usable_cache_dir(cache_dir: str) -> str:
  """The folder; or "", with a sentence on stderr, if it cannot be written or is not this user's alone: that is only slower."""
  if not cache_dir:
    return ""
  try:
    folder = private_files.open_cache(cache_dir)
    tempfile.TemporaryFile(dir=folder).close()
    return str(folder)
  except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error).rstrip(".")
    verb = "use" if isinstance(error, private_files.NotPrivate) else "write"
  say(
    f"cache: cannot {verb} {cache_dir}: {reason}. This run goes on without a cache. "
    'Pass another --cache_dir, or --cache_dir="" for none.'
  )
  return ""


def keep_compiled_programs(cache_dir: str) -> None:
  """Keeps programs in `cache_dir`: a CPU uses jaxfp8.serving.program_cache, a GPU the persistent compilation cache of JAX.

  Only one of the two caches may be on (program_cache says why). An empty cache_dir keeps nothing.
  """
  if not (cache_dir := _usable_cache_dir(cache_dir)):
    return
  import jax

  from jaxfp8.serving import program_cache

  use_measured_tiles(cache_dir)
  jax.config.update("jax_compilation_cache_dir", os.path.join(cache_dir, "programs"))
  program_cache.verify_jax_cache()
  jax.config.update("jax_enable_compilation_cache", os.environ.get("JAX_PLATFORMS") != "cpu")
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def use_measured_tiles(cache_dir: str) -> None:
  """Lets kernels use the tile sizes that `jaxfp8 validate-gpu` has measured and kept in `cache_dir`."""
  from pallas_kernels import tuned

  folder = pathlib.Path(cache_dir).expanduser().absolute() / "tuned" if cache_dir else None
  tuned.use_folder(folder, read=stored_files.read_own, write=private_files.write_bytes)
