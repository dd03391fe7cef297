"""The standard streams of a command, whatever the shell or the container has made of them.

    closed stdout, full stdout     InputError: the answer has no place to go
    closed stdin                   `read_stdin` raises InputError; commands that read nothing run
    closed stderr, full stderr     what would be said there is lost, and the command goes on
    stdout in another encoding     ? stands for a character that the encoding lacks, and stderr says so once
    a locale without UTF-8         the program starts again in Python's UTF-8 mode
    control characters             shown and not obeyed on stderr, and on stdout where that is a terminal (jaxfp8/terminal.py)

Knows no flags, and loads no jax.
"""

import codecs
import contextlib
import io
import os
import sys
from typing import Any

from jaxfp8.errors import InputError
from jaxfp8.terminal import make_visible, say

_REPLACE = "jaxfp8_replace"  # the name of the error handler of stdout
_said: set[str] = set()


class _Answers(io.FileIO):
  """Descriptor 1. A reader that has gone away stays a BrokenPipeError."""

  def write(self, data) -> int:
    try:
      return super().write(data) or 0
    except BrokenPipeError:
      raise
    except OSError as error:
      raise InputError(
        f"stdout: the answer cannot be written: {os.strerror(error.errno or 0)}. Write it to a file with room, or to a pipe."
      ) from error


class _Remarks(io.FileIO):
  """Descriptor 2. What cannot be written is lost: no answer depends on it."""

  def write(self, data) -> int:
    with contextlib.suppress(OSError):
      return super().write(data) or 0
    return len(data)


def prepare() -> None:
  """Makes the three streams usable; a second call changes nothing. Raises InputError if stdout is closed."""
  reserve_descriptors()
  if os.environ.get("COLUMNS", "1").strip("0") == "":
    del os.environ["COLUMNS"]  # tables of no width show nothing
  if isinstance(sys.stdin, io.TextIOWrapper):
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
  if sys.stderr is None:
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - it stays open as long as the process lives
  elif _is_plain(sys.stderr):
    sys.stderr = make_visible(_reopened(sys.stderr, _Remarks(2, "w", closefd=False), "backslashreplace"))
  if sys.stdout is None:
    raise InputError("stdout: it is closed, so the answer has no place to go. Open it, or write >/dev/null to drop the answer.")
  codecs.register_error(_REPLACE, _replace)
  if _is_plain(sys.stdout):
    answers = _reopened(sys.stdout, _Answers(1, "w", closefd=False), _REPLACE)
    sys.stdout = make_visible(answers) if answers.isatty() else answers
  elif isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors=_REPLACE)


def reserve_descriptors() -> None:
  """Opens /dev/null at the closed ones of descriptors 0, 1 and 2: else the next file would get that number, and the output
  of a library would be written into it."""
  for descriptor in range(3):
    try:
      os.fstat(descriptor)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one


def _is_plain(stream: Any) -> bool:
  """Whether this is the stream that Python opened at the start; a test or a notebook has others."""
  return type(stream) is io.TextIOWrapper and type(getattr(stream.buffer, "raw", stream.buffer)) is io.FileIO


def _reopened(stream: Any, raw: io.FileIO, errors: str) -> io.TextIOWrapper:
  stream.flush()
  return io.TextIOWrapper(
    io.BufferedWriter(raw),
    encoding=stream.encoding,
    errors=errors,
    line_buffering=stream.line_buffering or stream.write_through,  # the latter with PYTHONUNBUFFERED
    write_through=stream.write_through,
  )


def _replace(error: UnicodeError) -> tuple[str, int]:
  if not isinstance(error, UnicodeEncodeError):
    raise error
  if error.encoding not in _said:
    _said.add(error.encoding)
    say(f"stdout: its encoding {error.encoding} lacks characters of this text; ? stands for them. Set PYTHONIOENCODING=utf-8.")
  return "?" * (error.end - error.start), error.end


def finish_stdout() -> None:
  """Writes what stdout still holds, or drops it where that fails; Python would try again at the end, and complain."""
  try:
    if sys.stdout is not None:
      sys.stdout.flush()
  except (OSError, InputError):
    with contextlib.suppress(OSError):
      os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def require_stdin(command: str) -> None:
  """Raises InputError if stdin is closed."""
  if sys.stdin is None:
    raise InputError(f"{command}: stdin is closed, so there is nothing to read. Open it, or pass a file.")


def start_again_in_utf8() -> None:
  """In a locale whose encoding is ASCII, replaces this program by itself in Python's UTF-8 mode.

  There Python reads arguments, paths and streams as ASCII, and the libraries below cannot take what it makes of other bytes.
  """
  if sys.flags.utf8_mode or codecs.lookup(sys.getfilesystemencoding()).name != "ascii" or not sys.orig_argv[1:]:
    return
  with contextlib.suppress(OSError):
    os.environ["PYTHONUTF8"] = "1"  # for child processes
    os.execv(sys.executable, [sys.orig_argv[0], *sys.orig_argv[1:]])
