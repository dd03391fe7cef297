"""The options of a request: what is refused, and what the device makes of numbers that float32 cannot hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp8.errors import InputError
from jaxfp8.model.sampling import SamplingBatch, SamplingParams, sample
from tests.model.test_sampling import V, draw, random_logits


class TestParams:
  @pytest.mark.parametrize(
    ("field", "value"),
    [
      ("temperature", -0.1),
      ("temperature", float("nan")),
      ("temperature", float("inf")),
      ("top_k", -1),
      ("top_p", 0.0),
      ("top_p", 1.1),
      ("top_p", float("nan")),
      ("min_p", 1.0),
      ("min_p", -0.1),
      ("seed", -1),
      ("seed", 2**64),
      ("seed", 1.5),
      ("seed", True),
      ("temperature", 1e39),
      ("temperature", 10**400),
      ("temperature", -1e-46),
      ("temperature", "1"),
      ("temperature", None),
      ("top_p", -1e-46),
      ("top_k", 2**31),
      ("top_k", 2.5),
      ("top_k", float("nan")),
      ("min_p", 1 - 1e-12),
      ("min_p", float("nan")),
      ("max_new_tokens", 2.5),
      ("max_new_tokens", float("nan")),
      ("logprobs", 1.5),
      ("logprobs", 2**31),
      ("repetition_penalty", 1e-46),
      ("repetition_penalty", 1e39),
      ("repetition_penalty", float("nan")),
      ("frequency_penalty", float("nan")),
      ("max_new_tokens", 0),
      ("stop", ("",)),
      ("logprobs", -1),
      ("repetition_penalty", 0.0),
      ("repetition_penalty", float("inf")),
      ("frequency_penalty", 2.1),
      ("presence_penalty", float("nan")),
    ],
  )
  def test_out_of_range(self, field, value):
    with pytest.raises(InputError, match=rf"sampling: {field} must be"):
      SamplingParams(**{field: value})

  def test_edges_are_allowed(self):
    SamplingParams(temperature=0, top_k=0, top_p=1, min_p=0, seed=2**64 - 1, max_new_tokens=1, logprobs=0)
    SamplingParams(temperature=np.float32(0.5), top_k=np.int32(2), seed=np.uint64(2**64 - 1), top_p=1e-300, min_p=1e-300)

  def test_what_float32_makes_of_a_number_is_named(self):
    with pytest.raises(InputError, match=r"temperature must be at least 0 and finite; got 1e\+39, which is inf in float32\."):
      SamplingParams(temperature=1e39)
    with pytest.raises(InputError, match=r"repetition_penalty must be above 0 and finite; got 1e-40, which is 0 in float32\."):
      SamplingParams(repetition_penalty=1e-40)

  @pytest.mark.parametrize("options", [(1e-46, 1.0), (1e-40, 1.0), (1e-38, 0.9), (1.0, 1e-45), (1.0, 1e-300)])
  def test_options_that_float32_rounds_to_zero_take_the_most_probable_token(self, options):
    logits = random_logits(np.random.default_rng(8), 4) * 30
    temperature, top_p = options
    out = draw(logits, [SamplingParams(temperature, top_p=top_p, seed=3)] * 4, range(4))
    assert out.tokens_B.tolist() == logits.argmax(axis=1).tolist()

  def test_absurd_penalties_leave_a_token(self):
    logits = np.full((2, V), -50.0, np.float32)
    logits[:, 7] = 3
    history = np.full((2, 4), 7, np.int32)
    params = SamplingBatch.of([SamplingParams(1e-30, repetition_penalty=penalty) for penalty in (1e38, 1e-37)], [4, 4])

    def choose(logits):
      return sample(logits, params, jnp.array([4, 4]), vocab_size=V, history_BS=lambda: jnp.asarray(history)).tokens_B

    assert jax.jit(choose)(jnp.asarray(logits)).tolist() == [7, 7]

  def test_extreme_temperatures(self):
    """Near zero, sampling is greedy, and no value overflows into NaN."""
    logits = random_logits(np.random.default_rng(9), 4)
    for temperature in (1e-6, 1e-30, 1e30):
      out = draw(logits, [SamplingParams(temperature, top_p=0.9, top_k=50, seed=3)] * 4, range(4))
      assert ((out.tokens_B >= 0) & (out.tokens_B < V)).all()
      if temperature < 1:
        assert out.tokens_B.tolist() == logits.argmax(axis=1).tolist()
