"""The output of one request, token by token: stop rules, text in whole characters, log-probabilities. Calls no jax."""

import dataclasses
import time

from jaxfp8.model.sampling import Sampled, SamplingParams
from jaxfp8.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
  """Natural-log probabilities of one token under the model's own distribution, before penalties, temperature and cuts.

  top: (token id, log-probability) of the most probable tokens, best first.
  """

  token_id: int
  logprob: float
  top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Completion:
  """A finished request.

  token_ids: all chosen tokens, including the token that ended the text. text: the text without stop tokens and stop strings
  ("" with no tokenizer). finish_reason: "stop" or "length". logprobs: one entry per token; None if the request wants none.
  ttft_s: seconds from submission to the first token.
  """

  request_id: int
  num_prompt_tokens: int
  token_ids: tuple[int, ...]
  text: str
  finish_reason: str
  logprobs: tuple[TokenLogprobs, ...] | None
  ttft_s: float


@dataclasses.dataclass(frozen=True)
class Delta:
  """One chosen token and the text that became certain with it. The last delta of a request holds the `completion`."""

  request_id: int
  token_id: int
  text: str
  completion: Completion | None = None


class OutputCollector:
  """Collects one request's tokens, text and log-probabilities, and decides when the request ends."""

  def __init__(
    self, request_id: int, num_prompt: int, params: SamplingParams, eos_ids: tuple[int, ...], tokenizer: Tokenizer | None
  ):
    self.request_id, self.num_prompt, self.params = request_id, num_prompt, params
    self._stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_ids))
    if tokenizer:  # a special token has no text in which its string could be found
      self._stop_ids |= {token for stop in params.stop if (token := tokenizer.special_id(stop)) is not None}
    self._stream = tokenizer.stream() if tokenizer else None
    self._stops = StopStrings(params.stop)
    self._tokens: list[int] = []
    self._text: list[str] = []
    self._logprobs: list[TokenLogprobs] = []
    self._start, self._ttft = time.perf_counter(), 0.0

  def push(self, token: int, sampled: Sampled, row: int, last: bool) -> Delta:
    """Adds `token`, found in `row` of a step's result. last: whether the request has reached its maximum of tokens."""
    if not self._tokens:
      self._ttft = time.perf_counter() - self._start
    self._tokens.append(token)
    if (count := self.params.logprobs) is not None:
      top = zip(sampled.top_tokens_Bn[row][:count].tolist(), sampled.top_logprobs_Bn[row][:count].tolist(), strict=True)
      self._logprobs.append(TokenLogprobs(token, float(sampled.logprob_B[row]), tuple(top)))
    stopped = token in self._stop_ids
    text = "" if stopped or not self._stream else self._stops.push(self._stream.push(token))
    if (stopped or last) and self._stream and not self._stops.found:
      text += self._stops.push(self._stream.finish()) + self._stops.finish()
    stopped = stopped or self._stops.found
    self._text.append(text)
    completion = self._complete("stop" if stopped else "length") if stopped or last else None
    return Delta(self.request_id, token, text, completion)

  def _complete(self, reason: str) -> Completion:
    logprobs = None if self.params.logprobs is None else tuple(self._logprobs)
    return Completion(self.request_id, self.num_prompt, tuple(self._tokens), "".join(self._text), reason, logprobs, self._ttft)


class StopStrings:
  """Passes text through up to the first stop string. Holds back a suffix that may be the beginning of a stop string."""

  def __init__(self, stops: tuple[str, ...]):
    self.found, self._held, self._searches = False, "", [_Search(stop) for stop in stops]

  def push(self, text: str) -> str:
    """Adds text and returns the text that has become certain. After a stop string, returns ""."""
    if self.found:
      return ""
    before, self._held = len(self._held), self._held + text
    ends = [(before + end, before + end - len(search.stop)) for search in self._searches if (end := search.push(text))]
    if ends:  # the stop string that ends first: then the result does not depend on how the text was cut into pieces
      self.found, certain, self._held = True, self._held[: min(ends)[1]], ""
      return certain
    keep = max((search.overlap for search in self._searches), default=0)
    certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
    return certain

  def finish(self) -> str:
    """The text that was held back."""
    held, self._held = self._held, ""
    return held


class _Search:
  """Finds one stop string in text that comes in pieces, in linear time (Knuth, Morris and Pratt).

  overlap: length of the longest suffix of the text so far that is a proper prefix of `stop`.
  """

  def __init__(self, stop: str):
    self.stop, self.overlap = stop, 0
    self._shorter = [0]  # for each prefix of `stop`, the longest shorter prefix that ends it
    for character in stop[1:]:
      self._shorter.append(self._step(character, self._shorter[-1]))

  def push(self, text: str) -> int:
    """Number of characters of `text` up to the end of the first `stop`; 0 if it is not there."""
    for count, character in enumerate(text, 1):
      self.overlap = self._step(character, self.overlap)
      if self.overlap == len(self.stop):
        return count
    return 0

  def _step(self, character: str, overlap: int) -> int:
    while overlap and character != self.stop[overlap]:
      overlap = self._shorter[overlap - 1]
    return overlap + (character == self.stop[overlap])
