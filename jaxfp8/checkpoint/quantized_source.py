"""What a checkpoint made of a source holds, and its arrays one by one: which matrix stays float8, which is quantized, how.

    the source's matrix is   recipe fp8                                                  recipe bf16 or f32
    float8                   as it came: values and scales are never rounded again       dequantized
    plain                    quantized; left in the stream's dtype where `keep` matches, dequantized
                             and everywhere if the source holds float8 (then it was left out on purpose)

Refuses to know file formats (readers/) and files on disk.
"""

import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxfp8.checkpoint import layout
from jaxfp8.checkpoint.dequantize_on_read import dequantize
from jaxfp8.checkpoint.readers import Source
from jaxfp8.errors import InputError
from jaxfp8.model import fp8
from jaxfp8.recipe import BLOCK, LayerFormat, Precision, Recipe

_CHUNK = 16 << 20  # weights quantized together: the float32 copies stay small whatever the matrix


class SourceArrays:
  """The arrays that a checkpoint of `source` in `recipe` has, computed when they are read.

  Args:
    keep: regular expressions; a matrix whose module's name they match somewhere is not float8.
    static: whether the source's scales of inputs are taken over ("inputs"), and those of keys and values ("kv").

  Raises:
    InputError: scales of the source that the recipe does not want; an expression that matches nothing.
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
    self.static_scales = tuple(name for name in source.static_scales() if self._wants(name, static))
    groups = layout.checkpoint_arrays(source.config, recipe, self.formats, self.exceptions, self.static_scales)
    self.expected = {key: value for group in groups for key, value in group.items()}
    self._static = {layout.static_key(name): name for name in self.static_scales}

  def _check_granularity(self) -> None:
    own = source_granularity(self.source)
    if own and (own == "block128") != (self.recipe.granularity == "block128"):
      raise InputError(
        f"convert: {self.source.path} holds float8 weights with {own} scales, which are never rounded again; got "
        f"granularity={self.recipe.granularity!r}. Leave it out, or pass {own!r}."
      )

  def _format(self, layer: int) -> LayerFormat:
    """How each merged matrix of a layer is kept in memory; notes what is stored otherwise."""
    formats = {}
    for merged, modules in layout.merged_modules(layer).items():
      formats[merged] = self.recipe.weights
      if self.recipe.weights != "fp8":
        continue
      kinds = [self._kind(module) for module in modules]
      wanted = "block128" if self.recipe.granularity == "block128" else "channel"
      if all(kind == wanted for kind in kinds):
        continue
      formats[merged] = self.recipe.stream
      stay = [(module, kind) for module, kind in zip(modules, kinds, strict=True) if kind and module in self._quantized]
      self.exceptions |= dict(stay)
      if stay:
        self.notes.append(
          f"{', '.join(module for module, _ in stay)} stays float8 on disk and is widened to {self.recipe.stream} in memory, "
          f"since {merged} is one matrix there and its parts are not alike"
        )
      elif None in kinds and any(kinds):
        self.notes.append(f"{', '.join(modules)} are one matrix in memory: all stay in {self.recipe.stream}")
    return LayerFormat(**formats)

  def _kind(self, module: str) -> str | None:
    """Scales that a matrix has in an fp8 checkpoint: "channel" or "block128"; None for one that is not float8."""
    if module in self._keep:
      return None
    own = self._quantized.get(module)
    if own or self._quantized:
      return "channel" if own == "tensor" else own
    return "block128" if self.recipe.granularity == "block128" else "channel"

  def _keep_tables(self) -> None:
    """A float8 head or embedding is stored as it came, and bf16 in memory."""
    if self.recipe.weights != "fp8":
      return
    for module in ("model.embed_tokens", "lm_head"):
      own = self._quantized.get(module)
      if own and module not in self._keep and not (module == "lm_head" and self.source.config.tied_embeddings):
        self.exceptions[module] = "channel" if own == "tensor" else own
        self.notes.append(f"{module} stays float8 on disk and is widened to {self.recipe.stream} in memory")

  def _wants(self, name: str, static: Sequence[str]) -> bool:
    if not name.endswith(".input_scale"):
      return "kv" in static
    return "inputs" in static and self.recipe.weights == "fp8" and name.removesuffix(".input_scale") not in self._keep

  def read(self, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """{key: array} as stored; a matrix whose weight and scale are both asked for is read and quantized once."""
    by_module: dict[str, list[str]] = {}
    arrays = {}
    for key in keys:
      if key in self._static:
        arrays[key] = self.source.read_static(self._static[key])
      else:
        by_module.setdefault(key.rsplit(".", 1)[0], []).append(key)
    for module, wanted in by_module.items():
      arrays |= self._convert(module, wanted)
    return arrays

  def _convert(self, module: str, keys: list[str]) -> dict[str, np.ndarray]:
    name = f"{module}.weight"
    is_scale = [".scale[" in key for key in keys]
    dtype = np.dtype(np.float32)
    if not all(is_scale):
      dtype = self.expected[keys[is_scale.index(False)]][1]
    float8 = any(is_scale) or dtype == Precision.FP8.dtype
    if float8 and module in self._quantized:  # as it came
      return {
        key: self.source.read_scale(name) if scale else self.source.read(name)
        for key, scale in zip(keys, is_scale, strict=True)
      }
    if float8:
      q = _quantize(self.source.read(name), self.recipe.granularity)
      return {key: q[1] if scale else q[0] for key, scale in zip(keys, is_scale, strict=True)}
    array = self.source.read(name)
    if module in self._quantized:
      array = dequantize(array, self.source.read_scale(name))
    (key,) = keys
    return {key: array.astype(dtype, copy=False)}


def source_granularity(source: Source) -> str | None:
  """What most scales of a source's layers cover: "tensor" (where all do), "channel" or "block128"; None without float8."""
  kinds = [kind for module in _modules(source) if "layers" in module and (kind := source.granularity(f"{module}.weight"))]
  if not kinds:
    return None
  if 2 * kinds.count("block128") > len(kinds):
    return "block128"
  return "tensor" if set(kinds) == {"tensor"} else "channel"


def has_inputs(source: Source) -> bool:
  return any(name.endswith(".input_scale") for name in source.static_scales())


def _modules(source: Source) -> list[str]:
  """Every matrix, by its module's name."""
  return [name.removesuffix(".weight") for name in source.names() if len(source.shape(name)) == 2]


def _matches(keep: Sequence[str], modules: list[str]) -> set[str]:
  found = set()
  for expression in keep:
    try:
      matched = {module for module in modules if re.search(expression, module)}
    except re.error as error:
      raise InputError(f"convert: keep_bf16 must be regular expressions; got {expression!r}: {error}.") from error
    if not matched:
      raise InputError(
        f"convert: keep_bf16 {expression!r} matches no matrix; they are called like model.layers.0.self_attn.q_proj. "
        "Pass an expression that matches some."
      )
    found |= matched
  return found


def _quantize(w: np.ndarray, granularity: str) -> tuple[np.ndarray, np.ndarray]:
  """(float8 [F, D], scales) by fp8.quantize, some rows at a time; on the CPU, whatever the default device."""
  with jax.default_device(jax.local_devices(backend="cpu")[0]):
    rows = max(1, _CHUNK // w.shape[1] // BLOCK) * BLOCK
    if w.shape[0] <= rows:
      q = _quantizer(granularity)(w)
      return np.asarray(q.qvalue), np.asarray(q.scale)
    chunks = [w[start : start + rows] for start in range(0, w.shape[0], rows)]
    value, scales = np.empty(w.shape, Precision.FP8.dtype), []
    if granularity == "tensor":
      amax = max(float(_largest(chunk)) for chunk in chunks)
      scale = fp8.scale_of(jnp.float32(amax))
    for place, chunk in enumerate(chunks):
      target = value[place * rows : place * rows + len(chunk)]
      if granularity == "tensor":
        target[...] = _with_scale(chunk, scale)
      else:
        q = _quantizer(granularity)(chunk)
        target[...] = q.qvalue
        scales.append(np.asarray(q.scale))
    return value, np.full(w.shape[:1], scale, np.float32) if granularity == "tensor" else np.concatenate(scales)


@functools.cache
def _quantizer(granularity: str):
  return jax.jit(functools.partial(fp8.quantize, granularity=granularity))


@jax.jit
def _largest(w: jax.Array) -> jax.Array:
  return jnp.max(jnp.abs(w)).astype(jnp.float32)


@jax.jit
def _with_scale(w: jax.Array, scale: jax.Array) -> jax.Array:
  return fp8.to_float8(w.astype(jnp.float32) * (1 / scale))
