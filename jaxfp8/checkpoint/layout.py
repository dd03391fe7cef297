"""How the stored arrays of a checkpoint become the arrays of a model, and back.

    model_parts(model)           each weight of a model: the rows or columns of the stored arrays that it is built from
    unmerge_layer(model, layer)  one layer of a model as stored arrays

A model's arrays are merged, padded, replicated for a mesh and stacked per segment (see model/llama.py); stored_arrays.py
describes the arrays of a checkpoint. Numpy only, no I/O: device_arrays.py reads and copies.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
from jaxfp8.model.layers import DecoderLayer, Linear, SplitLinear
from jaxfp8.model.llama import Llama
from jaxfp8.recipe import BLOCK, Granularity, LayerFormat, MatrixFormat


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
    for linear in segment_linears(segment, layer_format):
      yield _stacked(model, linear, layers, specs[1 + start])
  final = model.final_norm.weight
  yield Part(final, (Leaf(final.get_value(), ((FINAL_NORM,),), False, 0, np.arange(model.config.d_model)),))
  if not model.config.tied_embeddings:
    yield _table(model, model.head.weight, HEAD)


class SegmentLinear(NamedTuple):
  """A linear of a layer, or of a segment of stacked layers.

  merged: the one of MERGED_MATRICES that it is, or is a part of. matrices: the stored matrices that it holds, with the letters
  of their axes.
  """

  merged: str
  matrices: Mapping[str, str]
  format: MatrixFormat
  module: Linear


def segment_linears(segment: DecoderLayer, layer_format: LayerFormat) -> Iterator[SegmentLinear]:
  """All linears of a layer, or of a segment of stacked layers, in the order of the computation."""
  for merged, matrices in MERGED_MATRICES.items():
    module, formats = merged_linear(segment, merged), layer_format.matrices(merged)
    if isinstance(module, Linear):
      yield SegmentLinear(merged, matrices, formats[0], module)
      continue
    for (name, letters), matrix, part in zip(matrices.items(), formats, module.parts, strict=True):
      yield SegmentLinear(merged, {name: letters}, matrix, part)


def merged_linear(segment: DecoderLayer, merged: str) -> Linear | SplitLinear:
  """The module of one of MERGED_MATRICES in a layer, or in a segment of stacked layers."""
  return getattr(segment.attention if merged in ("qkv", "o") else segment.mlp, merged)


def _table(model: Llama, weight: nnx.Param, key: str) -> Part:
  target = weight.get_value()
  rows = _pad(np.arange(model.config.vocab_size), target.shape[0], filler=-1)
  return Part(weight, (Leaf(target, ((key,),), False, 0, rows),))


def _stacked(model: Llama, linear: SegmentLinear, layers: range, specs: Mapping[str, ArraySpec]) -> Part:
  """The part of one linear over the layers of a segment; `specs` describes the stored arrays of the first layer."""
  weight, matrices = linear.module.weight, linear.matrices.items()
  value, granularity = weight.get_value(), linear.format.granularity(model.recipe)
  axis = 1 if linear.merged in ("o", "down") else 0

  def keys_of(key: Callable[..., str], *more) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(key(layer, *matrix, *more) for matrix in matrices) for layer in layers)

  def sizes(keys: tuple[tuple[str, ...], ...], along: int) -> list[int]:
    return [specs[key].shape[along] for key in keys[0]]

  keys = keys_of(weight_key)
  matrix = value.qvalue if granularity else value
  leaf = Leaf(matrix, keys, True, axis, _sources(model, linear, matrix.shape[1:], sizes(keys, axis), axis))
  if granularity is None:
    return Part(weight, (leaf,))
  keys, scale = keys_of(scale_key, granularity), value.scale
  if granularity != Granularity.BLOCK128:
    rows = np.arange(scale.shape[1]) if axis else _sources(model, linear, (*scale.shape[1:], 1), sizes(keys, 0), 0)
    return Part(weight, (leaf, Leaf(scale, keys, True, 0, rows, filler=1)))
  unit = math.gcd(BLOCK, matrix.shape[-2])  # rows of the merged matrix that share a row of scales
  if axis:
    columns = _sources(model, linear, scale.shape[1:], sizes(keys, 1), 1)
    return Part(weight, (leaf, Leaf(scale, keys, True, 1, columns, filler=1, repeat=BLOCK // unit)))
  num_rows = [size // unit for size in _output_rows(model.config, linear)]
  numbers = [np.repeat(rows, BLOCK // unit)[:size] for rows, size in zip(_numbered(sizes(keys, 0)), num_rows, strict=True)]
  blocks = _merge(model, linear, numbers, scale.shape[1:-1])
  return Part(weight, (leaf, Leaf(scale, keys, True, 0, blocks, filler=1)))


def _numbered(sizes: Sequence[int]) -> list[np.ndarray]:
  """The numbers that `Leaf.sources` gives the rows (or columns) of each matrix."""
  return [matrix * STRIDE + np.arange(size) for matrix, size in enumerate(sizes)]


def _sources(model: Llama, linear: SegmentLinear, shape: tuple[int, ...], sizes: Sequence[int], axis: int) -> np.ndarray:
  """`Leaf.sources` of an array whose layers have this shape: the numbers of its rows or columns, merged like them."""
  return _merge(model, linear, _numbered(sizes), (shape[-1],) if axis else shape[:-1])


def _output_rows(c: LlamaConfig, linear: SegmentLinear) -> list[int]:
  """Rows of each stored matrix of qkv or gate_up, F rounded up to whole blocks."""
  sizes = {"NH": c.num_heads * c.head_dim, "KH": c.num_kv_heads * c.head_dim, "F": -(-c.d_ff // BLOCK) * BLOCK}
  return [sizes[letters.split(",")[0]] for letters in linear.matrices.values()]


def _merge(model: Llama, linear: SegmentLinear, matrices: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
  """The numbers of the rows (or columns) of stored matrices in the order of the linear, -1 for padding."""
  if linear.merged == "qkv":
    return _merge_heads(model, dict(zip(linear.matrices, matrices, strict=True)), shape)
  if linear.merged == "gate_up":
    return np.stack([_pad(matrix, shape[1], filler=-1) for matrix in matrices])
  if linear.merged == "o":
    return _order_heads(model, matrices[0], shape)
  return _pad(matrices[0], shape[-1], filler=-1)


def _merge_heads(model: Llama, matrices: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
  """q, k, v (or one of them) with rows (head, row in head) -> [kv * group * K_local, G / group + 2, rows in head]."""
  K, mesh, heads = model.config.num_kv_heads, model.shape, []
  for name, rows in matrices.items():
    if name.endswith("q_proj"):
      heads.append(rows.reshape(K, mesh.group, model.config.group_size // mesh.group, -1))
    else:
      heads.append(np.broadcast_to(rows.reshape(K, 1, 1, -1), (K, mesh.group, 1, len(rows) // K)))
  merged = np.concatenate(heads, axis=2)
  by_device = merged.reshape(mesh.kv, K // mesh.kv, mesh.group, *merged.shape[2:]).swapaxes(1, 2)
  return by_device.reshape(shape)


def _order_heads(model: Llama, columns: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Columns in the order in which devices hold query heads: (kv, group, its KV head, its query head, row in head)."""
  K, mesh = model.config.num_kv_heads, model.shape
  if mesh.group == 1:  # heads in their own order
    return columns
  return columns.reshape(mesh.kv, K // mesh.kv, mesh.group, -1).swapaxes(1, 2).reshape(shape)


def _pad(array: np.ndarray, size: int, filler: float) -> np.ndarray:
  """`array` with `filler` behind it: `size` rows."""
  return np.concatenate([array, np.full((size - len(array), *array.shape[1:]), filler, array.dtype)])


def unmerge_layer(model: Llama, layer: int) -> dict[str, np.ndarray]:
  """One layer of a model for one device (nothing replicated) as stored arrays."""
  index, (start, _, layer_format) = next(
    (i, bounds) for i, bounds in enumerate(model.segment_bounds()) if bounds[0] <= layer < bounds[1]
  )
  segment, arrays = model.segments[index], {}
  for name, norm in NORMS.items():
    arrays[weight_key(layer, norm, "D")] = np.asarray(getattr(segment, name).weight.get_value()[layer - start])
  for linear in segment_linears(segment, layer_format):
    value: Any = jax.tree.map(lambda leaf: np.asarray(leaf[layer - start]), linear.module.weight.get_value())
    granularity = linear.format.granularity(model.recipe)
    weights = _unmerge(model.config, linear, value.qvalue if granularity else value)
    scales = _unmerge_scales(model.config, linear, value, granularity) if granularity else [None] * len(weights)
    for (matrix, letters), weight, scale in zip(linear.matrices.items(), weights, scales, strict=True):
      arrays[weight_key(layer, matrix, letters)] = weight
      if scale is not None and granularity:
        arrays[scale_key(layer, matrix, letters, granularity)] = scale
  return arrays


def _unmerge_scales(c: LlamaConfig, linear: SegmentLinear, value: QArray, granularity: Granularity) -> list[np.ndarray]:
  scales = _unmerge(c, linear, np.asarray(value.scale))
  if granularity != Granularity.BLOCK128:
    return scales
  step = BLOCK // math.gcd(BLOCK, value.qvalue.shape[-2])
  return [scale[::step] for scale in scales]


def _unmerge(c: LlamaConfig, linear: SegmentLinear, array: np.ndarray) -> list[np.ndarray]:
  if linear.merged == "qkv":
    sizes = [c.group_size if name.endswith("q_proj") else 1 for name in linear.matrices]
    parts = np.split(array, np.cumsum(sizes)[:-1], axis=1)
    return [part.reshape(-1, *array.shape[3:]) for part in parts]
  if linear.merged == "gate_up":
    return list(array[:, : c.d_ff])
  return [array[:, : c.d_ff]] if linear.merged == "down" and array.ndim == 2 else [array]
