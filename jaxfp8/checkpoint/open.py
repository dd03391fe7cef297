"""A checkpoint of any kind, opened once: the object that is handed from the door to the arrays. Imports no jax.

    open_checkpoint(path)   ->  Checkpoint (a folder of jaxfp8), or another `Source` (Hugging Face, GGUF)
    Checkpoint(path)        reads jaxfp8.json and the tokenizer, and compares sizes of files and digests of small ones; arrays
                            are read and compared when they are asked for, which is when tensorstore is imported

A `Checkpoint` is a `Source` too, so that it can be converted into another layout or exported. Refuses to know models.
"""

import functools
import importlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxfp8.checkpoint import readers
from jaxfp8.checkpoint.block_digests import BlockDigests, Bounds, sha256_of
from jaxfp8.checkpoint.manifest import (
  DamagedCheckpoint,
  Manifest,
  check_files,
  is_checkpoint,
  read_manifest,
)
from jaxfp8.checkpoint.readers import Source, expected_tensors
from jaxfp8.checkpoint.readers.locate import absolute
from jaxfp8.checkpoint.readers.source import check_finite
from jaxfp8.checkpoint.stored_arrays import ArraySpec, Range, Read, checkpoint_arrays
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.errors import InputError, first_line
from jaxfp8.recipe import Granularity, LayerFormat


def open_checkpoint(path: Source | str | os.PathLike | None = None) -> Source:
  """Opens a checkpoint of jaxfp8, a Hugging Face folder or a GGUF file; None is the default model.

  A source that is open already is returned as it is. Raises InputError for anything else.
  """
  if isinstance(path, Source):
    return path
  path = readers.default_model() if path is None else path
  return Checkpoint(path) if is_checkpoint(path) else readers.open_source(path)


_MOST_COMPRESSED, _SMALL_BYTES = 16, 64 << 20  # a checkpoint that claims more bytes than its files can hold is refused


class Checkpoint(Source):
  """An opened checkpoint of jaxfp8.

  expected: key -> shape and dtype of every array.

  The constructor raises DamagedCheckpoint for a folder that is no checkpoint or has lost data, and InputError for a newer
  version's; reading raises DamagedCheckpoint for damaged arrays.
  """

  dialect = "jaxfp8"

  def __init__(self, path: str | os.PathLike):
    self.path = absolute(path)
    self.manifest: Manifest = read_manifest(self.path)
    check_files(self.path, self.manifest)
    self.config = self.manifest.config
    m = self.manifest
    groups = checkpoint_arrays(m.config, m.recipe, m.formats, m.exceptions, m.static_scales)
    self.expected: dict[str, ArraySpec] = {key: spec for group in groups for key, spec in group.items()}
    self._check_room()
    self._keys = {key.partition("[")[0]: key for key in self.expected}
    self._verified: set[str] = set()  # arrays of a checkpoint without digests of blocks

  def _check_room(self) -> None:
    """Raises DamagedCheckpoint for arrays that no files of this size can hold, before memory of their size is asked for.

    jaxfp8 writes arrays uncompressed; weights that another writer has compressed do not shrink to a sixteenth.
    """
    held = sum(path.stat().st_size for path in self.files())
    claimed = sum(spec.num_bytes for spec in self.expected.values())
    if claimed > _MOST_COMPRESSED * held + _SMALL_BYTES:
      raise self._damaged(f"its manifest says that the arrays have {claimed:,} bytes, and the files have {held:,}")

  def _damaged(self, reason: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(self.path, reason, self)

  # --- as the store of a model's arrays ---

  @property
  def formats(self) -> tuple[LayerFormat, ...]:
    return self.manifest.formats

  @property
  def exceptions(self) -> dict[str, str]:
    return dict(self.manifest.exceptions)

  def range_reader(self) -> Read:
    """Reads ranges, and refuses NaN and Inf in them: a model that was saved after its training diverged holds some."""

    def read_finite(ranges: Iterable[Range]) -> dict[Range, np.ndarray]:
      arrays = self.read_ranges(ranges)
      for part, array in arrays.items():
        check_finite(part.key.partition("[")[0], array, self.path, "Save or convert the model again.")
      return arrays

    return read_finite

  def read_ranges(self, ranges: Iterable[Range]) -> dict[Range, np.ndarray]:
    """Reads all ranges in parallel, and of each array only the blocks that its range touches. Compares their digests."""
    ranges, has_blocks, bounds = list(ranges), bool(self.manifest.blocks), {}
    _ = self._arrays  # which names an array that is absent
    if not has_blocks:
      self._verify_whole({part.key for part in ranges})
    for part in ranges:
      whole = [(0, size) for size in self.expected[part.key].shape]
      whole[part.axis] = (part.start, part.stop)
      bounds[part] = self._blocks(part.key).cover(part.axis, part.start, part.stop) if has_blocks else tuple(whole)
    result = {}
    for part, array in self._read_bounds({part: (part.key, bounds[part]) for part in ranges}):
      if has_blocks:
        self._compare(part.key, array, bounds[part])
      first = bounds[part][part.axis][0]
      result[part] = part._replace(start=part.start - first, stop=part.stop - first).cut(array)
    return result

  def read_array(self, key: str, *, verify: bool = True) -> np.ndarray:
    """One whole array. verify: compare its digests."""
    whole = tuple((0, size) for size in self.expected[key].shape)
    ((_, array),) = self._read_bounds({key: (key, whole)})
    if verify and self.manifest.blocks:
      self._compare(key, array, whole)
    elif verify and self.manifest.checksums.get(key, expected := sha256_of(array)) != expected:
      raise self._damaged(f"{key} is not what was written, since its SHA-256 differs")
    return array

  def _verify_whole(self, keys: Iterable[str]) -> None:
    """Reads these arrays once, for a checkpoint of an earlier version, which has digests of whole arrays alone."""
    for key in sorted(set(keys) - self._verified):
      self.read_array(key)
      self._verified.add(key)

  def _read_bounds(self, wanted: Mapping[Any, tuple[str, Bounds]]) -> Iterator[tuple[Any, np.ndarray]]:
    """(name, array) of each part of an array that is wanted under a name, all read in parallel."""
    arrays = self._arrays
    try:
      pending = {name: arrays[key][_slices(bounds)].read() for name, (key, bounds) in wanted.items()}
    except Exception as error:  # tensorstore raises ValueError for every kind of damage
      raise self._damaged(first_line(error)) from error
    for name, array in pending.items():
      try:
        yield name, np.asarray(array.result())
      except Exception as error:
        raise self._damaged(first_line(error)) from error

  def _blocks(self, key: str) -> BlockDigests:
    try:
      return BlockDigests.from_json(self.expected[key].shape, self.manifest.blocks[key])
    except (KeyError, TypeError, ValueError) as error:
      raise self._damaged(f"the manifest has no digests of {key} that fit ({error})") from error

  def _compare(self, key: str, array: np.ndarray, bounds: Bounds) -> None:
    if wrong := self._blocks(key).first_wrong(array, bounds):
      place = ", ".join(f"{start}:{stop}" for start, stop in wrong)
      raise self._damaged(f"{key}[{place}] is not what was written, since its digest differs")

  @functools.cached_property
  def _arrays(self) -> dict[str, Any]:
    """The opened arrays. Raises DamagedCheckpoint unless their shapes and dtypes are those of the manifest."""
    opening, arrays = _open_arrays(self.path, self.expected), {}
    for key, (shape, dtype) in self.expected.items():
      try:
        arrays[key] = opening[key].result()
      except Exception as error:
        what = f"{key} is absent" if "NOT_FOUND" in str(error) else f"{key}: {first_line(error)}"
        raise self._damaged(what) from error
      actual = tuple(arrays[key].shape), arrays[key].dtype.numpy_dtype
      if actual != (shape, dtype):
        raise self._damaged(f"{key} must be {dtype} {shape}; the folder has {actual[1]} {actual[0]}")
      chunk = arrays[key].chunk_layout
      if any(
        most > max(1, size)
        for grid in (chunk.read_chunk, chunk.write_chunk)
        for most, size in zip(grid.shape or (), shape, strict=False)
      ):
        raise self._damaged(f"{key} of shape {shape} is stored in chunks that are larger than it is")
    return arrays

  # --- as a source ---

  def names(self) -> tuple[str, ...]:
    return tuple(expected_tensors(self.config))

  def dtype(self, name: str) -> np.dtype:
    return self.expected[self._keys[name]].dtype

  def shape(self, name: str) -> tuple[int, ...]:
    return self.expected[self._keys[name]].shape

  def read(self, name: str) -> np.ndarray:
    array = self.read_array(self._keys[name])
    check_finite(name, array, self.path)
    return array

  def granularity(self, name: str) -> str | None:
    scale = self._keys.get(name.removesuffix("weight") + "scale")
    if scale is None:
      return None
    if "/" in scale:
      return Granularity.BLOCK128
    is_tensor = self.manifest.recipe.granularity == Granularity.TENSOR
    return Granularity.TENSOR if is_tensor else Granularity.CHANNEL

  def read_scale(self, name: str) -> np.ndarray:
    return self.read_array(self._keys[name.removesuffix("weight") + "scale"])

  def static_scales(self) -> tuple[str, ...]:
    return self.manifest.static_scales

  def read_static(self, name: str) -> np.ndarray:
    return self.read_array(self._keys[name])

  @property
  def tokenizer(self) -> TokenizerFiles:
    if self.manifest.tokenizer is None:
      raise InputError(f"readers: text needs a tokenizer, and {self.path} has none. Convert the model with its tokenizer.")
    return self.manifest.tokenizer

  def files(self) -> list[pathlib.Path]:
    return sorted(path for path in self.path.rglob("*") if path.is_file())


def _slices(bounds: Bounds) -> tuple[slice, ...]:
  return tuple(slice(start, stop) for start, stop in bounds)


def _open_arrays(folder: pathlib.Path, keys: Iterable[str]) -> dict[str, Any]:
  """Futures of the arrays: a Zarr 3 array for each key in an OCDBT store, the name of whose folder is up to Orbax."""
  tensorstore = importlib.import_module("tensorstore")
  base = next((path.parent for path in sorted(folder.glob("*/manifest.ocdbt"))), folder)
  context = tensorstore.Context()  # shared by all arrays, so that the index is read once
  files = {"driver": "file", "path": f"{base.resolve()}/"}  # a URL would give #, % and ? a meaning
  store = {"driver": "ocdbt", "base": files}
  specs = {key: {"driver": "zarr3", "kvstore": {**store, "path": f"{key}/"}} for key in keys}
  return {key: tensorstore.open(spec, open=True, context=context) for key, spec in specs.items()}
