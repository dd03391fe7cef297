"""The model against Hugging Face transformers (goldens) and against a float64 Llama in numpy."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxfp8.checkpoint import readers
from jaxfp8.checkpoint.load import abstract_model, load_source
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.mesh import MeshShape
from jaxfp8.model.batch import DecodeBatch, PrefillBatch
from jaxfp8.model.kv_cache import KVCache
from jaxfp8.model.llama import Llama
from jaxfp8.model.sampling import SamplingParams
from jaxfp8.recipe import Recipe
from jaxfp8.serving.engine import Engine, Request
from jaxfp8.serving.limits import EngineLimits
from jaxfp8.serving.steps import decode, prefill
from tests.helpers import tiny_llamas, tiny_models
from tests.helpers.tiny_llamas import F32

LIMIT = 2e-4  # largest difference from transformers' float32 logits, which are within 5e-5 of float64


@functools.cache
def tiny(case):
  return tiny_llamas.load(case)


def difference(a, b):
  return float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))


@pytest.mark.parametrize(("page_size", "pieces"), [(64, [150]), (32, [70, 33, 1, 46])], ids=("whole", "pieces"))
@pytest.mark.parametrize("case", tiny_models.CASES)
def test_logits_are_those_of_transformers(case, page_size, pieces):
  golden = tiny_llamas.golden(f"tiny_{case}")
  logits, _ = tiny_llamas.run_pieces(tiny(case), golden["tokens"], pieces, page_size=page_size, pad_to=max(pieces))
  assert difference(logits, golden["logits"]) < LIMIT


def test_large_pages_and_shuffled_tables_match_transformers():
  golden = tiny_llamas.golden("tiny_gqa_9_3_untied")
  pieces = {"pieces": [129, 1, 1, 19], "page_size": 128, "table": [3, 1], "pad_to": 129}
  logits, _ = tiny_llamas.run_pieces(tiny("gqa_9_3_untied"), golden["tokens"], **pieces)
  assert difference(logits, golden["logits"]) < LIMIT


@pytest.mark.parametrize("case", ["mha_tied", "gqa_5_1_llama3"])
def test_ragged_batches_match_transformers(case):
  """Each sequence is a prefix of the golden's tokens. Prefill gives the last logits of each, decode the next."""
  model, golden = tiny(case), tiny_llamas.golden(f"tiny_{case}")
  lengths = [1, 31, 64, 65, 149]
  batch = PrefillBatch.from_prompts([golden["tokens"][:length] for length in lengths])
  cache = KVCache.init(model.config, num_pages=int(batch.page_table_BM.max()) + 1, dtype="f32")
  logits, cache = jax.jit(prefill)(model, cache, batch)
  assert difference(logits, golden["logits"][[length - 1 for length in lengths]]) < LIMIT
  tokens = jnp.asarray(golden["tokens"][lengths])
  # 64 tokens fill their page, so the next token needs another page.
  table = np.pad(np.asarray(batch.page_table_BM), ((0, 0), (0, 1)))
  table[2, 1] = batch.page_table_BM.max() + 1
  cache = jax.tree.map(lambda pool: jnp.pad(pool, [(0, 0), (0, 1)] + [(0, 0)] * (pool.ndim - 2)), cache)
  step = DecodeBatch(tokens, jnp.asarray(lengths, jnp.int32) + 1, jnp.asarray(table))
  logits, _ = jax.jit(decode)(model, cache, step)
  assert difference(logits, golden["logits"][lengths]) < LIMIT


def test_wrong_weights_exceed_the_limit():
  """The comparison above can fail: two swapped KV heads, or a missing RoPE, are far outside of its limit."""
  golden = tiny_llamas.golden("tiny_gqa_6_2_linear")
  config, weights = (
    tiny_models.make_config("gqa_6_2_linear"),
    tiny_models.make_weights(tiny_models.make_config("gqa_6_2_linear")),
  )
  swapped = dict(weights)
  name = "model.layers.1.self_attn.k_proj.weight"
  swapped[name] = np.concatenate([weights[name][16:], weights[name][:16]])
  straight = dataclasses.replace(config, rope=dataclasses.replace(config.rope, type="default"))
  for wrong in (tiny_llamas.load(config, weights=swapped), tiny_llamas.load(straight, weights=weights)):
    logits, _ = tiny_llamas.run_pieces(wrong, golden["tokens"], [150])
    assert difference(logits, golden["logits"]) > 100 * LIMIT


@pytest.fixture(scope="module")
def real_model():
  return load_source(readers.open_source(readers.default_model()), F32)


class TestRealModel:
  """SmolLM2-135M-Instruct, loaded once, float32 everywhere."""

  def test_logits_are_those_of_transformers(self, real_model):
    golden = tiny_llamas.golden("real")
    prompts = [golden[f"ids_{i}"] for i in range(5)]
    batch = PrefillBatch.from_prompts(prompts)
    cache = KVCache.init(real_model.config, num_pages=int(batch.page_table_BM.max()) + 1, dtype="f32")
    logits, _ = tiny_llamas.every_logit(real_model, cache, batch)
    logits, every = np.asarray(logits), int(golden["every"])
    for i, (first, stop) in enumerate(zip(batch.query_starts[:-1], batch.query_starts[1:], strict=True)):
      assert difference(logits[stop - 1], golden[f"last_{i}"]) < LIMIT
      assert difference(logits[first:stop, ::every], golden[f"every_{i}"]) < LIMIT

  def test_64_greedy_tokens_are_those_of_transformers(self, real_model):
    golden = tiny_llamas.golden("real")
    requests = [
      Request(tuple(golden[f"ids_{i}"].tolist()), SamplingParams(max_new_tokens=64, ignore_eos=True)) for i in range(5)
    ]
    total = sum(len(request.prompt) for request in requests)
    limits = EngineLimits(num_pages=32, max_sequences=5, max_pages=8, prefill_sizes=(total,), decode_sizes=(5,))
    completions = Engine(real_model, limits=limits).generate(requests)
    for i, completion in enumerate(completions):
      assert list(completion.token_ids) == golden[f"greedy_{i}"].tolist()


class TestGradients:
  def test_match_finite_differences(self):
    """Central differences in float32, along a random direction through each array of weights."""
    config = tiny_models.make_config("gqa_9_3_untied")
    model = tiny_llamas.load("gqa_9_3_untied", implementation="reference")
    tokens = tiny_models.make_tokens(config, 20)
    batch = tiny_llamas.piece_batch(tokens, 0, 20, [0])
    graph, weights = nnx.split(model)

    @jax.jit
    def loss(weights):
      hidden, _ = nnx.merge(graph, weights)(batch, KVCache.init(config, 1, "f32"))
      logits = nnx.merge(graph, weights).logits(hidden)[:-1]
      return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(tokens[1:, None]), axis=1))

    gradient = jax.jit(jax.grad(loss))(weights)
    leaves, tree = jax.tree.flatten(weights)
    rng = np.random.default_rng(0)
    for index, leaf in enumerate(leaves):  # one direction through each array of weights
      direction = rng.standard_normal(leaf.shape).astype(np.float32)
      step = 1e-2 / np.linalg.norm(direction) * max(1.0, float(jnp.linalg.norm(leaf)) * 0.1)
      moved = [
        loss(jax.tree.unflatten(tree, [*leaves[:index], leaf + sign * step * direction, *leaves[index + 1 :]]))
        for sign in (1, -1)
      ]
      numeric = float(moved[0] - moved[1]) / (2 * step)
      exact = float(jnp.vdot(jax.tree.leaves(gradient)[index], direction))
      assert abs(numeric - exact) < 0.02 * abs(exact) + 2e-3, leaf.shape

  def test_gradient_reaches_float8_scales(self):
    """Float8 values are constants. Their scales are float32, so they can be trained."""
    recipe = Recipe("fp8", "channel", "f32", "f32")
    model = tiny_llamas.load("mha_tied", recipe, implementation="reference")
    batch = tiny_llamas.piece_batch(tiny_models.make_tokens(model.config, 10), 0, 10, [0])
    graph, weights = nnx.split(model)
    leaves, tree = jax.tree.flatten(weights)
    scales = [i for i, leaf in enumerate(leaves) if leaf.dtype == jnp.float32 and leaf.shape[:2] == (2, 4)]

    def loss(scale):
      filled = [*leaves]
      filled[scales[0]] = scale
      hidden, _ = nnx.merge(graph, jax.tree.unflatten(tree, filled))(batch, KVCache.init(model.config, 1, "f32"))
      return jnp.sum(hidden**2)

    gradient = jax.jit(jax.grad(loss))(leaves[scales[0]])
    assert bool(jnp.any(gradient != 0)) and bool(jnp.all(jnp.isfinite(gradient)))


class TestAbstract:
  def test_an_abstract_70b_is_built_in_milliseconds(self):
    config = LlamaConfig.from_name("llama-3.1-70b")
    for recipe in (Recipe(), Recipe("bf16", kv="fp8"), Recipe("fp8", "block128")):
      start = time.perf_counter()
      model = Llama(config, recipe)
      best = time.perf_counter() - start
      for _ in range(4):  # the best of five counts, since the machine may be busy
        start = time.perf_counter()
        model = Llama(config, recipe)
        best = min(best, time.perf_counter() - start)
      assert best < 0.1
      leaves = jax.tree.leaves(nnx.state(model))
      assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
      parameters = sum(leaf.size for leaf in leaves if leaf.dtype != jnp.float32)
      assert 70.5e9 < parameters < 70.6e9

  @pytest.mark.parametrize("tensor", [1, 2, 4, 8, 16])
  def test_a_mesh_cuts_every_weight_evenly(self, tensor):
    config = LlamaConfig.from_name("llama-3.1-70b")
    shape = MeshShape.for_model(config, tensor)
    model = Llama(config, Recipe(), shape=shape)
    sizes = {"kv": shape.kv, "group": shape.group}
    for leaf, spec in zip(jax.tree.leaves(nnx.state(model)), model.partitions(), strict=True):
      for size, axes in zip(leaf.shape, spec, strict=False):
        cut = np.prod([sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ())])
        assert size % cut == 0

  def test_block_scales_that_a_mesh_would_cut_are_refused(self):
    config = LlamaConfig.from_name("llama-3.1-8b")
    Llama(config, Recipe("fp8", "block128"), shape=MeshShape.for_model(config, 8))
    odd = dataclasses.replace(config, num_heads=24, num_kv_heads=8, head_dim=64)
    for tensor in (8, 6):  # 192 columns a device; 256 in runs of 64, since each device has queries of four KV heads
      with pytest.raises(InputError, match="whole blocks"):
        Llama(odd, Recipe("fp8", "block128"), shape=MeshShape.for_model(odd, tensor))

  def test_abstract_model_has_the_shapes_of_the_loaded_one(self):
    for recipe in (F32, Recipe(), Recipe("fp8", "block128"), Recipe("bf16")):
      abstract = abstract_model(tiny_models.make_config("gqa_9_3_untied"), recipe, None, None)
      loaded = tiny_llamas.load("gqa_9_3_untied", recipe)
      for like, leaf in zip(jax.tree.leaves(nnx.state(abstract)), jax.tree.leaves(nnx.state(loaded)), strict=True):
        assert (like.shape, like.dtype) == (leaf.shape, leaf.dtype)
