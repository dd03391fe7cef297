"""The journal of a checkpoint that is being written: what of it is on the disk, for a writer that continues the work.

    {"work": ..., "version": 2}                          a digest of what is written
    {"group": ..., "sums": {...}, "blocks": {...}}       a group of arrays is on the disk, with these digests
    {"whole": true}                                      the folder is complete, and gets its name next

Every line ends in the SHA-256 of itself, and the first wrong line ends the journal. A writer holds a lock on its journal as
long as it lives, so a journal without a lock belongs to a dead writer. Refuses to know the folder.
"""

import fcntl
import json
import os
import pathlib
from typing import Any, BinaryIO

from jaxfp8 import private_files
from jaxfp8.checkpoint.manifest import digest_of
from jaxfp8.checkpoint.manifest_fields import BLOCKS, SUMS
from jaxfp8.regular_files import TEXT_BYTES

SUFFIX = ".journal"
_VERSION = 2


class Journal:
  """A journal whose lock this process holds.

  work: the digest in its first line; None for a journal that another version wrote, or a kill cut short.
  groups: the lines of groups, by the names of their folders. whole: whether the folder was complete.
  """

  def __init__(self, path: pathlib.Path, file: BinaryIO):
    self.path, self._file = path, file
    entries, self._end = _whole_lines(file.read(TEXT_BYTES))
    first, *lines = entries or [{}]
    self.work: str | None = first.get("work") if first.get("version") == _VERSION else None
    self.groups: dict[str, dict[str, Any]] = {line["group"]: line for line in lines if "group" in line}
    self.whole = any("whole" in line for line in lines)

  @classmethod
  def create(cls, path: pathlib.Path, work: str) -> "Journal | None":
    """None if, before it was locked, another writer took the new file for a dead writer's and removed it."""
    # Held while the writer lives. `take` refuses a file that others could have written.
    file = open(path, "x+b", opener=lambda name, flags: os.open(name, flags, private_files.FILE_MODE))  # noqa: SIM115
    fcntl.flock(file, fcntl.LOCK_EX)
    if not os.fstat(file.fileno()).st_nlink:
      file.close()
      return None
    journal = cls(path, file)
    journal.work = work
    journal._note({"work": work, "version": _VERSION})
    return journal

  @classmethod
  def take(cls, path: pathlib.Path) -> "Journal | None":
    """The journal of a dead writer of this user; None if its writer lives, or has removed it."""
    try:
      file = private_files.open_own(path)
    except OSError:  # it is gone, or another user's, or no file
      return None
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      file.close()
      return None
    return cls(path, file)

  def note_group(self, group: str, sums: dict[str, str], blocks: dict[str, Any]) -> None:
    """Waits until the disk has the line."""
    self._note({"group": group, "sums": sums, "blocks": blocks})

  def note_whole(self) -> None:
    self._note({"whole": True})

  def close(self) -> None:
    """Gives the lock back."""
    self._file.close()

  def _note(self, entry: dict[str, Any]) -> None:
    self._file.seek(self._end)
    self._file.truncate()  # a line that is not whole
    self._file.write(json.dumps(entry | {"sha256": digest_of(entry)}).encode() + b"\n")
    self._file.flush()
    os.fsync(self._file.fileno())
    self._end = self._file.tell()


def _is_entry(entry: dict[str, Any]) -> bool:
  """Whether the fields of a line have the types that a writer gives them, and a group the name of a folder."""
  match entry:
    case {"group": str(name), "sums": sums, "blocks": blocks}:
      return pathlib.PurePath(name).name == name and SUMS.holds(sums) and BLOCKS.holds(blocks)
    case {"group": _}:
      return False
  return isinstance(entry.get("work", ""), str)


def _whole_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
  """The lines up to the first that is damaged, or that a kill cut short; and their bytes."""
  entries, size = [], 0
  for line in content.splitlines(keepends=True):
    try:
      entry = json.loads(line)
      if not line.endswith(b"\n") or entry["sha256"] != digest_of(entry) or not _is_entry(entry):
        break
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
      break
    entries.append(entry)
    size += len(line)
  return entries, size
