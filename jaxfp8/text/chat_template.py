"""A model's chat template: messages in, text out. A misbehaving template raises InputError and harms nothing else.

The template runs in a child process (chat_template_child.py), which starts with the first chat and lives as long as the
`ChatTemplate`. The start takes 0.1 to 0.3 s, a chat then less than a millisecond. Refuses to know tokens.
"""

import contextlib
import json
import subprocess
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import IO, Any, cast

from jaxfp8 import child_process
from jaxfp8.errors import InputError

_WAY_OUT = "Pass --raw, or a checkpoint with a working template."


class ChatTemplate:
  """Renders one Jinja template. Thread safe. seconds: the time limit of one render."""

  def __init__(self, template: str, special_tokens: Mapping[str, str], seconds: float = 2.0):
    self._template = template
    self._special_tokens = dict(special_tokens)
    self._seconds = seconds
    self._lock = threading.Lock()
    self._child: subprocess.Popen | None = None

  def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
    """The prompt's text. Raises InputError as `render_all` does."""
    return cast(str, self.render_all([messages], add_generation_prompt)[0])

  def render_all(self, variants: Sequence[Sequence[Mapping[str, Any]]], add_generation_prompt: bool = True) -> list[Any]:
    """The text of each list of messages, at one time and with one seed; None for a list, but the first, that fails.

    Raises InputError if the template raises, is not Jinja or exceeds its time or memory, or if messages are not plain JSON.
    """
    variables = {
      **self._special_tokens,
      "tools": None,
      "documents": None,
      "add_generation_prompt": add_generation_prompt,
    }
    try:
      lists = [[dict(message) for message in messages] for messages in variants]
      request = json.dumps({"template": self._template, "variables": variables, "messages": lists})
    except TypeError as error:
      raise InputError(f"chat: messages must hold text and plain values: {error}. Pass role and content as strings.") from error
    with self._lock:
      answer = self._ask(request)
    if "error" in answer:
      raise InputError(f"chat: the model's chat template failed: {answer['error']}. {_WAY_OUT}")
    return answer["texts"]

  def _ask(self, request: str) -> dict[str, Any]:
    if self._child is None or self._child.poll() is not None:
      self._child = self._start()
    stdin, stdout, _ = _pipes(child := self._child)
    with contextlib.suppress(BrokenPipeError):
      stdin.write(request + "\n")
      stdin.flush()
    line = stdout.readline()
    if not line.endswith("\n"):  # the time limit or a memory fault has ended the child
      child.wait()
      self._child = None
      raise InputError(f"chat: the model's chat template did not end within {self._seconds:g} s and 1 GB. {_WAY_OUT}")
    return json.loads(line)

  def _start(self) -> subprocess.Popen:
    child = child_process.start(
      child_process.Child.CHAT_TEMPLATE,
      str(self._seconds),
      isolated=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      encoding="utf-8",
    )
    weakref.finalize(self, _stop, child)
    _, stdout, stderr = _pipes(child)
    if not stdout.readline():
      reason = child_process.last_line(stderr.read()) or "no reason given"
      raise InputError(f"chat: the process that renders chat templates did not start: {reason}. Pass --raw.")
    stderr.close()
    return child


def _pipes(child: subprocess.Popen) -> tuple[IO[str], IO[str], IO[str]]:
  """stdin, stdout and stderr of a child that was started with pipes."""
  return cast(tuple[IO[str], IO[str], IO[str]], (child.stdin, child.stdout, child.stderr))


def _stop(child: subprocess.Popen) -> None:
  child.kill()
  child.wait()
  for pipe in _pipes(child):
    with contextlib.suppress(OSError):
      pipe.close()
