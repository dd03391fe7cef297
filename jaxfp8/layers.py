"""The parts of a Llama as Flax NNX modules: `Linear`, `RMSNorm`, `Attention`, `Mlp`, `DecoderLayer`.

They own weights and nothing else. `LayerBuilder` declares those weights: merged, padded and replicated for a mesh, each with
how it is cut. `StepContext` is what every layer of a step shares. Refuses to know how layers are stacked and run (model.py).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

import pallas_kernels
from jaxfp8.batch import DecodeBatch, PrefillBatch
from jaxfp8.cache import KVCache
from jaxfp8.config import BLOCK, LlamaConfig, Recipe
from jaxfp8.dims import TENSOR, Axes, sum_over
from jaxfp8.errors import InputError
from jaxfp8.fp8 import DTYPES, QArray, quantize_tokens
from jaxfp8.mesh import MeshShape, Padded


@dataclasses.dataclass(frozen=True)
class LayerFormat:
  """How one layer's four merged matrices are stored: each "fp8" (with the recipe's granularity), "bf16" or "f32"."""

  qkv: str
  o: str
  gate_up: str
  down: str

  @classmethod
  def uniform(cls, weights: str) -> "LayerFormat":
    return cls(weights, weights, weights, weights)


@dataclasses.dataclass(frozen=True)
class Runtime:
  """Everything static about a run that is no size: mesh axes, kernels, activations."""

  axes: Axes = None
  implementation: str = "auto"
  target: pallas_kernels.Target | None = None
  activations: str = "bf16"
  stream: str = "bf16"

  @property
  def stream_dtype(self):
    return DTYPES[self.stream]


class Linear(nnx.Module):
  """y [T, F...] = x [T, D] @ w^T for a weight [F..., D], float8 with scales or plain."""

  def __init__(self, weight, partition, runtime: Runtime):
    self.weight = nnx.Param(weight, partition=partition)
    self.runtime = runtime

  def __call__(self, x_TD: jax.Array, out_dtype=None) -> jax.Array:
    weight, runtime = self.weight.get_value(), self.runtime
    scale = x_scale = None
    if isinstance(weight, QArray):
      weight, scale = weight.qvalue, weight.scale
      scale = scale.reshape(-1) if scale.ndim < weight.ndim else scale.reshape(-1, scale.shape[-1])
      if runtime.activations == "fp8":
        x_TD, x_scale = quantize_tokens(x_TD)
    y = pallas_kernels.fp8_matmul(
      x_TD,
      weight.reshape(-1, weight.shape[-1]),
      scale,
      x_scale,
      out_dtype=out_dtype or runtime.stream_dtype,
      implementation=runtime.implementation,
      target=runtime.target,
    )
    return y.reshape(y.shape[0], *weight.shape[:-1])


class RMSNorm(nnx.Module):
  """x / rms(x) * weight in float32 (Zhang and Sennrich, arXiv 1910.07467)."""

  def __init__(self, shape: tuple[int, ...], eps: float):
    self.weight = nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), partition=PartitionSpec())
    self.eps = eps

  def __call__(self, x_TD: jax.Array) -> jax.Array:
    x = x_TD.astype(jnp.float32)
    scale = jax.lax.rsqrt(_mean_square(x) + self.eps)
    return (x * scale * self.weight.get_value()).astype(x_TD.dtype)


class Attention(nnx.Module):
  """Grouped-query attention. qkv is [J, G + 2, H, D]: for each KV head its G query heads, its key and its value."""

  def __init__(self, build: "LayerBuilder", layer_format: LayerFormat):
    self.qkv = build.linear(layer_format.qkv, build.qkv_shape, PartitionSpec(None, TENSOR))
    self.o = build.linear(layer_format.o, build.o_shape, PartitionSpec(None, None, TENSOR), build.o_run)
    self.runtime = build.runtime

  def __call__(self, x_TD, pool: KVCache, context: "StepContext") -> tuple[jax.Array, KVCache]:
    qkv = self.qkv(x_TD)  # [T, K, G + 2, H]
    T, K, rows, H = qkv.shape
    q = _rotate(qkv[:, :, : rows - 2].reshape(T, K * (rows - 2), H), context)
    k = _rotate(qkv[:, :, rows - 2], context)
    where = context.page_table_BM, context.query_starts, context.lengths_B
    kernels = {"implementation": self.runtime.implementation, "target": self.runtime.target}
    pool = pool.write(k, qkv[:, :, rows - 1], *where, **kernels)
    out = pallas_kernels.paged_attention(
      q, pool.k_pages, pool.v_pages, *where, k_scale=pool.k_scale, v_scale=pool.v_scale, **kernels
    )
    return sum_over(self.o(out.reshape(T, -1)), self.runtime.axes), pool


class Mlp(nnx.Module):
  """SwiGLU (Shazeer, arXiv 2002.05202): down(silu(gate(x)) * up(x)), with gate and up as one array [2, F, D]."""

  def __init__(self, build: "LayerBuilder", layer_format: LayerFormat):
    self.gate_up = build.linear(layer_format.gate_up, build.gate_up_shape, PartitionSpec(None, None, TENSOR))
    self.down = build.linear(layer_format.down, build.down_shape, PartitionSpec(None, None, TENSOR))
    self.runtime = build.runtime

  def __call__(self, x_TD: jax.Array) -> jax.Array:
    gate_up = self.gate_up(x_TD).astype(jnp.float32)  # [T, 2, F]
    hidden = jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1]
    return sum_over(self.down(hidden.astype(x_TD.dtype)), self.runtime.axes)


class DecoderLayer(nnx.Module):
  """One layer, or a stack of equal ones: every weight has a leading layer axis until the scan takes it off."""

  def __init__(self, build: "LayerBuilder", layer_format: LayerFormat):
    self.attention_norm = RMSNorm((build.num_layers, build.config.d_model), build.config.rms_norm_eps)
    self.attention = Attention(build, layer_format)
    self.mlp_norm = RMSNorm((build.num_layers, build.config.d_model), build.config.rms_norm_eps)
    self.mlp = Mlp(build, layer_format)

  def __call__(self, x_TD, pool: KVCache, context: "StepContext") -> tuple[jax.Array, KVCache]:
    y, pool = self.attention(self.attention_norm(x_TD), pool, context)
    x_TD = x_TD + y
    return x_TD + self.mlp(self.mlp_norm(x_TD)), pool


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

  def linear(self, dtype: str, shape: tuple[int, ...], partition: PartitionSpec, run: int | None = None) -> Linear:
    """`run`: how many input columns stay together when they are cut; None: all that a device has."""
    value = jax.ShapeDtypeStruct(shape, DTYPES[dtype])
    if dtype != "fp8":
      return Linear(value, partition, self.runtime)
    if self.recipe.granularity == "block128":
      # Blocks of 128 rows, repeated to what divides the rows: a head or a model may be narrower than whole blocks.
      unit = math.gcd(BLOCK, shape[-2])
      scale_shape = (*shape[:-2], shape[-2] // unit, self._block_columns(shape, partition, run))
      scale_partition = partition
    else:
      scale_shape, scale_partition = shape[:-1], PartitionSpec(*partition[: len(shape) - 1])
    scale = jax.ShapeDtypeStruct(scale_shape, jnp.float32)
    return Linear(QArray(value, scale), QArray(partition, scale_partition), self.runtime)

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
  cos_TH: jax.Array  # [T, 1, H / 2]
  sin_TH: jax.Array

  @classmethod
  def of(cls, batch: PrefillBatch | DecodeBatch, config: LlamaConfig) -> "StepContext":
    _, position_T = batch.places()
    angles = position_T[:, None].astype(jnp.float32) * config.rope.inverse_frequencies(config.head_dim)
    return cls(
      batch.page_table_BM,
      batch.query_starts,
      batch.lengths_B,
      jnp.cos(angles)[:, None],
      jnp.sin(angles)[:, None],
    )

  def at_layer(self, layer: jax.Array, num_pages: int) -> "StepContext":
    """The same with one layer's page numbers in the flattened pool."""
    return dataclasses.replace(self, page_table_BM=self.page_table_BM + layer * num_pages)


def _rotate(x_TNH: jax.Array, context: StepContext) -> jax.Array:
  """RoPE in float32 on the two halves of each head (Hugging Face's order of the pairs)."""
  first, second = jnp.split(x_TNH.astype(jnp.float32), 2, axis=-1)
  cos, sin = context.cos_TH, context.sin_TH
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_TNH.dtype)


def _mean_square(x_TD: jax.Array) -> jax.Array:
  """Mean of x^2 along D, float32 [T, 1].

  As a product with ones: on a CPU a plain sum rounds differently for few rows than for many, a product of at least two
  rows and columns does not, and results must not depend on what else is in the batch.
  """
  T, D = x_TD.shape
  square = x_TD * x_TD
  if T == 1:
    square = jnp.concatenate([square, square])
  total = jax.lax.dot_general(square, jnp.ones((8, D)), (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
  return total[:T, :1] / D
