"""Steps: results do not depend on the batch (bit for bit on a CPU), the pool is written in place, and meshes agree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.model.batch import PrefillBatch
from jaxfp8.model.kv_cache import KVCache
from jaxfp8.model.sampling import SamplingParams
from jaxfp8.recipe import Recipe
from jaxfp8.serving.engine import Engine, Request
from jaxfp8.serving.limits import EngineLimits
from jaxfp8.serving.steps import CompiledSteps, prefill
from jaxfp8.sharding import make_mesh
from tests.helpers import numpy_llama, tiny_llamas, tiny_models
from tests.helpers.step_driver import Driver, Row, bits, random_rows
from tests.helpers.tiny_llamas import F32

RECIPES = {
  "f32": F32,
  "bf16": Recipe("bf16", "channel", "bf16", "bf16"),
  "fp8_weights": Recipe("fp8", "channel", "bf16", "bf16"),
  "fp8_blocks_and_pages": Recipe("fp8", "block128", "f32", "fp8"),
  "fp8_everything": Recipe("fp8", "channel", "fp8", "fp8"),
}
# As wide as the default model, so that XLA chooses the same algorithms for its matrix products.
WIDE = LlamaConfig(
  vocab_size=1003,
  d_model=576,
  d_ff=1536,
  num_layers=2,
  num_heads=9,
  num_kv_heads=3,
  head_dim=64,
  max_context=512,
  tied_embeddings=True,
  name="wide",
)


@functools.cache
def weights_of(config):
  return tiny_models.make_weights(config)


# tensor=6 gives kv=2 and group=3: each device has two KV heads and a third of their query heads.
GROUPS = dataclasses.replace(tiny_models.make_config("gqa_9_3_untied"), num_heads=12, num_kv_heads=4, head_dim=8)
CONFIGS = {"wide": WIDE, "groups": GROUPS}


@functools.cache
def tiny(case, recipe):
  config = CONFIGS.get(case) or tiny_models.make_config(case)
  return tiny_llamas.load(config, RECIPES[recipe], weights=weights_of(config))


@functools.cache
def driver_of(case, recipe):
  """One driver for all tests, since its programs take seconds to compile. No test relies on the previous contents of the pool.

  The pool is much larger than the programs' temporaries, as `test_the_pool_is_written_in_place` requires.
  """
  return Driver(tiny(case, recipe), num_pages=400)


class TestBitEquality:
  """On a CPU the bits of a sequence's logits depend neither on its chunks nor on the other sequences of the batch."""

  @pytest.mark.parametrize(
    ("case", "recipe"), [("mha_tied", "f32"), ("gqa_5_1_llama3", "bf16")]
    + [("wide", recipe) for recipe in RECIPES if recipe != "fp8_weights"]
  )  # fmt: skip
  def test_pieces(self, case, recipe):
    """Under plain jit: 130 tokens at once, one by one, and in pieces of up to 65 tokens padded to 90."""
    model = tiny(case, recipe)
    tokens = tiny_models.make_tokens(model.config, 130)
    whole, cache = tiny_llamas.run_pieces(model, tokens, [130])
    for pieces, pad_to in (([1] * 130, None), ([3, 62, 65], 90)):
      logits, other = tiny_llamas.run_pieces(model, tokens, pieces, pad_to=pad_to)
      np.testing.assert_array_equal(bits(logits), bits(whole), err_msg=f"pieces {pieces[:9]} padded to {pad_to}")
      self._same_pages(cache, other, 130)

  def test_pieces_of_two(self):
    """Pieces of two tokens, since two rows are the fewest that a matrix product may have."""
    model = tiny("mha_tied", "fp8_weights")
    tokens = tiny_models.make_tokens(model.config, 130)
    whole, _ = tiny_llamas.run_pieces(model, tokens, [130])
    logits, _ = tiny_llamas.run_pieces(model, tokens, [2] * 65)
    np.testing.assert_array_equal(bits(logits), bits(whole))

  def _same_pages(self, a: KVCache, b: KVCache, length: int):
    """The pools hold the same keys and values for the first `length` tokens. The rest of the last page may differ."""
    for name, axis in (("k_pages", -2), ("v_pages", -1), ("k_scale", -1), ("v_scale", -1)):
      if getattr(a, name) is not None:
        x, y = (_tokens_first(getattr(cache, name), axis)[:length] for cache in (a, b))
        np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8), err_msg=name)

  @pytest.mark.parametrize("recipe", ["bf16", "fp8_everything"])
  def test_compiled_steps(self, recipe):
    """One sequence of 75 tokens, alone and with others, in prefill programs of 40 and 160 tokens, decode of 2 and 4 rows."""
    driver = driver_of("gqa_9_3_untied", recipe)
    tokens = tiny_models.make_tokens(driver.config, 75)
    row = functools.partial(Row, tokens, pages=(9, 2), slot=1)
    others = random_rows(driver.config, [33, 12], first_page=3, first_slot=2)

    chosen, whole = driver.prefill([row(0, 75)])
    assert chosen[0] == whole[0].argmax()
    want = bits(whole[0])

    def check(result, place, what):
      assert result[0][place] == chosen[0], what
      np.testing.assert_array_equal(bits(result[1][place]), want, err_msg=what)

    check(driver.prefill([*others, row(0, 75)]), 2, "in company")
    driver.prefill([row(0, 38, emit=False)])
    check(driver.prefill([others[1], row(38, 75)], size=160), 1, "in two pieces, the second in company")
    for stop in (16, 48, 64):
      driver.prefill([row(max(0, stop - 32), stop, emit=False)])
    check(driver.prefill([row(64, 75)]), 0, "in four pieces")
    driver.prefill([row(0, 1, emit=False)])
    for stop in range(2, 75):
      driver.decode([row(stop - 1, stop, emit=False)])
    check(driver.decode([row(74, 75)]), 0, "token by token")
    driver.prefill([*others, row(0, 74, emit=False)])
    company = [dataclasses.replace(other, start=other.stop - 1) for other in others]
    if recipe == "bf16":  # this avoids compiling the decode program of 4 sequences
      del company[0]
    check(driver.decode([*company, row(74, 75)]), len(company), "decoding in company")
    driver.prefill([row(0, 74, emit=False)])
    check(driver.prefill([others[1], row(74, 75), others[0]]), 1, "riding along with prompts")

  def test_a_researcher_gets_the_same_numbers(self):
    """The pure function under plain jit agrees with the compiled step."""
    driver = driver_of("gqa_9_3_untied", "f32")
    model, tokens = tiny("gqa_9_3_untied", "f32"), tiny_models.make_tokens(driver.config, 75)
    batch = PrefillBatch.from_prompts([tokens, tokens[:10]])
    logits, _ = jax.jit(prefill)(model, KVCache.init(driver.config, 3, "f32"), batch)
    _, logprobs = driver.prefill([Row(tokens, 0, 75, (0, 1)), Row(tokens, 0, 10, (2,), 1)])
    np.testing.assert_allclose(jax.nn.log_softmax(logits), logprobs, atol=2e-6)


class TestState:
  def test_the_token_on_the_device_is_used(self):
    """FROM_DEVICE takes the token last chosen for the sequence's slot. A chunk that does not emit leaves that token alone."""
    driver = driver_of("gqa_9_3_untied", "bf16")
    tokens = tiny_models.make_tokens(driver.config, 30)
    chosen, _ = driver.prefill([Row(tokens, 0, 30, (4,), slot=2), Row(tokens, 0, 8, (5,), slot=0)])
    assert chosen[0] != chosen[1]
    driver.prefill([Row(tokens, 0, 5, (6,), slot=1), Row(tokens, 0, 3, (7,), slot=2, emit=False)])
    last = np.asarray(driver.state.last_tokens)
    assert last[2] == chosen[0] and last[0] == chosen[1]
    longer = np.append(tokens, chosen[0])
    by_device = driver.decode([Row(tokens, 30, 31, (4,), slot=2, from_device=True, emit=False)])
    by_host = driver.decode([Row(longer, 30, 31, (4,), slot=2, emit=False)])
    assert by_device[0] == by_host[0]
    np.testing.assert_array_equal(bits(by_device[1]), bits(by_host[1]))
    wrong = driver.decode([Row(tokens, 30, 31, (4,), slot=0, from_device=True)])
    assert not np.array_equal(bits(wrong[1]), bits(by_host[1])), "another slot holds another token"

  @pytest.mark.parametrize("recipe", ["bf16", "fp8_everything"])
  def test_nobody_elses_pages_are_touched(self, recipe):
    driver = driver_of("gqa_9_3_untied", recipe)
    tokens = tiny_models.make_tokens(driver.config, 70)
    driver.prefill([Row(tokens, 0, 70, (3, 8)), Row(tokens, 0, 64, (1,), 1)])
    before = jax.device_get(driver.state.cache)
    rng = np.random.default_rng(1)
    fresh = rng.permutation(tokens), rng.permutation(tokens)
    driver.prefill([Row(fresh[0], 0, 10, (5,), 2), Row(fresh[1], 0, 20, (6,), 3)])
    driver.decode([Row(fresh[0], 10, 11, (5,), 2)])
    after = jax.device_get(driver.state.cache)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
      changed = (x.view(np.uint8) != y.view(np.uint8)).reshape(*x.shape[:2], -1).any(axis=(0, 2))
      assert np.flatnonzero(changed).tolist() == [5, 6]

  @pytest.mark.parametrize(
    ("recipe", "kind", "size"),
    [
      ("f32", "prefill", 160),
      ("bf16", "prefill", 40),
      ("bf16", "decode", 2),
      ("fp8_everything", "prefill", 40),
      ("fp8_everything", "decode", 2),
    ],
  )
  def test_the_pool_is_written_in_place(self, recipe, kind, size):
    driver = driver_of("gqa_9_3_untied", recipe)
    pool = driver.state.cache.nbytes
    memory = driver.steps.compile(kind, size).memory_analysis()
    assert pool > 5e6
    assert memory.alias_size_in_bytes >= pool
    assert memory.temp_size_in_bytes < pool / 4

  def test_a_donated_pool_is_gone(self):
    driver = driver_of("gqa_9_3_untied", "bf16")
    state = driver.state
    driver.prefill([Row(np.ones(4, np.int32), 0, 4, (0,))])
    assert state.cache.k_pages.is_deleted() and not driver.state.cache.k_pages.is_deleted()

  def test_a_model_for_another_mesh_is_refused(self):
    config = tiny_models.make_config("mha_tied")
    limits = EngineLimits(num_pages=1, max_sequences=1, max_pages=1)
    with pytest.raises(InputError, match="Load it for this mesh"):
      CompiledSteps(tiny("mha_tied", "f32"), make_mesh(config, tensor=2), limits)


class TestFloat8Pages:
  """Attention over the float8 pages that a model wrote, against float64 attention over the same pages."""

  def test_within_twice_the_error_of_the_reference(self):
    model = tiny("head_64_eps", "fp8_everything")
    config, tokens = model.config, tiny_models.make_tokens(model.config, 150)
    table = [2, 0, 1]
    _, cache = tiny_llamas.run_pieces(model, tokens, [100, 50], table=table, pad_to=100)
    q = np.random.default_rng(0).standard_normal((150, config.num_heads, config.head_dim)).astype(np.float32)
    where = jnp.asarray([table], jnp.int32), jnp.array([0, 150], jnp.int32), jnp.array([150], jnp.int32)
    attend = {
      name: jax.jit(functools.partial(pallas_kernels.paged_attention, implementation=name)) for name in ("cpu", "reference")
    }
    for layer in range(config.num_layers):
      pool = [getattr(cache, name)[layer] for name in ("k_pages", "v_pages", "k_scale", "v_scale")]
      k, v = _dense(*pool, table, 150)
      truth = numpy_llama.attention(q, *(np.repeat(x, config.group_size, axis=1) for x in (k, v)))
      out = {name: f(jnp.asarray(q), *pool[:2], *where, k_scale=pool[2], v_scale=pool[3]) for name, f in attend.items()}
      errors = {name: float(np.abs(np.asarray(x) - truth).max()) for name, x in out.items()}
      assert errors["cpu"] <= 2 * errors["reference"] < 1e-5
      wrong = numpy_llama.attention(q, *(np.repeat(x, config.group_size, axis=1) for x in (v, k)))
      assert np.abs(wrong - truth).max() > 1e-2

  def test_pages_hold_the_rounded_keys_and_values(self):
    """One layer: the pool's keys and values are those of a float64 Llama, to half a float8 step."""
    config = tiny_models.make_config("one_layer_head_10")
    model = tiny_llamas.load("one_layer_head_10", Recipe("fp8", "channel", "f32", "fp8"))
    tokens, seen = tiny_models.make_tokens(config, 70), []
    _, cache = tiny_llamas.run_pieces(model, tokens, [70])
    weights = {
      name: numpy_llama.fake_quantize_weight(w, "channel") if "proj" in name else w for name, w in weights_of(config).items()
    }
    numpy_llama.forward(config, weights, tokens, kv=lambda x: seen.append(x) or x)
    pool = [getattr(cache, name)[0] for name in ("k_pages", "v_pages", "k_scale", "v_scale")]
    for held, truth in zip(_dense(*pool, [0, 1], 70), seen, strict=True):
      amax = np.abs(truth).max(axis=-1, keepdims=True)
      # e4m3 has three mantissa bits: half a step is 1/16 of a value, or 2^-10 times the scale for the smallest values.
      assert np.all(np.abs(held - truth) <= np.abs(truth) / 16 * 1.001 + amax / 448 * 2**-10 * 1.001)
      assert np.abs(held - truth).max() > 1e-3


class TestMeshes:
  @pytest.mark.parametrize(
    ("case", "tensor", "data"),
    [("gqa_9_3_untied", 3, 2), ("groups", 6, 1)],
  )
  def test_the_same_numbers_as_on_one_device(self, case, tensor, data):
    """kv = 3 with data = 2; kv = 2, for four KV heads, with group = 3. None of these sizes divides V = 103 or F = 91."""
    config = CONFIGS.get(case) or tiny_models.make_config(case)
    mesh = make_mesh(config, tensor, data)
    model = tiny_llamas.load(config, F32, mesh=mesh)
    tokens, logprobs = _generate(Driver(model, mesh), data)
    want_tokens, want = _generate(driver_of(case, "f32"), 1)
    np.testing.assert_array_equal(tokens, want_tokens)
    np.testing.assert_allclose(logprobs, want, atol=1e-5)

  @pytest.mark.parametrize(("recipe", "limit"), [("fp8_everything", 0.3), ("fp8_blocks_and_pages", 0.1)])
  def test_float8_models_are_cut_too(self, recipe, limit):
    """Each device scales its own part of the activations, so the results differ from one device's. They stay near the truth.

    The limits are fractions of the logits' standard deviation, about twice the error of one device.
    """
    config = tiny_models.make_config("head_64_eps")
    if recipe == "fp8_blocks_and_pages":  # each device has whole blocks of columns
      config = dataclasses.replace(config, num_heads=4, num_kv_heads=2, head_dim=128, name="blocks")
    tokens, weights = tiny_models.make_tokens(config, 70), tiny_models.make_weights(config)
    granularity = RECIPES[recipe].granularity
    rounded = {n: numpy_llama.fake_quantize_weight(w, granularity) if "proj" in n else w for n, w in weights.items()}
    truth = numpy_llama.forward(config, rounded, tokens, kv=lambda x: numpy_llama.fake_quantize(x, -1))[-1]
    mesh = make_mesh(config, config.num_heads // config.num_kv_heads)
    model = tiny_llamas.load(config, RECIPES[recipe], weights=weights, mesh=mesh)
    _, logprobs = Driver(model, mesh, prefill_sizes=(80,)).prefill([Row(tokens, 0, 70, (1, 3))])
    error = logprobs[0] - np.asarray(jax.nn.log_softmax(truth))
    assert np.sqrt(np.mean(error**2)) < limit * np.std(truth)


def _generate(driver, data):
  """Prefills two prompts and decodes three greedy steps. Returns (tokens [4, 2], log-probabilities [4, 2, V])."""
  prompts = [tiny_models.make_tokens(driver.config, n, seed=n) for n in (70, 31)]
  rows = [Row(prompts[0], 0, 70, (1, 3)), Row(prompts[1], 0, 31, (2,), slot=1)]

  def shards():
    return [[rows[0]], [rows[1]]] if data == 2 else [rows]

  results = [driver.prefill(*shards(), size=160)]
  for _ in range(3):
    rows = [dataclasses.replace(row, start=row.stop, stop=row.stop + 1, from_device=True) for row in rows]
    results.append(driver.decode(*shards(), size=2))
  tokens, logprobs = zip(*results, strict=True)
  return np.stack(tokens), np.stack(logprobs)


class TestNoCompilation:
  def test_nothing_is_compiled_while_generating(self):
    """Counts jax's own events of compilation and tracing. The first jit shows that the listener receives them."""
    events = []

    def listen(name, seconds, **_):
      if name in ("/jax/core/compile/backend_compile_duration", "/jax/core/compile/jaxpr_trace_duration"):
        events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
      jax.jit(lambda x: x * 3 + 1)(np.ones(7, np.float32))
      assert {name.rsplit("/", 1)[1] for name in events} == {"backend_compile_duration", "jaxpr_trace_duration"}
      model = tiny("mha_tied", "bf16")
      limits = EngineLimits(num_pages=6, max_sequences=3, max_pages=4, prefill_sizes=(48,), decode_sizes=(3,))
      engine = Engine(model, limits=limits)
      engine.compile()
      events.clear()
      requests = [
        Request(tuple(tiny_models.make_tokens(model.config, length, length).tolist()), SamplingParams(max_new_tokens=n, **how))
        for length, n, how in (
          (5, 9, {"temperature": 1.0, "seed": 3}),
          (100, 20, {}),
          (64, 30, {"temperature": 0.5, "top_k": 5}),
          (1, 70, {"ignore_eos": True}),
          (17, 1, {"temperature": 2.0, "top_p": 0.5}),
        )
      ]
      engine.generate(requests)
      assert events == []
    finally:
      jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"decode_sizes": (2, 4)}, "must hold max_sequences=5"),
    ({"decode_sizes": (8, 2)}, "positive and ascending"),
    ({"prefill_sizes": ()}, "positive and ascending"),
    ({"prefill_sizes": (0, 4)}, "positive and ascending"),
    ({"max_pages": 0}, "at least 1"),
    ({"num_pages": -1}, "at least 1"),
  ],
)
def test_impossible_limits(change, message):
  with pytest.raises(InputError, match=f"limits: .*{message}"):
    EngineLimits(**{"num_pages": 8, "max_sequences": 5, "max_pages": 2, "decode_sizes": (2, 8)} | change)


def _tokens_first(pool, axis) -> np.ndarray:
  """[L, P, K, ...] with the token axis moved to the front: [P * C, L, ...], tokens in the order of a page table 0, 1, .."""
  x = np.moveaxis(np.asarray(pool), [1, axis], [0, 1])
  return np.ascontiguousarray(x.reshape(-1, *x.shape[2:]))


def _dense(k_pages, v_pages, k_scale, v_scale, table, length):
  """Dequantizes one layer's float8 pages, [P, K, C, H] and [P, K, H, C], to float64 keys and values [length, K, H]."""
  k, v, k_scale, v_scale = (np.asarray(x)[table].astype(np.float64) for x in (k_pages, v_pages, k_scale, v_scale))
  k, v = k * k_scale[..., None], v * v_scale[..., None, :]
  k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 3, 1, 2)
  return k.reshape(-1, *k.shape[2:])[:length], v.reshape(-1, *v.shape[2:])[:length]
