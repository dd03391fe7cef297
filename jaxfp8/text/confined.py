"""A child process that runs what came with downloaded weights, under limits, and answers one request after the other.

    child = Confined(Child.TOKENIZER, "tokenizer")
    child.ask({"text": ..., **limits}) -> {"ids": ...}; Ended if a limit, a crash or Ctrl-C ended the child

It starts with the first request and lives as long as this object. After it was ended the next request starts a new one.
Refuses to know the content of requests and answers.
"""

import contextlib
import json
import subprocess
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

from jaxfp8 import child_process
from jaxfp8.errors import InputError


class Ended(Exception):
  """The child ended before it answered."""


class Confined:
  """Thread safe. name: of the part of jaxfp8, in messages. first: the request that each new child gets before all others."""

  def __init__(
    self, child: child_process.Child, name: str, *arguments: str, first: Callable[[], Mapping[str, Any]] | None = None
  ):
    self._child, self._name, self._arguments, self._first = child, name, arguments, first
    self._lock = threading.Lock()
    self.process: subprocess.Popen | None = None

  def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
    """The child's answer. Raises Ended, TypeError for a request that is not plain JSON, and InputError if none starts."""
    line = json.dumps(request)
    with self._lock:
      if self.process is None or self.process.poll() is not None:
        self.process = self._start()
        if self._first and "error" in (answer := self._ask(json.dumps(self._first()))):
          return answer
      return self._ask(line)

  def _ask(self, line: str) -> dict[str, Any]:
    stdin, stdout, _ = _pipes(process := cast(subprocess.Popen, self.process))
    answer = ""
    try:
      with contextlib.suppress(BrokenPipeError):
        stdin.write(line + "\n")
        stdin.flush()
      answer = stdout.readline()
    finally:
      if not answer.endswith("\n"):  # ended by a limit; or Ctrl-C came here, and its answer would be taken for the next one
        _stop(process)
        self.process = None
    if not answer.endswith("\n"):
      raise Ended
    return json.loads(answer)

  def _start(self) -> subprocess.Popen:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = child_process.start(self._child, *self._arguments, isolated=True, encoding="utf-8", **pipes)
    weakref.finalize(self, _stop, process)
    _, stdout, stderr = _pipes(process)
    if not stdout.readline():
      reason = child_process.last_line(stderr.read()) or "no reason given"
      raise InputError(f"{self._name}: the process that confines it did not start: {reason}. Install jaxfp8 again.")
    stderr.close()
    return process


def _pipes(process: subprocess.Popen) -> tuple[IO[str], IO[str], IO[str]]:
  """stdin, stdout and stderr of a process that was started with pipes."""
  return cast(tuple[IO[str], IO[str], IO[str]], (process.stdin, process.stdout, process.stderr))


def _stop(process: subprocess.Popen) -> None:
  process.kill()
  process.wait()
  for pipe in _pipes(process):
    with contextlib.suppress(OSError):
      pipe.close()
