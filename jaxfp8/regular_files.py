"""Opens files that others have made: regular files alone, of a bounded size, and through no link that leads astray.

    open_file(path, within=folder)             a binary file; `within` is the folder of the model that the file is a part of
    read_bytes, read_text(path, max_bytes)     the whole file, whose size is compared before it is read
    require_tree(folder)                       the same rules for all that is in a folder

A pipe would wait for a writer, a device may have no end, and a link could bring a private file into a copy of a model. So what
is no regular file is refused before it is opened. A link in a model's folder may lead into that folder, or into the blobs of
the Hub's cache that the folder is a snapshot of. Without `within`, for a file that a user names, links are followed.
"""

import io
import os
import pathlib
import stat

from jaxfp8.errors import InputError

TEXT_BYTES = 64 << 20  # of config.json, an index, a template, a manifest or a TOML file: many times the largest known
TOKENIZER_BYTES = 64 << 20  # of tokenizer.json: the largest published one has 33 MB
CORPUS_BYTES = 512 << 20  # of a text for calibration or evaluation
_GIVEN_AGAIN = "Fetch the file again, or pass a regular file."


def open_file(path: str | os.PathLike, *, within: pathlib.Path | None = None) -> io.BufferedReader:
  """Opens a regular file to read it.

  Raises InputError for anything else and for a link out of `within`, and OSError for a file that cannot be opened.
  """
  require_regular(path, within=within)
  flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
  file = os.fdopen(os.open(os.path.realpath(path), flags), "rb")
  try:
    _require_regular_mode(path, os.fstat(file.fileno()).st_mode)  # another file may have taken its place
  except BaseException:
    file.close()
    raise
  return file


def read_bytes(path: str | os.PathLike, max_bytes: int, *, within: pathlib.Path | None = None) -> bytes:
  """The content. Raises InputError as `open_file` does, and for more than `max_bytes` bytes; OSError."""
  with open_file(path, within=within) as file:
    size, parts = os.fstat(file.fileno()).st_size, []
    while size <= max_bytes and (part := file.read(1 << 20)):  # a file may grow, and those of /proc have no size
      parts.append(part)
      size = max(size, sum(map(len, parts)))
  if size > max_bytes:
    raise InputError(f"files: {path} has more than {max_bytes:,} bytes, the most that is read of such a file. {_GIVEN_AGAIN}")
  return b"".join(parts)


def read_text(
  path: str | os.PathLike, max_bytes: int = TEXT_BYTES, *, within: pathlib.Path | None = None, encoding: str = "utf-8"
) -> str:
  """The text, with newlines for all line ends. Raises UnicodeDecodeError, and as `read_bytes` does."""
  return io.TextIOWrapper(io.BytesIO(read_bytes(path, max_bytes, within=within)), encoding=encoding).read()


def require_regular(path: str | os.PathLike, *, within: pathlib.Path | None = None) -> os.stat_result:
  """The facts of the file, which is not opened. Raises as `open_file` does."""
  if within is not None:
    require_link(path, within)
  info = os.stat(path)
  _require_regular_mode(path, info.st_mode)
  return info


def require_link(path: str | os.PathLike, *folders: pathlib.Path) -> None:
  """Raises InputError if the path leads out of all these folders, and of the blobs of a Hub cache that holds one of them."""
  real = pathlib.Path(os.path.realpath(path))
  if not any(real.is_relative_to(root) for folder in folders for root in _roots(folder)):
    raise InputError(
      f"files: a link in a model's folder may lead only into the folder or its Hub cache; {path} leads to {real}. Copy the "
      "file into the folder, or pass the folder that holds it."
    )


def require_tree(folder: pathlib.Path) -> None:
  """Raises InputError unless all in the folder are regular files, folders, and links to regular files as above."""
  for root, folders, files in os.walk(folder):
    for name in (*folders, *files):
      path = os.path.join(root, name)
      if not stat.S_ISDIR(os.lstat(path).st_mode):
        require_regular(path, within=folder)


def mode_name(mode: int) -> str:
  """What a file of this mode is, in words."""
  names = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
  )  # fmt: skip
  return next((name for test, name in names if test(mode)), "no regular file")


def _require_regular_mode(path: str | os.PathLike, mode: int) -> None:
  if not stat.S_ISREG(mode):
    raise InputError(f"files: {path} must be a regular file; it is {mode_name(mode)}. {_GIVEN_AGAIN}")


def _roots(folder: pathlib.Path) -> list[pathlib.Path]:
  """The folder, and the blobs of models--ORGANIZATION--NAME if it is, or is in, snapshots/REVISION there."""
  real = pathlib.Path(os.path.realpath(folder))
  snapshots = (part.parent for part in (real, *real.parents) if part.parent.name == "snapshots")
  return [real, *(part.parent / "blobs" for part in snapshots if part.parent.name.startswith("models--"))]
