"""Runs compiled steps by hand: the test, and no scheduler, chooses the tokens and sequences of a step."""

import dataclasses

import jax
import numpy as np

from jaxfp8.model.batch import DecodeBatch, PrefillBatch
from jaxfp8.model.llama import Llama
from jaxfp8.model.sampling import SamplingBatch, SamplingParams
from jaxfp8.serving.limits import EngineLimits
from jaxfp8.serving.steps import FROM_DEVICE, CompiledSteps, StepInput
from jaxfp8.sharding import make_mesh
from tests.helpers import tiny_models


@dataclasses.dataclass
class Row:
  """Tokens start .. stop - 1 of one sequence: `pages` are its pages, `slot` its row of last_tokens."""

  tokens: np.ndarray
  start: int
  stop: int
  pages: tuple[int, ...]
  slot: int = 0
  emit: bool = True
  params: SamplingParams | None = None
  from_device: bool = False


class Driver:
  """CompiledSteps that return the log-probability of every token of the vocabulary."""

  def __init__(self, model: Llama, mesh=None, **limits):
    sizes = {"num_pages": 16, "max_sequences": 4, "max_pages": 4, "prefill_sizes": (40, 160), "decode_sizes": (2, 4)}
    self.limits = EngineLimits(**{**sizes, "num_logprobs": model.config.vocab_size, **limits})
    self.config = model.config
    self.steps = CompiledSteps(model, mesh or make_mesh(model.config), self.limits)
    self.state = self.steps.init_state()

  def prefill(self, *shards: list[Row], size: int | None = None):
    """One step. Returns (tokens, log-probabilities [rows, V]) of the rows of all shards, in order."""
    size = size or self.limits.prefill_size(max(sum(row.stop - row.start for row in shard) for shard in shards))
    return self._run(shards, self.limits.max_sequences, size, "prefill")

  def decode(self, *shards: list[Row], size: int | None = None):
    size = size or self.limits.decode_size(max(map(len, shards)))
    return self._run(shards, size, size, "decode")

  def _run(self, shards, rows: int, size: int, kind: str):
    self.state, sampled = self.steps.run(self.state, self.inputs(shards, rows, size, kind))
    kept = [shard * rows + row for shard, chunks in enumerate(shards) for row in range(len(chunks))]
    tokens, top, logprobs = (np.asarray(x)[kept] for x in (sampled.tokens_B, sampled.top_tokens_Bn, sampled.top_logprobs_Bn))
    dense = np.full((len(kept), self.config.vocab_size), np.nan, np.float32)
    np.put_along_axis(dense, top, logprobs, axis=1)
    assert not np.isnan(dense).any()
    return tokens, dense

  def inputs(self, shards, rows: int, size: int, kind: str) -> StepInput:
    tokens, starts, lengths, tables, places, emits, params = [], [], [], [], [], [], []
    for chunks in shards:
      flat, edges = [], [0]
      for row in chunks:
        piece = [FROM_DEVICE] if row.from_device else np.asarray(row.tokens[row.start : row.stop]).tolist()
        flat += piece
        edges.append(len(flat))
      empty = rows - len(chunks)
      tokens += flat + [0] * (size - len(flat))
      starts += edges + [edges[-1]] * empty
      lengths += [row.stop for row in chunks] + [0] * empty
      tables += [(*row.pages, *[0] * (self.limits.max_pages - len(row.pages))) for row in chunks]
      tables += [(0,) * self.limits.max_pages] * empty
      places += [row.slot for row in chunks] + [self.limits.max_sequences] * empty
      emits += [row.emit for row in chunks] + [False] * empty
      params += [row.params for row in chunks] + [None] * empty
    tokens, starts, lengths, tables, places = (np.array(x, np.int32) for x in (tokens, starts, lengths, tables, places))
    batch = DecodeBatch(tokens, lengths, tables) if kind == "decode" else PrefillBatch(tokens, starts, lengths, tables)
    return StepInput(batch, places, np.array(emits), SamplingBatch.of(params))


def random_rows(config, lengths: list[int], first_page: int, first_slot: int, seed: int = 5) -> list[Row]:
  """Further sequences for the batch beside the tested sequence; one page each."""
  return [
    Row(tiny_models.make_tokens(config, length, seed + i), 0, length, (first_page + i,), first_slot + i)
    for i, length in enumerate(lengths)
  ]


def bits(x) -> np.ndarray:
  """float32 as int32, to compare bits: -0 and 0 differ, and NaN equals itself."""
  return np.asarray(jax.device_get(x), np.float32).view(np.int32)
