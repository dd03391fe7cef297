"""How the stored arrays of a checkpoint become the arrays of a model, and back.

    model_parts(model)           each weight of a model: the rows or columns of the stored arrays that it is built from
    unmerge_layer(model, layer)  one layer of a model as stored arrays

A model's arrays are merged, padded, replicated for a mesh and stacked per segment (see model/llama.py); stored_arrays.py
describes the arrays of a checkpoint. Numpy only, no I/O: device_arrays.py reads and copies.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxfp8.checkpoint.stored_arrays import (
  EMBEDDING,
  FINAL_NORM,
  HEAD,
  MERGED_MATRICES,
  NORMS,
  ArraySpec,
  checkpoint_arrays,
  scale_key,
  weight_key,
)
from jaxfp8.config import LlamaConfig
from jaxfp8.model.fp8 import QArray
from jaxfp8.model.layers import DecoderLayer, Linear
from jaxfp8.model.llama import Llama
from jaxfp8.recipe import BLOCK, Granularity, Precision


@dataclasses.dataclass(frozen=True)
class Leaf:
  """How one array of a model is built from stored arrays, so that any part of the array can be built alone.

  target: shape and dtype of the model's array.
  keys: the stored arrays that are merged, for each layer of the segment; one entry for an array without a layer axis.
  is_stacked: whether the model's array has a layer axis (the first).
  axis: the axis of the stored arrays that is merged, padded and cut: 0 for rows, 1 for columns.
  sources: int64, the source of each index along the merged axes: `matrix * STRIDE + row` (or column); -1 is padding.
  filler: the value of padding.
  repeat: with axis 1, the number of rows of the model's array that each row of a stored array gives.
  """

  target: jax.ShapeDtypeStruct
  keys: tuple[tuple[str, ...], ...]
  is_stacked: bool
  axis: int
  sources: np.ndarray
  filler: float = 0
  repeat: int = 1


@dataclasses.dataclass(frozen=True)
class Part:
  """One weight of a model; `leaves` in the order of `jax.tree.leaves` of its value."""

  weight: nnx.Param
  leaves: tuple[Leaf, ...]


STRIDE = 1 << 32  # more than any matrix has rows


def model_parts(model: Llama) -> Iterator[Part]:
  """Every weight of a model in the order of the computation."""
  yield _table(model, model.embedding, EMBEDDING)
  specs = checkpoint_arrays(model.config, model.recipe, tuple(model.formats))
  for segment, (start, stop, layer_format) in zip(model.segments, model.segment_bounds(), strict=True):
    layers = range(start, stop)
    for name, norm in NORMS.items():
      keys = tuple((weight_key(layer, norm, "D"),) for layer in layers)
      weight = getattr(segment, name).weight
      yield Part(weight, (Leaf(weight.get_value(), keys, True, 0, np.arange(model.config.d_model)),))
    for merged in MERGED_MATRICES:
      weight, precision = merged_linear(segment, merged).weight, getattr(layer_format, merged)
      yield _stacked(model, weight, merged, layers, precision=precision, specs=specs[1 + start])
  final = model.final_norm.weight
  yield Part(final, (Leaf(final.get_value(), ((FINAL_NORM,),), False, 0, np.arange(model.config.d_model)),))
  if not model.config.tied_embeddings:
    yield _table(model, model.head.weight, HEAD)


def merged_linear(segment: DecoderLayer, merged: str) -> Linear:
  """The module of one of MERGED_MATRICES in a layer, or in a segment of stacked layers."""
  return getattr(segment.attention if merged in ("qkv", "o") else segment.mlp, merged)


def _table(model: Llama, weight: nnx.Param, key: str) -> Part:
  target = weight.get_value()
  rows = _pad(np.arange(model.config.vocab_size), target.shape[0], filler=-1)
  return Part(weight, (Leaf(target, ((key,),), False, 0, rows),))


def _stacked(
  model: Llama, weight: nnx.Param, merged: str, layers: range, *, precision: Precision, specs: Mapping[str, ArraySpec]
) -> Part:
  """The part of one merged matrix over the layers of a segment; `specs` describes the stored arrays of the first layer."""
  value, granularity = weight.get_value(), model.recipe.granularity
  matrices = MERGED_MATRICES[merged].items()
  axis = 1 if merged in ("o", "down") else 0

  def keys_of(key: Callable[..., str], *more) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(key(layer, *matrix, *more) for matrix in matrices) for layer in layers)

  def sizes(keys: tuple[tuple[str, ...], ...], along: int) -> list[int]:
    return [specs[key].shape[along] for key in keys[0]]

  keys = keys_of(weight_key)
  matrix = value.qvalue if precision == Precision.FP8 else value
  leaf = Leaf(matrix, keys, True, axis, _sources(model, merged, matrix.shape[1:], sizes(keys, axis), axis))
  if precision != Precision.FP8:
    return Part(weight, (leaf,))
  keys, scale = keys_of(scale_key, granularity), value.scale
  if granularity != Granularity.BLOCK128:
    rows = np.arange(scale.shape[1]) if axis else _sources(model, merged, (*scale.shape[1:], 1), sizes(keys, 0), 0)
    return Part(weight, (leaf, Leaf(scale, keys, True, 0, rows, filler=1)))
  unit = math.gcd(BLOCK, matrix.shape[-2])  # rows of the merged matrix that share a row of scales
  if axis:
    columns = _sources(model, merged, scale.shape[1:], sizes(keys, 1), 1)
    return Part(weight, (leaf, Leaf(scale, keys, True, 1, columns, filler=1, repeat=BLOCK // unit)))
  num_rows = [size // unit for size in _output_rows(model, merged)]
  numbers = [np.repeat(rows, BLOCK // unit)[:size] for rows, size in zip(_numbered(sizes(keys, 0)), num_rows, strict=True)]
  blocks = _MERGE[merged](model, numbers, scale.shape[1:-1], -1)
  return Part(weight, (leaf, Leaf(scale, keys, True, 0, blocks, filler=1)))


def _numbered(sizes: Sequence[int]) -> list[np.ndarray]:
  """The numbers that `Leaf.sources` gives the rows (or columns) of each matrix."""
  return [matrix * STRIDE + np.arange(size) for matrix, size in enumerate(sizes)]


def _sources(model: Llama, merged: str, shape: tuple[int, ...], sizes: Sequence[int], axis: int) -> np.ndarray:
  """`Leaf.sources` of a merged array whose layers have this shape: the numbers of its rows or columns, merged like them."""
  numbers = _numbered(sizes)
  if axis:
    return _MERGE[merged](model, [columns[None] for columns in numbers], (1, shape[-1]), -1)[0]
  return _MERGE[merged](model, numbers, shape[:-1], -1)


def _output_rows(model: Llama, merged: str) -> list[int]:
  """Rows of each stored matrix of qkv or gate_up, F rounded up to whole blocks."""
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


def unmerge_layer(model: Llama, layer: int) -> dict[str, np.ndarray]:
  """One layer of a model for one device (nothing replicated) as stored arrays."""
  index, (start, _, layer_format) = next(
    (i, bounds) for i, bounds in enumerate(model.segment_bounds()) if bounds[0] <= layer < bounds[1]
  )
  segment, arrays = model.segments[index], {}
  for name, norm in NORMS.items():
    arrays[weight_key(layer, norm, "D")] = np.asarray(getattr(segment, name).weight.get_value()[layer - start])
  for merged, matrices in MERGED_MATRICES.items():
    weight = merged_linear(segment, merged).weight.get_value()
    value: Any = jax.tree.map(lambda leaf: np.asarray(leaf[layer - start]), weight)
    quantized = getattr(layer_format, merged) == Precision.FP8
    weights = _unmerge(model.config, merged, value.qvalue if quantized else value)
    scales = _unmerge_scales(model, merged, value) if quantized else [None] * len(weights)
    for (matrix, letters), weight, scale in zip(matrices.items(), weights, scales, strict=True):
      arrays[weight_key(layer, matrix, letters)] = weight
      if scale is not None:
        arrays[scale_key(layer, matrix, letters, model.recipe.granularity)] = scale
  return arrays


def _unmerge_scales(model: Llama, merged: str, value: QArray) -> list[np.ndarray]:
  scales = _unmerge(model.config, merged, np.asarray(value.scale))
  if model.recipe.granularity != Granularity.BLOCK128:
    return scales
  step = BLOCK // math.gcd(BLOCK, value.qvalue.shape[-2])
  return [scale[::step] for scale in scales]


def _unmerge(c: LlamaConfig, merged: str, array: np.ndarray) -> list[np.ndarray]:
  if merged == "qkv":
    rows = array[:, : c.group_size], array[:, c.group_size], array[:, c.group_size + 1]
    return [part.reshape(-1, *array.shape[3:]) for part in rows]
  if merged == "gate_up":
    return list(array[:, : c.d_ff])
  return [array[:, : c.d_ff]] if merged == "down" and array.ndim == 2 else [array]
