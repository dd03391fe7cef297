"""A source in the form of a checkpoint: which of its matrices stay float8 and which are quantized, and how.

    the source's matrix is   recipe fp8                                                  recipe bf16 or f32
    float8                   as it came: values and scales are never rounded again       dequantized
    plain                    quantized; in the stream's dtype if `keep` matches, or if   converted
                             the source holds float8 (then it was left out on purpose)

Matrices that are merged in memory (q, k and v; gate and up) are kept apart if some came as float8 and others did not, or with
other scales. A plain source is quantized by this module, and there all of them stay plain if `keep` matches one.

Arrays are computed when they are read. Refuses to know file formats (readers/) and files on disk.
"""

import functools
import pathlib
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxfp8.checkpoint.dequantize_on_read import dequantize_part
from jaxfp8.checkpoint.device_arrays import whole_arrays
from jaxfp8.checkpoint.readers import Source
from jaxfp8.checkpoint.stored_arrays import ArraySpec, Read, checkpoint_arrays, merged_modules, static_key
from jaxfp8.errors import InputError
from jaxfp8.model import fp8
from jaxfp8.recipe import BLOCK, Granularity, LayerFormat, Precision, Recipe

_CHUNK = 16 << 20  # weights quantized together: the float32 copies stay small whatever the matrix


class QuantizedSource:
  """The arrays that a checkpoint of `source` in `recipe` has, computed when they are read.

  Args:
    keep: regular expressions; a matrix is not float8 if one of them matches some part of its module's name.
    static: the source's static scales that are taken over: "inputs", "kv" (of keys and values), or both.

  Attributes:
    formats: the format of each layer's matrices.
    exceptions: module -> "channel" or "block128" of a float8 head or embedding, which are bf16 in memory.
    static_scales: names of the static scales that are taken over.
    expected: key -> shape and dtype of every array.
    notes: sentences about matrices that are stored otherwise than asked for.

  Raises:
    InputError: scales of the source that contradict the recipe; an expression that matches nothing.
  """

  def __init__(self, source: Source, recipe: Recipe, keep: Sequence[str] = (), static: Sequence[str] = ("inputs", "kv")):
    self.source, self.recipe = source, recipe
    self.notes: list[str] = []
    granularities = {module: source.granularity(f"{module}.weight") for module in _modules(source)}
    self._quantized = {module: kind for module, kind in granularities.items() if kind}
    self._keep = _matches(keep, list(granularities))
    if recipe.weights == "fp8":
      self._check_granularity()
    self.exceptions: dict[str, str] = {}
    self.formats = tuple(self._format(layer) for layer in range(source.config.num_layers))
    self._keep_tables()
    self.static_scales = tuple(name for name in source.static_scales() if self._takes_over(name, static))
    groups = checkpoint_arrays(source.config, recipe, self.formats, self.exceptions, self.static_scales)
    self.expected: dict[str, ArraySpec] = {key: spec for group in groups for key, spec in group.items()}
    self._static = {static_key(name): name for name in self.static_scales}

  @property
  def path(self) -> pathlib.Path:
    return self.source.path

  def _check_granularity(self) -> None:
    stored, asked = source_granularity(self.source), self.recipe.granularity
    if stored and stored != asked and (stored != Granularity.TENSOR or asked != Granularity.CHANNEL):
      raise InputError(
        f"convert: {self.source.path} holds float8 weights with {stored} scales, which are never rounded again; got "
        f"granularity={asked!r}. Leave it out, or pass {str(stored)!r}."
      )

  def _format(self, layer: int) -> LayerFormat:
    """The formats of a layer's matrices. Adds to `notes`."""
    formats = {}
    for merged, modules in merged_modules(layer).items():
      formats[merged] = self.recipe.weights
      if self.recipe.weights != "fp8":
        continue
      kinds = [self._kind(module) for module in modules]
      if any(kinds) and not all(kinds) and not self._quantized:
        self.notes.append(f"{', '.join(modules)} are one matrix in memory: all stay in {self.recipe.stream}")
        kinds = [None] * len(kinds)
      formats[merged] = [self._word(kind) for kind in kinds]
      if len(set(kinds)) > 1:
        parts = ", ".join(f"{module} ({kind or self.recipe.stream})" for module, kind in zip(modules, kinds, strict=True))
        self.notes.append(f"{parts} differ, so they are separate matrices in memory, which cost more launches than one")
    return LayerFormat(**formats)

  def _word(self, kind: str | None) -> str:
    """The MatrixFormat of a matrix with such scales."""
    if kind is None:
      return self.recipe.stream
    return Precision.FP8 if kind == self._own_scales else f"{Precision.FP8}_{kind}"

  @property
  def _own_scales(self) -> str:
    """The scales of the recipe's own granularity as they are stored: one scale per tensor is stored as one per channel."""
    return Granularity.BLOCK128 if self.recipe.has_block_scales else Granularity.CHANNEL

  def _kind(self, module: str) -> str | None:
    """Scales that a matrix has in an fp8 checkpoint, "channel" or "block128"; None if the matrix is not float8."""
    if module in self._keep:
      return None
    stored = self._quantized.get(module)
    if stored or self._quantized:
      return Granularity.CHANNEL if stored == Granularity.TENSOR else stored
    return self._own_scales

  def _keep_tables(self) -> None:
    """Stores a float8 head or embedding as it came; both are bf16 in memory."""
    if self.recipe.weights != "fp8":
      return
    for module in ("model.embed_tokens", "lm_head"):
      stored = self._quantized.get(module)
      if stored and module not in self._keep and not (module == "lm_head" and self.source.config.tied_embeddings):
        self.exceptions[module] = Granularity.CHANNEL if stored == Granularity.TENSOR else stored
        self.notes.append(f"{module} stays float8 on disk and is dequantized to {self.recipe.stream} in memory")

  def _takes_over(self, name: str, static: Sequence[str]) -> bool:
    if not name.endswith(".input_scale"):
      return "kv" in static
    return "inputs" in static and self.recipe.weights == "fp8" and name.removesuffix(".input_scale") not in self._keep

  def range_reader(self) -> Read:
    return whole_arrays(self.read)

  def read_array(self, key: str) -> np.ndarray:
    return self.read((key,))[key]

  def read(self, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """{key: array} as a checkpoint stores it. A matrix is read and quantized once for its weight and its scale together."""
    by_module: dict[str, list[str]] = {}
    arrays = {}
    for key in keys:
      if key in self._static:
        arrays[key] = self.source.read_static(self._static[key])
      else:
        by_module.setdefault(key.rsplit(".", 1)[0], []).append(key)
    for module, module_keys in by_module.items():
      arrays |= self._convert(module, module_keys)
    return arrays

  def _convert(self, module: str, keys: list[str]) -> dict[str, np.ndarray]:
    name = f"{module}.weight"
    is_scale = [".scale[" in key for key in keys]
    dtype = Precision.F32.dtype if all(is_scale) else self.expected[keys[is_scale.index(False)]].dtype
    is_float8 = any(is_scale) or dtype == Precision.FP8.dtype
    if is_float8 and module in self._quantized:  # as it came
      return {
        key: self.source.read_scale(name) if scale else self.source.read(name)
        for key, scale in zip(keys, is_scale, strict=True)
      }
    if is_float8:
      value, scales = _quantize(self.source.read(name), self.recipe.granularity)
      return {key: scales if scale else value for key, scale in zip(keys, is_scale, strict=True)}
    array = self.source.read(name)
    if module in self._quantized:
      array = dequantize_part(array, self.source.read_scale(name))
    (key,) = keys
    return {key: array.astype(dtype, copy=False)}


def default_recipe(source: Source, weights: str = "fp8", granularity: str | None = None) -> Recipe:
  """Float8 with `granularity`, or else the source's own scales, or else one scale per channel."""
  return Recipe(weights, granularity or source_granularity(source) or Granularity.CHANNEL)


def source_granularity(source: Source) -> str | None:
  """The granularity of most scales in a source's layers: "tensor" if all are, "channel" or "block128"; None without float8."""
  kinds = [kind for module in _modules(source) if "layers" in module and (kind := source.granularity(f"{module}.weight"))]
  if not kinds:
    return None
  if 2 * kinds.count(Granularity.BLOCK128) > len(kinds):
    return Granularity.BLOCK128
  return Granularity.TENSOR if set(kinds) == {Granularity.TENSOR} else Granularity.CHANNEL


def has_input_scales(source: Source) -> bool:
  """Whether the source has static scales of inputs."""
  return any(name.endswith(".input_scale") for name in source.static_scales())


def _modules(source: Source) -> list[str]:
  """The name of every matrix's module."""
  return [name.removesuffix(".weight") for name in source.names() if len(source.shape(name)) == 2]


def _matches(keep: Sequence[str], modules: list[str]) -> set[str]:
  """The modules that `keep` matches. Raises InputError for an expression that is malformed or matches none."""
  matched = set()
  for expression in keep:
    try:
      modules_matched = {module for module in modules if re.search(expression, module)}
    except re.error as error:
      raise InputError(f"convert: keep_bf16 must be regular expressions; got {expression!r}: {error}.") from error
    if not modules_matched:
      raise InputError(
        f"convert: keep_bf16 {expression!r} matches no matrix; they are called like model.layers.0.self_attn.q_proj. "
        "Pass an expression that matches some."
      )
    matched |= modules_matched
  return matched


def _quantize(w: np.ndarray, granularity: str) -> tuple[np.ndarray, np.ndarray]:
  """(float8 [F, D], scales) by fp8.quantize, some rows at a time; on the CPU, whatever the default device."""
  with jax.default_device(jax.local_devices(backend="cpu")[0]):
    rows = max(1, _CHUNK // w.shape[1] // BLOCK) * BLOCK
    if w.shape[0] <= rows:
      q = _quantizer(granularity)(w)
      return np.asarray(q.qvalue), np.asarray(q.scale)
    chunks = [w[start : start + rows] for start in range(0, w.shape[0], rows)]
    value, scales, tensor_scale = np.empty(w.shape, Precision.FP8.dtype), [], None
    if granularity == Granularity.TENSOR:
      amax = max(float(_largest(chunk)) for chunk in chunks)
      tensor_scale = fp8.scale_of(jnp.float32(amax))
    for index, chunk in enumerate(chunks):
      target = value[index * rows : index * rows + len(chunk)]
      if tensor_scale is not None:
        target[...] = _with_scale(chunk, tensor_scale)
      else:
        q = _quantizer(granularity)(chunk)
        target[...] = q.qvalue
        scales.append(np.asarray(q.scale))
    return value, np.concatenate(scales) if tensor_scale is None else np.full(w.shape[:1], tensor_scale, np.float32)


@functools.cache
def _quantizer(granularity: str):
  return jax.jit(functools.partial(fp8.quantize, granularity=granularity))


@jax.jit
def _largest(w: jax.Array) -> jax.Array:
  return jnp.max(jnp.abs(w)).astype(jnp.float32)


@jax.jit
def _with_scale(w: jax.Array, scale: jax.Array) -> jax.Array:
  return fp8.to_float8(w.astype(jnp.float32) * (1 / scale))
