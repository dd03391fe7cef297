"""Runs text through a model layer by layer, and chooses from what it sees: static scales, and better rounded weights.

    calibrate(source or folder, new folder, chunks, recipe, ..)   writes a checkpoint; one layer in memory at a time
    Calibrator(.., chunks, ..).layers()                           the same as arrays, for a model in memory

Each layer's weights are read, run over all chunks with the model's own code (one layer of it, on the default device), and let
go; only the hidden states of the text stay, [tokens, D] twice. Every layer sees what the layers before it, as they are
written, give. Inputs of linears and keys and values are counted in bins of their size (64 an octave), from which each choice
of a scale follows. Refuses to know text and flags.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxfp8 import filling, layout, readers, static_scales
from jaxfp8.batch import PrefillBatch
from jaxfp8.cache import KVCache
from jaxfp8.checkpoint import CheckpointReader, abstract_model
from jaxfp8.checkpoint_folder import CheckpointWriter, Manifest, is_checkpoint, read_manifest
from jaxfp8.config import STATIC, Recipe
from jaxfp8.convert import SourceArrays, tokenizer_of
from jaxfp8.errors import InputError
from jaxfp8.layers import LayerFormat, Linear, StepContext
from jaxfp8.magnitudes import SCALES, Magnitudes
from jaxfp8.model import Llama
from jaxfp8.rounding import check_rounding, round_weights

_ROWS = 8  # chunks that run at a time
Progress = Callable[[int, int], None]  # (layers done, of how many)


@dataclasses.dataclass(frozen=True)
class Seen:
  """What one matrix's inputs, or keys or values, were: amax and the scales that each choice gives, [] or [K]."""

  layer: int
  name: str  # qkv, o, gate_up, down, k_scale or v_scale
  amax: np.ndarray
  scales: Mapping[str, np.ndarray]


def calibrate(
  path: str | os.PathLike | None,
  folder: str | os.PathLike,
  chunks: np.ndarray,
  recipe: Recipe | None = None,
  *,
  rounding: str = "nearest",
  scales: str = "max",
  provenance: Mapping | None = None,
  progress: Progress | None = None,
) -> list["Seen"]:
  """Writes `path`, with static scales and by `rounding`, as the new checkpoint `folder`; one layer in memory at a time.

  Args:
    path: a checkpoint of jaxfp8, whose weights are kept, or what `load` takes; None: the default model.
    chunks: int32 [chunks, tokens] of calibration text, such as `quality.cut_chunks` gives.
    recipe: what the checkpoint is for. None: float8 weights (or those that are there) with static scales for everything.
    rounding: "nearest", "mse" or "gptq" (rounding.py), for a source that is not float8 yet.
    scales: "max", "percentile" or "mse": which of the sizes seen is the largest to be represented.
    provenance: plain values that are stored beside what was chosen.

  Returns what was seen, layer by layer. Raises InputError for bad weights, bad wishes, an existing folder or a full disk;
  nothing is then left behind.
  """
  path = pathlib.Path(path or readers.default_model())
  if is_checkpoint(path):
    manifest = read_manifest(path)
    recipe = recipe or _all_static(manifest.recipe)
    arrays, tokenizer, before = CheckpointReader(path, manifest), manifest.tokenizer, manifest.provenance
    _require_same_weights(path, manifest.recipe, recipe)
  else:
    source, recipe = readers.open_source(path), recipe or _all_static(Recipe())
    arrays, tokenizer, before = SourceArrays(source, _dynamic(recipe)), tokenizer_of(source), {"source": path.name}
  calibrator = Calibrator(arrays, chunks, rounding, scales)
  facts = {"rounding": rounding, "scales": scales, "tokens": int(chunks.size), **(provenance or {})}
  manifest = Manifest(arrays.config, recipe, arrays.formats, tokenizer, {**before, "calibration": facts})
  with CheckpointWriter(folder, manifest) as writer:
    writer.write(_read(arrays, list(layout.checkpoint_arrays(arrays.config, _dynamic(recipe), arrays.formats)[0])))
    for _, group in calibrator.layers(progress):
      writer.write(group)
  return calibrator.seen


def load_calibrated(
  arrays: SourceArrays | CheckpointReader, recipe: Recipe, chunks: np.ndarray, rounding: str, scales: str = "max", **kwargs
) -> Llama:
  """A model in memory with `recipe`'s static scales from `chunks`, its weights rounded by `rounding`; kwargs as `load`'s."""
  static = STATIC in recipe.activations + recipe.kv
  layers = Calibrator(arrays, chunks, rounding, scales if static else None).layers()
  found = {key: array for _, group in layers for key, array in group.items()}

  def read(keys):
    return {key: found[key] for key in keys if key in found} | _read(arrays, [key for key in keys if key not in found])

  model = filling.fill(abstract_model(arrays.config, recipe, arrays.formats, None, **kwargs), filling.whole_arrays(read), None)
  return static_scales.fill(model, found.__getitem__, None)


def _all_static(recipe: Recipe) -> Recipe:
  activations = "fp8" + STATIC if recipe.weights == "fp8" else recipe.activations
  return dataclasses.replace(recipe, activations=activations, kv="fp8" + STATIC)


def _dynamic(recipe: Recipe) -> Recipe:
  """The same without static scales: never float8 activations, so that what is seen is what will be rounded."""
  return dataclasses.replace(recipe, activations=recipe.stream, kv=recipe.stream)


def _require_same_weights(path: pathlib.Path, stored: Recipe, wanted: Recipe) -> None:
  if (stored.weights, stored.granularity, stored.stream) != (wanted.weights, wanted.granularity, wanted.stream):
    raise InputError(
      f"calibrate: {path} holds {stored.weights} weights ({stored.granularity}); got {wanted.weights} ({wanted.granularity}). "
      "Weights that were converted are never requantized: pass the source checkpoint."
    )


def _read(arrays: SourceArrays | CheckpointReader, keys: Sequence[str]) -> dict[str, np.ndarray]:
  """Whole arrays of either."""
  return arrays.read(tuple(keys)) if isinstance(arrays, SourceArrays) else {key: arrays.read_array(key) for key in keys}


class Calibrator:
  """The layers of a model over calibration text, one after the other.

  Args:
    arrays: where they come from: SourceArrays or CheckpointReader (convert.py, checkpoint.py).
    chunks: int32 [chunks, tokens], each a prompt of its own.
    rounding: how weights are rounded that come from a source ("nearest", "mse" or "gptq"); what is float8 already is kept.
    scales: which of SCALES the static scales are; None for none at all.
  """

  def __init__(self, arrays: SourceArrays | CheckpointReader, chunks: np.ndarray, rounding: str, scales: str | None):
    check_rounding(rounding)
    if scales is not None and scales not in SCALES:
      raise InputError(f"calibrate: scales must be one of {', '.join(SCALES)}; got {scales!r}.")
    if rounding != "nearest" and not isinstance(arrays, SourceArrays):
      raise InputError(
        "calibrate: weights that are float8 already are never rounded again. Pass the source, or rounding=nearest."
      )
    self.arrays, self.chunks, self.rounding, self.choice = arrays, chunks, rounding, scales
    self.config, self.formats = arrays.config, arrays.formats
    self.recipe = _dynamic(arrays.recipe)
    self.seen: list[Seen] = []

  def layers(self, progress: Progress | None = None) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(layer, {key: array}) of each layer in order, as a checkpoint holds it; `seen` grows by what was seen."""
    groups = layout.checkpoint_arrays(self.config, self.recipe, self.formats)
    hidden = self._embed()
    for layer, keys in enumerate(groups[1:]):
      arrays = _read(self.arrays, keys)
      if self.rounding == "gptq":
        arrays |= self._gptq(layer, hidden)
      elif self.rounding == "mse":
        arrays |= self._round(layer, {})
      if self.choice is None and self.rounding != "gptq":
        yield layer, arrays
      else:
        hidden, magnitudes = self._run(layer, arrays, self.recipe, hidden, _count)
        yield layer, arrays | self._scales(layer, magnitudes)
      if progress:
        progress(layer + 1, self.config.num_layers)

  def _embed(self) -> list[tuple[jax.Array, jax.Array]]:
    table = _read(self.arrays, [layout.EMBEDDING])[layout.EMBEDDING]
    groups = [self.chunks[start : start + _ROWS] for start in range(0, len(self.chunks), _ROWS)]
    rows = [jnp.asarray(table[group.reshape(-1)]) for group in groups]
    return [(x, jnp.zeros_like(x)) for x in rows]

  def _gptq(self, layer: int, hidden) -> dict[str, np.ndarray]:
    """This layer's weights rounded for the inputs that the layers before give it, its own being what they were."""
    plain = "f32" if self.recipe.stream == "f32" else "bf16"
    recipe = dataclasses.replace(self.recipe, weights=plain)
    source = SourceArrays(self.arrays.source, recipe)
    keys = layout.checkpoint_arrays(self.config, recipe, source.formats)[layer + 1]
    _, hessians = self._run(layer, source.read(tuple(keys)), recipe, hidden, _hessians)
    return self._round(layer, hessians)

  def _round(self, layer: int, hessians: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    found = {}
    for merged in static_scales.LINEARS:
      if getattr(self.formats[layer], merged) != "fp8":
        continue
      for weight, scale in layout.keys_of(layer, merged, self.recipe.granularity):
        source = self.arrays.source.read(weight.split("[")[0])
        q = round_weights(source, self.recipe.granularity, self.rounding, hessians.get(merged))
        found |= {weight: q.qvalue, scale: q.scale}
    return found

  def _scales(self, layer: int, magnitudes: Mapping[str, Magnitudes]) -> dict[str, np.ndarray]:
    found = {}
    if self.choice is None:
      return found
    for name, sizes in magnitudes.items():
      scales = sizes.scales()
      linear = name in static_scales.LINEARS
      self.seen.append(Seen(layer, name, sizes.amax[0] if linear else sizes.amax, scales))
      if not linear:
        found[static_scales.kv_key(layer, name)] = scales[self.choice]
      elif getattr(self.formats[layer], name) == "fp8":
        found |= {static_scales.input_key(layer, matrix): scales[self.choice][0] for matrix in layout.matrices_of(name)}
    return found

  def _run(self, layer: int, arrays, recipe: Recipe, hidden, collect):
    """(hidden states after the layer, what `collect` made of its inputs): all chunks through one layer."""
    formats = (self.formats[layer] if recipe.weights == "fp8" else LayerFormat.uniform(recipe.weights),)
    # A vocabulary of one: neither embedding nor head has a part in a layer.
    sizes = {"num_layers": 1, "vocab_size": 1, "tied_embeddings": True, "bos_id": None, "eos_ids": ()}
    model = Llama(dataclasses.replace(self.config, **sizes), recipe, formats=formats)
    outside = {layout.EMBEDDING: np.zeros((1, self.config.d_model)), layout.FINAL_NORM: np.ones(self.config.d_model)}

    def read(keys):
      return {key: outside[key] if key in outside else arrays[key.replace(".0.", f".{layer}.", 1)] for key in keys}

    segment = filling.fill(model, filling.whole_arrays(read), None).segments[0]
    after, collected = [], None
    for x, y in hidden:
      batch = PrefillBatch.from_prompts([[0] * self.chunks.shape[1]] * (len(x) // self.chunks.shape[1]))
      cache = KVCache.init(model.config, int(batch.page_table_BM.max()) + 1, recipe.kv)
      x, y, inputs = _one_layer(model.config, segment, x, y, cache, batch)
      collected = collect(collected, inputs, self.config.num_kv_heads)
      after.append((x, y))
    return after, collected


@functools.partial(jax.jit, static_argnums=0)
def _one_layer(config, segment, x, y, cache: KVCache, batch: PrefillBatch):
  """(x, y, inputs): the layer's results, and what its four linears, and its pages, were given."""
  graph, stacked = nnx.split(segment)
  layer = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], stacked))
  inputs: dict[str, jax.Array] = {}
  for name in static_scales.LINEARS:
    owner = layer.attention if name in ("qkv", "o") else layer.mlp
    setattr(owner, name, _listening(getattr(owner, name), functools.partial(inputs.__setitem__, name)))
  x, y, pool = layer(x, y, cache.flatten(), StepContext.of(batch, config))
  inputs |= {"k_scale": pool.k_pages, "v_scale": pool.v_pages}
  return x, y, inputs


def _listening(linear: Linear, hear: Callable[[jax.Array], None]) -> Linear:
  """The same linear, which tells its inputs while it is traced."""

  class Listening(Linear):
    def sums(self, x_TD, out_dtype=None):
      hear(x_TD)
      return super().sums(x_TD, out_dtype)

  return Listening(linear.weight.get_value(), linear.weight.get_metadata("partition"), linear.runtime)


def _count(magnitudes: dict[str, Magnitudes] | None, inputs, num_kv_heads: int) -> dict[str, Magnitudes]:
  """Pages hold zeros where no token is, which no choice of a scale hears of but as zeros."""
  if magnitudes is None:
    magnitudes = {name: Magnitudes(1 if name in static_scales.LINEARS else num_kv_heads) for name in inputs}
  for name, values in inputs.items():
    array = np.asarray(values.astype(jnp.float32))
    magnitudes[name].add(array[None] if name in static_scales.LINEARS else array.swapaxes(0, 1))
  return magnitudes


def _hessians(hessians: dict[str, jax.Array] | None, inputs, num_kv_heads: int) -> dict[str, jax.Array]:
  found = {name: _gram(inputs[name]) for name in static_scales.LINEARS}
  return found if hessians is None else {name: hessians[name] + found[name] for name in found}


@jax.jit
def _gram(x_TD: jax.Array) -> jax.Array:
  x = x_TD.astype(jnp.float32)
  return jax.lax.dot_general(x, x, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
