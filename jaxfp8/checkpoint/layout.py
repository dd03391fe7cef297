"""How the arrays of a checkpoint become the arrays of a model, and back: the only file that knows both.

In a checkpoint: one array per layer and matrix, unmerged, [out, in], Hugging Face's names with the letters of the axes:

    model.layers.3.self_attn.k_proj.weight[KH,D]   float8, bf16 or f32
    model.layers.3.self_attn.k_proj.scale[KH]      float32, beside float8 only; [KH/128,D/128] for block scales
    model.layers.3.self_attn.q_proj.input_scale[]  float32, where the source has static activation scales: one a matrix
    model.layers.3.self_attn.k_scale[K]            float32, where it has scales of keys (v_scale: values), one a KV head

What cannot be part of a merged array as it is (float8 beside a bf16 neighbour, other scales than the recipe's, a float8 head)
is stored as it came, listed in the manifest's `exceptions`, and widened when it is loaded (widening.py).

In a model: merged, padded, replicated for a mesh and stacked per segment (see model.py). Numpy only, no I/O: `parts` says
from which rows or columns of which arrays each model weight is built (filling.py does it); `split_layer` takes one layer of a
model apart again.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType

import jax
import numpy as np
from flax import nnx

from jaxfp8.config import LlamaConfig
from jaxfp8.model.fp8 import QArray
from jaxfp8.model.layers import DecoderLayer
from jaxfp8.model.llama import Llama
from jaxfp8.recipe import BLOCK, LayerFormat, Precision, Recipe

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight[V,D]", "lm_head.weight[V,D]", "model.norm.weight[D]"
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
# A model's merged array: the matrices of a checkpoint that it holds, each with the letters of its axes.
_MATRICES = {
  "qkv": {"self_attn.q_proj": "NH,D", "self_attn.k_proj": "KH,D", "self_attn.v_proj": "KH,D"},
  "o": {"self_attn.o_proj": "D,NH"},
  "gate_up": {"mlp.gate_proj": "F,D", "mlp.up_proj": "F,D"},
  "down": {"mlp.down_proj": "D,F"},
}


def weight_key(layer: int, matrix: str, letters: str) -> str:
  return f"model.layers.{layer}.{matrix}.weight[{letters}]"


def scale_key(layer: int, matrix: str, letters: str, granularity: str) -> str:
  return scale_of_key(weight_key(layer, matrix, letters), granularity)


def keys_of(layer: int, merged: str, granularity: str) -> list[tuple[str, str]]:
  """(key of the weight, key of its scale) of each of those matrices, for float8 weights."""
  return [(weight_key(layer, *matrix), scale_key(layer, *matrix, granularity)) for matrix in _MATRICES[merged].items()]


def checkpoint_arrays(
  config: LlamaConfig,
  recipe: Recipe,
  formats: tuple[LayerFormat, ...],
  exceptions: Mapping[str, str] = MappingProxyType({}),
  static: Collection[str] = (),
) -> list[dict[str, tuple[tuple[int, ...], np.dtype]]]:
  """Key -> (shape, dtype) of every array of a checkpoint, in groups: the rest first, then each layer.

  exceptions: module -> "channel" or "block128" of a matrix stored as float8 whatever `formats` says.
  static: names of input and KV scales, as `static_key` takes them.
  """
  c = config
  sizes = {"V": c.vocab_size, "D": c.d_model, "F": c.d_ff, "NH": c.num_heads * c.head_dim, "KH": c.num_kv_heads * c.head_dim}
  f32 = np.dtype(np.float32)

  def matrix(key: str, dtype: str, granularity: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    module, letters = split_key(key)
    if module in exceptions:
      dtype, granularity = "fp8", exceptions[module]
    shape = tuple(sizes[letter] for letter in letters.split(","))
    arrays = {key: (shape, Precision(dtype).dtype)}
    if dtype == "fp8":
      blocks = tuple(-(-size // BLOCK) for size in shape)
      arrays[scale_of_key(key, granularity)] = (blocks if granularity == "block128" else shape[:1], f32)
    return arrays

  tables = (EMBEDDING,) if c.tied_embeddings else (EMBEDDING, HEAD)
  groups = [{FINAL_NORM: ((sizes["D"],), f32)}]
  for table in tables:
    groups[0] |= matrix(table, recipe.stream, recipe.granularity)
  for layer, layer_format in enumerate(formats):
    group = {weight_key(layer, norm, "D"): ((sizes["D"],), f32) for norm in _NORMS.values()}
    for merged, matrices in _MATRICES.items():
      for name, letters in matrices.items():
        group |= matrix(weight_key(layer, name, letters), getattr(layer_format, merged), recipe.granularity)
    groups.append(group)
  for name in static:
    layer = int(name.split(".")[2])
    groups[1 + layer][static_key(name)] = ((c.num_kv_heads,) if static_key(name).endswith("[K]") else (), f32)
  return groups


def merged_modules(layer: int) -> dict[str, tuple[str, ...]]:
  """Merged matrix -> the modules (`model.layers.0.self_attn.q_proj`) that it holds."""
  return {merged: tuple(f"model.layers.{layer}.{name}" for name in names) for merged, names in _MATRICES.items()}


def split_key(key: str) -> tuple[str, str]:
  """`model.norm.weight[D]` -> (`model.norm`, `D`)."""
  name, _, letters = key.partition("[")
  return name.rpartition(".")[0], letters.rstrip("]")


def scale_of_key(key: str, granularity: str) -> str:
  """The key of the scale beside a float8 weight's key."""
  module, letters = split_key(key)
  axes = letters.split(",")
  return f"{module}.scale[{','.join(f'{axis}/{BLOCK}' for axis in axes) if granularity == 'block128' else axes[0]}]"


def static_key(name: str) -> str:
  """The key of a static scale: `MODULE.input_scale` is one number, `...self_attn.k_scale` and `v_scale` one a KV head."""
  return name + ("[K]" if name.endswith((".k_scale", ".v_scale")) else "[]")


@dataclasses.dataclass(frozen=True)
class Leaf:
  """How one array of a model is built from checkpoint arrays, so that any part of it can be built alone.

  like: the model's array. keys: the checkpoint arrays that it is merged from, for each layer of its segment; one entry where it
    has no layer axis. axis: of the checkpoint arrays, the one that is merged, padded and cut (0 rows, 1 columns).
  places: for each place along the merged axes where it comes from, `matrix * STRIDE + row` (or column); -1 is padding.
  filler: what padding holds. repeat: with columns, how often each row of a checkpoint array stands in the model's.
  """

  like: jax.ShapeDtypeStruct
  keys: tuple[tuple[str, ...], ...]
  layered: bool
  axis: int
  places: np.ndarray
  filler: float = 0
  repeat: int = 1


@dataclasses.dataclass(frozen=True)
class Part:
  """One model weight; `leaves` in the order of `jax.tree.leaves` of its value."""

  weight: nnx.Param
  leaves: tuple[Leaf, ...]


STRIDE = 1 << 32  # more than any matrix has rows


def parts(model: Llama) -> Iterator[Part]:
  """Every weight of a model in the order of its computation."""
  yield _table(model, model.embedding, EMBEDDING)
  shapes = checkpoint_arrays(model.config, model.recipe, tuple(model.formats))
  for segment, (start, stop, layer_format) in zip(model.segments, model.segment_bounds(), strict=True):
    for name, norm in _NORMS.items():
      keys = tuple((weight_key(layer, norm, "D"),) for layer in range(start, stop))
      weight = getattr(segment, name).weight
      yield Part(weight, (Leaf(weight.get_value(), keys, True, 0, np.arange(model.config.d_model)),))
    for merged in _MATRICES:
      linear = merged_linear(segment, merged)
      yield _stacked(model, linear.weight, merged, range(start, stop), getattr(layer_format, merged), shapes[1 + start])
  final = model.final_norm.weight
  yield Part(final, (Leaf(final.get_value(), ((FINAL_NORM,),), False, 0, np.arange(model.config.d_model)),))
  if not model.config.tied_embeddings:
    yield _table(model, model.head.weight, HEAD)


def _table(model: Llama, weight: nnx.Param, key: str) -> Part:
  like = weight.get_value()
  rows = _pad(np.arange(model.config.vocab_size), like.shape[0], filler=-1)
  return Part(weight, (Leaf(like, ((key,),), False, 0, rows),))


def merged_linear(segment: DecoderLayer, merged: str):
  return getattr(segment.attention if merged in ("qkv", "o") else segment.mlp, merged)


def _stacked(model: Llama, weight: nnx.Param, merged: str, layers: range, dtype: str, shapes) -> Part:
  """The part of one merged matrix over the layers of a segment; `shapes` are those of one layer's checkpoint arrays."""
  target, granularity = weight.get_value(), model.recipe.granularity
  columns = list(_MATRICES[merged].items())
  axis = 1 if merged in ("o", "down") else 0

  def keys_of(name):
    return tuple(tuple(name(layer, *column) for column in columns) for layer in layers)

  def counts(keys, along):
    return [shapes[key][0][along] for key in keys[0]]

  keys = keys_of(weight_key)
  whole = target.qvalue if dtype == "fp8" else target
  leaf = Leaf(whole, keys, True, axis, _places(model, merged, whole.shape[1:], counts(keys, axis), axis))
  if dtype != "fp8":
    return Part(weight, (leaf,))
  keys = keys_of(lambda *where: scale_key(*where, granularity))
  scale = target.scale
  if granularity != "block128":
    places = np.arange(scale.shape[1]) if axis else _places(model, merged, (*scale.shape[1:], 1), counts(keys, 0), 0)
    return Part(weight, (leaf, Leaf(scale, keys, True, 0, places, 1)))
  unit = math.gcd(BLOCK, whole.shape[-2])
  rows = None if axis else [size // unit for size in _output_rows(model, merged)]
  places = _places(model, merged, scale.shape[1:], counts(keys, axis), axis, rows, BLOCK // unit)
  return Part(weight, (leaf, Leaf(scale, keys, True, axis, places, 1, BLOCK // unit if axis else 1)))


def _places(model: Llama, merged: str, shape, counts: list[int], axis: int, rows=None, repeat: int = 1) -> np.ndarray:
  """`Leaf.places`: where rows or columns go is seen by merging their numbers instead of them.

  shape: of one layer's merged array. rows: how many of the repeated rows each matrix has.
  """
  numbers = [matrix * STRIDE + np.arange(count) for matrix, count in enumerate(counts)]
  if axis:
    return _MERGE[merged](model, [own[None] for own in numbers], (1, shape[-1]), -1)[0]
  if rows:
    numbers = [np.repeat(own, repeat)[:size] for own, size in zip(numbers, rows, strict=True)]
  return _MERGE[merged](model, numbers, shape[:-1], -1)


def _output_rows(model: Llama, merged: str) -> list[int]:
  """Rows of each unmerged matrix, F rounded up to whole blocks."""
  c = model.config
  if merged == "qkv":
    return [c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim]
  return [-(-c.d_ff // BLOCK) * BLOCK] * 2


def _merge_qkv(model: Llama, matrices: list[np.ndarray], shape, filler) -> np.ndarray:
  """q, k, v with rows (head, row in head) -> [kv * group * K_local, G / group + 2, rows in head, ...]."""
  K, mesh = model.config.num_kv_heads, model.shape
  q, k, v = matrices
  per_head = k.shape[0] // K
  q = q.reshape(K, mesh.group, -1, per_head, *q.shape[1:])
  k, v = (
    np.broadcast_to(m.reshape(K, 1, 1, per_head, *m.shape[1:]), (K, mesh.group, 1, per_head, *m.shape[1:])) for m in (k, v)
  )
  merged = np.concatenate([q, k, v], axis=2)
  by_device = merged.reshape(mesh.kv, K // mesh.kv, mesh.group, *merged.shape[2:]).swapaxes(1, 2)
  return by_device.reshape(shape)


def _merge_o(model: Llama, matrices: list[np.ndarray], shape, filler) -> np.ndarray:
  """Columns in the order in which devices hold query heads: (kv, group, its KV head, its query head, row in head)."""
  (o,) = matrices
  K, mesh = model.config.num_kv_heads, model.shape
  if mesh.group == 1:  # heads in their own order
    return o
  return o.reshape(len(o), mesh.kv, K // mesh.kv, mesh.group, -1).swapaxes(2, 3).reshape(shape)


def _merge_gate_up(model: Llama, matrices: list[np.ndarray], shape, filler) -> np.ndarray:
  return np.stack([_pad(matrix, shape[1], filler=filler) for matrix in matrices])


def _merge_one(model: Llama, matrices: list[np.ndarray], shape, filler) -> np.ndarray:
  (matrix,) = matrices
  return _pad(matrix, shape[-1], axis=matrix.ndim - 1, filler=filler)


_MERGE = {"qkv": _merge_qkv, "o": _merge_o, "gate_up": _merge_gate_up, "down": _merge_one}


def _pad(array: np.ndarray, size: int, axis: int = 0, filler: float = 0) -> np.ndarray:
  """`array` with `filler` behind it along `axis`; padded weights are 0 and padded scales 1."""
  missing = size - array.shape[axis]
  if not missing:
    return array
  shape = (*array.shape[:axis], missing, *array.shape[axis + 1 :])
  return np.concatenate([array, np.full(shape, filler, array.dtype)], axis=axis)


def split_layer(model: Llama, layer: int) -> dict[str, np.ndarray]:
  """One layer of a model for one device (nothing replicated) as checkpoint arrays."""
  index, (start, _, layer_format) = next(
    (i, bounds) for i, bounds in enumerate(model.segment_bounds()) if bounds[0] <= layer < bounds[1]
  )
  segment, arrays = model.segments[index], {}
  for name, norm in _NORMS.items():
    arrays[weight_key(layer, norm, "D")] = np.asarray(getattr(segment, name).weight.get_value()[layer - start])
  for merged, matrices in _MATRICES.items():
    value = jax.tree.map(lambda leaf: np.asarray(leaf[layer - start]), merged_linear(segment, merged).weight.get_value())
    quantized = getattr(layer_format, merged) == "fp8"
    weights = _unmerge(model.config, merged, value.qvalue if quantized else value)
    scales = _unmerge_scales(model, merged, value) if quantized else [None] * len(weights)
    for (matrix, letters), weight, scale in zip(matrices.items(), weights, scales, strict=True):
      arrays[weight_key(layer, matrix, letters)] = weight
      if scale is not None:
        arrays[scale_key(layer, matrix, letters, model.recipe.granularity)] = scale
  return arrays


def _unmerge_scales(model: Llama, merged: str, value: QArray) -> list[np.ndarray]:
  if model.recipe.granularity != "block128":
    return _unmerge(model.config, merged, value.scale)
  step = BLOCK // math.gcd(BLOCK, value.qvalue.shape[-2])
  return [scale[::step] for scale in _unmerge(model.config, merged, value.scale)]


def _unmerge(c: LlamaConfig, merged: str, array: np.ndarray) -> list[np.ndarray]:
  if merged == "qkv":
    rows = array[:, : c.group_size], array[:, c.group_size], array[:, c.group_size + 1]
    return [part.reshape(-1, *array.shape[3:]) for part in rows]
  if merged == "gate_up":
    return list(array[:, : c.d_ff])
  return [array[:, : c.d_ff]] if merged == "down" and array.ndim == 2 else [array]
