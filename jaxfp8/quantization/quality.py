"""How far a model's predictions are from another's, with confidence intervals: what `jaxfp8 evaluate` reports.

    cut_chunks(tokens, ..)             ->  token ids [chunks, context + 1], spread evenly over a text
    Reference(model, chunks).score(m)  ->  Scores, one number a position
    Quality.of(scores, ..)             ->  perplexity, KL divergence, top-1 agreement as Estimates

Every chunk is a prompt of its own through the model's prefill and its paged cache, so what the KV pages hold counts.
Logits exist for a few positions at a time: those of 2,000 positions over 49,152 tokens would be 400 MB. Refuses to know
files and text.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxfp8.checkpoint.layout import merged_linear
from jaxfp8.errors import InputError
from jaxfp8.model.batch import PrefillBatch
from jaxfp8.model.fp8 import QArray, dequantize
from jaxfp8.model.kv_cache import KVCache
from jaxfp8.model.layers import Linear
from jaxfp8.model.llama import Llama

MATRICES = ("qkv", "o", "gate_up", "down")  # of a layer, as a model merges them
RESAMPLES, CONFIDENCE = 2000, 0.95
EXP = np.exp  # what makes a perplexity of a mean of nll
_POSITIONS = 128  # whose logits exist at a time


def cut_chunks(tokens: Sequence[int], num_tokens: int, context: int, bos_id: int | None = None) -> np.ndarray:
  """int32 [chunks, context + 1]: of each row, `context` tokens are read and as many are predicted.

  The chunks (num_tokens / context, rounded up) lie evenly over the text and do not overlap; with bos_id each starts with it.
  Raises InputError for a text too short, and for fewer than two chunks, which have no confidence interval.
  """
  if context < 2 or num_tokens < context + 1:
    raise InputError(
      f"quality: needs at least two chunks of at least 2 tokens for a confidence interval; got {num_tokens} tokens in chunks "
      f"of {context}. Pass more tokens or a shorter context."
    )
  count, size = -(-num_tokens // context), context + 1 - (bos_id is not None)
  if len(tokens) < count * size:
    raise InputError(
      f"quality: {count} chunks of {context} tokens need a text of {count * size} tokens; this one has {len(tokens)}. "
      "Pass a longer text or fewer tokens."
    )
  starts = np.linspace(0, len(tokens) - size, count).astype(int)
  rows = np.stack([np.asarray(tokens[start : start + size], np.int32) for start in starts])
  return rows if bos_id is None else np.insert(rows, 0, bos_id, axis=1)


def cut_training_chunks(
  tokens: Sequence[int], num_tokens: int, context: int, held_out: np.ndarray, bos_id: int | None = None
) -> np.ndarray:
  """int32 [chunks, context] for calibration: evenly over what `cut_chunks(tokens, ..)` gave as `held_out` leaves of the text.

  No token is in both. As many chunks as num_tokens / context, rounded up, or as there is room for. Raises InputError for none.
  """
  size, taken = context - (bos_id is not None), held_out.shape[1] - (bos_id is not None)
  starts = np.linspace(0, len(tokens) - taken, len(held_out)).astype(int)  # as in cut_chunks
  free = [
    start
    for first, last in zip([0, *(starts + taken)], [*starts, len(tokens)], strict=True)
    for start in range(first, last - size + 1, size)
  ]
  if context < 2 or not free:
    raise InputError(f"quality: beside the text that is held out there is no room for {context} tokens. Pass a longer text.")
  indices = np.unique(np.linspace(0, len(free) - 1, min(len(free), -(-num_tokens // context))).astype(int))
  rows = np.stack([np.asarray(tokens[free[index] : free[index] + size], np.int32) for index in indices])
  return rows if bos_id is None else np.insert(rows, 0, bos_id, axis=1)


@dataclasses.dataclass(frozen=True)
class Scores:
  """What a model made of each position, [chunks, context]: nats for nll and kl, 0 or 1 for agrees.

  nll: -log of the probability of the token that follows. kl: of the model's distribution from the reference's,
  sum p_reference log(p_reference / p_model). agrees: whether both have the same most probable token.
  """

  nll: np.ndarray
  kl: np.ndarray
  agrees: np.ndarray


class Reference:
  """A reference model's predictions for some chunks, kept as hidden states; `score` holds other models against them."""

  def __init__(self, model: Llama, chunks: np.ndarray):
    self.model, self.chunks = model, chunks
    self._hidden = [hidden_states(model, row[:-1]) for row in chunks]
    self.nll = self.score(model).nll

  def score(self, model: Llama, progress: Callable[[int, int], None] | None = None) -> Scores:
    """Runs `model` over the chunks."""
    rows = []
    for row, hidden in zip(self.chunks, self._hidden, strict=True):
      mine = hidden if model is self.model else hidden_states(model, row[:-1])
      rows.append(self._score_chunk(model, hidden, mine, row[1:]))
      if progress:
        progress(len(rows), len(self.chunks))
    return Scores(*(np.stack(values) for values in zip(*rows, strict=True)))

  def _score_chunk(self, model: Llama, hidden, mine, following: np.ndarray) -> list[np.ndarray]:
    parts = []
    for start in range(0, len(following), _POSITIONS):
      part = slice(start, start + _POSITIONS)
      logits = _logits(self.model, hidden[part]), _logits(model, mine[part])
      parts.append(jax.device_get(_score(*logits, following[part])))
    return [np.concatenate(values) for values in zip(*parts, strict=True)]


def hidden_states(model: Llama, tokens: Sequence[int]) -> jax.Array:
  """[T, D] after the last norm: one prompt through a fresh paged cache of the model's own recipe."""
  batch = PrefillBatch.from_prompts([tokens])
  cache = KVCache.init(model.config, batch.page_table_BM.shape[1], model.recipe.kv)
  return _hidden(model, cache, batch)


@jax.jit
def _hidden(model: Llama, cache: KVCache, batch: PrefillBatch) -> jax.Array:
  return model(batch, cache)[0]


@jax.jit
def _logits(model: Llama, hidden_TD: jax.Array) -> jax.Array:
  return model.logits(hidden_TD)[:, : model.config.vocab_size]


@jax.jit
def _score(reference_TV: jax.Array, logits_TV: jax.Array, following_T: jax.Array) -> tuple[jax.Array, ...]:
  p, q = jax.nn.log_softmax(reference_TV), jax.nn.log_softmax(logits_TV)
  nll = -jnp.take_along_axis(q, following_T[:, None], axis=1)[:, 0]
  kl = jnp.sum(jnp.exp(p) * (p - q), axis=1)
  return nll, kl, (jnp.argmax(p, axis=1) == jnp.argmax(q, axis=1)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A figure and its 95 % confidence interval."""

  value: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Quality:
  """A model against its reference. `perplexity_ratio` is paired (the same text), so its interval is far narrower than
  `perplexity`'s, which is mostly the text's."""

  perplexity: Estimate
  perplexity_ratio: Estimate
  kl: Estimate
  top1: Estimate

  @classmethod
  def of(cls, scores: Scores, reference_nll: np.ndarray) -> "Quality":
    return cls(
      perplexity=bootstrap(scores.nll, EXP),
      perplexity_ratio=bootstrap(scores.nll - reference_nll, EXP),
      kl=bootstrap(scores.kl),
      top1=bootstrap(scores.agrees),
    )


def bootstrap(values: np.ndarray, transform: Callable = lambda mean: mean) -> Estimate:
  """transform(mean of values [chunks, context]) with a percentile interval from resampling whole chunks.

  Positions of one chunk depend on each other, so chunks are what is drawn (Efron and Tibshirani, An Introduction to the
  Bootstrap, 1993, chapters 8 and 13). The same chunks are drawn in every call. With few chunks intervals come out too narrow.
  """
  means = np.asarray(values, np.float64).mean(axis=1)
  draws = np.random.default_rng(0).integers(0, len(means), (RESAMPLES, len(means)))
  tail = (1 - CONFIDENCE) / 2
  low, high = np.quantile(transform(means[draws].mean(axis=1)), [tail, 1 - tail])
  return Estimate(float(transform(means.mean())), float(low), float(high))


def with_layers(base: Llama, quantized: Llama, layers: Sequence[int], matrices: Sequence[str] = MATRICES) -> Llama:
  """`base` with the numbers that some layers' matrices have in `quantized`, in base's dtype: what rounding them changes.

  A model with those layers in float8 gives the same results but for the order of sums; this one has base's formats, so that
  one compiled program serves for every choice of layers. Both are of one config on one device, with equal formats in all
  layers. Raises InputError when they are not.
  """
  if base.config != quantized.config or len(base.segments) != 1 or len(quantized.segments) != 1:
    raise InputError("quality: with_layers needs two models of one config, each with equal formats in all its layers.")
  graph, state = nnx.split(base)
  changed = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, state))  # new variables: `merge` alone would share base's
  for weight, replacement in zip(*(_linears(model.segments[0], matrices) for model in (changed, quantized)), strict=True):
    value = weight.get_value()
    for layer in layers:
      rounded = _widen(jax.tree.map(lambda leaf, layer=layer: leaf[layer], replacement.get_value()))
      value = value.at[layer].set(rounded[tuple(map(slice, value.shape[1:]))].astype(value.dtype))
    weight.set_value(value)
  return changed


def _linears(segment, matrices: Sequence[str]) -> list[nnx.Param]:
  linears = [linear for name in matrices if isinstance(linear := merged_linear(segment, name), Linear)]
  if len(linears) < len(matrices):
    raise InputError("quality: with_layers needs merged matrices, whose parts have equal formats.")
  return [linear.weight for linear in linears]


def _widen(weight: QArray | jax.Array) -> jax.Array:
  """One layer's merged matrix [..., F, D] as plain numbers, float32 where it was float8."""
  if not isinstance(weight, QArray):
    return weight
  rows = weight.qvalue.reshape(-1, weight.qvalue.shape[-1])
  blocks = weight.scale.ndim == weight.qvalue.ndim
  scale = weight.scale.reshape(-1, weight.scale.shape[-1]) if blocks else weight.scale.reshape(-1)
  return dequantize(QArray(rows, scale)).reshape(weight.qvalue.shape)
