"""How the arrays of a checkpoint become the arrays of a model, and back: the only file that knows both.

In a checkpoint: one array per layer and matrix, unmerged, [out, in], Hugging Face's names with the letters of the axes:

    model.layers.3.self_attn.k_proj.weight[KH,D]   float8, bf16 or f32
    model.layers.3.self_attn.k_proj.scale[KH]      float32, beside float8 only; [KH/128,D/128] for block scales
    model.layers.3.self_attn.q_proj.input_scale[]  float32, where the source has static activation scales: one a matrix
    model.layers.3.self_attn.k_scale[K]            float32, where it has scales of keys (v_scale: values), one a KV head

What cannot be part of a merged array as it is (float8 beside a bf16 neighbour, other scales than the recipe's, a float8 head)
is stored as it came, listed in the manifest's `exceptions`, and `widened` when it is loaded.

In a model: merged, padded, replicated for a mesh and stacked per segment (see model.py). Numpy only, no I/O: `parts` says
which arrays each model weight is built from and how; `split_layer` takes one layer of a model apart again.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from jaxfp8.config import BLOCK, LlamaConfig, Recipe
from jaxfp8.fp8 import QArray
from jaxfp8.layers import DecoderLayer, LayerFormat
from jaxfp8.model import Llama

Arrays = Mapping[str, np.ndarray]

NUMPY_DTYPES = {
  "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
  "bf16": np.dtype(ml_dtypes.bfloat16),
  "f32": np.dtype(np.float32),
}
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
    arrays = {key: (shape, NUMPY_DTYPES[dtype])}
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


def widened(read: Callable[[tuple[str, ...]], Arrays], exceptions: Mapping[str, str], dtype: np.dtype):
  """`read` for a model: what is stored as float8 and cannot stay so within its merged array comes in `dtype`."""

  def read_widened(keys: tuple[str, ...]) -> Arrays:
    scales = {key: scale_of_key(key, exceptions[split_key(key)[0]]) for key in keys if split_key(key)[0] in exceptions}
    arrays = dict(read((*keys, *scales.values())))
    for key, scale in scales.items():
      arrays[key] = dequantize(arrays[key], arrays.pop(scale)).astype(dtype)
    return arrays

  return read_widened if exceptions else read


def dequantize(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """float32 [out, in] of a float8 weight with scales per channel or per block of 128."""
  wide = weight.astype(np.float32)
  if scale.ndim == 1:
    wide *= scale[:, None]
    return wide
  for row, factors in enumerate(scale):
    wide[row * BLOCK : (row + 1) * BLOCK] *= np.repeat(factors, BLOCK)[: wide.shape[1]]
  return wide


@dataclasses.dataclass(frozen=True)
class Part:
  """One model weight: `build` makes its value (numpy, or QArray of numpy) from the checkpoint arrays `keys`."""

  weight: nnx.Param
  keys: tuple[str, ...]
  build: Callable[[Arrays], np.ndarray | QArray]


def parts(model: Llama) -> Iterator[Part]:
  """Every weight of a model in the order of its computation."""
  rows = model.embedding.get_value().shape[0]
  yield Part(model.embedding, (EMBEDDING,), lambda arrays: _pad(arrays[EMBEDDING], rows))
  for segment, (start, stop, layer_format) in zip(model.segments, model.segment_bounds(), strict=True):
    for name, norm in _NORMS.items():
      keys = tuple(weight_key(layer, norm, "D") for layer in range(start, stop))
      yield Part(getattr(segment, name).weight, keys, lambda arrays, keys=keys: np.stack([arrays[key] for key in keys]))
    for merged in _MATRICES:
      yield _stacked(model, segment, merged, range(start, stop), getattr(layer_format, merged))
  yield Part(model.final_norm.weight, (FINAL_NORM,), lambda arrays: arrays[FINAL_NORM])
  if not model.config.tied_embeddings:
    yield Part(model.head.weight, (HEAD,), lambda arrays: _pad(arrays[HEAD], rows))


def merged_linear(segment: DecoderLayer, merged: str):
  return getattr(segment.attention if merged in ("qkv", "o") else segment.mlp, merged)


def _stacked(model: Llama, segment: DecoderLayer, merged: str, layers: range, dtype: str) -> Part:
  """The part of one merged matrix over the layers of a segment."""
  weight = merged_linear(segment, merged).weight
  target, granularity = weight.get_value(), model.recipe.granularity
  columns = [(matrix, letters) for matrix, letters in _MATRICES[merged].items()]
  weights = [[weight_key(layer, *column) for column in columns] for layer in layers]
  scales = [[scale_key(layer, *column, granularity) for column in columns] for layer in layers] if dtype == "fp8" else []

  def fill(arrays: Arrays, rows: list[list[str]], like: jax.ShapeDtypeStruct, merge) -> np.ndarray:
    out = np.empty(like.shape, like.dtype)
    for place, keys in zip(out, rows, strict=True):
      place[...] = merge([arrays[key] for key in keys], place.shape)
    return out

  def build(arrays: Arrays):
    merge = _MERGE[merged]

    def weight_of(matrices, shape):
      return merge(model, matrices, shape, 0)

    if dtype != "fp8":
      return fill(arrays, weights, target, weight_of)

    def scale_of(matrices, shape):
      if granularity == "block128":
        unit = math.gcd(BLOCK, target.qvalue.shape[-2])
        size = [arrays_rows // unit for arrays_rows in _output_rows(model, merged)]
        matrices = [np.repeat(m, BLOCK // unit, axis=0)[:rows] for m, rows in zip(matrices, size, strict=True)]
      return merge(model, matrices, shape, 1)

    return QArray(fill(arrays, weights, target.qvalue, weight_of), fill(arrays, scales, target.scale, scale_of))

  return Part(weight, tuple(key for rows in (weights, scales) for keys in rows for key in keys), build)


def _output_rows(model: Llama, merged: str) -> list[int]:
  """Rows of each unmerged matrix, F rounded up to whole blocks."""
  c = model.config
  if merged == "qkv":
    return [c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim]
  return [-(-c.d_ff // BLOCK) * BLOCK] * 2 if merged == "gate_up" else [c.d_model]


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
  if o.ndim == 1 or mesh.group == 1:  # scales per channel; heads in their own order
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
