"""The text of --prompt_file: UTF-8, from a file, a pipe or stdin, which are all read alike."""

import codecs
import os
import sys

from jaxfp8.commands import streams
from jaxfp8.errors import InputError

_MAX_BYTES = 64 << 20  # no context holds so much text
# A mark at the start of text in another encoding. UTF-32's starts with UTF-16's, so it stands before it.
_OTHER_MARKS = (
  (codecs.BOM_UTF32_LE, "UTF-32"),
  (codecs.BOM_UTF32_BE, "UTF-32"),
  (codecs.BOM_UTF16_LE, "UTF-16"),
  (codecs.BOM_UTF16_BE, "UTF-16"),
)


def read(name: str) -> str:
  """The text of the file, or of stdin for "-". A byte order mark is dropped, and line ends of Windows become newlines.

  Raises InputError for a file that cannot be read, and for text that is not UTF-8, holds NUL or has more than 64 MB.
  """
  if name == "-":
    streams.require_stdin("generate")
  try:
    if name == "-":
      content = sys.stdin.buffer.read(_MAX_BYTES + 1)
    else:
      with open(name, "rb") as file:
        content = file.read(_MAX_BYTES + 1)
  except (OSError, ValueError) as error:  # ValueError: a NUL in the name
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    raise _refusal(name, reason, "Pass a text file.") from error
  if len(content) > _MAX_BYTES:
    raise _refusal(name, f"it has more than {_MAX_BYTES >> 20} MB", "Pass a shorter text.")
  for mark, encoding in _OTHER_MARKS:
    if content.startswith(mark):
      raise _refusal(name, f"it is {encoding}", f"Convert it: iconv -f {encoding} -t UTF-8.")
  try:
    text = content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise _refusal(name, "it is not UTF-8 text", "A prompt must be UTF-8 text: convert it, for example with iconv.") from error
  if "\0" in text:
    raise _refusal(name, "it holds NUL bytes, so it is no UTF-8 text", "Convert it to UTF-8, or pass a text file.")
  return text.replace("\r\n", "\n").replace("\r", "\n")


def _refusal(name: str, reason: str, way_out: str) -> InputError:
  return InputError(f"generate: cannot read --prompt_file={name}: {reason}. {way_out}")
