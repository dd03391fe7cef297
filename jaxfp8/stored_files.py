"""Small files that a later run reads back: each begins with the SHA-256 of its content, which is compared before it is used.

    sha256 0123...cdef      one line
    ...                     the content

What a cache holds can be made again. So a damaged file, and one that another user can have written (private_files.py), counts
as no file, and a folder that cannot be written as no cache; each says so in one sentence on stderr. Refuses to know what is in
a file.
"""

import hashlib
import os
import pathlib

from jaxfp8 import private_files, terminal

_NAME = b"sha256 "
_HEADER = len(_NAME) + 64 + 1  # bytes before the content
_said: set[str] = set()


def write(path: pathlib.Path, content: bytes) -> bool:
  """Replaces `path` by a file with this content; whether that was possible. If not, says so once in a process."""
  try:
    private_files.write_bytes(path, with_digest(content))
  except OSError as error:
    warn_unwritable(path.parent, error)
    return False
  return True


def read(path: pathlib.Path, remedy: str) -> bytes | None:
  """The content, or None if there is no such file, or it is damaged or another user's.

  remedy: the end of the sentence about a damaged file: what is done instead ("the program is compiled again").
  """
  try:
    data = private_files.read_bytes(path)
  except (FileNotFoundError, NotADirectoryError):  # `write` says that the folder is impossible
    return None
  except private_files.NotPrivate as error:
    say(f"{error}, so {path.name} is not used; {remedy}" if str(path) not in str(error) else f"{error}; {remedy}")
    return None
  except OSError as error:
    say(f"cannot read {path}: {os.strerror(error.errno or 0)}; {remedy}")
    return None
  content = without_digest(data)
  if content is None:
    say_damaged(path, data, remedy)
  return content


def read_own(path: pathlib.Path) -> bytes:
  """The content of a file of the cache that has no digest. Says so and raises if it is another user's; raises OSError."""
  try:
    return private_files.read_bytes(path)
  except private_files.NotPrivate as error:
    if str(path) not in _said:
      _said.add(str(path))
      say(f"{error}; the file is not used")
    raise


def with_digest(content: bytes) -> bytes:
  """The bytes of a file with this content."""
  return _NAME + hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def without_digest(data: bytes) -> bytes | None:
  """The content of a file with these bytes; None if they are damaged, or those of an earlier version without a digest."""
  content = data[_HEADER:]
  return content if data == with_digest(content) else None


def say_damaged(path: pathlib.Path, data: bytes, remedy: str) -> None:
  """Says why `without_digest` gave None for the bytes of a file."""
  reason = "is damaged: its SHA-256 is not the stored one" if data.startswith(_NAME) else "is damaged or of an earlier version"
  say(f"{path} {reason}; {remedy}")


def say(sentence: str) -> None:
  """Prints a sentence about the cache on stderr."""
  terminal.say(f"cache: {sentence}.")


def warn_unwritable(folder: pathlib.Path, error: OSError) -> None:
  """Says once in a process that nothing is kept."""
  if not _said:
    _said.add("unwritable")
    reason = os.strerror(error.errno) if error.errno else str(error)
    verb = "use" if isinstance(error, private_files.NotPrivate) else "write"
    say(f"cannot {verb} {folder}: {reason}; this run goes on and keeps nothing for the next one")
