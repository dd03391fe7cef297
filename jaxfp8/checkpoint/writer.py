"""Writes the folder of a checkpoint: whole or not at all. On request it continues the work of a process that was killed.

    FOLDER.writing-1a2b3c4d.partial_save/   Orbax's groups; each is a folder that is renamed when it is complete
    FOLDER.writing-1a2b3c4d.journal         the groups that are on the disk, with the digests of their arrays (journal.py)
    FOLDER.writing-1a2b3c4d.merged...       Orbax merges the groups here, out of hard links to their data
    FOLDER.writing-1a2b3c4d/                what is merged; the texts and the manifest are added
    FOLDER                                  appears by a rename when everything is on the disk

At every moment one of these holds all that the journal lists, so a kill at any moment loses at most the last group.
"""

import dataclasses
import functools
import os
import pathlib
import re
import secrets
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxfp8 import unfinished
from jaxfp8.checkpoint.block_digests import blocks_of, sha256_of
from jaxfp8.checkpoint.folders import glob_escape, link_tree, remove
from jaxfp8.checkpoint.journal import SUFFIX, Journal
from jaxfp8.checkpoint.manifest import (
  MANIFEST,
  TEMPLATE,
  TOKENIZER,
  WRITING,
  Manifest,
  file_digests,
  orbax,
  orbax_context,
)
from jaxfp8.errors import InputError, first_line
from jaxfp8.terminal import say

_PARTIAL = ".partial_save"  # Orbax's own ending
_MERGED = ".merged"
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
    self._blocks: dict[str, Any] = {}  # and the digests of its blocks
    self._is_whole = False  # the folder has its name already, by a process that was killed right after
    self._busy = threading.Lock()  # held while files are written
    self._journal: Journal | None = None

  def _name_temporary(self, name: str) -> None:
    self._temporary = self.folder.with_name(name)
    self._partial = self.folder.with_name(name + _PARTIAL)

  def __enter__(self) -> "CheckpointWriter":
    if self.folder.exists() and not (self.resume and self._find_whole()):
      raise self._exists()
    try:
      unfinished.register(self, self.abandon)  # before the first file: nobody calls `__exit__` if this method is interrupted
      with self._busy:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if self.work is not None and not self._is_whole:
          self._take_over(self.work)
      return self
    except BaseException as error:
      self._leave(keep=self.resume)
      if isinstance(error, OSError):
        raise self._disk_error(error) from error
      raise

  def write(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays, under keys that have not been written yet."""
    ocp = orbax()
    sums = {key: sha256_of(array) for key, array in arrays.items()}
    blocks = {key: blocks_of(array).to_json() for key, array in arrays.items()}
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
          self._journal.note_group(group, sums, blocks)
        self.done |= sums
        self._blocks |= blocks
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
    if self._is_whole:
      return
    if not self._temporary.exists():
      self._merge()
    if self.manifest.tokenizer:
      texts = {TOKENIZER: self.manifest.tokenizer.tokenizer_json, TEMPLATE: self.manifest.tokenizer.chat_template}
      for name, text in texts.items():
        if text is not None:
          (self._temporary / name).write_bytes(text.encode())
    (self._temporary / MANIFEST).unlink(missing_ok=True)
    paths = sorted(path for path in self._temporary.rglob("*") if path.is_file())
    files = {str(path.relative_to(self._temporary)): path.stat().st_size for path in paths}
    sums = self.done | file_digests(self._temporary)
    provenance = {**self.manifest.provenance, **(self._late() if self._late else {})}
    manifest = dataclasses.replace(self.manifest, provenance=provenance, files=files, checksums=sums, blocks=self._blocks)
    self._write_manifest(manifest)
    if self._check:
      provenance = {**provenance, **self._check(self._temporary)}
      self._write_manifest(dataclasses.replace(manifest, provenance=provenance))
    sync_tree(self._temporary)
    if self._journal:
      self._journal.note_whole()
    os.rename(self._temporary, self.folder)
    _sync(self.folder.parent)

  def _merge(self) -> None:
    """Lets Orbax merge the groups into the folder.

    Orbax moves the groups' files one by one, so that a kill meanwhile would lose all groups. It gets a copy to merge, whose
    data are hard links. On a disk without hard links Orbax merges the groups themselves.
    """
    merged = self.folder.with_name(self._temporary.name + _MERGED)
    copied = self._journal is not None and link_tree(self._partial, self.folder.with_name(merged.name + _PARTIAL))
    ocp = orbax()
    with orbax_context(ocp):
      ocp.partial.finalize(merged if copied else self._temporary)
    if copied:
      sync_tree(merged)
      os.rename(merged, self._temporary)

  def _write_manifest(self, manifest: Manifest) -> None:
    (self._temporary / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")

  # --- resuming ---

  def _groups(self) -> list[str]:
    """The folders of Orbax's complete groups."""
    if not self._partial.exists():
      return []
    return sorted(path.name for path in self._partial.iterdir() if ".pending_" in path.name and "-tmp" not in path.name)

  def _leftovers(self) -> list[Journal]:
    """The journals of dead writers of this folder, locked."""
    paths = sorted(self.folder.parent.glob(f"{glob_escape(self.folder.name)}{WRITING}*{SUFFIX}"))
    return [journal for path in paths if (journal := Journal.take(path))]

  def _find_whole(self) -> bool:
    """Whether the folder is the result of this very work, by a process that was killed before it removed its journal."""
    for journal in self._leftovers():
      name = journal.path.name.removesuffix(SUFFIX)
      if self.work and journal.work == self.work and journal.whole and not self.folder.with_name(name).exists():
        self._is_whole, self._journal = True, journal
        self._name_temporary(name)
        self._read(journal)
        return True
      journal.close()
    return False

  def _take_over(self, work: str) -> None:
    """Removes the leftovers of dead writers of this folder, or adopts one; then holds the lock on a journal."""
    for journal in self._leftovers():
      name = journal.path.name.removesuffix(SUFFIX)
      if self.resume and self._journal is None:
        if (reason := self._adopt(name, journal, work)) is None:
          self._journal = journal
          continue
        say(f"convert: the unfinished {name} {reason}; it is removed, and the conversion begins again.")
      remove(self.folder.parent, name)
      journal.close()
    while self._journal is None:
      self._journal = Journal.create(self.folder.with_name(self._temporary.name + SUFFIX), work)
      if self._journal is None:
        self._name_temporary(_temporary_name(self.folder))

  def _adopt(self, name: str, journal: Journal, work: str) -> str | None:
    """Continues a leftover, without files that its journal does not list. Returns None, or why it cannot be continued."""
    if journal.work is None:
      return "has no readable journal"
    if journal.work != work:
      return "is of another source, other options or another version"
    own_name = self._temporary.name
    self._name_temporary(name)
    if not self._temporary.exists() and not set(journal.groups) <= set(self._groups()):
      self._name_temporary(own_name)
      return "has lost groups that its journal lists"
    if not self._temporary.exists():
      for path in list(self._partial.iterdir()) if self._partial.exists() else []:
        if path.name not in journal.groups:
          shutil.rmtree(path, ignore_errors=True)
    for pattern in (f"{glob_escape(name)}*-tmp*", f"{glob_escape(name)}{_MERGED}*"):
      for path in self.folder.parent.glob(pattern):
        shutil.rmtree(path, ignore_errors=True)
    self._read(journal)
    return None

  def _read(self, journal: Journal) -> None:
    for line in journal.groups.values():
      self.done |= line["sums"]
      self._blocks |= line["blocks"]

  def _exists(self) -> InputError:
    return InputError(f"checkpoint: {self.folder} exists already. Pass another folder, or remove it first.")

  def _disk_error(self, error: Exception) -> Exception:
    """The error in one sentence if the disk refused; else the error itself."""
    if isinstance(error, OSError) and error.errno:
      reason = os.strerror(error.errno)
    elif full := _FULL.search(str(error)):
      reason = full[0]
    elif isinstance(error, OSError):
      reason = first_line(error)[:200]
    else:
      return error
    left = "The written part stays for --resume" if self.resume and self._journal else "Nothing was left behind"
    return InputError(f"checkpoint: cannot write {self.folder}: {reason}. {left}; pass another folder or free space.")

  def _clean(self) -> None:
    remove(self.folder.parent, self._temporary.name)


def _without_stragglers(hook: Callable[[Any], object], unraisable: Any) -> None:
  """Silences arrays whose write ends after Orbax has closed its event loop, as it does at the first array that fails.

  Each of them would print a traceback.
  """
  if str(unraisable.exc_value) != "Event loop is closed":
    hook(unraisable)


def _temporary_name(folder: pathlib.Path) -> str:
  return f"{folder.name}{WRITING}{secrets.token_hex(4)}"


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
