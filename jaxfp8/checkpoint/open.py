"""A checkpoint of any kind, opened once: the object that is handed from the door to the arrays. Imports no jax.

    open_checkpoint(path)   ->  Checkpoint (a folder of jaxfp8), or another `Source` (Hugging Face, GGUF)
    Checkpoint(path)        reads jaxfp8.json and the tokenizer, and compares the sizes of all files; the arrays are checked and
                            read when they are asked for, which is when Orbax is imported

A `Checkpoint` is a `Source` too, so that it can be converted into another layout or exported. Refuses to know models.
"""

import functools
import importlib
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxfp8.checkpoint import readers
from jaxfp8.checkpoint.manifest import Manifest, check_files, damaged, is_checkpoint, orbax, orbax_context, read_manifest
from jaxfp8.checkpoint.readers import Source, expected_tensors
from jaxfp8.checkpoint.readers.locate import absolute
from jaxfp8.checkpoint.readers.source import check_finite
from jaxfp8.checkpoint.stored_arrays import ArraySpec, Range, Read, checkpoint_arrays
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.errors import InputError
from jaxfp8.recipe import Granularity, LayerFormat


def open_checkpoint(path: Source | str | os.PathLike | None = None) -> Source:
  """Opens a checkpoint of jaxfp8, a Hugging Face folder or a GGUF file; None is the default model.

  A source that is open already is returned as it is. Raises InputError for anything else.
  """
  if isinstance(path, Source):
    return path
  path = readers.default_model() if path is None else path
  return Checkpoint(path) if is_checkpoint(path) else readers.open_source(path)


class Checkpoint(Source):
  """An opened checkpoint of jaxfp8.

  expected: key -> shape and dtype of every array.

  The constructor raises InputError for a folder that is no checkpoint or has lost data; reading raises it for damaged arrays.
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
    self._keys = {key.partition("[")[0]: key for key in self.expected}

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
    """Reads all ranges in parallel, and of each array only the chunks that its range touches."""
    store = self._store
    try:
      opened = {part: store.open(part.key) for part in ranges}
      pending = {part: part.cut(array.result()).read() for part, array in opened.items()}
      return {part: array.result() for part, array in pending.items()}
    except Exception as error:  # tensorstore raises ValueError for every kind of damage
      raise damaged(self.path, error) from error

  def read_array(self, key: str) -> np.ndarray:
    store = self._store
    try:
      return np.asarray(store.open(key).result().read().result())
    except Exception as error:
      raise damaged(self.path, error) from error

  @functools.cached_property
  def _store(self) -> "_Store":
    """The arrays. Raises InputError unless their shapes and dtypes are those of the manifest."""
    self._check_arrays()
    return _Store(self.path)

  def _check_arrays(self) -> None:
    ocp = orbax()
    try:
      with orbax_context(ocp):
        stored = ocp.metadata(self.path).metadata
    except Exception as error:  # Orbax raises many kinds for a damaged folder
      raise damaged(self.path, error) from error
    if not stored:
      raise damaged(self.path, "Orbax finds no arrays")
    for key, (shape, dtype) in self.expected.items():
      actual = (tuple(stored[key].shape), np.dtype(stored[key].dtype)) if key in stored else "nothing"
      if actual != (shape, dtype):
        raise damaged(self.path, f"{key} must be {dtype} {shape}; the folder has {actual}")

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


class _Store:
  """The arrays of a folder: a Zarr 3 array for each key in an OCDBT store, the name of whose folder is up to Orbax."""

  def __init__(self, folder: pathlib.Path):
    self._tensorstore = importlib.import_module("tensorstore")
    self._base = next((path.parent for path in folder.glob("*/manifest.ocdbt")), folder)
    self._context = self._tensorstore.Context()  # shared by all arrays, so that the index is read once

  def open(self, key: str) -> Any:
    """A future of the array."""
    base = {"driver": "file", "path": f"{self._base.resolve()}/"}  # a URL would give #, % and ? a meaning
    store = {"driver": "ocdbt", "base": base, "path": f"{key}/"}
    return self._tensorstore.open({"driver": "zarr3", "kvstore": store}, open=True, context=self._context)
