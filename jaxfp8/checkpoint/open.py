"""A checkpoint of jaxfp8 as a `Source`: to convert it into another layout, or to export it."""

import os
import pathlib

import numpy as np

from jaxfp8.checkpoint import readers
from jaxfp8.checkpoint.load import CheckpointReader
from jaxfp8.checkpoint.manifest import is_checkpoint, read_manifest
from jaxfp8.checkpoint.readers import Source, expected_tensors
from jaxfp8.checkpoint.readers.source import check_finite
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.errors import InputError


class CheckpointSource(Source):
  """An opened checkpoint of jaxfp8. Raises InputError from the constructor for a damaged one."""

  dialect = "jaxfp8"

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self.manifest = read_manifest(path)
    self.config = self.manifest.config
    self.reader = CheckpointReader(self.path, self.manifest)
    self._keys = {key.partition("[")[0]: key for key in self.reader.expected}

  def names(self) -> tuple[str, ...]:
    return tuple(expected_tensors(self.config))

  def dtype(self, name: str) -> np.dtype:
    return self.reader.expected[self._keys[name]][1]

  def shape(self, name: str) -> tuple[int, ...]:
    return self.reader.expected[self._keys[name]][0]

  def read(self, name: str) -> np.ndarray:
    array = self._read(name)
    check_finite(name, array, self.path)
    return array

  def granularity(self, name: str) -> str | None:
    scale = self._keys.get(name.removesuffix("weight") + "scale")
    if scale is None:
      return None
    if "/" in scale:
      return "block128"
    return "tensor" if self.manifest.recipe.granularity == "tensor" else "channel"

  def read_scale(self, name: str) -> np.ndarray:
    return self._read(name.removesuffix("weight") + "scale")

  def static_scales(self) -> tuple[str, ...]:
    return self.manifest.static_scales

  def read_static(self, name: str) -> np.ndarray:
    return self._read(name)

  def _read(self, name: str) -> np.ndarray:
    return self.reader.read_array(self._keys[name])

  @property
  def tokenizer(self) -> TokenizerFiles:
    if self.manifest.tokenizer is None:
      raise InputError(f"readers: text needs a tokenizer, and {self.path} has none. Convert the model with its tokenizer.")
    return self.manifest.tokenizer

  def files(self) -> list[pathlib.Path]:
    return sorted(path for path in self.path.rglob("*") if path.is_file())


def open_any(path: str | os.PathLike) -> Source:
  """A checkpoint of jaxfp8, a Hugging Face folder or a GGUF file. Raises InputError for anything else."""
  return CheckpointSource(path) if is_checkpoint(path) else readers.open_source(path)
