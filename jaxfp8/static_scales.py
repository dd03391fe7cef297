"""Where static scales lie: those of a linear layer's inputs and of keys and values, in a checkpoint and in a model.

    model.layers.3.self_attn.q_proj.input_scale[]   float32, beside a float8 weight
    model.layers.3.self_attn.k_scale[K], .v_scale[K] float32, one per KV head

A checkpoint has them when it was calibrated (or came with them), whatever its recipe; a model has those that its recipe
wants. Matrices that a model merges multiply with one input: the largest of their scales counts, since a smaller one would
saturate. Refuses to know how scales are chosen (calibration.py).
"""

import functools
import sys
from collections.abc import Callable, Collection, Mapping

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxfp8 import layout
from jaxfp8.config import STATIC, LlamaConfig, Recipe
from jaxfp8.errors import InputError
from jaxfp8.layers import LayerFormat
from jaxfp8.model import Llama

LINEARS = ("qkv", "o", "gate_up", "down")
KV = ("k_scale", "v_scale")


def input_key(layer: int, matrix: str) -> str:
  return f"model.layers.{layer}.{matrix}.input_scale[]"


def kv_key(layer: int, name: str) -> str:
  """`name` is one of KV."""
  return f"model.layers.{layer}.self_attn.{name}[K]"


def is_scale(key: str) -> bool:
  return key.endswith((".input_scale[]", *(f".{name}[K]" for name in KV)))


def possible_arrays(config: LlamaConfig, formats: tuple[LayerFormat, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """Key -> (shape, dtype) of every static scale that a checkpoint may have."""
  f32, found = np.dtype(np.float32), {}
  for layer, layer_format in enumerate(formats):
    for merged in LINEARS:
      if getattr(layer_format, merged) == "fp8":
        found |= {input_key(layer, matrix): ((), f32) for matrix in layout.matrices_of(merged)}
    found |= {kv_key(layer, name): ((config.num_kv_heads,), f32) for name in KV}
  return found


def wanted_keys(config: LlamaConfig, recipe: Recipe, formats: tuple[LayerFormat, ...]) -> list[str]:
  """Those that a model of `recipe` needs."""
  wants = {True: recipe.kv.endswith(STATIC), False: recipe.activations.endswith(STATIC)}
  return [key for key in possible_arrays(config, formats) if wants[key.endswith("[K]")]]


def require(keys: Collection[str], there: Collection[str], where: object) -> None:
  """Raises InputError when some of `keys` are static scales that are not `there`."""
  missing = [key for key in keys if is_scale(key) and key not in there]
  if missing:
    raise InputError(
      f"load: a recipe with static scales needs {missing[0]}; {where} has none. Write a checkpoint with them by "
      "`python -m tools.calibrate`, or ask for dynamic scales (fp8)."
    )


def fill(model: Llama, read: Callable[[str], np.ndarray], mesh: Mesh | None) -> Llama:
  """Puts static scales into an abstract model that has them; `read(key)` gives an array. Raises InputError for bad ones."""
  for segment, (start, stop, _) in zip(model.segments, model.segment_bounds(), strict=True):
    layers = range(start, stop)
    for merged in LINEARS:
      scale = layout.merged_linear(segment, merged).input_scale
      if scale is not None:
        rows = [[input_key(layer, matrix) for matrix in layout.matrices_of(merged)] for layer in layers]
        _place(scale, _largest([{key: float(read(key)) for key in row} for row in rows]), mesh)
    for name in KV:
      scale = getattr(segment.attention, name)
      if scale is not None:
        _place(scale, _per_head(model, {key: read(key) for key in (kv_key(layer, name) for layer in layers)}), mesh)
  return model


def _place(param: nnx.Param, array: np.ndarray, mesh: Mesh | None) -> None:
  sharding = None if mesh is None else NamedSharding(mesh, param.get_metadata("partition"))
  param.set_value(jax.device_put(array, sharding))


def split_layer(model: Llama, layer: int) -> dict[str, np.ndarray]:
  """One layer's static scales, of a model for one device, as checkpoint arrays."""
  segment, start = next(
    (segment, start)
    for segment, (start, stop, _) in zip(model.segments, model.segment_bounds(), strict=True)
    if start <= layer < stop
  )
  arrays = {}
  for merged in LINEARS:
    scale = layout.merged_linear(segment, merged).static_scale
    if scale is not None:
      arrays |= {input_key(layer, matrix): np.asarray(scale[layer - start]) for matrix in layout.matrices_of(merged)}
  if segment.attention.static_scales is not None:
    for name, scale in zip(KV, segment.attention.static_scales, strict=True):
      arrays[kv_key(layer, name)] = np.asarray(scale[layer - start])
  return arrays


def _largest(rows: list[dict[str, float]]) -> np.ndarray:
  """float32 [layers]: of the scales of matrices that share an input."""
  for row in rows:
    _require_positive(row)
    if max(row.values()) > min(row.values()):
      _say_once(
        f"jaxfp8: matrices that share an input have different scales, as {next(iter(row))} and its like; the largest counts."
      )
  return np.array([max(row.values()) for row in rows], np.float32)


def _per_head(model: Llama, scales: dict[str, np.ndarray]) -> np.ndarray:
  """float32 [layers, kv * group * K_local]: each head's scale on every device that has the head (as layout.py merges qkv)."""
  mesh, K, layers = model.shape, model.config.num_kv_heads, len(scales)
  _require_positive(scales)
  by_head = np.stack([np.asarray(scale, np.float32) for scale in scales.values()]).reshape(layers, mesh.kv, 1, K // mesh.kv)
  return np.broadcast_to(by_head, (layers, mesh.kv, mesh.group, K // mesh.kv)).reshape(layers, -1)


def _require_positive(scales: Mapping[str, float | np.ndarray]) -> None:
  for key, scale in scales.items():
    if not (np.isfinite(scale).all() and np.all(np.asarray(scale) > 0)):
      raise InputError(f"load: static scales must be positive; {key} is {scale}. Calibrate again.")


@functools.cache
def _say_once(sentence: str) -> None:
  print(sentence, file=sys.stderr)
