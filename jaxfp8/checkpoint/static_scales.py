"""Static scales of the inputs of linear layers and of keys and values, in a checkpoint and in a model.

    model.layers.3.self_attn.q_proj.input_scale[]   float32, beside a float8 weight
    model.layers.3.self_attn.k_scale[K], .v_scale[K] float32, one per KV head

A checkpoint has static scales if it was calibrated, or converted from a checkpoint that has them, whatever its recipe. A model
has the scales that its recipe requires. Matrices merged into one round their input once: the largest of their scales counts,
since a smaller one would saturate. Refuses to know how scales are chosen (quantization/calibration.py).
"""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxfp8.checkpoint.layout import segment_linears
from jaxfp8.checkpoint.stored_arrays import MERGED_MATRICES, static_key
from jaxfp8.errors import InputError
from jaxfp8.model.llama import Llama
from jaxfp8.recipe import LayerFormat
from jaxfp8.terminal import say

LINEARS = tuple(MERGED_MATRICES)
KV = ("k_scale", "v_scale")


def required_keys(model: Llama) -> list[str]:
  """The keys of all static scales that this model has."""
  return [key for scale in _scales(model) for row in scale.keys for key in row]


class _Scale(NamedTuple):
  """A static scale of a segment: the model's array, and for each layer the keys of the stored scales that make it."""

  param: nnx.Param
  keys: list[list[str]]
  start: int  # the segment's first layer
  is_input: bool


def _scales(model: Llama) -> Iterator[_Scale]:
  for segment, (start, stop, layer_format) in zip(model.segments, model.segment_bounds(), strict=True):
    for linear in segment_linears(segment, layer_format):
      if linear.module.input_scale is not None:
        keys = [[_input_key(layer, name) for name in linear.matrices] for layer in range(start, stop)]
        yield _Scale(linear.module.input_scale, keys, start, True)
    for name in KV if segment.attention.k_scale is not None else ():
      keys = [[kv_key(layer, name)] for layer in range(start, stop)]
      yield _Scale(getattr(segment.attention, name), keys, start, False)


def _input_key(layer: int, matrix: str) -> str:
  return static_key(f"model.layers.{layer}.{matrix}.input_scale")


def input_keys(layer: int, merged: str, layer_format: LayerFormat) -> list[str]:
  """The keys of the input scales of the float8 matrices in one of LINEARS."""
  matrices = zip(MERGED_MATRICES[merged], layer_format.matrices(merged), strict=True)
  return [_input_key(layer, name) for name, matrix in matrices if matrix.is_float8]


def kv_key(layer: int, name: str) -> str:
  """The key of a layer's scales of keys or values; `name` is one of KV."""
  return static_key(f"model.layers.{layer}.self_attn.{name}")


def has_all_input_scales(formats: Sequence[LayerFormat], keys: Collection[str]) -> bool:
  """Whether every float8 matrix has an input scale among `keys`. If one has none, all matrices need dynamic scales."""
  required = [
    key for layer, layer_format in enumerate(formats) for merged in LINEARS for key in input_keys(layer, merged, layer_format)
  ]
  return bool(required) and all(key in keys for key in required)


def require_scales(required: Collection[str], available: Collection[str], path: object) -> None:
  """Raises InputError, naming `path`, if one of the `required` keys is not `available`."""
  missing = [key for key in required if key not in available]
  if missing:
    raise InputError(
      f"load: a recipe with static scales needs {missing[0]}; {path} has none. Write a checkpoint with them by "
      "`jaxfp8 calibrate`, or ask for dynamic scales (fp8)."
    )


def load_static_scales(model: Llama, read: Callable[[str], np.ndarray], mesh: Mesh | None) -> Llama:
  """Puts static scales into an abstract model that has them, and returns it; `read(key)` gives a stored array.

  Raises InputError for a scale that is not positive and finite.
  """
  for scale in _scales(model):
    arrays = [{key: np.asarray(read(key)) for key in row} for row in scale.keys]
    _require_positive(arrays)
    _put(scale.param, _largest(arrays) if scale.is_input else _per_head(model, arrays), mesh)
  return model


def _put(param: nnx.Param, array: np.ndarray, mesh: Mesh | None) -> None:
  sharding = None if mesh is None else NamedSharding(mesh, param.get_metadata("partition"))
  param.set_value(jax.device_put(array, sharding))


def stored_static_scales(model: Llama, layer: int) -> dict[str, np.ndarray]:
  """One layer's static scales, of a model for one device, as stored arrays."""
  arrays = {}
  for scale in _scales(model):
    if scale.start <= layer < scale.start + len(scale.keys):
      value = np.asarray(scale.param.get_value())[layer - scale.start]
      arrays |= {key: np.asarray(value) for key in scale.keys[layer - scale.start]}
  return arrays


def _largest(rows: list[dict[str, np.ndarray]]) -> np.ndarray:
  """float32 [layers]: the largest scale of the matrices that share an input."""
  for row in rows:
    if max(row.values()) > min(row.values()):
      _say_once(f"jaxfp8: matrices that share an input have different scales, such as {next(iter(row))}; the largest counts.")
  return np.array([max(row.values()) for row in rows], np.float32)


def _per_head(model: Llama, rows: list[dict[str, np.ndarray]]) -> np.ndarray:
  """float32 [layers, kv * group * K_local]: each head's scale on every device that has the head, ordered as in qkv."""
  mesh, K, layers = model.shape, model.config.num_kv_heads, len(rows)
  scales = np.stack([scale for row in rows for scale in row.values()]).astype(np.float32)
  by_head = scales.reshape(layers, mesh.kv, 1, K // mesh.kv)
  return np.broadcast_to(by_head, (layers, mesh.kv, mesh.group, K // mesh.kv)).reshape(layers, -1)


def _require_positive(rows: list[dict[str, np.ndarray]]) -> None:
  for key, scale in ((key, scale) for row in rows for key, scale in row.items()):
    if not (np.isfinite(scale).all() and (scale > 0).all()):
      raise InputError(f"load: static scales must be positive; {key} is {scale}. Calibrate again.")


@functools.cache
def _say_once(sentence: str) -> None:
  say(sentence)
