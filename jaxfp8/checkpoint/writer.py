"""Writes the folder of a checkpoint: whole or not at all. On request it continues the work of a process that was killed.

    FOLDER.writing-1a2b3c4d.partial_save/   Orbax's groups; each is a folder that is renamed when it is complete
    FOLDER.writing-1a2b3c4d.journal         an identity of the work, then one line per group: its folder, its arrays' checksums
    FOLDER                                  appears by a rename when everything is on the disk

A writer holds a lock on its journal as long as it lives, so a journal without a lock belongs to a dead writer.
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
from typing import Any, TextIO

import numpy as np

from jaxfp8 import unfinished
from jaxfp8.checkpoint.manifest import MANIFEST, TEMPLATE, TOKENIZER, WRITING, Manifest, orbax, orbax_context
from jaxfp8.errors import InputError

_PATIENCE = 10.0  # seconds that `abandon` waits for the current write
_FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large|Input/output error|Read-only file system")


class CheckpointWriter:
  """Writes a checkpoint group by group; use as a context manager.

  Leaving normally makes `folder` appear whole; leaving by an exception removes what was written, unless `resume`.
  Raises InputError if `folder` exists already or the disk refuses.

  Args:
    work: a digest of what is written; only the leftover of equal work is continued. None: the work cannot be resumed.
    resume: continue a leftover of this work, if there is one, and keep the written part if this writer fails.
    late: gives more provenance; called when everything else is written.
    check: called with the path of the whole checkpoint under its temporary name; its result is added to the provenance. If it
      raises, no folder appears.
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
    self.folder, self.manifest, self.work, self.resume = pathlib.Path(folder).absolute(), manifest, work, resume
    # No leading dot: Orbax 0.12.8 would then silently finalize nothing. Random, since process ids repeat in containers.
    self._name_temporary(_temporary_name(self.folder))
    self._late, self._check = late, check
    self.done: dict[str, str] = {}  # sha256 of every array that is on the disk
    self._busy = threading.Lock()  # held while files are written
    self._journal: TextIO | None = None

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
    """Writes arrays, under keys that have not been written yet."""
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
      sys.unraisablehook = hook  # not after a failure: writes of other arrays may go on for a while
    except Exception as error:  # Orbax reports a full disk, as tensorstore does, by a ValueError
      raise self._disk_error(error) from error

  def abandon(self) -> None:
    """For another thread: waits for the current write, lets no further write begin, and removes every file."""
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
    provenance = {**self.manifest.provenance, **(self._late() if self._late else {})}
    manifest = dataclasses.replace(self.manifest, provenance=provenance, files=files, checksums=sums)
    self._write_manifest(manifest)
    if self._check:
      provenance = {**provenance, **self._check(self._temporary)}
      self._write_manifest(dataclasses.replace(manifest, provenance=provenance))
    sync_tree(self._temporary)
    os.rename(self._temporary, self.folder)
    _sync(self.folder.parent)

  def _write_manifest(self, manifest: Manifest) -> None:
    (self._temporary / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")

  # --- resuming ---

  def _groups(self) -> list[str]:
    """The folders of Orbax's complete groups."""
    if not self._partial.exists():
      return []
    return sorted(path.name for path in self._partial.iterdir() if ".pending_" in path.name and "-tmp" not in path.name)

  def _take_over(self) -> None:
    """Removes the leftovers of dead writers of this folder, or adopts one; then holds the lock on a journal."""
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

  def _adopt(self, name: str, journal: TextIO) -> bool:
    """Whether a leftover is of this work and whole by its journal. Removes files from it that the journal does not list."""
    lines = []
    for line in journal.read().splitlines():
      try:
        lines.append(json.loads(line))
      except ValueError:  # the last line, which a kill cut short
        break
    if not lines or lines[0] != {"work": self.work}:
      return False
    own_name, groups = self._temporary.name, {line["group"] for line in lines[1:]}
    self._name_temporary(name)
    if not self._temporary.exists() and not groups <= set(self._groups()):
      self._name_temporary(own_name)
      return False
    if not self._temporary.exists():
      for path in list(self._partial.iterdir()) if self._partial.exists() else []:
        if path.name not in groups:
          shutil.rmtree(path, ignore_errors=True)
    for path in self.folder.parent.glob(f"{_glob_escape(name)}*-tmp*"):
      shutil.rmtree(path, ignore_errors=True)
    self.done = {key: value for line in lines[1:] for key, value in line["sums"].items()}
    return True

  def _note(self, entry: dict[str, Any]) -> None:
    assert self._journal is not None
    self._journal.write(json.dumps(entry) + "\n")
    self._journal.flush()
    os.fsync(self._journal.fileno())

  def _exists(self) -> InputError:
    return InputError(f"checkpoint: {self.folder} exists already. Pass another folder, or remove it first.")

  def _disk_error(self, error: Exception) -> Exception:
    """The error in one sentence if the disk refused; else the error itself."""
    if isinstance(error, OSError) and error.errno:
      reason = os.strerror(error.errno)
    elif full := _FULL.search(str(error)):
      reason = full[0]
    elif isinstance(error, OSError):
      reason = str(error).split("\n", 1)[0][:200]
    else:
      return error
    left = "The written part stays for --resume" if self.resume and self._journal else "Nothing was left behind"
    return InputError(f"checkpoint: cannot write {self.folder}: {reason}. {left}; pass another folder or free space.")

  def _clean(self) -> None:
    _remove(self.folder.parent, self._temporary.name)


def _without_stragglers(hook: Callable[[Any], object], unraisable: Any) -> None:
  """Silences arrays whose write ends after Orbax has closed its event loop, as it does at the first array that fails.

  Each of them would print a traceback.
  """
  if str(unraisable.exc_value) != "Event loop is closed":
    hook(unraisable)


def _remove(parent: pathlib.Path, name: str) -> None:
  """Removes every file whose name begins with `name`. Repeats, since an interrupted Orbax may create its folders again."""
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
  """Waits until a folder and all files in it are on the disk."""
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
