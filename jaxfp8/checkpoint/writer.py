"""Writing a checkpoint's folder: whole or not at all, and, where it is asked for, going on with what a killed process left.

    FOLDER.writing-1a2b3c4d.partial_save/   Orbax's groups, each one a folder that is renamed when it is complete
    FOLDER.writing-1a2b3c4d.journal         what work this is, then one line a group: its folder, its arrays' checksums
    FOLDER                                  appears by a rename when everything is on the disk

The writer holds a lock on its journal while it lives, so a leftover without one is known to be dead.
"""

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxfp8.checkpoint import unfinished
from jaxfp8.checkpoint.manifest import MANIFEST, TEMPLATE, TOKENIZER, WRITING, Manifest, orbax, orbax_context
from jaxfp8.errors import InputError

_PATIENCE = 10.0  # seconds that `abandon_unfinished` waits for a write under way
_FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large|Input/output error|Read-only file system")


class CheckpointWriter:
  """Writes a checkpoint group by group; use as a context manager.

  Leaving normally makes `folder` appear whole; leaving by an exception removes what was written, unless `resume`.
  Raises InputError if `folder` exists already or the disk refuses.

  Args:
    work: what is being written; only a leftover of equal work is gone on with. None: it cannot be resumed.
    resume: go on with a leftover of this work, if there is one, and keep what is written if this writer fails.
    late: more provenance, asked for when everything else is written.
    check: given the whole checkpoint under its temporary name, adds to its provenance; if it raises, no folder appears.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    manifest: Manifest,
    *,
    work: str | None = None,
    resume: bool = False,
    late: Callable[[], Mapping[str, Any]] | None = None,
    check: Callable[[pathlib.Path], Mapping[str, Any]] | None = None,
  ):
    self.folder, self.manifest, self.work, self.resume = pathlib.Path(folder), manifest, work, resume
    # No leading dot: Orbax 0.12.8 would then silently finalize nothing. Random: process ids repeat in containers.
    self._name_temporary(_temporary_name(self.folder))
    self._late, self._check = late, check
    self.done: dict[str, str] = {}  # sha256 of every array that is on the disk
    self._busy = threading.Lock()  # held while files are written
    self._journal = None

  def _name_temporary(self, name: str) -> None:
    self._temporary = self.folder.with_name(name)
    self._partial = self.folder.with_name(name + ".partial_save")

  def __enter__(self) -> "CheckpointWriter":
    if self.folder.exists():
      raise self._exists()
    try:
      unfinished.register(self, self.abandon)  # before the first file: nobody calls `__exit__` if this method is interrupted
      with self._busy:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if self.work is not None:
          self._take_over()
      return self
    except BaseException as error:
      self._leave(keep=self.resume)
      if isinstance(error, OSError):
        raise self._disk_error(error) from error
      raise

  def write(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Adds arrays under keys that are not there yet."""
    ocp = orbax()
    sums = {key: checksum(array) for key, array in arrays.items()}
    hook = sys.unraisablehook
    sys.unraisablehook = functools.partial(_without_stragglers, hook)
    try:
      with self._busy:
        before = set(self._groups())
        with orbax_context(ocp):
          ocp.partial.save(self._temporary, dict(arrays))
        if self._journal:
          (group,) = set(self._groups()) - before
          sync_tree(self._partial / group)
          _sync(self._partial)
          self._note({"group": group, "sums": sums})
        self.done |= sums
      sys.unraisablehook = hook  # not where it failed: arrays may be under way for a while
    except Exception as error:  # Orbax passes on what tensorstore says of a full disk as a ValueError
      raise self._disk_error(error) from error

  def abandon(self) -> None:
    """From another thread: waits for the write under way, lets no further write begin, and removes everything."""
    self._busy.acquire(timeout=_PATIENCE)  # never released
    if not self.resume:
      self._clean()

  def __exit__(self, kind, error, traceback) -> None:
    keep = self.resume
    try:
      if kind is None:
        with self._busy:
          self._finish()
        keep = False
    except OSError as failure:
      raise (self._exists() if self.folder.exists() else self._disk_error(failure)) from failure
    finally:
      self._leave(keep)

  def _leave(self, keep: bool) -> None:
    """Gives the journal's lock back, and removes what was written unless `keep`."""
    if not keep:
      self._clean()
    if self._journal:
      self._journal.close()
    unfinished.discard(self)

  def _finish(self) -> None:
    if not self._temporary.exists():
      ocp = orbax()
      with orbax_context(ocp):
        ocp.partial.finalize(self._temporary)
    texts = {}
    if self.manifest.tokenizer:
      texts[TOKENIZER] = self.manifest.tokenizer.tokenizer_json
      if self.manifest.tokenizer.chat_template is not None:
        texts[TEMPLATE] = self.manifest.tokenizer.chat_template
    for name, text in texts.items():
      (self._temporary / name).write_text(text, encoding="utf-8")
    (self._temporary / MANIFEST).unlink(missing_ok=True)
    paths = sorted(path for path in self._temporary.rglob("*") if path.is_file())
    files = {str(path.relative_to(self._temporary)): path.stat().st_size for path in paths}
    sums = self.done | {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    about = {**self.manifest.provenance, **(self._late() if self._late else {})}
    self._write_manifest(about, files, sums)
    if self._check:
      self._write_manifest({**about, **self._check(self._temporary)}, files, sums)
    sync_tree(self._temporary)
    os.rename(self._temporary, self.folder)
    _sync(self.folder.parent)

  def _write_manifest(self, provenance: Mapping[str, Any], files: Mapping[str, int], sums: Mapping[str, str]) -> None:
    manifest = dataclasses.replace(self.manifest, provenance=provenance)
    (self._temporary / MANIFEST).write_text(manifest.to_json(files, sums), encoding="utf-8")

  # --- resuming ---

  def _groups(self) -> list[str]:
    """Orbax's complete groups."""
    if not self._partial.exists():
      return []
    return sorted(path.name for path in self._partial.iterdir() if ".pending_" in path.name and "-tmp" not in path.name)

  def _take_over(self) -> None:
    """Removes what dead writers of this folder left, or goes on with it; then holds the journal."""
    for path in sorted(self.folder.parent.glob(f"{_glob_escape(self.folder.name)}{WRITING}*.journal")):
      journal = open(path, "r+", encoding="utf-8")  # noqa: SIM115 - held while the writer lives
      try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError:  # its writer lives
        journal.close()
        continue
      name = path.name.removesuffix(".journal")
      if self.resume and self._journal is None and self._adopt(name, journal):
        self._journal = journal
        continue
      _remove(self.folder.parent, name)
      journal.close()
    while self._journal is None:
      path = self.folder.with_name(self._temporary.name + ".journal")
      journal = open(path, "x", encoding="utf-8")  # noqa: SIM115
      fcntl.flock(journal, fcntl.LOCK_EX)
      if os.fstat(journal.fileno()).st_nlink:
        self._journal = journal
        self._note({"work": self.work})
      else:  # before it was locked, another writer took it for a dead one's and removed it
        journal.close()
        self._name_temporary(_temporary_name(self.folder))

  def _adopt(self, name: str, journal) -> bool:
    """Whether a leftover is of this work and as its journal says; what the journal does not know is removed from it."""
    lines = []
    for line in journal.read().splitlines():
      try:
        lines.append(json.loads(line))
      except ValueError:  # the last one, cut short
        break
    if not lines or lines[0] != {"work": self.work}:
      return False
    mine, groups = self._temporary.name, {line["group"] for line in lines[1:]}
    self._name_temporary(name)
    if not self._temporary.exists() and not groups <= set(self._groups()):
      self._name_temporary(mine)
      return False
    if not self._temporary.exists():
      for path in list(self._partial.iterdir()) if self._partial.exists() else []:
        if path.name not in groups:
          shutil.rmtree(path, ignore_errors=True)
    for path in self.folder.parent.glob(f"{_glob_escape(name)}*-tmp*"):
      shutil.rmtree(path, ignore_errors=True)
    self.done = {key: value for line in lines[1:] for key, value in line["sums"].items()}
    return True

  def _note(self, entry: dict) -> None:
    self._journal.write(json.dumps(entry) + "\n")
    self._journal.flush()
    os.fsync(self._journal.fileno())

  def _exists(self) -> InputError:
    return InputError(f"checkpoint: {self.folder} exists already. Pass another folder, or remove it first.")

  def _disk_error(self, error: Exception) -> Exception:
    """The error in one sentence if the disk refused; else the error itself."""
    if isinstance(error, OSError) and error.errno:
      reason = os.strerror(error.errno)
    elif found := _FULL.search(str(error)):
      reason = found[0]
    elif isinstance(error, OSError):
      reason = str(error).split("\n", 1)[0][:200]
    else:
      return error
    left = "What is written stays for --resume" if self.resume and self._journal else "Nothing was left behind"
    return InputError(f"checkpoint: cannot write {self.folder}: {reason}. {left}; pass another folder or free space.")

  def _clean(self) -> None:
    _remove(self.folder.parent, self._temporary.name)


def _without_stragglers(hook, unraisable) -> None:
  """For a write that may fail: Orbax closes its loop at the first array that does, and what tensorstore still has under way
  would be printed, array by array, when it reports there."""
  if str(unraisable.exc_value) != "Event loop is closed":
    hook(unraisable)


def _remove(parent: pathlib.Path, name: str) -> None:
  """Repeats: what Orbax still has under way when it is interrupted makes its folders again."""
  for _ in range(20):
    left = [path for path in parent.iterdir() if path.name.startswith(name)] if parent.is_dir() else []
    if not left:
      return
    for path in left:
      if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
      else:
        path.unlink(missing_ok=True)
    time.sleep(0.05)


def _temporary_name(folder: pathlib.Path) -> str:
  return f"{folder.name}{WRITING}{secrets.token_hex(4)}"


def checksum(array: np.ndarray) -> str:
  """sha256 of an array's bytes in row-major order."""
  return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


def _glob_escape(name: str) -> str:
  return re.sub(r"([*?[])", r"[\1]", name)


def sync_tree(folder: pathlib.Path) -> None:
  for root, _, names in os.walk(folder):
    for name in names:
      _sync(pathlib.Path(root) / name)
    _sync(pathlib.Path(root))


def _sync(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
