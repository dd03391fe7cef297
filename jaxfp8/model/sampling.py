"""The choice of the next token from logits, which may be cut over devices by vocabulary.

The choice needs only sums, maxima and one small gather over the vocabulary, so one device and sixteen run the same program:
  - top-k and top-p keep the tokens at or above a threshold logit. Bisecting the 2^32 ordered float32 values finds the exact
    threshold: the largest value at which k tokens, or probability mass p, remain. Equal logits are kept or dropped together.
  - Penalties count the tokens of a sequence's text; each device counts those of its part of the vocabulary.
  - Sampling adds Gumbel noise and takes the maximum (Gumbel-max trick). A token's noise depends only on the request's seed, the
    position and the token: the same seed gives the same text, whatever else is in the batch.

Order: penalties, temperature, top-k, top-p among the tokens that top-k kept, min-p relative to the most probable token.
Refuses to know requests, text and how logits are computed.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxfp8.model.sampling_params import SamplingParams, as_float32
from jaxfp8.sharding import Axes, gather_over, index_over, max_over, sum_over

_LARGEST_LOGIT = 1e8  # of a penalized token; divided by the least temperature it is still a float32


@flax.struct.dataclass
class SamplingBatch:
  """The numbers of B requests' SamplingParams: float32 or int32 [B] each.

  seed_B2: uint32 [B, 2], the high and the low word of each seed. num_prompt_B: tokens of each prompt.
  """

  temperature_B: jax.Array
  top_k_B: jax.Array
  top_p_B: jax.Array
  min_p_B: jax.Array
  seed_B2: jax.Array
  repetition_B: jax.Array
  frequency_B: jax.Array
  presence_B: jax.Array
  num_prompt_B: jax.Array

  @classmethod
  def of(cls, params: list[SamplingParams | None], num_prompt: list[int] | None = None) -> "SamplingBatch":
    """From each row's SamplingParams and number of prompt tokens. None is an empty row, which is sampled greedily."""
    rows = [p or SamplingParams() for p in params]

    def floats(name: str) -> Any:
      return _host_array([as_float32(name, getattr(p, name)) for p in rows], np.float32)

    return cls(
      temperature_B=floats("temperature"),
      top_k_B=_host_array([p.top_k for p in rows], np.int32),
      top_p_B=floats("top_p"),
      min_p_B=floats("min_p"),
      seed_B2=_host_array([(int(p.seed) >> 32, int(p.seed) & 0xFFFFFFFF) for p in rows], np.uint32),
      repetition_B=floats("repetition_penalty"),
      frequency_B=floats("frequency_penalty"),
      presence_B=floats("presence_penalty"),
      num_prompt_B=_host_array(num_prompt or [0] * len(rows), np.int32),
    )


def _host_array(values: list, dtype: Any) -> Any:
  """A numpy array, typed as Any: it becomes a `jax.Array` when the step is called."""
  return np.array(values, dtype)


@flax.struct.dataclass
class Sampled:
  """The chosen tokens and their log-probabilities under softmax(logits), before penalties, temperature and cuts.

  tokens_B: int32. logprob_B: float32, of the chosen token.
  top_tokens_Bn, top_logprobs_Bn: int32 and float32, the n most probable tokens, best first.
  """

  tokens_B: jax.Array
  logprob_B: jax.Array
  top_tokens_Bn: jax.Array
  top_logprobs_Bn: jax.Array


def sample(
  logits_BV: jax.Array,
  params: SamplingBatch,
  position_B: jax.Array,
  *,
  vocab_size: int,
  axes: Axes = None,
  num_logprobs: int = 0,
  history_BS: Callable[[], jax.Array] | None = None,
) -> Sampled:
  """Chooses one token a row.

  Args:
    logits_BV: float32, this device's part of the vocabulary; padding is -inf.
    position_B: int32, the position in its sequence of the token to be chosen: each step's noise depends on it.
    vocab_size: size of the vocabulary without padding; noise is drawn for this many tokens.
    axes: mesh axes that the vocabulary is cut over.
    num_logprobs: the number of most probable tokens to return (static).
    history_BS: returns the tokens of each row, int32; the first position_B of them count. Called for penalties only; None: no
      penalties.
  """
  rows = logits_BV.shape[0]
  if rows == 1:  # one row would take XLA:CPU's other path for sums; see _sum
    logits_BV = jnp.concatenate([logits_BV, logits_BV])
    params, position_B = jax.tree.map(lambda x: jnp.concatenate([x, x]), (params, position_B))
  with jax.named_scope("sample.penalties"):
    penalized = logits_BV if history_BS is None else _penalized(logits_BV, params, position_B, history_BS, axes)

  def drawn():
    scaled = penalized / jnp.where(params.temperature_B > 0, params.temperature_B, 1)[:, None]
    kept = _cut(scaled, params, axes)
    noise = _noise(params.seed_B2, position_B, vocab_size, logits_BV.shape[1], axes)
    return jnp.where((params.temperature_B > 0)[:, None], kept + noise, penalized)

  with jax.named_scope("sample.choice"):
    scores = jax.lax.cond(jnp.any(params.temperature_B > 0), drawn, lambda: penalized)
    tokens, chosen_logit = _best(scores, logits_BV, axes)
  with jax.named_scope("sample.logprobs"):
    max_logit = max_over(jnp.max(logits_BV, axis=-1), axes)
    log_total = max_logit + jnp.log(sum_over(_sum(jnp.exp(logits_BV - max_logit[:, None])), axes))
    top_logits, top_tokens = _top(logits_BV, num_logprobs, axes)
  result = Sampled(tokens, chosen_logit - log_total, top_tokens, top_logits - log_total[:, None])
  return jax.tree.map(lambda x: x[:rows], result)


def _penalized(logits_BV, params: SamplingBatch, length_B, history_BS, axes: Axes):
  """Logits [B, V] with the penalties on tokens of the text. Each device counts the tokens of its part of the vocabulary."""
  rows, size = logits_BV.shape

  def penalize():
    tokens = history_BS()
    tokens = jnp.broadcast_to(tokens, (rows, tokens.shape[1]))
    position = jnp.arange(tokens.shape[1])
    local = tokens - index_over(axes) * size
    local = jnp.where((position < length_B[:, None]) & (local >= 0) & (local < size), local, size)
    in_answer = position >= params.num_prompt_B[:, None]
    row = jnp.arange(rows)[:, None]
    counts_in_text = jnp.zeros((rows, size), jnp.int32).at[row, local].add(1, mode="drop")
    counts = jnp.zeros((rows, size), jnp.int32).at[row, jnp.where(in_answer, local, size)].add(1, mode="drop")
    repetition = params.repetition_B[:, None]
    logits = jnp.where(logits_BV > 0, logits_BV / repetition, logits_BV * repetition)
    logits = jnp.where(counts_in_text > 0, jnp.clip(logits, -_LARGEST_LOGIT, _LARGEST_LOGIT), logits_BV)
    return logits - params.frequency_B[:, None] * counts - params.presence_B[:, None] * (counts > 0)

  needed = jnp.any((params.repetition_B != 1) | (params.frequency_B != 0) | (params.presence_B != 0))
  return jax.lax.cond(needed, penalize, lambda: logits_BV)


def _cut(logits_BV, params: SamplingBatch, axes: Axes):
  """Logits [B, V] with -inf for the tokens that top-k, top-p or min-p drop."""

  def bisected():
    top_k = jnp.where(params.top_k_B > 0, params.top_k_B, jnp.iinfo(jnp.int32).max).astype(jnp.float32)
    by_k = _threshold(logits_BV, jnp.ones_like(logits_BV), top_k, axes)
    kept = jnp.where(logits_BV >= by_k[:, None], logits_BV, -jnp.inf)
    mass = jnp.exp(kept - max_logit[:, None])
    least_mass = params.top_p_B * sum_over(_sum(mass), axes)
    by_p = _threshold(kept, mass, least_mass, axes)
    return jnp.where(params.top_p_B < 1, jnp.maximum(by_k, by_p), by_k)

  max_logit = jax.lax.optimization_barrier(max_over(jnp.max(logits_BV, axis=-1), axes))
  needed = jnp.any((params.top_k_B > 0) | (params.top_p_B < 1))
  threshold = jax.lax.cond(needed, bisected, lambda: jnp.full_like(max_logit, -jnp.inf))
  threshold = jnp.maximum(threshold, max_logit + jnp.log(params.min_p_B))
  return jnp.where(logits_BV >= threshold[:, None], logits_BV, -jnp.inf)


def _threshold(logits_BV, weight_BV, least_B, axes: Axes):
  """[B], the largest t such that tokens with logit >= t together weigh at least `least_B`; -inf if all tokens weigh less."""
  ordered = _ordered(logits_BV)

  def halve(_, bounds):
    low, high = bounds  # enough weight at or above low; too little at or above high
    middle = low + ((high - low) >> jnp.uint32(1))
    enough = sum_over(_sum(jnp.where(ordered >= middle[:, None], weight_BV, 0)), axes) >= least_B
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  low = jnp.zeros_like(least_B, jnp.uint32)
  high = jnp.full_like(low, jnp.iinfo(jnp.uint32).max)
  low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
  return jnp.where(low == 0, -jnp.inf, _from_ordered(low))


def _ordered(x):
  """float32 as uint32 in the same order."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _from_ordered(u):
  """The inverse of `_ordered`."""
  bits = jnp.where(u >> 31 == 1, u ^ jnp.uint32(1 << 31), ~u)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _sum(x_BV):
  """The sum along V, [B], as a product with ones: on a CPU the bits of a row then do not depend on the number of rows."""
  ones = jnp.ones((8, x_BV.shape[1]))
  total = jax.lax.dot_general(x_BV, ones, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
  return total[:, 0]


def _noise(seed_B2, position_B, vocab_size: int, local_size: int, axes: Axes):
  """This device's part of each row's Gumbel noise [B, V], which is drawn for the whole vocabulary: the same for every mesh.

  The two words of a seed are the key of Threefry, as in `jax.random.key` of a 64-bit integer.
  """

  def row(seed, position):
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(key, position), (vocab_size,))

  noise = jax.vmap(row)(seed_B2, position_B)
  if axes is None:
    return jnp.pad(noise, ((0, 0), (0, local_size - vocab_size)))
  padded = jnp.pad(noise, ((0, 0), (0, local_size)))
  return jax.lax.dynamic_slice_in_dim(padded, jnp.minimum(index_over(axes) * local_size, vocab_size), local_size, axis=1)


def _best(scores_BV, logits_BV, axes: Axes):
  """(token, its logit), [B] each, of the highest score; the smallest of tokens with equal scores."""
  local = jnp.argmax(scores_BV, axis=-1)
  token = (local + index_over(axes) * scores_BV.shape[1]).astype(jnp.int32)
  score, logit = (jnp.take_along_axis(x, local[:, None], axis=1)[:, 0] for x in (scores_BV, logits_BV))
  scores, tokens, logits = (gather_over(x, axes) for x in (score, token, logit))
  winner = jnp.argmax(scores, axis=0)[None]
  return jnp.take_along_axis(tokens, winner, 0)[0], jnp.take_along_axis(logits, winner, 0)[0]


def _top(logits_BV, count: int, axes: Axes):
  """(logits, tokens) [B, count] of the most probable tokens, best first."""
  rows, size = logits_BV.shape
  logits, tokens = jax.lax.top_k(logits_BV, min(count, size))
  tokens = tokens + index_over(axes) * size
  logits, tokens = (gather_over(x, axes).swapaxes(0, 1).reshape(rows, -1) for x in (logits, tokens))
  best, index = jax.lax.top_k(logits, min(count, logits.shape[1]))
  return best, jnp.take_along_axis(tokens, index, axis=1).astype(jnp.int32)
