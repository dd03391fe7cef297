"""Where static scales lie: those of a linear layer's inputs and of keys and values, in a checkpoint and in a model.

    model.layers.3.self_attn.q_proj.input_scale[]   float32, beside a float8 weight
    model.layers.3.self_attn.k_scale[K], .v_scale[K] float32, one per KV head

A checkpoint has them when it was calibrated (or came with them), whatever its recipe; a model has those that its recipe
wants. Matrices that a model merges multiply with one input: the largest of their scales counts, since a smaller one would
saturate. Refuses to know how scales are chosen (calibration.py).
"""

import functools
import sys
from collections.abc import Callable, Collection, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxfp8.checkpoint import layout
from jaxfp8.errors import InputError
from jaxfp8.model.layers import DecoderLayer
from jaxfp8.model.llama import Llama
from jaxfp8.recipe import LayerFormat

LINEARS = ("qkv", "o", "gate_up", "down")
KV = ("k_scale", "v_scale")


def wanted(model: Llama) -> list[str]:
  """The keys of all static scales that this model has."""
  return [key for rows in _rows(model).values() for row in rows for key in row]


def _rows(model: Llama) -> dict[tuple[int, str], list[list[str]]]:
  """(segment, one of LINEARS or KV) -> for each layer of the segment the keys that its scale there is made of."""
  found = {}
  for place, (segment, (start, stop, _)) in enumerate(zip(model.segments, model.segment_bounds(), strict=True)):
    for merged in LINEARS:
      if layout.merged_linear(segment, merged).input_scale is not None:
        found[place, merged] = [input_keys(layer, merged) for layer in range(start, stop)]
    for name in KV if segment.attention.k_scale is not None else ():
      found[place, name] = [[kv_key(layer, name)] for layer in range(start, stop)]
  return found


def _param(segment: DecoderLayer, name: str) -> nnx.Param:
  return layout.merged_linear(segment, name).input_scale if name in LINEARS else getattr(segment.attention, name)


def input_keys(layer: int, merged: str) -> list[str]:
  return [layout.static_key(f"{module}.input_scale") for module in layout.merged_modules(layer)[merged]]


def kv_key(layer: int, name: str) -> str:
  """`name` is one of KV."""
  return layout.static_key(f"model.layers.{layer}.self_attn.{name}")


def complete(formats: Sequence[LayerFormat], there: Collection[str]) -> bool:
  """Whether every float8 matrix has a stored scale of its inputs. One without needs dynamic scales, and then all have them."""
  wanted = [
    key
    for layer, layer_format in enumerate(formats)
    for merged in LINEARS
    if getattr(layer_format, merged) == "fp8"
    for key in input_keys(layer, merged)
  ]
  return bool(wanted) and all(key in there for key in wanted)


def require(keys: Collection[str], there: Collection[str], where: object) -> None:
  """Raises InputError when some of `keys` are not `there`."""
  missing = [key for key in keys if key not in there]
  if missing:
    raise InputError(
      f"load: a recipe with static scales needs {missing[0]}; {where} has none. Write a checkpoint with them by "
      "`python -m tools.calibrate`, or ask for dynamic scales (fp8)."
    )


def fill(model: Llama, read: Callable[[str], np.ndarray], mesh: Mesh | None) -> Llama:
  """Puts static scales into an abstract model that has them; `read(key)` gives an array. Raises InputError for bad ones."""
  for (place, name), rows in _rows(model).items():
    arrays = [{key: np.asarray(read(key)) for key in row} for row in rows]
    _require_positive(arrays)
    _place(_param(model.segments[place], name), _largest(arrays) if name in LINEARS else _per_head(model, arrays), mesh)
  return model


def _place(param: nnx.Param, array: np.ndarray, mesh: Mesh | None) -> None:
  sharding = None if mesh is None else NamedSharding(mesh, param.get_metadata("partition"))
  param.set_value(jax.device_put(array, sharding))


def split_layer(model: Llama, layer: int) -> dict[str, np.ndarray]:
  """One layer's static scales, of a model for one device, as checkpoint arrays."""
  arrays = {}
  for (place, name), rows in _rows(model).items():
    start, stop, _ = model.segment_bounds()[place]
    if start <= layer < stop:
      scale = np.asarray(_param(model.segments[place], name).get_value())[layer - start]
      arrays |= {key: np.asarray(scale) for key in rows[layer - start]}
  return arrays


def _largest(rows: list[dict[str, np.ndarray]]) -> np.ndarray:
  """float32 [layers]: of the scales of matrices that share an input."""
  for row in rows:
    if max(row.values()) > min(row.values()):
      _say_once(
        f"jaxfp8: matrices that share an input have different scales, as {next(iter(row))} and its like; the largest counts."
      )
  return np.array([max(row.values()) for row in rows], np.float32)


def _per_head(model: Llama, rows: list[dict[str, np.ndarray]]) -> np.ndarray:
  """float32 [layers, kv * group * K_local]: each head's scale on every device that has the head (as layout.py merges qkv)."""
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
  print(sentence, file=sys.stderr)
