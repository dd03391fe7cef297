"""The scheduler under random workloads, with a simulated device that checks all tokens that a step reads and writes."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfp8.errors import InputError
from jaxfp8.serving.scheduler import Scheduler, StepPlan


@dataclasses.dataclass(frozen=True)
class Job:
  """A request. A stop token ends it after `stop_after` new tokens. `arrives` is the step at which the request is added."""

  prompt: int
  new: int
  stop_after: int | None = None
  arrives: int = 0

  @property
  def num_new(self) -> int:
    return min(self.new, self.stop_after or self.new)


def token_of(request_id: int, position: int) -> int:
  return 1000 * request_id + position


class Spy(Scheduler):
  """A scheduler that checks each preemption and records the order of first admissions."""

  def __init__(self, **sizes):
    super().__init__(**sizes)
    self.admitted = []

  def _preempt(self, sequence):
    assert sequence.num_unread_tokens == 0, "its unread token would be lost"
    assert sequence is [s for s in self.running if s.shard == sequence.shard][-1], "only the youngest"
    super()._preempt(sequence)

  def _admit(self):
    before = list(self.running)
    super()._admit()
    new = [s for s in self.running if s not in before]
    self.admitted += [s.request_id for s in new if s.request_id not in self.admitted]


class Device:
  """The pools and last tokens of every shard. Steps write them in the order in which the steps are started."""

  def __init__(self, page_size: int):
    self.page_size, self.slots, self.last = page_size, {}, {}

  def run(self, plan: StepPlan) -> None:
    for shard, chunks in enumerate(plan.shards):
      for chunk in chunks:
        for position in range(chunk.start, chunk.stop):
          token = self.last[shard, chunk.sequence.slot] if chunk.from_device else chunk.sequence.tokens[position]
          assert token == token_of(chunk.sequence.request_id, position)
          self.slots[self._slot(shard, chunk, position)] = token
      for chunk in chunks:  # attention: a chunk reads only tokens of its own sequence
        for position in range(chunk.stop):
          assert self.slots[self._slot(shard, chunk, position)] == token_of(chunk.sequence.request_id, position)
        if chunk.emits:
          self.last[shard, chunk.sequence.slot] = token_of(chunk.sequence.request_id, chunk.stop)

  def _slot(self, shard, chunk, position):
    return shard, chunk.pages[position // self.page_size], position % self.page_size


def simulate(jobs: list[Job], *, num_shards=1, **sizes) -> tuple[Spy, list[StepPlan]]:
  """The engine's loop, which commits one step behind. Returns the scheduler and all plans.

  A round in which nothing could be planned before a commit counts as a plan without chunks.
  """
  sizes["num_shards"] = num_shards
  scheduler, device, sequences, plans = Spy(**sizes), Device(sizes["page_size"]), {}, []
  arriving = sorted(enumerate(jobs), key=lambda item: item[1].arrives)
  previous, nothing = None, StepPlan("decode", ((),) * sizes["num_shards"])
  while arriving or scheduler.has_work or previous:
    while arriving and arriving[0][1].arrives <= len(plans):
      index, job = arriving.pop(0)
      prompt = [token_of(index, position) for position in range(job.prompt)]
      sequences[index] = scheduler.add(index, prompt, job.new)
    plan = scheduler.schedule()
    scheduler.check_integrity()
    if num_shards == 1:
      waiting = [(jobs[s.request_id].arrives, s.request_id) for s in scheduler.waiting]
      assert waiting == sorted(waiting), "who was preempted comes before who has not started"
    if plan:
      check_plan(plan, scheduler, sizes)
      device.run(plan)
    else:
      assert previous or arriving, "nothing planned although nothing is under way: this would never end"
    plans.append(plan or nothing)
    if previous:
      chosen = {c.sequence: token_of(c.sequence.request_id, c.stop) for c in previous.chunks() if c.emits}
      alive = {sequence: token for sequence, token in chosen.items() if sequence in scheduler.running}
      before = {sequence: len(sequence.tokens) for sequence in alive}
      scheduler.commit(previous, alive)
      for sequence, token in alive.items():
        assert token == token_of(sequence.request_id, before[sequence]), "tokens arrive in order"
        job = jobs[sequence.request_id]
        if len(sequence.tokens) - job.prompt == job.num_new:
          scheduler.finish(sequence)
      scheduler.check_integrity()
    previous = plan
  for index, job in enumerate(jobs):
    wanted = [token_of(index, position) for position in range(job.prompt + job.num_new)]
    assert sequences[index].tokens == wanted
  assert all(pool.num_free == pool.num_pages for pool in scheduler.pools)
  return scheduler, plans


def check_plan(plan: StepPlan, scheduler: Scheduler, sizes) -> None:
  assert len(plan.shards) == len(scheduler.pools)
  for shard, chunks in enumerate(plan.shards):
    assert len(chunks) <= sizes["max_sequences"]
    assert sum(chunk.stop - chunk.start for chunk in chunks) <= plan.num_tokens
    assert len({chunk.sequence for chunk in chunks}) == len(chunks)
    assert len({chunk.sequence.slot for chunk in chunks}) == len(chunks)
    for chunk in chunks:
      assert chunk.sequence.shard == shard and chunk.sequence in scheduler.running
      assert 0 <= chunk.start < chunk.stop <= chunk.sequence.max_tokens - 1
      assert 0 <= chunk.sequence.slot < sizes["max_sequences"]
      assert len(chunk.pages) * sizes["page_size"] >= chunk.stop
    pages = [page for chunk in chunks for page in chunk.pages]
    assert len(set(pages)) == len(pages), "two sequences share a page"
  if plan.kind == "decode":
    assert all(chunk.stop - chunk.start == 1 and chunk.emits for chunk in plan.chunks())
    assert plan.num_tokens <= sizes["max_sequences"]
  else:
    assert plan.num_tokens <= sizes["max_tokens"]


@st.composite
def workloads(draw):
  page_size = draw(st.integers(1, 8))
  jobs = draw(
    st.lists(
      st.builds(
        Job,
        prompt=st.integers(1, 40),
        new=st.integers(1, 20),
        stop_after=st.none() | st.integers(1, 20),
        arrives=st.sampled_from([0, 0, 0, 3, 10, 40]),
      ),
      min_size=1,
      max_size=9,
    )
  )
  least = max(-(-(job.prompt + job.new) // page_size) for job in jobs)
  return jobs, {
    "page_size": page_size,
    "num_pages": least + draw(st.integers(0, 12)),  # with 0 the pool holds just the longest sequence
    "max_sequences": draw(st.integers(1, 5)),
    "max_tokens": draw(st.integers(1, 24)),
    "num_shards": draw(st.integers(1, 3)),
  }


@settings(max_examples=400, deadline=None)
@given(workloads())
def test_random_workloads(workload):
  jobs, sizes = workload
  scheduler, plans = simulate(jobs, **sizes)
  arrived = sorted(range(len(jobs)), key=lambda index: jobs[index].arrives)
  assert scheduler.admitted == arrived, "first come, first admitted"
  # A preempted sequence is computed again, at most once per preemption. Without preemptions no token is computed twice.
  if scheduler.num_preemptions == 0:
    computed = sum(chunk.stop - chunk.start for plan in plans for chunk in plan.chunks())
    beyond = sum(job.stop_after is not None for job in jobs)  # the step after a stop token was already in flight
    assert computed <= sum(job.prompt + job.num_new - 1 for job in jobs) + beyond


def test_a_pool_of_exactly_one_sequence():
  jobs = [Job(prompt=30, new=34) for _ in range(5)]
  _, plans = simulate(jobs, num_pages=8, page_size=8, max_sequences=4, max_tokens=16)
  assert len(plans) < 5 * 200


def test_decoding_sequences_ride_along_with_prompts():
  """While a long prompt is computed in chunks, a decoding sequence gets a token in every step."""
  jobs = [Job(prompt=4, new=30), Job(prompt=100, new=2, arrives=5)]
  _, plans = simulate(jobs, num_pages=40, page_size=8, max_sequences=4, max_tokens=16)
  mixed = [plan for plan in plans if len({chunk.sequence for chunk in plan.chunks()}) == 2]
  assert sum(plan.kind == "prefill" for plan in mixed) >= 7
  steps_of_first = [any(chunk.sequence.request_id == 0 for chunk in plan.chunks()) for plan in plans]
  assert all(steps_of_first[:30])


def test_an_older_prompt_is_not_overtaken():
  """A prompt that waits for pages is not overtaken by the short requests that arrived later."""
  jobs = [Job(prompt=8, new=4), Job(prompt=20, new=2)] + [Job(prompt=2, new=2) for _ in range(60)]
  _, plans = simulate(jobs, num_pages=6, page_size=4, max_sequences=4, max_tokens=8)
  first_token = next(i for i, plan in enumerate(plans) if any(c.sequence.request_id == 1 and c.emits for c in plan.chunks()))
  started = {c.sequence.request_id for plan in plans[:first_token] for c in plan.chunks()}
  assert len(started) <= 5, "only what fits beside the two oldest"


def test_a_waiting_prompt_does_not_turn_decode_steps_into_prefill_steps():
  """A decode program, with one token per sequence, is several times cheaper than a prefill program."""
  jobs = [Job(prompt=8, new=40), Job(prompt=40, new=2)]
  _, plans = simulate(jobs, num_pages=12, page_size=4, max_sequences=4, max_tokens=8)
  for plan in plans:
    assert (plan.kind == "decode") == all(chunk.from_device for chunk in plan.chunks())


def test_every_shard_is_used():
  jobs = [Job(prompt=8, new=16) for _ in range(6)]
  _, plans = simulate(jobs, num_pages=20, page_size=4, max_sequences=2, max_tokens=16, num_shards=3)
  assert [len(shard) for shard in plans[0].shards] == [2, 2, 2]
  assert len(plans) == 17  # the last round only commits


def test_a_full_shard_does_not_stop_the_others():
  """Shard 0 must wait for an unread token before it may preempt. Meanwhile shard 1 continues."""
  jobs = [Job(prompt=4, new=28), Job(prompt=4, new=28), Job(prompt=4, new=28), Job(prompt=1, new=2)]
  _, plans = simulate(jobs, num_pages=8, page_size=4, max_sequences=2, max_tokens=16, num_shards=2)
  second = [any(c.sequence.request_id == 1 for c in plan.chunks()) for plan in plans]
  assert all(second[:28])


def test_one_step_ahead():
  """The next step is planned before the previous step's tokens are read, and takes these tokens from the device."""
  scheduler = Scheduler(num_pages=4, page_size=4, max_sequences=2, max_tokens=8)
  sequence = scheduler.add(0, [5, 6, 7], 3)
  first, second, third = (scheduler.schedule() for _ in range(3))
  assert [c.from_device for plan in (first, second, third) for c in plan.chunks()] == [False, True, True]
  assert [plan.kind for plan in (first, second, third)] == ["prefill", "decode", "decode"]
  assert scheduler.schedule() is None and sequence.num_unread_tokens == 3
  for plan, token in ((first, 8), (second, 9), (third, 10)):
    scheduler.commit(plan, {sequence: token})
  assert sequence.tokens == [5, 6, 7, 8, 9, 10] and sequence.num_unread_tokens == 0


@pytest.mark.parametrize("prompt", [1, 30, 33])
def test_what_can_never_fit_is_refused(prompt):
  scheduler = Scheduler(num_pages=4, page_size=8, max_sequences=2, max_tokens=8)
  scheduler.add(0, [1] * prompt, 32 - prompt) if prompt < 32 else None
  with pytest.raises(InputError, match="the pool has 4"):
    scheduler.add(1, [1] * prompt, 33 - prompt if prompt < 33 else 1)


def test_finishing_a_waiting_sequence():
  scheduler = Scheduler(num_pages=4, page_size=8, max_sequences=1, max_tokens=8)
  first, second = scheduler.add(0, [1], 3), scheduler.add(1, [1], 3)
  scheduler.schedule()
  scheduler.finish(second)
  scheduler.finish(first)
  scheduler.finish(first)
  assert not scheduler.has_work and scheduler.pools[0].num_free == 4
