"""Runs text through a model layer by layer, and chooses from what it sees: static scales, and better rounded weights.

    calibrate(path, new folder, chunks, recipe, ..)   writes a checkpoint; one layer in memory at a time
    Calibrator(source, recipe, chunks, ..).layers()   the same as arrays, for a model in memory

Each layer's weights are read, run over all chunks with the model's own code (one layer of it, on the default device), and let
go; only the hidden states of the text stay, [tokens, D] twice. Every layer sees what the layers before it, as they are
written, give. Inputs of linears, and keys and values, are counted by size (observers.py), from which each choice of a scale
follows. Refuses to know text and flags.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxfp8.checkpoint import static_scales, stored_arrays
from jaxfp8.checkpoint.convert import versions
from jaxfp8.checkpoint.dequantize_on_read import dequantize_on_read
from jaxfp8.checkpoint.device_arrays import load_arrays, whole_arrays
from jaxfp8.checkpoint.layout import merged_linear
from jaxfp8.checkpoint.load import abstract_model, load_into
from jaxfp8.checkpoint.manifest import Manifest
from jaxfp8.checkpoint.open import Checkpoint, open_checkpoint
from jaxfp8.checkpoint.quantized_source import QuantizedSource, default_recipe
from jaxfp8.checkpoint.readers import Source
from jaxfp8.checkpoint.stored_arrays import ArraySpec, Range
from jaxfp8.checkpoint.writer import CheckpointWriter
from jaxfp8.errors import InputError
from jaxfp8.model.batch import PrefillBatch
from jaxfp8.model.kv_cache import KVCache
from jaxfp8.model.layers import Linear, SplitLinear
from jaxfp8.model.llama import Llama
from jaxfp8.model.step_context import StepContext
from jaxfp8.quantization.observers import SCALE_CHOICES, HistogramObserver
from jaxfp8.quantization.rounding import Inputs, check_rounding, round_weights
from jaxfp8.recipe import Precision, Recipe

_ROWS = 8  # chunks that run at a time
Progress = Callable[[int, int], None]  # (layers done, of how many)


@dataclasses.dataclass(frozen=True)
class Observation:
  """What one matrix's inputs, or keys or values, were: amax and the scales that each choice gives, [1] or [K]."""

  layer: int
  name: str  # qkv, o, gate_up, down, k_scale or v_scale
  amax: np.ndarray
  scales: Mapping[str, np.ndarray]


def calibrate(
  path: Source | str | os.PathLike | None,
  folder: str | os.PathLike,
  chunks: np.ndarray,
  recipe: Recipe | None = None,
  *,
  rounding: str = "nearest",
  scales: str = "max",
  keep_bf16: Sequence[str] = (),
  provenance: Mapping[str, Any] | None = None,
  late: Callable[[], Mapping[str, Any]] | None = None,
  check: Callable[[pathlib.Path], Mapping[str, Any]] | None = None,
  progress: Progress | None = None,
) -> "Calibrator":
  """Writes `path`, with static scales and by `rounding`, as the new checkpoint `folder`; one layer in memory at a time.

  Args:
    path: a Hugging Face folder, a GGUF file or a checkpoint of jaxfp8; None: the default model. Float8 weights are kept.
    chunks: int32 [chunks, tokens] of calibration text, such as `quality.cut_training_chunks` gives.
    recipe: what the checkpoint is for. None: float8 weights (or those that are there) with static scales for everything.
    rounding: "nearest", "mse" or "gptq" (rounding.py), for a source that is not float8 yet.
    scales: "max", "percentile" or "mse": which of the sizes seen is the largest to be represented.
    keep_bf16: as in `convert_checkpoint`.
    provenance: plain values that are stored beside what was chosen.
    late, check: more to store, as `provenance` (where it is a function) and `check` of `convert_checkpoint`.

  Returns a Calibrator that is done: `seen` is what was seen, layer by layer; `arrays.notes` what is stored otherwise than asked
  for. Raises InputError for bad weights, unusable options, an existing folder or a full disk;
  nothing is then left behind.
  """
  source = open_checkpoint(path)
  recipe = recipe or all_static(source.manifest.recipe if isinstance(source, Checkpoint) else default_recipe(source))
  calibrator = Calibrator(source, recipe, chunks, rounding, scales, keep_bf16=keep_bf16)
  arrays = calibrator.arrays
  facts = {"rounding": rounding, "scales": scales, "tokens": int(chunks.size), **(provenance or {})}
  about = {"source": source.path.name, "dialect": source.dialect, "versions": versions(), "calibration": facts}
  names = tuple(key.partition("[")[0] for key in calibrator.static_keys())
  manifest = Manifest(source.config, recipe, arrays.formats, source.find_tokenizer(), about, dict(arrays.exceptions), names)
  with CheckpointWriter(folder, manifest, late=late, check=check) as writer:
    writer.write(arrays.read(tuple(calibrator.groups[0])))
    for _, group in calibrator.layers(progress):
      writer.write(group)
  return calibrator


def load_calibrated(model: Llama, calibrator: "Calibrator", calibrated: Mapping[str, np.ndarray]) -> Llama:
  """Fills an abstract model on one device with what `calibrator.layers()` gave, and the rest from its source."""
  arrays = calibrator.arrays

  def read(keys):
    rest = tuple(key for key in keys if key not in calibrated)
    return {key: calibrated[key] for key in keys if key in calibrated} | (arrays.read(rest) if rest else {})

  scales = {key: calibrated[key] for key in static_scales.required_keys(model) if key in calibrated}
  return load_into(model, arrays, read=whole_arrays(read), scales=scales)


def abstract_calibrated(calibrator: "Calibrator", recipe: Recipe, implementation: str = "auto") -> Llama:
  """The model of shapes for `load_calibrated`: `recipe` may differ from the calibrator's in activations and kv."""
  return abstract_model(calibrator.arrays.source.config, recipe, calibrator.arrays.formats, None, implementation)


def all_static(recipe: Recipe) -> Recipe:
  """The recipe with static scales for whatever in it can have them."""
  activations = Precision.FP8_STATIC if recipe.weights == "fp8" else recipe.activations
  return dataclasses.replace(recipe, activations=activations, kv=Precision.FP8_STATIC)


class Calibrator:
  """The layers of a model over calibration text, one after the other.

  Args: as `calibrate`'s; without `scales` nothing is measured. Raises InputError for unusable options.
  """

  def __init__(
    self,
    source: Source,
    recipe: Recipe,
    chunks: np.ndarray,
    rounding: str = "nearest",
    scales: str | None = "max",
    *,
    keep_bf16: Sequence[str] = (),
  ):
    check_rounding(rounding)
    if scales is not None and scales not in SCALE_CHOICES:
      raise InputError(f"calibrate: scales must be one of {', '.join(SCALE_CHOICES)}; got {scales!r}.")
    if rounding != "nearest" and any(source.granularity(name) for name in source.names()):
      raise InputError(
        f"calibrate: {source.path} is float8 already, and such weights are never rounded again. Pass the source, or "
        "rounding=nearest."
      )
    # Text runs with activations that are not float8, so that what is seen is what will be rounded.
    self.recipe = dataclasses.replace(recipe, activations=recipe.stream, kv=recipe.stream)
    self.arrays = QuantizedSource(source, self.recipe, keep_bf16, static=())
    self.config, self.formats = source.config, self.arrays.formats
    self.chunks, self.rounding, self.choice = chunks, rounding, scales
    self.groups = stored_arrays.checkpoint_arrays(self.config, self.recipe, self.formats, self.arrays.exceptions)
    self.seen: list[Observation] = []

  def static_keys(self) -> list[str]:
    """The keys of all static scales that `layers` gives."""
    layers = range(self.config.num_layers if self.choice else 0)
    inputs = [key for layer in layers for merged in static_scales.LINEARS for key in self._input_keys(layer, merged)]
    return inputs + [static_scales.kv_key(layer, name) for layer in layers for name in static_scales.KV]

  def layers(self, progress: Progress | None = None) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(layer, {key: array}) of each layer in order, as a checkpoint holds it; `seen` grows by what was seen."""
    hidden = self._embed()
    for layer, keys in enumerate(self.groups[1:]):
      arrays = self.arrays.read(tuple(keys))
      if self.rounding == "gptq":
        arrays |= self._gptq(layer, hidden)
      elif self.rounding == "mse":
        arrays |= self._round(layer, {})
      if self.choice or self.rounding == "gptq":
        hidden, observers = self._run(layer, arrays, self.arrays, hidden, _count if self.choice else None)
        arrays |= self._scales(layer, observers)
      yield layer, arrays
      if progress:
        progress(layer + 1, self.config.num_layers)

  def _input_keys(self, layer: int, merged: str) -> list[str]:
    return static_scales.input_keys(layer, merged, self.formats[layer])

  def _embed(self) -> list[tuple[jax.Array, jax.Array]]:
    dtype, whole = self.recipe.stream.dtype, Range(stored_arrays.EMBEDDING, 0, 0, self.config.vocab_size)
    read = dequantize_on_read(whole_arrays(self.arrays.read), self.arrays.exceptions, self.arrays.expected, dtype)
    table = read([whole])[whole]
    groups = [self.chunks[start : start + _ROWS] for start in range(0, len(self.chunks), _ROWS)]
    rows = [jnp.asarray(table[group.reshape(-1)]) for group in groups]
    return [(x, jnp.zeros_like(x)) for x in rows]

  def _gptq(self, layer: int, hidden) -> dict[str, np.ndarray]:
    """This layer's weights rounded for the inputs that the layers before give it, its own being what they were."""
    plain = QuantizedSource(self.arrays.source, dataclasses.replace(self.recipe, weights=self.recipe.stream), static=())
    keys = stored_arrays.checkpoint_arrays(self.config, plain.recipe, plain.formats)[layer + 1]
    _, hessians = self._run(layer, plain.read(tuple(keys)), plain, hidden, _hessians)
    return self._round(layer, hessians)

  def _round(self, layer: int, hessians: Mapping[str, jax.Array] | None) -> dict[str, np.ndarray]:
    rounded, granularity = {}, self.recipe.granularity
    for merged, matrices in stored_arrays.MERGED_MATRICES.items():
      if not self._input_keys(layer, merged):
        continue
      inputs = Inputs.of(np.asarray(hessians[merged])) if hessians else None
      for matrix in matrices.items():
        weight = stored_arrays.weight_key(layer, *matrix)
        q = round_weights(self.arrays.source.read(weight.split("[")[0]), granularity, self.rounding, inputs)
        rounded |= {weight: q.qvalue, stored_arrays.scale_key(layer, *matrix, granularity): q.scale}
    return rounded

  def _scales(self, layer: int, observers: Mapping[str, HistogramObserver] | None) -> dict[str, np.ndarray]:
    static = {}
    for name, observer in (observers or {}).items():
      scales, choice = observer.scales(), self.choice or ""  # only a calibrator with a choice has observers
      self.seen.append(Observation(layer, name, observer.amax, scales))
      if name in static_scales.KV:
        static[static_scales.kv_key(layer, name)] = scales[choice]
      else:
        static |= {key: np.asarray(scales[choice][0]) for key in self._input_keys(layer, name)}
    return static

  def _run(self, layer: int, arrays: Mapping[str, np.ndarray], of: QuantizedSource, hidden, collect):
    """(hidden states after the layer, what `collect` made of its inputs): all chunks through one layer."""
    # A vocabulary of one: neither embedding nor head has a part in a layer.
    sizes = {"num_layers": 1, "vocab_size": 1, "tied_embeddings": True, "bos_id": None, "eos_ids": ()}
    model = Llama(dataclasses.replace(self.config, **sizes), of.recipe, formats=(of.formats[layer],))
    mine, first = f"model.layers.{layer}.", "model.layers.0."
    D = self.config.d_model
    outside = {stored_arrays.EMBEDDING: np.zeros((1, D)), stored_arrays.FINAL_NORM: np.ones(D)}
    renamed = {key.replace(mine, first, 1): array for key, array in arrays.items()} | outside
    exceptions = {key.replace(mine, first, 1): kind for key, kind in of.exceptions.items() if key.startswith(mine)}
    expected = {key: ArraySpec(array.shape, array.dtype) for key, array in renamed.items()}
    read = whole_arrays(lambda keys: {key: renamed[key] for key in keys})
    read = dequantize_on_read(read, exceptions, expected, of.recipe.stream.dtype)
    segment, after, collected = load_arrays(model, read, None).segments[0], [], None
    for x, y in hidden:
      batch = PrefillBatch.from_prompts([[0] * self.chunks.shape[1]] * (len(x) // self.chunks.shape[1]))
      cache = KVCache.init(model.config, int(batch.page_table_BM.max()) + 1, of.recipe.kv)
      x, y, inputs = _one_layer(model.config, segment, x, y, cache, batch)
      if collect:
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
    _listen(merged_linear(layer, name), functools.partial(inputs.__setitem__, name))
  x, y, pool = layer(x, y, cache.flatten(), StepContext.of(batch, config))
  inputs |= {"k_scale": pool.k_pages, "v_scale": pool.v_pages}
  return x, y, inputs


def _listen(linear: Linear | SplitLinear, hear: Callable[[Any], None]) -> None:
  """Lets a linear tell its inputs while it is traced."""
  partial_sums = linear.partial_sums

  def listening(x_TD, out_dtype=None):
    hear(x_TD)
    return partial_sums(x_TD, out_dtype)

  object.__setattr__(linear, "partial_sums", listening)


def _count(observers: dict[str, HistogramObserver] | None, inputs, num_kv_heads: int) -> dict[str, HistogramObserver]:
  """Pages hold zeros where no token is; they change no scale."""
  if observers is None:
    observers = {name: HistogramObserver(1 if name in static_scales.LINEARS else num_kv_heads) for name in inputs}
  for name, values in inputs.items():
    array = np.asarray(values.astype(jnp.float32))
    observers[name].add(array[None] if name in static_scales.LINEARS else array.swapaxes(0, 1))
  return observers


def _hessians(hessians: dict[str, jax.Array] | None, inputs, num_kv_heads: int) -> dict[str, jax.Array]:
  grams = {name: _gram(inputs[name]) for name in static_scales.LINEARS}
  return grams if hessians is None else {name: hessians[name] + grams[name] for name in grams}


@jax.jit
def _gram(x_TD: jax.Array) -> jax.Array:
  x = x_TD.astype(jnp.float32)
  return jax.lax.dot_general(x, x, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
