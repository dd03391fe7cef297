"""Converted weights kept between runs: a source checkpoint and a recipe give a folder with our checkpoint.

    CACHE/checkpoints/NAME-fp8-channel-HASH/   the checkpoint; HASH is of the source's content, the recipe and the format
    CACHE/sources.json                         path, size, time of the source's files -> hash of their content

The second start looks at the files' sizes and times alone: it neither reads the source nor quantizes. What is found damaged
is converted again, and what a killed process left half written is removed by the next conversion.
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
from jaxfp8.checkpoint.convert import Progress
from jaxfp8.checkpoint.manifest import FORMAT_VERSION, MANIFEST, WRITING, check_files, is_checkpoint, read_manifest
from jaxfp8.checkpoint.quantized_source import source_granularity
from jaxfp8.checkpoint.readers import Source
from jaxfp8.checkpoint.unfinished import write_atomically
from jaxfp8.errors import InputError
from jaxfp8.recipe import Recipe

_SPOTS, _SPOT_BYTES = 64, 16 << 10
_STALE_SECONDS = 3600  # since a half-written checkpoint grew for the last time


def cached_checkpoint(
  source_path: str | os.PathLike,
  recipe: Recipe,
  cache_dir: str | os.PathLike,
  progress: Progress | None = None,
  check: Callable[[Source], None] = lambda source: None,
  own_granularity: bool = False,
) -> pathlib.Path:
  """The folder with `source_path` converted by `recipe`'s weights, converting it first if it is not there yet.

  own_granularity: float8 scales of the source's own stay as they are, whatever the recipe's granularity.
  `check` may raise before minutes are spent on a conversion that serves nobody.
  Raises InputError for a source that cannot be read or a cache folder that cannot be written; nothing half-written stays.
  """
  cache = pathlib.Path(cache_dir).expanduser()
  digest = _content_digest(readers.source_files(source_path), cache)
  key = hashlib.sha256(f"{digest} {recipe.weights} {recipe.granularity} {recipe.stream} {FORMAT_VERSION}".encode()).hexdigest()
  name = re.sub(r"[^A-Za-z0-9._]+", "-", pathlib.Path(source_path).resolve().stem)
  kind = recipe.weights if recipe.weights != "fp8" else f"fp8-{recipe.granularity}"
  folder = cache / "checkpoints" / f"{name}-{kind}-{key[:16]}"
  if _is_whole(folder):
    return folder
  source = readers.open_source(source_path)
  check(source)
  with _one_at_a_time(cache / "locks" / folder.name):
    if not _is_whole(folder):
      _remove_stale(folder)
      for note in source.notes:
        print(f"readers: {source.path}: {note}.", file=sys.stderr)
      if own_granularity and (own := source_granularity(source)):
        recipe = dataclasses.replace(recipe, granularity=own)
      try:
        done = convert.convert_checkpoint(source, folder, recipe, provenance={"source_sha256": digest}, progress=progress)
        for note in done.notes[:3]:
          print(f"convert: {note}.", file=sys.stderr)
      except InputError:
        if not _is_whole(folder):  # else another process converted the same meanwhile, where files cannot be locked
          raise
  return folder


@contextlib.contextmanager
def _one_at_a_time(lock: pathlib.Path) -> Iterator[None]:
  """The processes of a host that want the same weights wait for the one that converts them."""
  with contextlib.ExitStack() as stack:
    with contextlib.suppress(OSError):  # what cannot be written or locked is said by whoever writes the weights
      lock.parent.mkdir(parents=True, exist_ok=True)
      file = stack.enter_context(open(lock, "w"))
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def fingerprint(path: str | os.PathLike) -> str:
  """The same for the same numbers wherever they lie, and without reading them all.

  A converted checkpoint is known by its source's content, another of ours by its manifest (its files have random names), and
  a source by its files' sizes and 64 pieces of each.
  """
  path = pathlib.Path(path)
  if is_checkpoint(path):
    manifest = read_manifest(path)
    source = manifest.provenance.get("source_sha256")
    what = {"sha256": source, "weights": [manifest.recipe.weights, manifest.recipe.granularity]} if source else None
    return _digest(json.dumps(what) if what else (path / MANIFEST).read_text(encoding="utf-8"))
  return _digest(json.dumps([[file.name, *_spot_checks(file)] for file in readers.source_files(path)]))


def _spot_checks(path: pathlib.Path) -> tuple[int, str]:
  total = hashlib.sha256()
  size, _ = _size_and_time(path)
  with open(path, "rb") as file:
    for place in range(_SPOTS):
      file.seek(max(0, size - _SPOT_BYTES) * place // (_SPOTS - 1))
      total.update(file.read(_SPOT_BYTES))
  return size, total.hexdigest()


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_whole(folder: pathlib.Path) -> bool:
  """Whether the checkpoint is there. A damaged one is removed, with a word on stderr."""
  if not folder.exists():
    return False
  try:
    read_manifest(folder)
    check_files(folder)
  except InputError:
    print(f"cache: {folder} is damaged; the source is converted again.", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    return False
  return True


def _remove_stale(folder: pathlib.Path) -> None:
  """What a process that was killed left of this folder. Another that writes it now has touched it lately."""
  with contextlib.suppress(OSError):
    for path in folder.parent.iterdir():
      if path.name.startswith(folder.name + WRITING):
        newest = max(part.stat().st_mtime for part in (path, *path.rglob("*")))
        if time.time() - newest > _STALE_SECONDS:
          shutil.rmtree(path, ignore_errors=True)


def _content_digest(files: list[pathlib.Path], cache: pathlib.Path) -> str:
  """SHA-256 over names and contents, remembered by the files' paths, sizes and times."""
  stats = [(str(path.resolve()), *_size_and_time(path)) for path in files]
  key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
  index = cache / "sources.json"
  known = _read_index(index)
  if key not in known:
    known[key] = _hash_files(files)
    _write_index(index, known)
  return known[key]


def _size_and_time(path: pathlib.Path) -> tuple[int, int]:
  try:
    stat = path.stat()
  except OSError as error:
    raise InputError(f"cache: cannot read {path}: {os.strerror(error.errno)}. Fetch the checkpoint again.") from error
  return stat.st_size, stat.st_mtime_ns


def _hash_files(files: list[pathlib.Path]) -> str:
  total = hashlib.sha256()
  for path in files:
    try:
      with open(path, "rb") as file:
        total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    except OSError as error:
      raise InputError(f"cache: cannot read {path}: {os.strerror(error.errno)}. Fetch the checkpoint again.") from error
  return total.hexdigest()


def _read_index(path: pathlib.Path) -> dict[str, str]:
  """Empty where there is none or it is damaged: it only saves time."""
  with contextlib.suppress(OSError, ValueError):
    known = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(known, dict):
      return known
  return {}


def _write_index(path: pathlib.Path, known: dict[str, str]) -> None:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(known, indent=1).encode())
  except OSError as error:
    raise InputError(
      f'cache: cannot write {path.parent}: {os.strerror(error.errno)}. Pass another --cache_dir, or --cache_dir="" for none.'
    ) from error
