"""Declares the weights of a layer, or of a stack of equal layers: `LayerBuilder`.

Shapes are merged, padded and replicated for a mesh (docs/architecture.md has the layouts), each with its partition.
Refuses to know what is computed with the weights (layers.py) and where they come from.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.mesh import MeshShape, Padded
from jaxfp8.model.fp8 import QArray
from jaxfp8.model.layers import Linear, Runtime, SplitLinear
from jaxfp8.recipe import BLOCK, LayerFormat, MatrixFormat, Recipe
from jaxfp8.sharding import TENSOR, abstract_array

_PARTITIONS = {
  "qkv": PartitionSpec(None, TENSOR),
  "o": PartitionSpec(None, None, TENSOR),
  "gate_up": PartitionSpec(None, None, TENSOR),
  "down": PartitionSpec(None, None, TENSOR),
}


@dataclasses.dataclass(frozen=True)
class LayerBuilder:
  """Declares the weights of `num_layers` layers in `layer_format`."""

  config: LlamaConfig
  recipe: Recipe
  shape: MeshShape
  runtime: Runtime
  layer_format: LayerFormat
  num_layers: int

  @property
  def padded(self) -> Padded:
    return Padded.of(self.config, self.recipe, self.shape, self.layer_format)

  def merged(self, name: str) -> Linear | SplitLinear:
    """qkv or gate_up: one linear, or one for each stored matrix if their formats differ."""
    if not self.layer_format.is_split(name):
      return self.single(name)
    axis, sizes = (2, (self.qkv_shape[2] - 2, 1, 1)) if name == "qkv" else (1, (1, 1))
    whole = self._shape(name)
    shapes = [(*whole[:axis], size, *whole[axis + 1 :]) for size in sizes]
    formats = self.layer_format.matrices(name)
    parts = [self._linear(matrix, shape, _PARTITIONS[name]) for matrix, shape in zip(formats, shapes, strict=True)]
    return SplitLinear(parts, axis)  # the layer axis of weights is the token axis of activations

  def single(self, name: str) -> Linear:
    """One of the four merged matrices as one linear."""
    run = self.o_run if name == "o" else None
    return self._linear(self.layer_format.matrices(name)[0], self._shape(name), _PARTITIONS[name], run)

  def _shape(self, name: str) -> tuple[int, ...]:
    return getattr(self, f"{name}_shape")

  @property
  def qkv_shape(self) -> tuple[int, ...]:
    c, group = self.config, self.shape.group
    return (self.num_layers, c.num_kv_heads * group, c.group_size // group + 2, c.head_dim, c.d_model)

  @property
  def o_shape(self) -> tuple[int, ...]:
    return (self.num_layers, self.config.d_model, self.config.num_heads * self.config.head_dim)

  @property
  def o_run(self) -> int:
    """Columns of o that stay together: a device's query heads, or those of one KV head if it has several (layout.py)."""
    c, mesh = self.config, self.shape
    heads = c.num_heads // mesh.tensor if mesh.group == 1 else c.group_size // mesh.group
    return heads * c.head_dim

  @property
  def gate_up_shape(self) -> tuple[int, ...]:
    return (self.num_layers, 2, self.padded.d_ff, self.config.d_model)

  @property
  def down_shape(self) -> tuple[int, ...]:
    return (self.num_layers, self.config.d_model, self.padded.d_ff)

  def _linear(self, matrix: MatrixFormat, shape: tuple[int, ...], partition: PartitionSpec, run: int | None = None) -> Linear:
    """A linear layer with abstract weights [L, ..., D].

    run: the number of neighbouring input columns that stay together when columns are cut; None: all that a device has.
    Raises InputError if a cut would go through a block of 128 columns that has one scale.
    """
    value = abstract_array(shape, matrix.dtype)
    if not matrix.is_float8:
      return Linear(value, partition, self.runtime)
    if matrix.has_block_scales(self.recipe):
      # Blocks of 128 rows, repeated for fewer rows each: a head or a model may be narrower than whole blocks.
      unit = math.gcd(BLOCK, shape[-2])
      scale_shape = (*shape[:-2], shape[-2] // unit, self._block_columns(shape, partition, run))
      scale_partition = partition
    else:
      scale_shape, scale_partition = shape[:-1], PartitionSpec(*partition[: len(shape) - 1])
    scale = abstract_array(scale_shape, jnp.float32)
    input_scale = abstract_array(shape[:1], jnp.float32) if self.recipe.activations.is_static else None
    partitions: Any = (partition, scale_partition)  # a QArray of partition specs, leaf by leaf
    return Linear(QArray(value, scale), QArray(*partitions), self.runtime, input_scale)

  def kv_scale(self) -> nnx.Param | None:
    """A stored scale for each KV head; None if the recipe has none."""
    if not self.recipe.kv.is_static:
      return None
    return nnx.Param(jax.ShapeDtypeStruct(self.qkv_shape[:2], jnp.float32), partition=PartitionSpec(None, TENSOR))

  def _block_columns(self, shape: tuple[int, ...], partition: PartitionSpec, run: int | None) -> int:
    """Blocks along the input columns."""
    cut = len(partition) == len(shape) and self.shape.tensor > 1
    run = run or shape[-1] // self.shape.tensor
    if cut and run % BLOCK:
      raise InputError(
        f"Llama: block128 scales need each device's input columns to be whole blocks; {shape[-1]} columns over "
        f'tensor={self.shape.tensor}, {run} at a time, are not. Use granularity="channel" or another tensor.'
      )
    return -(-shape[-1] // BLOCK)
