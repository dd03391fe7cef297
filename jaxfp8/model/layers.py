"""The parts of a Llama as Flax NNX modules: `Linear`, `RMSNorm`, `Attention`, `Mlp`, `DecoderLayer`.

They own weights and nothing else. `LayerBuilder` declares those weights: merged, padded and replicated for a mesh, each with
how it is cut. `StepContext` is what every layer of a step shares. Refuses to know how layers are stacked and run (model.py).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

import pallas_kernels
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.mesh import MeshShape, Padded
from jaxfp8.model.batch import DecodeBatch, PrefillBatch
from jaxfp8.model.fp8 import QArray, quantize_tokens
from jaxfp8.model.kv_cache import KVCache
from jaxfp8.recipe import BLOCK, Granularity, LayerFormat, Precision, Recipe
from jaxfp8.sharding import TENSOR, Axes, concatenate_over, scatter_over, sum_over
from pallas_kernels import Quantized, Sums


@dataclasses.dataclass(frozen=True)
class Runtime:
  """Everything static about a run that is no size: mesh axes, kernels, activations."""

  axes: Axes = None
  implementation: str = "auto"
  target: pallas_kernels.Target | None = None
  activations: Precision = Precision.BF16
  stream: Precision = Precision.BF16

  @property
  def stream_dtype(self) -> np.dtype:
    return self.stream.dtype

  @property
  def kernels(self) -> dict[str, Any]:
    """How every operation of pallas_kernels is to be called."""
    return {"implementation": self.implementation, "target": self.target}


class Linear(nnx.Module):
  """y [T, F...] = x [T, D] @ w^T for a weight [F..., D], float8 with scales or plain."""

  def __init__(self, weight, partition, runtime: Runtime, input_scale=None):
    self.weight = nnx.Param(weight, partition=partition)
    self.input_scale = None if input_scale is None else nnx.Param(input_scale, partition=PartitionSpec())
    self.runtime = runtime

  @property
  def static_scale(self) -> jax.Array | None:
    """The stored scale of its float8 inputs, float32 []; None where each token has its own."""
    return None if self.input_scale is None else self.input_scale.get_value()

  @property
  def quantizes(self) -> bool:
    """Whether it multiplies with float8 activations."""
    return self.runtime.activations == Precision.FP8 and isinstance(self.weight.get_value(), QArray)

  def sums(self, x_TD: jax.Array | Quantized, out_dtype=None) -> Sums:
    """The product as it leaves its kernel, with F... flattened, for an operation that finishes it."""
    weight, x_scale, scale = self.weight.get_value(), None, None
    if self.quantizes and not isinstance(x_TD, Quantized):
      x_TD = quantize_tokens(x_TD, self.static_scale)
    if isinstance(x_TD, Quantized):
      x_TD, x_scale = x_TD
    if isinstance(weight, QArray):
      weight, scale = weight.qvalue, weight.scale
      scale = scale.reshape(-1) if scale.ndim < weight.ndim else scale.reshape(-1, scale.shape[-1])
    return pallas_kernels.fp8_matmul_sums(
      x_TD,
      weight.reshape(-1, weight.shape[-1]),
      scale,
      x_scale,
      out_dtype=out_dtype or self.runtime.stream_dtype,
      **self.runtime.kernels,
    )

  def __call__(self, x_TD: jax.Array | Quantized, out_dtype=None) -> jax.Array:
    weight = self.weight.get_value()
    y = self.sums(x_TD, out_dtype).finish(out_dtype or self.runtime.stream_dtype)
    return y.reshape(y.shape[0], *weight.shape[:-1])


class RMSNorm(nnx.Module):
  """The residual stream with a sublayer's result added, and its RMSNorm for `reader`, the linear that takes it."""

  def __init__(self, shape: tuple[int, ...], eps: float, runtime: Runtime):
    self.weight = nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), partition=PartitionSpec())
    self.eps, self.runtime = eps, runtime

  def __call__(self, x_TD: jax.Array, y_TD: jax.Array, reader: Linear) -> tuple[jax.Array, jax.Array | Quantized]:
    weight_D = self.weight.get_value()
    how = {"quantize": reader.quantizes, "static_scale": reader.static_scale}
    return pallas_kernels.residual_norm(x_TD, y_TD, weight_D, eps=self.eps, **how, **self.runtime.kernels)


class Attention(nnx.Module):
  """Grouped-query attention. qkv is [J, G + 2, H, D]: for each KV head its G query heads, its key and its value."""

  def __init__(self, build: "LayerBuilder", layer_format: LayerFormat):
    self.qkv = build.linear(layer_format.qkv, build.qkv_shape, PartitionSpec(None, TENSOR))
    self.o = build.linear(layer_format.o, build.o_shape, PartitionSpec(None, None, TENSOR), build.o_run)
    self.k_scale, self.v_scale = build.kv_scale(), build.kv_scale()
    self.runtime = build.runtime

  @property
  def static_scales(self) -> tuple[jax.Array, jax.Array] | None:
    """The stored scales of float8 keys and values, float32 [K] each; None where each token has its own."""
    return None if self.k_scale is None else (self.k_scale.get_value(), self.v_scale.get_value())

  def __call__(self, x_TD: jax.Array | Quantized, pool: KVCache, context: "StepContext") -> tuple[jax.Array, KVCache]:
    where = {"first_page": context.first_page, **self.runtime.kernels}
    table = context.page_table_BM, context.query_starts, context.lengths_B
    q_TNH, pages = pallas_kernels.rope_write(
      self.qkv.sums(x_TD),
      context.cos_TH,
      context.sin_TH,
      pool.pools,
      *table,
      static_scales=self.static_scales,
      dtype=self.runtime.stream_dtype,
      **where,
    )
    pool = KVCache.of(pages)
    out = pallas_kernels.paged_attention(
      q_TNH,
      pool.k_pages,
      pool.v_pages,
      *table,
      k_scale=pool.k_scale,
      v_scale=pool.v_scale,
      quantize=self.o.quantizes,
      static_scale=self.o.static_scale,
      **where,
    )
    out = out if isinstance(out, Quantized) else out.reshape(out.shape[0], -1)
    return context.reduce(self.o(out), self.runtime.axes), pool


class Mlp(nnx.Module):
  """SwiGLU (Shazeer, arXiv 2002.05202): down(silu(gate(x)) * up(x)), with gate and up as one array [2, F, D]."""

  def __init__(self, build: "LayerBuilder", layer_format: LayerFormat):
    self.gate_up = build.linear(layer_format.gate_up, build.gate_up_shape, PartitionSpec(None, None, TENSOR))
    self.down = build.linear(layer_format.down, build.down_shape, PartitionSpec(None, None, TENSOR))
    self.runtime = build.runtime

  def __call__(self, x_TD: jax.Array | Quantized, context: "StepContext") -> jax.Array:
    how = {"quantize": self.down.quantizes, "static_scale": self.down.static_scale, "dtype": self.runtime.stream_dtype}
    hidden = pallas_kernels.silu_multiply(self.gate_up.sums(x_TD), **how, **self.runtime.kernels)
    return context.reduce(self.down(hidden), self.runtime.axes)


class DecoderLayer(nnx.Module):
  """One layer, or a stack of equal ones: every weight has a leading layer axis until the scan takes it off.

  y_TD is what the layer before has still to add to the residual stream x_TD, so that the sum, the norm and the rounding to
  float8 are one operation.
  """

  def __init__(self, build: "LayerBuilder", layer_format: LayerFormat):
    norm = (build.num_layers, build.config.d_model), build.config.rms_norm_eps, build.runtime
    self.attention_norm = RMSNorm(*norm)
    self.attention = Attention(build, layer_format)
    self.mlp_norm = RMSNorm(*norm)
    self.mlp = Mlp(build, layer_format)

  def __call__(
    self, x_TD: jax.Array, y_TD: jax.Array, pool: KVCache, context: "StepContext"
  ) -> tuple[jax.Array, jax.Array, KVCache]:
    x_TD, normed = self.attention_norm(x_TD, y_TD, self.attention.qkv)
    y_TD, pool = self.attention(context.whole(normed), pool, context)
    x_TD, normed = self.mlp_norm(x_TD, y_TD, self.mlp.gate_up)
    return x_TD, self.mlp(context.whole(normed), context), pool


@dataclasses.dataclass(frozen=True)
class LayerBuilder:
  """Declares weights: merged, padded and replicated shapes for a mesh, with how each is cut."""

  config: LlamaConfig
  recipe: Recipe
  shape: MeshShape
  runtime: Runtime
  num_layers: int = 0

  def with_layers(self, num_layers: int) -> "LayerBuilder":
    return dataclasses.replace(self, num_layers=num_layers)

  @property
  def padded(self) -> Padded:
    return Padded.of(self.config, self.recipe, self.shape)

  @property
  def qkv_shape(self):
    c, group = self.config, self.shape.group
    return (self.num_layers, c.num_kv_heads * group, c.group_size // group + 2, c.head_dim, c.d_model)

  @property
  def o_shape(self):
    return (self.num_layers, self.config.d_model, self.config.num_heads * self.config.head_dim)

  @property
  def o_run(self) -> int:
    """Columns of o that stay together: a device's query heads, or those of one KV head where it has several (layout.py)."""
    c, mesh = self.config, self.shape
    heads = c.num_heads // mesh.tensor if mesh.group == 1 else c.group_size // mesh.group
    return heads * c.head_dim

  @property
  def gate_up_shape(self):
    return (self.num_layers, 2, self.padded.d_ff, self.config.d_model)

  @property
  def down_shape(self):
    return (self.num_layers, self.config.d_model, self.padded.d_ff)

  def linear(self, precision: Precision, shape: tuple[int, ...], partition: PartitionSpec, run: int | None = None) -> Linear:
    """`run`: how many input columns stay together when they are cut; None: all that a device has."""
    value = jax.ShapeDtypeStruct(shape, precision.dtype)
    if precision != Precision.FP8:
      return Linear(value, partition, self.runtime)
    if self.recipe.granularity is Granularity.BLOCK128:
      # Blocks of 128 rows, repeated to what divides the rows: a head or a model may be narrower than whole blocks.
      unit = math.gcd(BLOCK, shape[-2])
      scale_shape = (*shape[:-2], shape[-2] // unit, self._block_columns(shape, partition, run))
      scale_partition = partition
    else:
      scale_shape, scale_partition = shape[:-1], PartitionSpec(*partition[: len(shape) - 1])
    scale = jax.ShapeDtypeStruct(scale_shape, jnp.float32)
    input_scale = jax.ShapeDtypeStruct(shape[:1], jnp.float32) if self.recipe.activations.is_static else None
    return Linear(QArray(value, scale), QArray(partition, scale_partition), self.runtime, input_scale)

  def kv_scale(self) -> nnx.Param | None:
    """A stored scale for each KV head, where the recipe has them."""
    if not self.recipe.kv.is_static:
      return None
    return nnx.Param(jax.ShapeDtypeStruct(self.qkv_shape[:2], jnp.float32), partition=PartitionSpec(None, TENSOR))

  def _block_columns(self, shape, partition, run: int | None) -> int:
    cut = len(partition) == len(shape) and self.shape.tensor > 1
    run = run or shape[-1] // self.shape.tensor
    if cut and run % BLOCK:
      raise InputError(
        f"Llama: block128 scales need each device's input columns to be whole blocks; {shape[-1]} columns over "
        f'tensor={self.shape.tensor}, {run} at a time, are not. Use granularity="channel" or another tensor.'
      )
    return -(-shape[-1] // BLOCK)


@dataclasses.dataclass(frozen=True)
class StepContext:
  """What every layer of a step shares: which pages its tokens use, and their rotary angles."""

  page_table_BM: jax.Array
  query_starts: jax.Array | None
  lengths_B: jax.Array
  cos_TH: jax.Array  # [T, H / 2]
  sin_TH: jax.Array
  row_axes: Axes = None  # mesh axes over which the rows of the residual stream are cut (model.py)
  first_page: jax.Array | int = 0  # of the layer at hand, in the pool of all layers

  @classmethod
  def of(cls, batch: PrefillBatch | DecodeBatch, config: LlamaConfig, row_axes: Axes = None) -> "StepContext":
    _, position_T = batch.places()
    angles = position_T[:, None].astype(jnp.float32) * config.rope.inverse_frequencies(config.head_dim)
    return cls(
      batch.page_table_BM,
      batch.query_starts,
      batch.lengths_B,
      jnp.cos(angles),
      jnp.sin(angles),
      row_axes,
    )

  def reduce(self, y_TD: jax.Array, axes: Axes) -> jax.Array:
    """The sum over devices of what each adds to the residual stream: all rows of it, or this device's."""
    return sum_over(y_TD, axes) if self.row_axes is None else scatter_over(y_TD, self.row_axes)

  def whole(self, normed):
    """All rows of what a norm gave, in float8 already where linears read that."""
    return jax.tree.map(lambda x: concatenate_over(x, self.row_axes) if x.ndim else x, normed)

  def at_page(self, first_page: jax.Array) -> "StepContext":
    """The same for the layer whose pages in the flattened pool begin there."""
    return dataclasses.replace(self, first_page=first_page)
