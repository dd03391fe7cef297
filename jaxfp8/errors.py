"""`InputError`, the exception for a caller's mistake, and silence for the libraries that would add pages to its message.

Every message names the part of jaxfp8, the rule, the value that breaks the rule and the remedy, in one or two sentences:
`config: num_heads must be a multiple of num_kv_heads; got 9 and 2. Check the checkpoint's config.json.`
Commands print the message without a traceback and exit with code 1.
"""

import logging
import reprlib
from typing import Any

_MAX_MESSAGE = 2000
_MAX_VALUE = 160  # characters of a value in a message
_values = reprlib.Repr(maxstring=2 * _MAX_VALUE, maxother=2 * _MAX_VALUE, maxlist=50, maxtuple=50, maxdict=50)


class InputError(ValueError):
  """An input (a file, a flag, a shape) breaks a rule; the message names the rule and the remedy."""

  def __init__(self, message: str = ""):
    # A value from a damaged file can be as long as the file.
    if len(message) > _MAX_MESSAGE:
      message = f"{message[: _MAX_MESSAGE // 2]} [...] {message[-_MAX_MESSAGE // 4 :]}"
    super().__init__(message)


def shown(value: Any) -> str:
  """A value in a message, shortened: a file may hold one of megabytes."""
  text = _values.repr(value)
  return text if len(text) <= _MAX_VALUE else f"{text[: _MAX_VALUE - 10]} ..."


def first_line(error: Exception) -> str:
  """The message of a library without the pages that follow."""
  return str(error).split("\n", 1)[0][:300]


def silence_libraries() -> None:
  """Turns off the logs of libraries: Orbax logs pages about a damaged checkpoint, and a program of ours prints one sentence."""
  for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL + 1)
