"""Keeps converted weights between runs: a source and a recipe give a checkpoint of jaxfp8 in the cache folder.

    CACHE/checkpoints/NAME-fp8-channel-HASH/   the checkpoint; HASH is of the source's content, the recipe and the format
    CACHE/sources.json                         path, size, inode, times of the source's files -> hash of their content

The second start reads only these facts of the source's files: it neither reads the source nor quantizes. Other facts only mean
that the source is read again; the same content finds the same checkpoint. A damaged checkpoint, and one that another user can
have written (private_files.py), is converted again, with one sentence. The next conversion removes the leftovers of a process
that was killed.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxfp8 import private_files, regular_files, stored_files
from jaxfp8.checkpoint import convert, readers
from jaxfp8.checkpoint.convert import ReportProgress
from jaxfp8.checkpoint.manifest import FORMAT_VERSION, MANIFEST, WRITING, DamagedCheckpoint
from jaxfp8.checkpoint.manifest_fields import SUMS
from jaxfp8.checkpoint.open import Checkpoint
from jaxfp8.checkpoint.quantized_source import source_granularity
from jaxfp8.checkpoint.readers import Source
from jaxfp8.checkpoint.readers.locate import absolute
from jaxfp8.errors import InputError
from jaxfp8.recipe import Precision, Recipe
from jaxfp8.terminal import say

READING = 2  # raised whenever the readers take other numbers, tokens or formats from the same files
_SPOTS, _SPOT_BYTES = 64, 16 << 10
_STALE_SECONDS = 3600  # since a half-written checkpoint grew for the last time


def cached_checkpoint(
  source_path: str | os.PathLike,
  recipe: Recipe,
  cache_dir: str | os.PathLike,
  *,
  progress: ReportProgress | None = None,
  check: Callable[[Source], None] = lambda source: None,
  keep_granularity: bool = False,
) -> Checkpoint | None:
  """Opens `source_path` converted to `recipe`'s weights; converts it first if it is not in the cache yet, or damaged there.

  Returns None, after a sentence on stderr, if it must be converted and the cache folder cannot be written.

  Args:
    check: called with the opened source before a conversion; may raise before minutes are spent for nothing.
    keep_granularity: keep a float8 source's own scales, whatever the recipe's granularity.

  Raises InputError for a source that cannot be read or a disk that is full; nothing half-written stays.
  """
  source_path = absolute(source_path)
  try:
    cache = private_files.open_cache(cache_dir)
  except OSError as error:
    stored_files.warn_unwritable(pathlib.Path(cache_dir), error)
    return None
  digest = _content_digest(readers.source_files(source_path), cache)
  folder = cache / "checkpoints" / folder_name(source_path, digest, recipe)
  with contextlib.suppress(DamagedCheckpoint):
    if folder.exists():
      return _open(folder)
  source = readers.open_source(source_path)
  check(source)
  with _one_at_a_time(folder) as can_write:
    try:
      if folder.exists():  # another process was first
        return _open(folder)
    except DamagedCheckpoint as error:
      can_write = _remove(folder, error.reason) and can_write
    if not can_write:
      return None
    _remove_stale(folder)
    for note in source.notes:
      say(f"readers: {source.path}: {note}.")
    if keep_granularity and (granularity := source_granularity(source)):
      recipe = dataclasses.replace(recipe, granularity=granularity)
    try:
      arrays = convert.convert_checkpoint(
        source, folder, recipe, provenance={"source_sha256": digest}, check=_close, progress=progress
      )
      for note in arrays.notes[:3]:
        say(f"convert: {note}.")
    except InputError:
      if not folder.exists():  # else another process converted the same meanwhile, on a disk that does not lock files
        raise
    return _open(folder)


def _open(folder: pathlib.Path) -> Checkpoint:
  """Raises DamagedCheckpoint, also for a folder in which another user can have written."""
  try:
    private_files.require_tree(folder)
  except private_files.NotPrivate as error:
    raise DamagedCheckpoint(folder, str(error)) from error
  return Checkpoint(folder)


def _close(folder: pathlib.Path) -> Mapping[str, Any]:
  private_files.close_tree(folder)
  return {}


def folder_name(source_path: pathlib.Path, digest: str, recipe: Recipe) -> str:
  """The name of the folder with a source whose content has this digest, converted to `recipe`'s weights."""
  facts = f"{digest} {recipe.weights} {recipe.granularity} {recipe.stream} {FORMAT_VERSION}.{READING}"
  key = hashlib.sha256(facts.encode()).hexdigest()
  name = re.sub(r"[^A-Za-z0-9._]+", "-", source_path.resolve().stem)
  kind = recipe.weights if recipe.weights != Precision.FP8 else f"fp8-{recipe.granularity}"
  return f"{name}-{kind}-{key[:16]}"


def discard(checkpoint: Checkpoint, reason: str) -> bool:
  """Removes a checkpoint of the cache whose arrays are damaged, and says so; whether `cached_checkpoint` can replace it.

  Leaves the folder alone if another process has replaced it meanwhile: that one has another manifest.
  """
  with _one_at_a_time(checkpoint.path) as can_write:
    with contextlib.suppress(OSError, UnicodeDecodeError):
      if regular_files.read_text(checkpoint.path / MANIFEST) != checkpoint.manifest.text:
        return True
    return _remove(checkpoint.path, reason) and can_write


def _remove(folder: pathlib.Path, reason: str) -> bool:
  """Takes a damaged checkpoint away under a name that `_remove_stale` knows, so that nobody opens half of it."""
  stored_files.say(f"{folder} is damaged: {reason}; the source is converted again")
  away = folder.with_name(f"{folder.name}{WRITING}{secrets.token_hex(4)}")
  try:
    os.rename(folder, away)
  except FileNotFoundError:
    return True
  except OSError as error:
    stored_files.warn_unwritable(folder.parent, error)
    return False
  shutil.rmtree(away, ignore_errors=True)
  return True


@contextlib.contextmanager
def _one_at_a_time(folder: pathlib.Path) -> Iterator[bool]:
  """Lets one process at a time write a folder of the cache; the others wait. Gives whether the cache can be written.

  The lock's file stays, and holds no lock then.
  """
  lock = folder.parents[1] / "locks" / folder.name
  with contextlib.ExitStack() as stack:
    can_write = True
    try:
      private_files.make_folder(folder.parent)
      file = stack.enter_context(private_files.open_lock(lock))
      with contextlib.suppress(OSError):  # a disk that does not lock files
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
      stored_files.warn_unwritable(folder.parents[1], error)
      can_write = False
    yield can_write


def fingerprint(source: Source) -> str:
  """A digest that is equal for equal weights, whatever their path, and that does not read them all.

  Of a converted checkpoint: its source's content. Of another checkpoint of jaxfp8: its manifest, since its files have random
  names. Of another source: the sizes of its files, and 64 pieces of each.
  """
  if not isinstance(source, Checkpoint):
    return _digest(json.dumps([[file.name, *_spot_checks(file)] for file in source.files()]))
  manifest = source.manifest
  if sha256 := manifest.provenance.get("source_sha256"):
    return _digest(json.dumps({"sha256": sha256, "weights": [manifest.recipe.weights, manifest.recipe.granularity]}))
  return _digest(manifest.text)


def _spot_checks(path: pathlib.Path) -> tuple[int, str]:
  """(size in bytes, sha256 of 64 pieces of the file)."""
  total = hashlib.sha256()
  size = _stat(path).st_size
  with regular_files.open_file(path) as file:
    for spot in range(_SPOTS):
      file.seek(max(0, size - _SPOT_BYTES) * spot // (_SPOTS - 1))
      total.update(file.read(_SPOT_BYTES))
  return size, total.hexdigest()


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _remove_stale(folder: pathlib.Path) -> None:
  """Removes the leftovers of killed processes that wrote this folder. A living process has touched its own files lately."""
  with contextlib.suppress(OSError):
    for path in folder.parent.iterdir():
      if path.name.startswith(folder.name + WRITING):
        newest = max(part.stat().st_mtime for part in (path, *path.rglob("*")))
        if time.time() - newest > _STALE_SECONDS:
          shutil.rmtree(path, ignore_errors=True)


def _content_digest(files: list[pathlib.Path], cache: pathlib.Path) -> str:
  """SHA-256 of names and contents, remembered under the files' paths, sizes, inodes and times.

  The time of the last change (ctime) is one of them: a program that edits a file in place can set back the other time alone.
  """
  stats = []
  for path in files:
    stat = _stat(path)
    stats.append((str(path.resolve()), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns))
  key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
  index = cache / "sources.json"
  digests = _read_index(index)
  if key not in digests:
    digests[key] = _hash_files(files)
    stored_files.write(index, json.dumps(digests, indent=1).encode())
  return digests[key]


def _stat(path: pathlib.Path) -> os.stat_result:
  try:
    return path.stat()
  except OSError as error:
    raise InputError(f"cache: cannot read {path}: {os.strerror(error.errno or 0)}. Fetch the checkpoint again.") from error


def _hash_files(files: list[pathlib.Path]) -> str:
  total = hashlib.sha256()
  for path in files:
    try:
      with regular_files.open_file(path) as file:
        total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    except OSError as error:
      raise InputError(f"cache: cannot read {path}: {os.strerror(error.errno or 0)}. Fetch the checkpoint again.") from error
  return total.hexdigest()


def _read_index(path: pathlib.Path) -> dict[str, str]:
  """The content of sources.json; empty if the file is absent or damaged, since it only saves time."""
  content = stored_files.read(path, "the source is read again")
  with contextlib.suppress(ValueError, RecursionError):
    if content is not None and SUMS.holds(digests := json.loads(content)):
      return digests
  return {}
