"""The Llama: embedding, segments of stacked layers, head.

    model = Llama(config, recipe)          # abstract: shapes and dtypes, a millisecond, no memory
    hidden_TD, cache = model(batch, cache) # batch and KV cache are arguments, the new cache is a result
    logits_TV = model.logits(hidden_TD)

Layers are stacked: every weight of a segment (a maximal run of layers with equal formats) is one array with a leading
layer axis, and `lax.scan` runs the segment. Its collectives are those of dims.py, identities with no mesh.
Refuses to know: where weights come from, how steps are compiled, how tokens are chosen.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

import pallas_kernels
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.mesh import MeshShape
from jaxfp8.model.batch import DecodeBatch, PrefillBatch
from jaxfp8.model.kv_cache import KVCache
from jaxfp8.model.layers import DecoderLayer, LayerBuilder, Linear, RMSNorm, Runtime, StepContext
from jaxfp8.recipe import LayerFormat, Recipe
from jaxfp8.sharding import TENSOR, Axes, index_over
from pallas_kernels import costs
from pallas_kernels.float8_bytes import loop_views

_CUT_ROWS_FROM = 512  # tokens


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
    self.runtime = Runtime(axes, implementation, target, self.recipe.activation_dtype, self.recipe.stream)
    builder = LayerBuilder(config, self.recipe, self.shape, self.runtime)
    vocab = (builder.padded.vocab_size, config.d_model)
    self.embedding = nnx.Param(jax.ShapeDtypeStruct(vocab, self.runtime.stream_dtype), partition=PartitionSpec(TENSOR))
    self.segments = nnx.List(
      DecoderLayer(builder.with_layers(stop - start), layer_format) for start, stop, layer_format in self.segment_bounds()
    )
    self.final_norm = RMSNorm((config.d_model,), config.rms_norm_eps, self.runtime)
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
    """Runs the batch's tokens; returns (hidden [T, D] after the last norm, the cache with their keys and values).

    Raises InputError for a batch whose arrays do not fit together and for another model's cache.
    """
    batch.check()
    cache.check(self.config, self.config.num_kv_heads // (1 if self.runtime.axes is None else self.shape.kv))
    num_pages = cache.k_pages.shape[1]
    batch = batch.checked(num_pages, cache.page_size)
    context = StepContext.of(batch, self.config, self.row_axes(batch))
    x, pool, layer = context.reduce(self.own_rows(batch.tokens_T), self.runtime.axes), cache.flatten(), 0
    y = jnp.zeros_like(x)  # what the last sublayer has still to add
    pack, unpack = loop_views(self.runtime.target)
    for segment in self.segments:
      graph, stacked = nnx.split(segment)

      def run_layer(carry, inputs, graph=graph):
        (x, y, pool), (first_page, weights) = unpack(carry), unpack(inputs)
        return pack(nnx.merge(graph, weights)(x, y, pool, context.at_page(first_page))), None

      length = segment.attention_norm.weight.get_value().shape[0]
      with costs.repeated(length):
        carry, _ = jax.lax.scan(run_layer, pack((x, y, pool)), pack(((layer + jnp.arange(length)) * num_pages, stacked)))
      x, y, pool = unpack(carry)
      layer += length
    return context.whole(self.final_norm(x, y, self.output)[1]), pool.unflatten(self.config.num_layers)

  def row_axes(self, batch: PrefillBatch | DecodeBatch) -> Axes:
    """Mesh axes over which the rows of the residual stream are cut; None: every device has all of them.

    In a long prefill each device adds, norms and rounds its part of the rows: an eighth of that traffic on eight devices, and
    what is gathered is float8. A short one would pay more for the second collective than it saves (docs/multi-host.md).
    """
    T, tensor = batch.tokens_T.shape[0], self.shape.tensor
    worth_it = batch.query_starts is not None and T >= _CUT_ROWS_FROM and T % tensor == 0
    return self.runtime.axes if tensor > 1 and worth_it else None

  def own_rows(self, tokens_T: jax.Array) -> jax.Array:
    """Rows of the embedding [T, D]; cut over the vocabulary, zeros where another device has the row."""
    table = self.embedding.get_value()
    local = tokens_T - index_over(self.runtime.axes) * table.shape[0]
    mine = (local >= 0) & (local < table.shape[0])
    return jnp.where(mine[:, None], table[jnp.clip(local, 0, table.shape[0] - 1)], 0)

  @property
  def output(self) -> Linear:
    """The head, which may be the embedding."""
    return Linear(self.embedding.get_value(), PartitionSpec(), self.runtime) if self.config.tied_embeddings else self.head

  def logits(self, hidden_TD: jax.Array) -> jax.Array:
    """float32 [T, V]; under a mesh [T, V / tensor], this device's part of the (padded) vocabulary.

    Entries of padding are -inf.
    """
    logits = self.output(hidden_TD, out_dtype=jnp.float32)
    size = logits.shape[-1]
    token = index_over(self.runtime.axes) * size + jnp.arange(size)
    return jnp.where(token < self.config.vocab_size, logits, -jnp.inf)
