"""Keeps converted weights between runs: a source and a recipe give a checkpoint of jaxfp8 in the cache folder.

    CACHE/checkpoints/NAME-fp8-channel-HASH/   the checkpoint; HASH is of the source's content, the recipe and the format
    CACHE/sources.json                         path, size, time of the source's files -> hash of their content

The second start reads only the sizes and times of the source's files: it neither reads the source nor quantizes. A damaged
checkpoint is converted again. The next conversion removes the leftovers of a process that was killed.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator

from jaxfp8.checkpoint import convert, readers
from jaxfp8.checkpoint.convert import ReportProgress
from jaxfp8.checkpoint.manifest import FORMAT_VERSION, WRITING
from jaxfp8.checkpoint.open import Checkpoint
from jaxfp8.checkpoint.quantized_source import source_granularity
from jaxfp8.checkpoint.readers import Source
from jaxfp8.checkpoint.readers.locate import absolute
from jaxfp8.errors import InputError
from jaxfp8.recipe import Precision, Recipe
from jaxfp8.unfinished import write_atomically

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
) -> Checkpoint:
  """Opens `source_path` converted to `recipe`'s weights; converts it first if it is not in the cache yet.

  Args:
    check: called with the opened source before a conversion; may raise before minutes are spent for nothing.
    keep_granularity: keep a float8 source's own scales, whatever the recipe's granularity.

  Raises InputError for a source that cannot be read or a cache folder that cannot be written; nothing half-written stays.
  """
  cache, source_path = pathlib.Path(cache_dir).expanduser().absolute(), absolute(source_path)
  digest = _content_digest(readers.source_files(source_path), cache)
  folder = cache / "checkpoints" / folder_name(source_path, digest, recipe)
  if checkpoint := _open_whole(folder):
    return checkpoint
  source = readers.open_source(source_path)
  check(source)
  with _one_at_a_time(cache / "locks" / folder.name):
    if checkpoint := _open_whole(folder):
      return checkpoint
    _remove_stale(folder)
    for note in source.notes:
      print(f"readers: {source.path}: {note}.", file=sys.stderr)
    if keep_granularity and (granularity := source_granularity(source)):
      recipe = dataclasses.replace(recipe, granularity=granularity)
    try:
      arrays = convert.convert_checkpoint(source, folder, recipe, provenance={"source_sha256": digest}, progress=progress)
      for note in arrays.notes[:3]:
        print(f"convert: {note}.", file=sys.stderr)
    except InputError:
      if not folder.exists():  # else another process converted the same meanwhile, on a disk that does not lock files
        raise
    return Checkpoint(folder)


def folder_name(source_path: pathlib.Path, digest: str, recipe: Recipe) -> str:
  """The name of the folder with a source whose content has this digest, converted to `recipe`'s weights."""
  key = hashlib.sha256(f"{digest} {recipe.weights} {recipe.granularity} {recipe.stream} {FORMAT_VERSION}".encode()).hexdigest()
  name = re.sub(r"[^A-Za-z0-9._]+", "-", source_path.resolve().stem)
  kind = recipe.weights if recipe.weights != Precision.FP8 else f"fp8-{recipe.granularity}"
  return f"{name}-{kind}-{key[:16]}"


@contextlib.contextmanager
def _one_at_a_time(lock: pathlib.Path) -> Iterator[None]:
  """Lets one process at a time convert the same weights; the others wait. The file stays, and holds no lock then."""
  with contextlib.ExitStack() as stack:
    with contextlib.suppress(OSError):  # the writer of the weights reports a folder that cannot be written
      lock.parent.mkdir(parents=True, exist_ok=True)
      file = stack.enter_context(open(lock, "w"))
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


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
  size, _ = _size_and_time(path)
  with open(path, "rb") as file:
    for spot in range(_SPOTS):
      file.seek(max(0, size - _SPOT_BYTES) * spot // (_SPOTS - 1))
      total.update(file.read(_SPOT_BYTES))
  return size, total.hexdigest()


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _open_whole(folder: pathlib.Path) -> Checkpoint | None:
  """The checkpoint, if it is there. Removes a damaged one, and says so on stderr."""
  if not folder.exists():
    return None
  try:
    return Checkpoint(folder)
  except InputError:
    print(f"cache: {folder} is damaged; the source is converted again.", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _remove_stale(folder: pathlib.Path) -> None:
  """Removes the leftovers of killed processes that wrote this folder. A living process has touched its own files lately."""
  with contextlib.suppress(OSError):
    for path in folder.parent.iterdir():
      if path.name.startswith(folder.name + WRITING):
        newest = max(part.stat().st_mtime for part in (path, *path.rglob("*")))
        if time.time() - newest > _STALE_SECONDS:
          shutil.rmtree(path, ignore_errors=True)


def _content_digest(files: list[pathlib.Path], cache: pathlib.Path) -> str:
  """SHA-256 of names and contents, remembered under the files' paths, sizes and times."""
  stats = [(str(path.resolve()), *_size_and_time(path)) for path in files]
  key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
  index = cache / "sources.json"
  digests = _read_index(index)
  if key not in digests:
    digests[key] = _hash_files(files)
    _write_index(index, digests)
  return digests[key]


def _size_and_time(path: pathlib.Path) -> tuple[int, int]:
  try:
    stat = path.stat()
  except OSError as error:
    raise InputError(f"cache: cannot read {path}: {os.strerror(error.errno or 0)}. Fetch the checkpoint again.") from error
  return stat.st_size, stat.st_mtime_ns


def _hash_files(files: list[pathlib.Path]) -> str:
  total = hashlib.sha256()
  for path in files:
    try:
      with open(path, "rb") as file:
        total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    except OSError as error:
      raise InputError(f"cache: cannot read {path}: {os.strerror(error.errno or 0)}. Fetch the checkpoint again.") from error
  return total.hexdigest()


def _read_index(path: pathlib.Path) -> dict[str, str]:
  """The content of sources.json; empty if the file is absent or damaged, since it only saves time."""
  with contextlib.suppress(OSError, ValueError):
    digests = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(digests, dict):
      return digests
  return {}


def _write_index(path: pathlib.Path, digests: dict[str, str]) -> None:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(digests, indent=1).encode())
  except OSError as error:
    reason = os.strerror(error.errno or 0)
    raise InputError(
      f'cache: cannot write {path.parent}: {reason}. Pass another --cache_dir, or --cache_dir="" for none.'
    ) from error
