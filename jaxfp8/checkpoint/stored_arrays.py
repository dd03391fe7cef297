"""The arrays of a checkpoint: their keys, shapes and dtypes, and the types with which any part of them is read. Imports no jax.

One array per layer and matrix, unmerged, [out, in], under Hugging Face's names followed by the letters of the axes:

    model.layers.3.self_attn.k_proj.weight[KH,D]   float8, bf16 or f32
    model.layers.3.self_attn.k_proj.scale[KH]      float32, beside float8 only; [KH/128,D/128] for block scales
    model.layers.3.self_attn.q_proj.input_scale[]  float32, for static activation scales: one per matrix
    model.layers.3.self_attn.k_scale[K]            float32, for static scales of keys (v_scale: of values): one per KV head

A float8 head or embedding is stored as it came, listed in the manifest's `exceptions`, and dequantized on read
(dequantize_on_read.py). So are, in a checkpoint of an older version, matrices of layers that differ from their neighbours.
Refuses to know models (layout.py) and files.
"""

import math
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np

from jaxfp8.config import LlamaConfig
from jaxfp8.recipe import BLOCK, Granularity, LayerFormat, Precision, Recipe

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight[V,D]", "lm_head.weight[V,D]", "model.norm.weight[D]"
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
# The merged matrices of a model's layer: the stored matrices that each one holds, with the letters of their axes.
MERGED_MATRICES = {
  "qkv": {"self_attn.q_proj": "NH,D", "self_attn.k_proj": "KH,D", "self_attn.v_proj": "KH,D"},
  "o": {"self_attn.o_proj": "D,NH"},
  "gate_up": {"mlp.gate_proj": "F,D", "mlp.up_proj": "F,D"},
  "down": {"mlp.down_proj": "D,F"},
}


class ArraySpec(NamedTuple):
  """Shape and dtype of a stored array."""

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class Range(NamedTuple):
  """Rows (axis 0) or columns (axis 1) start .. stop - 1 of one stored array."""

  key: str
  axis: int
  start: int
  stop: int

  def cut(self, array):
    """The range of `array`, which is a numpy array or a tensorstore."""
    return array[self.start : self.stop] if self.axis == 0 else array[:, self.start : self.stop]


Read = Callable[[Iterable[Range]], dict[Range, np.ndarray]]


class ArrayStore(Protocol):
  """Arrays under the keys of a checkpoint: those of an opened `Checkpoint`, or those that a `QuantizedSource` computes."""

  @property
  def formats(self) -> tuple[LayerFormat, ...]: ...

  @property
  def exceptions(self) -> Mapping[str, str]: ...

  @property
  def expected(self) -> Mapping[str, ArraySpec]:
    """Key -> shape and dtype of every array."""
    ...

  @property
  def path(self) -> pathlib.Path:
    """The checkpoint that the arrays come from, for error messages."""
    ...

  def range_reader(self) -> Read:
    """A function that reads ranges of arrays, for one pass over the model."""
    ...

  def read_array(self, key: str) -> np.ndarray: ...


def weight_key(layer: int, matrix: str, letters: str) -> str:
  return f"model.layers.{layer}.{matrix}.weight[{letters}]"


def scale_key(layer: int, matrix: str, letters: str, granularity: str) -> str:
  return scale_of_key(weight_key(layer, matrix, letters), granularity)


def merged_modules(layer: int) -> dict[str, tuple[str, ...]]:
  """Merged matrix -> the modules (`model.layers.0.self_attn.q_proj`) that it holds."""
  return {merged: tuple(f"model.layers.{layer}.{name}" for name in names) for merged, names in MERGED_MATRICES.items()}


def split_key(key: str) -> tuple[str, str]:
  """`model.norm.weight[D]` -> (`model.norm`, `D`)."""
  name, _, letters = key.partition("[")
  return name.rpartition(".")[0], letters.rstrip("]")


def scale_of_key(key: str, granularity: str) -> str:
  """The key of the scale beside a float8 weight's key."""
  module, letters = split_key(key)
  axes = letters.split(",")
  block = granularity == Granularity.BLOCK128
  return f"{module}.scale[{','.join(f'{axis}/{BLOCK}' for axis in axes) if block else axes[0]}]"


def static_key(name: str) -> str:
  """The key of a static scale: `MODULE.input_scale` is one number, `...self_attn.k_scale` and `v_scale` one per KV head."""
  return name + ("[K]" if name.endswith((".k_scale", ".v_scale")) else "[]")


def checkpoint_arrays(
  config: LlamaConfig,
  recipe: Recipe,
  formats: tuple[LayerFormat, ...],
  exceptions: Mapping[str, str] = MappingProxyType({}),
  static: Collection[str] = (),
) -> list[dict[str, ArraySpec]]:
  """Shape and dtype of every array of a checkpoint by key, in groups: tables and final norm first, then each layer.

  exceptions: module -> "channel" or "block128" of a matrix stored as float8 whatever `formats` says.
  static: names of input and KV scales, as `static_key` takes them.
  """
  c = config
  sizes = {"V": c.vocab_size, "D": c.d_model, "F": c.d_ff, "NH": c.num_heads * c.head_dim, "KH": c.num_kv_heads * c.head_dim}
  f32 = Precision.F32.dtype

  def matrix(key: str, dtype: np.dtype, granularity: str | None = None) -> dict[str, ArraySpec]:
    module, letters = split_key(key)
    if module in exceptions:
      dtype, granularity = Precision.FP8.dtype, exceptions[module]
    shape = tuple(sizes[letter] for letter in letters.split(","))
    arrays = {key: ArraySpec(shape, dtype)}
    if granularity:
      blocks = tuple(-(-size // BLOCK) for size in shape)
      arrays[scale_of_key(key, granularity)] = ArraySpec(blocks if granularity == Granularity.BLOCK128 else shape[:1], f32)
    return arrays

  tables = (EMBEDDING,) if c.tied_embeddings else (EMBEDDING, HEAD)
  groups = [{FINAL_NORM: ArraySpec((sizes["D"],), f32)}]
  for table in tables:
    groups[0] |= matrix(table, recipe.stream.dtype)
  for layer, layer_format in enumerate(formats):
    group = {weight_key(layer, norm, "D"): ArraySpec((sizes["D"],), f32) for norm in NORMS.values()}
    for merged, matrices in MERGED_MATRICES.items():
      for (name, letters), form in zip(matrices.items(), layer_format.matrices(merged), strict=True):
        group |= matrix(weight_key(layer, name, letters), form.dtype, form.granularity(recipe))
    groups.append(group)
  for name in static:
    layer = int(name.split(".")[2])
    groups[1 + layer][static_key(name)] = ArraySpec((c.num_kv_heads,) if static_key(name).endswith("[K]") else (), f32)
  return groups
