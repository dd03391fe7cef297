"""Sampling against an independent float64 numpy version, on one device and on logits cut over several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from jaxfp8.model import sampling
from jaxfp8.model.sampling import SamplingBatch, SamplingParams, sample

V = 103
KNOWN = [87, 11, 31, 49]  # drawn by version 0.1, when seeds had 32 bits: 0, 1, 2, 2^32 - 1 at positions 0 .. 3
# Limits of the chi-square tests: a correct sampler exceeds them once in 10^6 runs.
CHI_SQUARE_LIMIT = {3: 30.7, 4: 33.4, 7: 40.5, 9: 44.8}


@functools.cache
def sampler(num_logprobs=0, vocab_size=V):
  return jax.jit(functools.partial(sample, vocab_size=vocab_size, num_logprobs=num_logprobs))


def draw(logits, params, positions, num_logprobs=0):
  return sampler(num_logprobs)(jnp.asarray(logits, jnp.float32), SamplingBatch.of(params), jnp.asarray(positions, jnp.int32))


def kept_by_numpy(logits, p: SamplingParams):
  """(certainly kept, certainly dropped) in float64; a token that depends on the last bits of a sum is in neither."""
  scaled = logits.astype(np.float64) / p.temperature
  kept = np.isfinite(scaled)
  if p.top_k:
    kept &= scaled >= np.sort(scaled)[::-1][min(p.top_k, len(scaled)) - 1]
  sure = kept.copy()
  if p.top_p < 1:
    mass = np.where(kept, np.exp(scaled - scaled.max()), 0)
    above = np.array([mass[scaled > value].sum() for value in scaled])  # a token is kept while the mass above it is below p
    sure &= above < p.top_p * mass.sum() * (1 - 1e-5)
    kept &= above < p.top_p * mass.sum() * (1 + 1e-5)
  if p.min_p:
    border = scaled.max() + np.log(p.min_p)
    sure &= scaled > border + 1e-5
    kept &= scaled > border - 1e-5
  return sure, ~kept


def random_logits(rng, rows=8, ties=False, size=V):
  logits = (rng.standard_normal((rows, size)) * np.exp(rng.standard_normal((rows, 1)))).astype(np.float32)
  return np.round(logits * 2) / 2 if ties else logits


class TestKeptSet:
  @settings(max_examples=25, deadline=None)
  @given(seed=st.integers(0, 10000), ties=st.booleans())
  def test_against_numpy(self, seed, ties):
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, ties=ties)
    params = [
      SamplingParams(
        temperature=float(rng.uniform(0.2, 3)),
        top_k=int(rng.choice([0, 0, 1, 2, 5, 40, V, 500])),
        top_p=float(rng.choice([1, 1, 0.05, 0.5, 0.9, 0.999])),
        min_p=float(rng.choice([0, 0, 0.02, 0.3, 0.99])),
      )
      for _ in range(8)
    ]
    temperature = np.array([[p.temperature] for p in params], np.float32)
    cut = np.asarray(_cut()(jnp.asarray(logits) / temperature, SamplingBatch.of(params)))
    for row, p in zip(range(8), params, strict=True):
      kept = np.isfinite(cut[row])
      sure, dropped = kept_by_numpy(logits[row], p)
      assert kept[sure].all() and not kept[dropped].any(), p
      assert kept.any()
      if ties:  # equal logits are kept or dropped together
        for value in np.unique(logits[row]):
          assert len(set(kept[logits[row] == value])) == 1

  def test_examples(self):
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    for p, kept in (
      (SamplingParams(1.0), [1, 1, 1, 1]),
      (SamplingParams(1.0, top_k=2), [1, 1, 0, 0]),
      (SamplingParams(1.0, top_p=0.35), [1, 0, 0, 0]),
      (SamplingParams(1.0, top_p=0.65), [1, 1, 0, 0]),
      (SamplingParams(1.0, top_p=0.75), [1, 1, 1, 0]),
      (SamplingParams(1.0, top_k=3, top_p=0.75), [1, 1, 0, 0]),  # p is a share of the mass that top-k kept: 0.7 / 0.9 > 0.75
      (SamplingParams(1.0, min_p=0.6), [1, 1, 0, 0]),
      (SamplingParams(1.0, top_k=1, min_p=0.1), [1, 0, 0, 0]),
    ):
      cut = np.asarray(_cut()(jnp.asarray(logits), SamplingBatch.of([p])))
      assert np.isfinite(cut)[0].tolist() == list(map(bool, kept)), p

  def test_top_k_keeps_ties(self):
    logits = jnp.array([[1.0, 2, 2, 2, 0]])
    cut = np.asarray(_cut()(logits, SamplingBatch.of([SamplingParams(1.0, top_k=2)])))
    assert np.isfinite(cut)[0].tolist() == [False, True, True, True, False]


@functools.cache
def _cut():
  return jax.jit(lambda logits, params: sampling._cut(logits, params, None))


class TestDraws:
  def test_greedy(self):
    rng = np.random.default_rng(0)
    logits = random_logits(rng, 6)
    logits[2, [5, 80]] = logits[2].max() + 1
    out = draw(logits, [SamplingParams(seed=s) for s in range(6)], range(6))
    assert out.tokens_B.tolist() == logits.argmax(axis=1).tolist()
    assert out.tokens_B[2] == 5, "of equal logits the smallest token"

  def test_greedy_rows_beside_sampled_ones(self):
    logits = random_logits(np.random.default_rng(1), 4)
    params = [SamplingParams(), SamplingParams(5.0, seed=1), SamplingParams(), SamplingParams(5.0, top_k=3, seed=2)]
    out = np.asarray(draw(logits, params, range(4)).tokens_B)
    assert out[[0, 2]].tolist() == logits.argmax(axis=1)[[0, 2]].tolist()

  @pytest.mark.parametrize(
    ("params", "kept"),
    [
      ({"temperature": 1.0}, 10),
      ({"temperature": 2.5}, 10),
      ({"temperature": 1.0, "top_k": 4}, 4),
      ({"temperature": 0.7, "top_p": 0.8}, None),
      ({"temperature": 1.0, "min_p": 0.3}, None),
    ],
  )
  def test_distribution(self, params, kept):
    """Chi-square of 20,000 draws (seeds and positions) from ten tokens of a hundred."""
    logits = np.full(V, -np.inf, np.float32)
    places = np.arange(3, 103, 10)
    logits[places] = np.array([2, 1.5, 1.2, 1, 0.5, 0.3, 0, -0.2, -0.5, -1], np.float32)
    p = SamplingParams(**params)
    sure, _ = kept_by_numpy(logits, p)
    assert kept is None or sure.sum() == kept
    weights = np.where(sure, np.exp((logits - 2) / p.temperature), 0)
    expected = 20000 * weights / weights.sum()
    rows = SamplingBatch.of([p] * 20000)
    rows = rows.replace(seed_B2=np.stack([np.zeros(20000, np.uint32), np.arange(20000, dtype=np.uint32) // 4], axis=1))
    tokens = sampler()(jnp.broadcast_to(logits, (20000, V)), rows, jnp.arange(20000, dtype=jnp.int32) % 4).tokens_B
    counts = np.bincount(np.asarray(tokens), minlength=V)
    assert counts[~sure].sum() == 0
    degrees = int(sure.sum()) - 1
    statistic = np.sum((counts - expected)[sure] ** 2 / expected[sure])
    limit = degrees + 6 * np.sqrt(2 * degrees) + 12  # above the 1e-6 quantile for 1 .. 9 degrees
    assert statistic < limit
    flat = expected.copy()
    flat[sure] = 20000 / sure.sum()
    assert np.sum((counts - flat)[sure] ** 2 / flat[sure]) > 3 * limit, "another distribution would be noticed"

  def test_the_same_seed_gives_the_same_token_in_any_batch(self):
    rng = np.random.default_rng(3)
    logits = random_logits(rng, 7)
    params = [
      SamplingParams(float(rng.uniform(0.5, 2)), top_k=int(rng.integers(0, 20)), seed=int(rng.integers(2**32)))
      for _ in range(7)
    ]
    positions = rng.integers(0, 10000, 7)
    together = draw(logits, params, positions)
    order = rng.permutation(7)
    shuffled = draw(logits[order], [params[i] for i in order], positions[order])
    assert shuffled.tokens_B.tolist() == together.tokens_B[order].tolist()
    for i in range(7):
      alone = draw(logits[i : i + 1], [params[i]], positions[i : i + 1])
      assert alone.tokens_B[0] == together.tokens_B[i]
      assert alone.logprob_B[0] == together.logprob_B[i]

  def test_seed_and_position_matter(self):
    logits = np.zeros((64, V), np.float32)
    by_seed = draw(logits, [SamplingParams(1.0, seed=s) for s in range(64)], [5] * 64).tokens_B
    by_position = draw(logits, [SamplingParams(1.0, seed=5)] * 64, range(64)).tokens_B
    for tokens in (by_seed, by_position):
      assert len(set(tokens.tolist())) > 30

  def test_a_known_draw(self):
    """The text of a seed stays the same across releases, unless this line is changed on purpose."""
    tokens = draw(np.zeros((4, V)), [SamplingParams(1.0, seed=s) for s in (0, 1, 2, 2**32 - 1)], [0, 1, 2, 3]).tokens_B
    noise = [
      jax.random.gumbel(jax.random.fold_in(jax.random.key(np.uint32(s)), p), (V,))
      for s, p in ((0, 0), (1, 1), (2, 2), (2**32 - 1, 3))
    ]
    assert tokens.tolist() == [int(row.argmax()) for row in noise]
    assert tokens.tolist() == KNOWN, "as in the releases whose seeds had 32 bits"

  def test_a_seed_of_64_bits_is_the_key_that_jax_makes_of_it(self):
    seeds = (2**32, 2**40 + 7, 2**63 - 1)
    tokens = draw(np.zeros((4, V)), [SamplingParams(1.0, seed=s) for s in (*seeds, 7)], [4] * 4).tokens_B
    with jax.enable_x64(True):
      keys = [jax.random.key(np.int64(s)) for s in seeds] + [jax.random.key(7)]
    noise = [jax.random.gumbel(jax.random.fold_in(key, 4), (V,)) for key in keys]
    assert tokens.tolist() == [int(row.argmax()) for row in noise]

  def test_both_words_of_a_seed_matter(self):
    seeds = [2**64 - 1, 2**32 - 1, *(word << 32 for word in range(62))]
    tokens = draw(np.zeros((64, V), np.float32), [SamplingParams(1.0, seed=s) for s in seeds], [5] * 64).tokens_B
    assert len(set(tokens.tolist())) > 30


class TestLogprobs:
  def test_chosen_and_top(self):
    logits = random_logits(np.random.default_rng(4), 5)
    params = [SamplingParams(0.5 * i, top_k=3, seed=i) for i in range(5)]
    out = draw(logits, params, range(5), num_logprobs=7)
    truth = logits.astype(np.float64)
    truth -= np.log(np.exp(truth).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(out.logprob_B, truth[np.arange(5), out.tokens_B], atol=2e-6)
    order = np.argsort(-truth, axis=1, kind="stable")[:, :7]
    np.testing.assert_array_equal(out.top_tokens_Bn, order)
    np.testing.assert_allclose(out.top_logprobs_Bn, np.take_along_axis(truth, order, 1), atol=2e-6)

  def test_no_logprobs(self):
    out = draw(np.zeros((3, V)), [None] * 3, [0] * 3)
    assert out.top_tokens_Bn.shape == (3, 0)


class TestCutVocabulary:
  """Logits cut over devices under shard_map give the tokens of one device, and nearly its log-probabilities."""

  @pytest.mark.parametrize("axes", [(1, 2), (2, 2), (3, 1)], ids=str)
  def test_the_same_as_one_device(self, axes):
    devices = axes[0] * axes[1]
    rng = np.random.default_rng(devices)
    logits = random_logits(rng, 6)
    logits[1, [3, 100]] = logits[1].max() + 1  # ties across the border between two devices
    logits[4] = np.round(logits[4])
    params = [
      SamplingParams(),
      SamplingParams(),
      SamplingParams(1.0, seed=7),
      SamplingParams(0.8, top_k=5, seed=8),
      SamplingParams(1.5, top_k=30, top_p=0.7, seed=9),
      SamplingParams(2.0, top_p=0.9, min_p=0.01, seed=10, repetition_penalty=1.5, frequency_penalty=0.3, presence_penalty=1.0),
    ]
    history = rng.integers(0, V, (6, 40), dtype=np.int32)
    fixed = {"vocab_size": V, "num_logprobs": 4, "history_BS": lambda: jnp.asarray(history)}
    alone, batch = jax.jit(functools.partial(sample, **fixed)), SamplingBatch.of(params, [20] * 6)
    padded = -(-V // devices) * devices
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(axes), ("kv", "group"))
    run = jax.jit(
      jax.shard_map(
        functools.partial(sample, axes=("kv", "group"), **fixed),
        mesh=mesh,
        in_specs=(PartitionSpec(None, ("kv", "group")), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
      )
    )
    for position in range(20):
      positions = jnp.arange(6, dtype=jnp.int32) + 10 * position
      one = alone(jnp.asarray(logits), batch, positions)
      wide = np.pad(logits, ((0, 0), (0, padded - V)), constant_values=-np.inf)
      many = run(jnp.asarray(wide), batch, positions)
      assert many.tokens_B.tolist() == one.tokens_B.tolist()
      assert (many.tokens_B < V).all()
      np.testing.assert_array_equal(many.top_tokens_Bn, one.top_tokens_Bn)
      np.testing.assert_allclose(many.logprob_B, one.logprob_B, atol=1e-5)
      np.testing.assert_allclose(many.top_logprobs_Bn, one.top_logprobs_Bn, atol=1e-5)

  def test_padding_is_never_chosen(self):
    """A flat distribution, padded from 103 to 128 on one device."""
    logits = np.full((500, 128), -np.inf, np.float32)
    logits[:, :V] = 0
    params = SamplingBatch.of([SamplingParams(2.0, seed=s) for s in range(500)])
    tokens = np.asarray(sampler()(jnp.asarray(logits), params, jnp.zeros(500, jnp.int32)).tokens_B)
    assert tokens.max() < V and tokens.max() > 90
    same = draw(logits[:, :V], [SamplingParams(2.0, seed=s) for s in range(500)], [0] * 500).tokens_B
    assert tokens.tolist() == same.tolist()
