r"""Text of strangers on a terminal: control characters are shown, and never act.

    visible(text)          the text with \x1b for an escape character
    say, show, show_json   a message on stderr, a result on stdout
    VisibleStream          a stream on which everything that is written becomes visible

Tokens, templates, names of tensors and files, metadata and the messages of libraries come from strangers, and a terminal obeys
what it is sent: a title, the clipboard, the place of the cursor. Messages and tables are visible everywhere. Answers are where
stdout is a terminal; a pipe or a file gets their bytes as they are. The project's own colors and bars are written past
`VisibleStream` (console.py, which makes their content visible first). Knows no rich.
"""

import json
import sys
from typing import Any, TextIO, cast

# C0 and C1 but newline and tab, what turns the direction of text around, and halves of characters, which no encoding has.
_HIDDEN = (*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_HIDDEN = (*_HIDDEN, *range(0xD800, 0xE000))
_SHOWN = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _HIDDEN}


def visible(text: str) -> str:
  r"""The text with control characters (C0, DEL and C1, but not newline and tab), bidirectional overrides and isolates
  (U+202A to U+202E, U+2066 to U+2069) and lone surrogates written as \x1b or \u202e."""
  return text if text.isascii() and text.isprintable() else text.translate(_SHOWN)


def one_line(error: Exception) -> str:
  """The message of an error in one line, however many it had."""
  return " ".join(str(error).split())


def say(sentence: str) -> None:
  """Prints a sentence on stderr, visible."""
  print(visible(sentence), file=sys.stderr)


def show(text: str) -> None:
  """Prints a result on stdout, visible."""
  print(visible(text))


def show_json(value: Any) -> None:
  """Prints a JSON value on stdout, in ASCII; DEL is the one control character that `json` would leave."""
  print(json.dumps(value).replace("\x7f", "\\u007f"))


class VisibleStream:
  """A text stream on which everything that is written becomes visible. All else is the inner stream's.

  Every piece stands for itself: there is no state that a piece could leave to the next one.
  """

  def __init__(self, inner: TextIO):
    self.inner = inner

  def write(self, text: str) -> int:
    self.inner.write(visible(text))
    return len(text)

  def writelines(self, lines: Any) -> None:
    for line in lines:
      self.write(line)

  def __getattr__(self, name: str) -> Any:
    return getattr(self.inner, name)


def make_visible(stream: TextIO) -> TextIO:
  return stream if isinstance(stream, VisibleStream) else cast(TextIO, VisibleStream(stream))


def without_filter(stream: TextIO) -> TextIO:
  """The stream below a `VisibleStream`, for a writer whose content is visible already."""
  return stream.inner if isinstance(stream, VisibleStream) else stream
