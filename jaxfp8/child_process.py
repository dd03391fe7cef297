"""The one protocol for child processes. A crash, an endless loop or the memory of a child cannot harm its parent.

    parent: ask(Child.CONVERSION, {"path": ...}) -> Reply(answers, ...)
    child:  serve(function): one JSON object on stdin -> the dicts that `function(request)` yields, one JSON line each

The child's stdout carries answers alone: `serve` sends the output of libraries to stderr. The last line of stderr explains a
failure. Answers that arrived before an abort or the time limit count. An InputError in the child is raised in the parent.
A child hears Ctrl-C whatever its parent ignores. Refuses to know: the content of requests and answers.
"""

import contextlib
import dataclasses
import enum
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxfp8 import search_path
from jaxfp8.errors import InputError
from jaxfp8.terminal import make_visible

_MAX_LAST_LINE = 300  # characters
_INPUT_ERROR = "input_error"  # the key of an answer that is an InputError
INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended


class Child(enum.StrEnum):
  """The modules that run as child processes. A test imports each of them."""

  BENCHMARK = "jaxfp8.commands.benchmark_child"
  CHAT_TEMPLATE = "jaxfp8.text.chat_template_child"
  COMPILED_CASES = "jaxfp8.inspection.deviceless"
  COMPILED_REPORT = "jaxfp8.serving.compiled_report"
  CONVERSION = "jaxfp8.serving.conversion_child"
  GENERATE = "jaxfp8.generate"
  GPU_VALIDATION = "jaxfp8.commands.gpu_validation.stages"
  TOKENIZER = "jaxfp8.text.tokenizer_child"


@dataclasses.dataclass(frozen=True)
class Reply:
  """The answers of a child, as far as it got. exit_code: None for a child that took longer than its time limit."""

  answers: tuple[dict[str, Any], ...]
  exit_code: int | None
  last_line: str = ""

  @property
  def timed_out(self) -> bool:
    return self.exit_code is None

  @property
  def failure(self) -> str:
    """Why the child failed, as the end of a sentence; empty for a child that succeeded."""
    if self.timed_out:
      return "the process took too long and was ended"
    if self.exit_code:
      return f"the process ended with code {self.exit_code}: {self.last_line or 'no message'}"
    return ""


def command_line(child: Child, *arguments: str, isolated: bool = False) -> list[str]:
  """-P: no module comes from the working directory. isolated: runs the file alone, without the package around it."""
  if isolated:
    path = pathlib.Path(__file__).parent.parent.joinpath(*child.value.split(".")).with_suffix(".py")
    return [sys.executable, "-P", str(path), *arguments]
  return [sys.executable, "-P", "-m", child.value, *arguments]


def start(
  child: Child, *arguments: str, isolated: bool = False, variables: Mapping[str, str] | None = None, **options
) -> subprocess.Popen:
  """Starts a child that is more than one request.

  variables: changes of the environment. options: those of subprocess.Popen.
  """
  environment = search_path.child_variables({**os.environ, **(variables or {})})
  return subprocess.Popen(command_line(child, *arguments, isolated=isolated), env=environment, **options)


def ask(
  child: Child,
  request: Mapping[str, Any],
  *,
  variables: Mapping[str, str] | None = None,
  timeout_s: float | None = None,
  show_errors: bool = False,
) -> Reply:
  """Runs a child on one request until it ends or `timeout_s` seconds have passed.

  variables: changes of the environment. show_errors: the child writes to this process's stderr, and last_line is empty.
  Raises the child's InputError.
  """
  process = start(
    child,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=None if show_errors else subprocess.PIPE,
    variables=variables,
  )
  line = json.dumps(request).encode() + b"\n"
  with process:
    try:
      out, err = process.communicate(line, timeout=timeout_s)
      exit_code: int | None = process.returncode
    except subprocess.TimeoutExpired:
      process.kill()
      out, err = process.communicate()
      exit_code = None
    except BaseException:
      process.kill()
      raise
  answers = _read_answers(out)
  for answer in answers:
    if _INPUT_ERROR in answer:
      raise InputError(answer[_INPUT_ERROR])
  return Reply(tuple(answers), exit_code, last_line((err or b"").decode(errors="replace")))


def _read_answers(out: bytes) -> list[dict[str, Any]]:
  """The complete lines; a child that was killed may leave half a line."""
  return [json.loads(line) for line in out.split(b"\n")[:-1] if line]


def last_line(text: str) -> str:
  """The last line with text in it, at most its last 300 characters; empty for an empty text."""
  lines = text.strip().splitlines()
  return lines[-1].strip()[-_MAX_LAST_LINE:] if lines else ""


def serve(function: Callable[[dict[str, Any]], Iterable[dict[str, Any]]]) -> None:
  """The child's side: reads one request, writes the answers of `function` as they come, and exits after an interruption.

  An InputError of `function` becomes the parent's. Any other exception ends the child with a traceback on stderr.
  """
  signal.signal(signal.SIGINT, signal.default_int_handler)
  answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)  # output of libraries goes to stderr
  sys.stderr = make_visible(sys.stderr)

  def write(answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()

  request = json.loads(sys.stdin.readline())
  try:
    for answer in function(request):
      write(answer)
  except InputError as error:
    write({_INPUT_ERROR: str(error)})
  except (KeyboardInterrupt, BrokenPipeError):  # the parent ends too, or has ended
    with contextlib.suppress(OSError):
      answers.close()
    sys.exit(INTERRUPTED)
