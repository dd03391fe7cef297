"""`Engine`: requests in, text out. The main loop of the project:

    plan = scheduler.schedule()             choose the tokens of the next step
    state, sampled = steps.run(state, ..)   start the step, without waiting for its result
    commit(previous plan, its tokens)       read the previous step's tokens: append, stop, yield text

Refuses to know how a step is computed (steps.py) and which sequences run (scheduler.py).
"""

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxfp8.distributed import processes
from jaxfp8.errors import InputError
from jaxfp8.model.batch import DecodeBatch, PrefillBatch
from jaxfp8.model.llama import Llama
from jaxfp8.model.sampling import SamplingBatch, SamplingParams
from jaxfp8.recipe import DEFAULT_PAGE_SIZE
from jaxfp8.serving import memory
from jaxfp8.serving.limits import EngineLimits, StepKind, sizes_up_to
from jaxfp8.serving.request_output import Completion, Delta, OutputCollector
from jaxfp8.serving.scheduler import Chunk, Scheduler, Sequence, StepPlan
from jaxfp8.serving.steps import FROM_DEVICE, CompiledSteps, State, StepInput
from jaxfp8.sharding import make_mesh, mesh_shape
from jaxfp8.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Request:
  """One prompt and its sampling options. The prompt is text (encoded with the tokenizer's BOS rule) or token ids."""

  prompt: str | tuple[int, ...]
  params: SamplingParams = dataclasses.field(default_factory=SamplingParams)


@dataclasses.dataclass
class Stats:
  """Totals of an engine: tokens and seconds per kind of step, and each decode step's context lengths in tokens."""

  prefill_tokens: int = 0
  prefill_seconds: float = 0.0
  decode_tokens: int = 0
  decode_seconds: float = 0.0
  decode_lengths: list[tuple[int, ...]] = dataclasses.field(default_factory=list)

  def add(self, plan: StepPlan, seconds: float) -> None:
    num_tokens = sum(chunk.stop - chunk.start for chunk in plan.chunks())
    if plan.kind is StepKind.PREFILL:
      self.prefill_tokens += num_tokens
      self.prefill_seconds += seconds
    else:
      self.decode_tokens += num_tokens
      self.decode_seconds += seconds
      self.decode_lengths.append(tuple(chunk.stop for chunk in plan.chunks()))


class Engine:
  """Generates text for many requests at once with one model.

  Args:
    model: a model with arrays, from `load` (for the same mesh) or the user's own.
    tokenizer: needed for text prompts, text output and stop strings. With None, prompts and output are token ids alone.
    mesh: from `make_mesh`; None is one device. If the mesh spans processes, each process makes the same engine and the same
      calls with the same requests, and each process gets all completions.
    limits: the static sizes. None makes room for 8 sequences of the model's full context, or for the pages that memory holds.

  Raises InputError if the KV pool needs more memory than is free.
  """

  def __init__(
    self, model: Llama, tokenizer: Tokenizer | None = None, *, mesh: Mesh | None = None, limits: EngineLimits | None = None
  ):
    self.config, self.tokenizer = model.config, tokenizer
    mesh = mesh or make_mesh(model.config)
    self.limits = limits or default_limits(model, mesh)
    self.kv_bytes = memory.require_kv_fits(model, self.limits, mesh)
    self.mesh_shape, self.formats = mesh_shape(mesh), model.formats
    self.steps = CompiledSteps(model, mesh, self.limits)
    self.state: State = self.steps.init_state()
    self.stats = Stats()

  @property
  def end_ids(self) -> tuple[int, ...]:
    """The tokens that end a text: those of the model's config, and the tokenizer's EOS, which may be another one."""
    return (*self.config.eos_ids, *(self.tokenizer.end_ids if self.tokenizer else ()))

  def compile(self) -> None:
    """Compiles every program that this engine can need, so that none is compiled while generating."""
    for size in self.limits.prefill_sizes:
      self.steps.compile(StepKind.PREFILL, size)
    for size in self.limits.decode_sizes:
      self.steps.compile(StepKind.DECODE, size)

  def generate(self, requests: Seq[Request]) -> list[Completion]:
    """Runs requests together until all have ended. Returns the completions in the order of the requests."""
    outputs: dict[int, Completion] = {}
    for delta in self.stream(requests):
      if delta.completion:
        outputs[delta.request_id] = delta.completion
    return [outputs[index] for index in range(len(requests))]

  def stream(self, requests: Seq[Request]) -> Iterator[Delta]:
    """Like `generate`, but yields a `Delta` for each token, with the text that has become certain.

    Raises InputError before the first step for a request that this engine cannot serve, or if processes have other requests.
    """
    self.compile()
    if processes.spans_processes(self.steps.mesh):
      processes.require_same({"requests": hashlib.sha256(repr(list(requests)).encode()).hexdigest()[:16]})
    scheduler, outputs = self._admit(requests)
    previous, before = None, time.perf_counter()
    while scheduler.has_work or previous:
      plan = scheduler.schedule()
      started = None
      if plan:
        self.state, started = self.steps.run(self.state, self._inputs(plan, outputs))
      if previous:
        yield from self._commit(*previous, scheduler, outputs)
        now = time.perf_counter()
        self.stats.add(previous[0], now - before)
        before = now
      previous = (plan, started) if plan else None

  def _admit(self, requests: Seq[Request]) -> tuple[Scheduler, dict[Sequence, OutputCollector]]:
    limits = self.limits
    scheduler = Scheduler(
      num_pages=limits.num_pages,
      page_size=limits.page_size,
      max_sequences=limits.max_sequences,
      max_tokens=limits.prefill_sizes[-1],
      num_shards=self.steps.num_shards,
    )
    outputs = {}
    for index, request in enumerate(requests):
      prompt = self.encode(request.prompt)
      if request.params.stop and self.tokenizer is None:
        raise InputError("engine: stop strings need a tokenizer, and this checkpoint has none. Pass stop_token_ids.")
      if any(token >= self.config.vocab_size for token in request.params.stop_token_ids):
        raise InputError(
          f"engine: stop_token_ids must be between 0 and {self.config.vocab_size - 1}, the ids of this model's tokens; "
          f"got {list(request.params.stop_token_ids)}."
        )
      if (request.params.logprobs or 0) > limits.num_logprobs:
        raise InputError(
          f"engine: logprobs must be at most this engine's {limits.num_logprobs}; got {request.params.logprobs}. "
          "Pass limits with a larger num_logprobs."
        )
      room = min(self.config.max_context, limits.max_pages * limits.page_size) - len(prompt)
      sequence = scheduler.add(index, prompt, min(request.params.max_new_tokens, room))
      outputs[sequence] = OutputCollector(index, len(prompt), request.params, self.end_ids, self.tokenizer)
    return scheduler, outputs

  def encode(self, prompt: str | Seq[int]) -> list[int]:
    """The token ids of a prompt.

    Raises InputError for an empty prompt, for ids outside of the vocabulary, and for a prompt that fills the context.
    """
    room = min(self.config.max_context, self.limits.max_pages * self.limits.page_size)
    if isinstance(prompt, str):
      if self.tokenizer is None:
        raise InputError("engine: text prompts need a tokenizer, and this checkpoint has none. Pass token ids.")
      prompt = self.tokenizer.encode(prompt, max_tokens=room)
    tokens = [int(token) for token in prompt]
    if not tokens:
      raise InputError("engine: the prompt is empty. Give at least one token.")
    if not all(0 <= token < self.config.vocab_size for token in tokens):
      raise InputError(
        f"engine: token ids must be between 0 and {self.config.vocab_size - 1}; got {min(tokens)} .. {max(tokens)}."
      )
    if len(tokens) >= room:
      raise InputError(
        f"engine: the prompt has {len(tokens)} tokens; the context holds {room}, and one must be left to answer. Shorten it."
      )
    return tokens

  def _inputs(self, plan: StepPlan, outputs: dict[Sequence, OutputCollector]) -> StepInput:
    """The step's batch as numpy arrays. The data shards follow each other along axis 0."""
    limits = self.limits
    if plan.kind is StepKind.PREFILL:
      rows, size = limits.max_sequences, limits.prefill_size(plan.num_tokens)
    else:
      rows = size = limits.decode_size(plan.num_tokens)
    parts = [_shard_arrays(chunks, rows, size, limits.max_pages, plan.kind) for chunks in plan.shards]
    tokens, starts, lengths, table = (_host_array(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
    batch = (
      DecodeBatch(tokens, lengths, table) if plan.kind is StepKind.DECODE else PrefillBatch(tokens, starts, lengths, table)
    )
    padded = [chunk for shard in plan.shards for chunk in (*shard, *[None] * (rows - len(shard)))]
    return StepInput(
      batch=batch,
      slot_B=_host_array([chunk.sequence.slot if chunk else limits.max_sequences for chunk in padded], np.int32),
      emit_B=_host_array([bool(chunk and chunk.emits) for chunk in padded]),
      sampling=SamplingBatch.of(
        [outputs[chunk.sequence].params if chunk else None for chunk in padded],
        [chunk.sequence.num_prompt if chunk else 0 for chunk in padded],
      ),
    )

  def _commit(self, plan: StepPlan, sampled, scheduler: Scheduler, outputs: dict[Sequence, OutputCollector]) -> Iterator[Delta]:
    """Waits for a step's tokens, appends them to their sequences, yields a `Delta` for each, and ends finished sequences."""
    sampled = jax.device_get(sampled)
    rows = len(sampled.tokens_B) // len(plan.shards)
    places = itertools.chain.from_iterable(
      ((shard * rows + row, chunk) for row, chunk in enumerate(chunks)) for shard, chunks in enumerate(plan.shards)
    )
    chosen = {chunk.sequence: row for row, chunk in places if chunk.emits and chunk.sequence in scheduler.running}
    scheduler.commit(plan, {sequence: int(sampled.tokens_B[row]) for sequence, row in chosen.items()})
    for sequence, row in chosen.items():
      delta = outputs[sequence].push(sequence.tokens[-1], sampled, row, last=len(sequence.tokens) == sequence.max_tokens)
      if delta.completion:
        scheduler.finish(sequence)
      yield delta


def _host_array(values: Any, dtype: Any = None) -> Any:
  """A numpy array, typed as Any: the call of the step turns the array into a `jax.Array`."""
  return np.asarray(values, dtype)


def default_limits(model: Llama, mesh: Mesh, max_sequences: int = 8) -> EngineLimits:
  """Limits for max_sequences sequences of the full context, or for the pages that half of the free memory holds, if fewer."""
  max_pages = -(-model.config.max_context // DEFAULT_PAGE_SIZE)
  affordable = memory.room_for_pages(model, mesh, 0.5)
  return EngineLimits(
    num_pages=max(1, min(max_sequences * max_pages, affordable)),
    max_sequences=max_sequences,
    max_pages=max_pages,
    decode_sizes=sizes_up_to(max_sequences, EngineLimits.decode_sizes),
  )


def _shard_arrays(chunks: tuple[Chunk, ...], rows: int, size: int, max_pages: int, kind: str):
  """One data shard's int32 arrays: (tokens [size], query_starts [rows + 1], lengths [rows], page table [rows, max_pages])."""
  tokens, starts = np.zeros(size, np.int32), np.zeros(rows + 1, np.int32)
  lengths, table = np.zeros(rows, np.int32), np.zeros((rows, max_pages), np.int32)
  for row, chunk in enumerate(chunks):
    first, count = starts[row], chunk.stop - chunk.start
    tokens[first : first + count] = FROM_DEVICE if chunk.from_device else chunk.sequence.tokens[chunk.start : chunk.stop]
    starts[row + 1 :] = first + count
    lengths[row] = chunk.stop
    table[row, : len(chunk.pages)] = chunk.pages
  return tokens, starts, lengths, table
