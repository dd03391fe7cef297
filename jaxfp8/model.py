"""The Llama as Flax NNX modules that own weights and nothing else.

    model = Llama(config, recipe)          # abstract: shapes and dtypes, a millisecond, no memory
    hidden_TD, cache = model(batch, cache) # batch and KV cache are arguments, the new cache is a result
    logits_TV = model.logits(hidden_TD)

Layers are stacked: every weight of a segment (a maximal run of layers with equal formats) is one array with a leading
layer axis, and `lax.scan` runs the segment. The model's only collective is `dims.sum_over`, the identity with no mesh.
Refuses to know: where weights come from, how steps are compiled, how tokens are chosen.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

import pallas_kernels
from jaxfp8.batch import DecodeBatch, PrefillBatch
from jaxfp8.cache import KVCache
from jaxfp8.config import BLOCK, LlamaConfig, Recipe
from jaxfp8.dims import TENSOR, Axes, Padded, index_over, sum_over
from jaxfp8.errors import InputError
from jaxfp8.fp8 import DTYPES, QArray, quantize_tokens
from jaxfp8.mesh import MeshShape
from pallas_kernels.float8_bytes import loop_views


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

  def __init__(self, build: "_Builder", layer_format: LayerFormat):
    self.qkv = build.linear(layer_format.qkv, build.qkv_shape, PartitionSpec(None, TENSOR))
    self.o = build.linear(layer_format.o, build.o_shape, PartitionSpec(None, None, TENSOR))
    self.runtime = build.runtime

  def __call__(self, x_TD, pool: KVCache, context: "_Context") -> tuple[jax.Array, KVCache]:
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

  def __init__(self, build: "_Builder", layer_format: LayerFormat):
    self.gate_up = build.linear(layer_format.gate_up, build.gate_up_shape, PartitionSpec(None, None, TENSOR))
    self.down = build.linear(layer_format.down, build.down_shape, PartitionSpec(None, None, TENSOR))
    self.runtime = build.runtime

  def __call__(self, x_TD: jax.Array) -> jax.Array:
    gate_up = self.gate_up(x_TD).astype(jnp.float32)  # [T, 2, F]
    hidden = jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1]
    return sum_over(self.down(hidden.astype(x_TD.dtype)), self.runtime.axes)


class DecoderLayer(nnx.Module):
  """One layer, or a stack of equal ones: every weight has a leading layer axis until the scan takes it off."""

  def __init__(self, build: "_Builder", layer_format: LayerFormat):
    self.attention_norm = RMSNorm((build.num_layers, build.config.d_model), build.config.rms_norm_eps)
    self.attention = Attention(build, layer_format)
    self.mlp_norm = RMSNorm((build.num_layers, build.config.d_model), build.config.rms_norm_eps)
    self.mlp = Mlp(build, layer_format)

  def __call__(self, x_TD, pool: KVCache, context: "_Context") -> tuple[jax.Array, KVCache]:
    y, pool = self.attention(self.attention_norm(x_TD), pool, context)
    x_TD = x_TD + y
    return x_TD + self.mlp(self.mlp_norm(x_TD)), pool


class Llama(nnx.Module):
  """A Llama of `ShapeDtypeStruct`s; `load`, `random_weights` or the user's own code fills it.

  Args:
    recipe: which numbers it runs in.
    formats: one LayerFormat a layer, where a checkpoint mixes dtypes; None means the recipe's weights everywhere.
    shape: the mesh that sizes are padded and KV heads replicated for.
    axes: mesh axes that a step under shard_map sums over; None for a model with no mesh.
    implementation, target: which kernels (see pallas_kernels); gradients need implementation="reference".
  """

  def __init__(
    self,
    config: LlamaConfig,
    recipe: Recipe | None = None,
    *,
    formats: tuple[LayerFormat, ...] | None = None,
    shape: MeshShape | None = None,
    axes: Axes = None,
    implementation: str = "auto",
    target: pallas_kernels.Target | None = None,
  ):
    self.config, self.recipe, self.shape = config, recipe or Recipe(), shape or MeshShape()
    self.formats = formats or (LayerFormat.uniform(self.recipe.weights),) * config.num_layers
    if len(self.formats) != config.num_layers:
      raise InputError(f"Llama: needs one format a layer; got {len(self.formats)} for {config.num_layers} layers.")
    self.runtime = Runtime(axes, implementation, target, self.recipe.activations, self.recipe.stream)
    builder = _Builder(config, self.recipe, self.shape, self.runtime)
    vocab = (builder.padded.vocab_size, config.d_model)
    self.embedding = nnx.Param(jax.ShapeDtypeStruct(vocab, self.runtime.stream_dtype), partition=PartitionSpec(TENSOR))
    self.segments = nnx.List(
      DecoderLayer(builder.with_layers(stop - start), layer_format) for start, stop, layer_format in self.segment_bounds()
    )
    self.final_norm = RMSNorm((config.d_model,), config.rms_norm_eps)
    if not config.tied_embeddings:
      self.head = Linear(jax.ShapeDtypeStruct(vocab, self.runtime.stream_dtype), PartitionSpec(TENSOR), self.runtime)

  def segment_bounds(self) -> list[tuple[int, int, LayerFormat]]:
    """(first layer, one past the last, format) of each segment."""
    bounds, start = [], 0
    for layer_format, run in itertools.groupby(self.formats):
      stop = start + len(list(run))
      bounds.append((start, stop, layer_format))
      start = stop
    return bounds

  def partitions(self) -> list[PartitionSpec]:
    """How each weight is cut over the mesh, in the order of `jax.tree.leaves(nnx.state(self))`."""
    variables = jax.tree.leaves(nnx.state(self), is_leaf=lambda node: isinstance(node, nnx.Variable))
    specs = [jax.tree.leaves(v.get_metadata("partition"), is_leaf=lambda x: isinstance(x, PartitionSpec)) for v in variables]
    return list(itertools.chain.from_iterable(specs))

  def __call__(self, batch: PrefillBatch | DecodeBatch, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Runs the batch's tokens; returns (hidden [T, D] after the last norm, the cache with their keys and values)."""
    num_pages = cache.k_pages.shape[1]
    context = _Context.of(batch, self.config)
    x, pool, layer = self.embed(batch.tokens_T), cache.flatten(), 0
    pack, unpack = loop_views(self.runtime.target)
    for segment in self.segments:
      graph, stacked = nnx.split(segment)

      def run_layer(carry, inputs, graph=graph):
        (x, pool), (index, weights) = unpack(carry), unpack(inputs)
        return pack(nnx.merge(graph, weights)(x, pool, context.at_layer(index, num_pages))), None

      length = segment.attention_norm.weight.get_value().shape[0]
      carry, _ = jax.lax.scan(run_layer, pack((x, pool)), pack((layer + jnp.arange(length), stacked)))
      x, pool = unpack(carry)
      layer += length
    return self.final_norm(x), pool.unflatten(self.config.num_layers)

  def embed(self, tokens_T: jax.Array) -> jax.Array:
    """Rows of the embedding [T, D]. Cut over the vocabulary, each device gives the rows that it has."""
    table = self.embedding.get_value()
    local = tokens_T - index_over(self.runtime.axes) * table.shape[0]
    mine = (local >= 0) & (local < table.shape[0])
    rows = jnp.where(mine[:, None], table[jnp.clip(local, 0, table.shape[0] - 1)], 0)
    return sum_over(rows, self.runtime.axes)

  def logits(self, hidden_TD: jax.Array) -> jax.Array:
    """float32 [T, V]; under a mesh [T, V / tensor], this device's part of the (padded) vocabulary.

    Entries of padding are -inf.
    """
    head = Linear(self.embedding.get_value(), PartitionSpec(), self.runtime) if self.config.tied_embeddings else self.head
    logits = head(hidden_TD, out_dtype=jnp.float32)
    size = logits.shape[-1]
    token = index_over(self.runtime.axes) * size + jnp.arange(size)
    return jnp.where(token < self.config.vocab_size, logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class _Builder:
  """Declares weights: merged, padded and replicated shapes for a mesh, with how each is cut."""

  config: LlamaConfig
  recipe: Recipe
  shape: MeshShape
  runtime: Runtime
  num_layers: int = 0

  def with_layers(self, num_layers: int) -> "_Builder":
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
  def gate_up_shape(self):
    return (self.num_layers, 2, self.padded.d_ff, self.config.d_model)

  @property
  def down_shape(self):
    return (self.num_layers, self.config.d_model, self.padded.d_ff)

  def linear(self, dtype: str, shape: tuple[int, ...], partition: PartitionSpec) -> Linear:
    value = jax.ShapeDtypeStruct(shape, DTYPES[dtype])
    if dtype != "fp8":
      return Linear(value, partition, self.runtime)
    if self.recipe.granularity == "block128":
      # Blocks of 128 rows, repeated to what divides the rows: a head or a model may be narrower than whole blocks.
      unit = math.gcd(BLOCK, shape[-2])
      scale_shape = (*shape[:-2], shape[-2] // unit, self._block_columns(shape, partition))
      scale_partition = partition
    else:
      scale_shape, scale_partition = shape[:-1], PartitionSpec(*partition[: len(shape) - 1])
    scale = jax.ShapeDtypeStruct(scale_shape, jnp.float32)
    return Linear(QArray(value, scale), QArray(partition, scale_partition), self.runtime)

  def _block_columns(self, shape, partition) -> int:
    cut = len(partition) == len(shape) and self.shape.tensor > 1
    if cut and shape[-1] // self.shape.tensor % BLOCK:
      raise InputError(
        f"Llama: block128 scales need each device's input columns to be whole blocks; {shape[-1]} columns over "
        f'tensor={self.shape.tensor} are not. Use granularity="channel" or another tensor.'
      )
    return -(-shape[-1] // BLOCK)


@dataclasses.dataclass(frozen=True)
class _Context:
  """What every layer of a step shares: which pages its tokens use, and their rotary angles."""

  page_table_BM: jax.Array
  query_starts: jax.Array | None
  lengths_B: jax.Array
  cos_TH: jax.Array  # [T, 1, H / 2]
  sin_TH: jax.Array

  @classmethod
  def of(cls, batch: PrefillBatch | DecodeBatch, config: LlamaConfig) -> "_Context":
    _, position_T = batch.places()
    angles = position_T[:, None].astype(jnp.float32) * config.rope.inverse_frequencies(config.head_dim)
    return cls(
      batch.page_table_BM,
      batch.query_starts,
      batch.lengths_B,
      jnp.cos(angles)[:, None],
      jnp.sin(angles)[:, None],
    )

  def at_layer(self, layer: jax.Array, num_pages: int) -> "_Context":
    """The same with one layer's page numbers in the flattened pool."""
    return dataclasses.replace(self, page_table_BM=self.page_table_BM + layer * num_pages)


def _rotate(x_TNH: jax.Array, context: _Context) -> jax.Array:
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
