"""Where static scales lie: those of a linear layer's inputs and of keys and values, in a checkpoint and in a model.

    model.layers.3.self_attn.q_proj.input_scale[]   float32, beside a float8 weight
    model.layers.3.self_attn.k_scale[K], .v_scale[K] float32, one per KV head

A checkpoint has them when it was calibrated (or came with them), whatever its recipe; a model has those that its recipe
wants. Matrices that a model merges multiply with one input: the largest of their scales counts, since a smaller one would
saturate. Refuses to know how scales are chosen (calibration.py).
"""

import functools
import sys
from collections.abc import Collection, Iterator

import numpy as np

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


def parts(model: Llama) -> Iterator[layout.Part]:
  """The static scales that this model has."""
  for segment, (start, stop, _) in zip(model.segments, model.segment_bounds(), strict=True):
    for merged in LINEARS:
      scale = layout.merged_linear(segment, merged).input_scale
      if scale is not None:
        rows = [[input_key(layer, matrix) for matrix in layout.matrices_of(merged)] for layer in range(start, stop)]
        keys = tuple(key for row in rows for key in row)
        yield layout.Part(scale, keys, functools.partial(_largest, rows))
    for name in KV:
      scale = getattr(segment.attention, name)
      if scale is not None:
        keys = tuple(kv_key(layer, name) for layer in range(start, stop))
        yield layout.Part(scale, keys, functools.partial(_per_head, model, keys))


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


def _largest(rows: list[list[str]], arrays: layout.Arrays) -> np.ndarray:
  """float32 [layers]."""
  values = [[float(arrays[key]) for key in row] for row in rows]
  for row, found in zip(rows, values, strict=True):
    if not all(np.isfinite(value) and value > 0 for value in found):
      raise InputError(f"load: static scales must be positive; {', '.join(row)} are {found}. Calibrate again.")
    if max(found) > min(found):
      _say_once(
        f"jaxfp8: matrices that share an input have different scales, as {row[0]} and its neighbours; the largest counts."
      )
  return np.array([max(found) for found in values], np.float32)


def _per_head(model: Llama, keys: tuple[str, ...], arrays: layout.Arrays) -> np.ndarray:
  """float32 [layers, kv * group * K_local], each head's scale on every device that has the head (as layout.py merges qkv)."""
  mesh, K = model.shape, model.config.num_kv_heads
  scales = np.stack([np.asarray(arrays[key], np.float32) for key in keys])
  if not (np.isfinite(scales).all() and (scales > 0).all()):
    raise InputError(f"load: static scales must be positive; some of {keys[0]} and its like are not. Calibrate again.")
  spread = np.broadcast_to(scales.reshape(len(keys), mesh.kv, 1, K // mesh.kv), (len(keys), mesh.kv, mesh.group, K // mesh.kv))
  return spread.reshape(len(keys), -1)


@functools.cache
def _say_once(sentence: str) -> None:
  print(sentence, file=sys.stderr)
