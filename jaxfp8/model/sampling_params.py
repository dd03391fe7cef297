"""The options of one request, `SamplingParams`, and the float32 numbers that a device makes of them. Loads no jax."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxfp8.errors import InputError, shown

MAX_SEED = 2**64 - 1
_MAX_STOP = 4096  # characters of a stop string, which are held back before they are certain
_LEAST_TEMPERATURE = (
  1e-30  # below it logits / temperature overflows; the noise could change only the choice between equal logits
)
_LEAST_NORMAL = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """The options of one request: how tokens are chosen, and when the answer ends.

  temperature: 0 is greedy, and so is a temperature below 1e-30.
  repetition_penalty: above 0; 1 is none. Divides positive and multiplies negative logits of tokens in the prompt or the answer.
  frequency_penalty: -2 .. 2. Subtracted from a token's logit once for every occurrence of the token in the answer.
  presence_penalty: -2 .. 2. Subtracted once if the token occurs in the answer. Penalties act first, on greedy choices too.
  top_k: 0 keeps all. top_p in (0, 1]; min_p in [0, 1).
  seed: 0 .. 2^64 - 1. max_new_tokens: at least 1.
  stop_token_ids: tokens that end the text, besides the end tokens of model and tokenizer unless ignore_eos; the token is not
    part of the text.
  stop: strings that end the text; the first such string and all text after it are dropped. A string that is one special token
    of the tokenizer, such as "<|eot_id|>", ends the text at that token too, although special tokens have no text.
  logprobs: the number of most probable tokens to report beside the chosen one; None reports no log-probabilities.

  The device computes in float32 and int32. So a rule holds for a number and for the number's float32: 1e39 is infinite. The
  smallest top_p above 0 is the smallest normal float32, which keeps the most probable token alone.

  Raises InputError, naming the option and its rule, for values outside of these ranges and of other types.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  seed: int = 0
  max_new_tokens: int = 256
  stop: tuple[str, ...] = ()
  stop_token_ids: tuple[int, ...] = ()
  ignore_eos: bool = False
  logprobs: int | None = None
  repetition_penalty: float = 1.0
  frequency_penalty: float = 0.0
  presence_penalty: float = 0.0

  def __post_init__(self):
    for name, (rule, holds) in _FLOAT_RULES.items():
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputError(f"sampling: {name} must be a number; got {shown(value)}.")
      if not holds(value):
        raise InputError(f"sampling: {name} must be {rule}; got {shown(value)}.")
      if not holds(rounded := as_float32(name, value)):
        raise InputError(f"sampling: {name} must be {rule}; got {shown(value)}, which is {rounded:g} in float32.")
    for name in ("top_k", "seed", "max_new_tokens", "logprobs"):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, (numbers.Integral, type(None) if name == "logprobs" else int)):
        raise InputError(f"sampling: {name} must be a whole number; got {shown(value)}.")
    rules = (
      ("top_k", 0 <= self.top_k < 2**31, "at least 0 (0 keeps all) and below 2^31"),
      ("seed", 0 <= self.seed <= MAX_SEED, f"between 0 and {MAX_SEED}"),
      ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
      ("stop", _all(self.stop, _is_stop), f"strings that are not empty, of at most {_MAX_STOP} characters, in a tuple"),
      ("stop_token_ids", _all(self.stop_token_ids, _is_token_id), "token ids, in a tuple"),
      ("logprobs", self.logprobs is None or 0 <= self.logprobs < 2**31, "None or at least 0 and below 2^31"),
    )
    for name, holds, rule in rules:
      if not holds:
        raise InputError(f"sampling: {name} must be {rule}; got {shown(getattr(self, name))}.")


_FLOAT_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
  "temperature": ("at least 0 and finite", lambda x: 0 <= x < math.inf),
  "top_p": ("above 0 and at most 1", lambda x: 0 < x <= 1),
  "min_p": ("at least 0 and below 1", lambda x: 0 <= x < 1),
  "repetition_penalty": ("above 0 and finite", lambda x: 0 < x < math.inf),
  "frequency_penalty": ("between -2 and 2", lambda x: -2 <= x <= 2),
  "presence_penalty": ("between -2 and 2", lambda x: -2 <= x <= 2),
}


def as_float32(name: str, value: Any) -> float:
  """The number that the device computes with. Devices take subnormal numbers for 0."""
  with np.errstate(over="ignore", under="ignore"):
    try:
      rounded = float(np.float32(value))
    except OverflowError:  # an int beyond float64
      return math.inf
  if name == "top_p":
    return max(rounded, _LEAST_NORMAL)
  least = _LEAST_TEMPERATURE if name == "temperature" else _LEAST_NORMAL
  return 0.0 if abs(rounded) < least else rounded


def _all(values: Any, holds: Callable[[Any], Any]) -> bool:
  return isinstance(values, (tuple, list)) and all(map(holds, values))


def _is_stop(value: Any) -> bool:
  return isinstance(value, str) and 1 <= len(value) <= _MAX_STOP


def _is_token_id(value: Any) -> bool:
  return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= 0
