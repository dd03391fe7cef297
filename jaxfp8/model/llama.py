"""The Llama: embedding, segments of stacked layers, head.

    model = Llama(config, recipe)          # abstract: shapes and dtypes, a millisecond, no memory
    hidden_TD, cache = model(batch, cache) # batch and KV cache are arguments, the new cache is a result
    logits_TV = model.logits(hidden_TD)

Layers are stacked: every weight of a segment (a maximal run of layers with equal formats) is one array with a leading
layer axis, and a scan runs the segment. The collectives are those of sharding.py, identities with no mesh.
Refuses to know: where weights come from, how steps are compiled, how tokens are chosen.
"""

import itertools
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

import pallas_kernels
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.mesh import MeshShape, Padded
from jaxfp8.model.batch import DecodeBatch, PrefillBatch
from jaxfp8.model.kv_cache import KVCache
from jaxfp8.model.layer_builder import LayerBuilder
from jaxfp8.model.layers import DecoderLayer, Linear, RMSNorm, Runtime
from jaxfp8.model.step_context import StepContext
from jaxfp8.recipe import LayerFormat, Recipe
from jaxfp8.sharding import TENSOR, Axes, abstract_array, index_over
from pallas_kernels import float8_bytes

_MIN_CUT_ROWS = 512  # tokens of a prefill whose rows are cut over devices


class Llama(nnx.Module):
  """A Llama of `ShapeDtypeStruct`s; `load`, `random_weights` or the user's own code fills it.

  Args:
    recipe: the number formats; None is `Recipe()`.
    formats: one LayerFormat for each layer, if a checkpoint mixes formats; None: the recipe's weights in every layer.
    shape: the mesh for which sizes are padded and KV heads replicated; None is one device.
    axes: mesh axes that a step under shard_map sums over; None without a mesh.
    implementation, target: which kernels, and for which device (see pallas_kernels); gradients need "reference".

  Raises InputError if the number of formats is not that of the layers, or the mesh would cut a block of scales.
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
    formats_of_a_run = {"activations": self.recipe.activation_dtype, "stream": self.recipe.stream}
    self.runtime = Runtime(axes, implementation, target, **formats_of_a_run, activation_bound=config.activation_scale_ub)
    vocab = (Padded.of(config, self.recipe, self.shape).vocab_size, config.d_model)
    self.embedding = nnx.Param(abstract_array(vocab, self.runtime.stream_dtype), partition=PartitionSpec(TENSOR))
    self.segments = nnx.List(
      DecoderLayer(LayerBuilder(config, self.recipe, self.shape, self.runtime, layer_format, stop - start))
      for start, stop, layer_format in self.segment_bounds()
    )
    self.final_norm = RMSNorm((config.d_model,), config.rms_norm_eps, self.runtime)
    if not config.tied_embeddings:
      self.head = Linear(abstract_array(vocab, self.runtime.stream_dtype), PartitionSpec(TENSOR), self.runtime)

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
    """Runs the batch's tokens. Returns (hidden [T, D] after the last norm, the cache with the tokens' keys and values).

    Raises InputError for a batch with arrays that do not fit together, and for another model's cache.
    """
    batch.check()
    cache.check(self.config, self.config.num_kv_heads // (1 if self.runtime.axes is None else self.shape.kv))
    num_pages = cache.k_pages.shape[1]
    batch = batch.checked(num_pages, cache.page_size)
    context = StepContext.of(batch, self.config, self.row_axes(batch))
    with jax.named_scope("embedding"):
      x = context.reduce(self.embed(batch.tokens_T), self.runtime.axes)
    pool = cache.flatten()
    y = jnp.zeros_like(x)  # the last sublayer's result, which the next norm adds to x
    for segment, (start, stop, _) in zip(self.segments, self.segment_bounds(), strict=True):
      graph, stacked = nnx.split(segment)

      def run_layer(carry, inputs, graph=graph):
        (x, y, pool), (first_page, weights) = carry, inputs
        return nnx.merge(graph, weights)(x, y, pool, context.at_page(first_page))

      first_pages = (start + jnp.arange(stop - start)) * num_pages
      x, y, pool = float8_bytes.loop(run_layer, (x, y, pool), (first_pages, stacked), self.runtime.target)
    hidden = cast(jax.Array, self.final_norm(x, y, self.output)[1])  # never `Quantized`: the head is not float8
    return context.gather_rows(hidden), pool.unflatten(self.config.num_layers)

  def row_axes(self, batch: PrefillBatch | DecodeBatch) -> Axes:
    """Mesh axes that the rows of the residual stream are cut over; None: every device has all rows.

    In a long prefill each device adds, normalizes and rounds its part of the rows. Eight devices then move an eighth of those
    bytes each, and the gathered rows are float8. A short prefill would lose more time in the second collective than it saves
    (docs/multi-host.md).
    """
    T, tensor = batch.tokens_T.shape[0], self.shape.tensor
    worth_it = batch.query_starts is not None and T >= _MIN_CUT_ROWS and T % tensor == 0
    return self.runtime.axes if tensor > 1 and worth_it else None

  def embed(self, tokens_T: jax.Array) -> jax.Array:
    """Rows of the embedding [T, D]. Under a mesh, rows of another device's part of the vocabulary are zeros."""
    table = self.embedding.get_value()
    local = tokens_T - index_over(self.runtime.axes) * table.shape[0]
    is_local = (local >= 0) & (local < table.shape[0])
    return jnp.where(is_local[:, None], table[jnp.clip(local, 0, table.shape[0] - 1)], 0)

  @property
  def output(self) -> Linear:
    """The head, which may be the embedding."""
    return Linear(self.embedding.get_value(), PartitionSpec(), self.runtime) if self.config.tied_embeddings else self.head

  def logits(self, hidden_TD: jax.Array) -> jax.Array:
    """float32 [T, V] of hidden states [T, D]; under a mesh [T, V / tensor], this device's part of the (padded) vocabulary.

    Entries of padding are -inf.
    """
    with jax.named_scope("head"):
      logits = self.output(hidden_TD, out_dtype=jnp.float32)
      size = logits.shape[-1]
      token = index_over(self.runtime.axes) * size + jnp.arange(size)
      return jnp.where(token < self.config.vocab_size, logits, -jnp.inf)
