"""Decides which sequences run next: admission, pages and preemption, in Python ints. Imports no jax.

The scheduler runs one step ahead of the tokens that the host has read. It plans step n + 1 while step n computes, since a
sequence's length does not depend on the token that step n chooses. So a sequence may have an unread token: the device has
chosen it, and the host does not have it yet. `schedule` plans a step, `commit` takes the tokens that a step chose.

    waiting --admit--> running --finish--> gone
       ^----- preempt -----'        (its pages are freed; its tokens are computed again later, with the same result)

Pages belong to a data shard; a sequence lives on one shard from admission to its end or preemption.
"""

import collections
import dataclasses
from collections.abc import Iterable

from jaxfp8.errors import InputError
from jaxfp8.serving.limits import StepKind
from jaxfp8.serving.pages import PageAllocator


@dataclasses.dataclass(eq=False)
class Sequence:
  """A request that waits or runs. `tokens` are the prompt and the chosen tokens that the host has read."""

  request_id: int
  tokens: list[int]
  num_prompt: int
  max_tokens: int  # prompt and new tokens together
  num_computed: int = 0  # tokens whose keys and values are in the pool, or will be by the steps planned so far
  num_unread_tokens: int = 0  # tokens that the host has not read: 1 while a step is in flight, 2 from `schedule` to `commit`
  on_device: bool = False  # whether the device still holds the last chosen token
  shard: int = 0
  slot: int = 0

  @property
  def length(self) -> int:
    """The number of tokens of the sequence, including unread tokens."""
    return len(self.tokens) + self.num_unread_tokens

  @property
  def is_decoding(self) -> bool:
    """Whether only the last token is left to compute, and the device holds that token."""
    return self.on_device and self.num_computed == self.length - 1


@dataclasses.dataclass(frozen=True)
class Chunk:
  """The part of a sequence that one step computes: tokens start .. stop - 1.

  emits: the chunk ends with the sequence's last token, so the step chooses the next one.
  from_device: the chunk is one token, which the step takes from the device. pages: all pages of the sequence.
  """

  sequence: Sequence
  start: int
  stop: int
  emits: bool
  from_device: bool
  pages: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class StepPlan:
  """One planned step; its chunks are listed per data shard."""

  kind: StepKind
  shards: tuple[tuple[Chunk, ...], ...]

  def chunks(self) -> Iterable[Chunk]:
    return (chunk for shard in self.shards for chunk in shard)

  @property
  def num_tokens(self) -> int:
    """Tokens of the fullest shard. The batch must hold them."""
    return max(sum(chunk.stop - chunk.start for chunk in shard) for shard in self.shards)


class Scheduler:
  """Plans steps for sequences over `num_shards` pools.

  Args:
    num_pages, page_size: each shard's pool.
    max_sequences: running sequences per shard.
    max_tokens: tokens that a shard may compute in one prefill step; longer prompts are cut into chunks.
  """

  def __init__(self, *, num_pages: int, page_size: int, max_sequences: int, max_tokens: int, num_shards: int = 1):
    self.pools = [PageAllocator(num_pages, page_size) for _ in range(num_shards)]
    self.max_sequences, self.max_tokens = max_sequences, max_tokens
    self.waiting: collections.deque[Sequence] = collections.deque()
    self.running: list[Sequence] = []  # oldest first
    self.num_preemptions = 0

  def add(self, request_id: int, prompt: list[int], max_new_tokens: int) -> Sequence:
    """Queues a request. Raises InputError if the prompt and its new tokens can never fit in the pool."""
    sequence = Sequence(request_id, list(prompt), len(prompt), len(prompt) + max_new_tokens)
    pool = self.pools[0]
    if pool.pages_for(sequence.max_tokens) > pool.num_pages:
      raise InputError(
        f"scheduler: a prompt of {len(prompt)} tokens with {max_new_tokens} new ones needs "
        f"{pool.pages_for(sequence.max_tokens)} pages of {pool.page_size} tokens; the pool has {pool.num_pages}. "
        "Use a shorter prompt, fewer new tokens or a larger pool."
      )
    self.waiting.append(sequence)
    return sequence

  @property
  def has_work(self) -> bool:
    return bool(self.waiting or self.running)

  def schedule(self) -> StepPlan | None:
    """Plans the next step. None: nothing can be planned before an outstanding step is committed, or there is no work.

    A prompt in flight is computed together with one token of every decoding sequence, so that weights are read once.
    """
    self._admit()
    ready = [s for s in self.running if s.length < s.max_tokens]
    prompts = [s for s in ready if not s.is_decoding]
    budgets = [self.max_tokens if prompts else self.max_sequences] * len(self.pools)
    chunks: list[list[Chunk]] = [[] for _ in self.pools]
    blocked = set()  # shards whose next sequence to preempt has an unread token: nothing more is planned for them
    for sequence in [s for s in ready if s.is_decoding] + prompts:
      size = min(sequence.length - sequence.num_computed, budgets[sequence.shard])
      if size < 1 or sequence.shard in blocked or sequence not in self.running:
        continue
      if self._make_room(sequence, sequence.num_computed + size):
        chunks[sequence.shard].append(self._plan_chunk(sequence, size))
        budgets[sequence.shard] -= size
      elif self._youngest(sequence.shard) is not sequence:
        blocked.add(sequence.shard)
    return self._planned(chunks)

  def commit(self, plan: StepPlan, tokens: dict[Sequence, int]) -> None:
    """Appends the tokens that a planned step chose. Skips sequences that have ended in the meantime."""
    for chunk in plan.chunks():
      if chunk.emits and chunk.sequence in self.running:
        chunk.sequence.tokens.append(tokens[chunk.sequence])
        chunk.sequence.num_unread_tokens -= 1

  def finish(self, sequence: Sequence) -> None:
    """Ends a sequence and frees its pages. A step in flight may still write to them, before any step of their next owner."""
    if sequence in self.running:
      self.running.remove(sequence)
      self.pools[sequence.shard].free(sequence)
    elif sequence in self.waiting:
      self.waiting.remove(sequence)

  def check_integrity(self) -> None:
    """Raises RuntimeError unless every page of every pool is free or owned exactly once."""
    for pool in self.pools:
      pool.check_integrity()

  def _planned(self, chunks: list[list[Chunk]]) -> StepPlan | None:
    """The plan of these chunks, or None without chunks. If all prompts wait for pages, the plan is a decode step."""
    if not any(chunks):
      return None
    kind = StepKind.DECODE if all(chunk.from_device for shard in chunks for chunk in shard) else StepKind.PREFILL
    return StepPlan(kind, tuple(tuple(shard) for shard in chunks))

  def _plan_chunk(self, sequence: Sequence, size: int) -> Chunk:
    start, stop = sequence.num_computed, sequence.num_computed + size
    emits = stop == sequence.length
    chunk = Chunk(sequence, start, stop, emits, sequence.is_decoding, tuple(self.pools[sequence.shard].pages_of(sequence)))
    sequence.num_computed = stop
    if emits:
      sequence.num_unread_tokens, sequence.on_device = sequence.num_unread_tokens + 1, True
    return chunk

  def _admit(self) -> None:
    """Admits waiting sequences in order, each to the emptiest shard, while it has a slot and pages for the first chunk."""
    while self.waiting:
      sequence = self.waiting[0]
      shard = min(range(len(self.pools)), key=lambda i: (self._num_running(i), -self.pools[i].num_free))
      first = min(sequence.length, self.max_tokens)
      if self._num_running(shard) >= self.max_sequences or not self.pools[shard].can_grow(sequence, first):
        return
      self.waiting.popleft()
      taken = {s.slot for s in self.running if s.shard == shard}
      sequence.shard, sequence.slot = shard, next(i for i in range(self.max_sequences) if i not in taken)
      self.pools[shard].grow(sequence, first)
      self.running.append(sequence)

  def _num_running(self, shard: int) -> int:
    return sum(s.shard == shard for s in self.running)

  def _youngest(self, shard: int) -> Sequence:
    return [s for s in self.running if s.shard == shard][-1]

  def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
    """Allocates pages for num_tokens tokens, preempting younger sequences of the shard. False if the sequence must wait."""
    pool = self.pools[sequence.shard]
    while not pool.can_grow(sequence, num_tokens):
      youngest = self._youngest(sequence.shard)
      if youngest is sequence or youngest.num_unread_tokens:
        return False
      self._preempt(youngest)
    pool.grow(sequence, num_tokens)
    return True

  def _preempt(self, sequence: Sequence) -> None:
    self.running.remove(sequence)
    self.pools[sequence.shard].free(sequence)
    sequence.num_computed, sequence.on_device = 0, False
    self.waiting.appendleft(sequence)
    self.num_preemptions += 1
