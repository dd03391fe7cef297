"""What kernels cost, written down while a program is traced.

    with costs.recording(lengths=(4096,) * 8) as calls:   # what the sequences of the step will hold
      jax.jit(step).lower(...)                            # every kernel records one Call
    sum(call.cost.weight_bytes * call.repeats for call in calls)

Shapes are those that a kernel sees: under shard_map, one device's. Bytes are what has to come from device memory once: weights
and pages; and what operations hand to each other: read once, written once. Nothing happens where nobody records.
Refuses to know: what plain XLA does, which is to be read from the compiled program, and times.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.experimental.pallas as pl


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one call. weight_bytes: matrices, scales, norms; read and written bytes: all else but the pages.

  number_format: what its arithmetic runs in, "fp8" or "bf16" (float16 counts as that) on tensor cores, or "f32".
  """

  weight_bytes: int = 0
  kv_read_bytes: int = 0
  kv_written_bytes: int = 0
  read_bytes: int = 0
  written_bytes: int = 0
  flops: int = 0
  number_format: str = "f32"

  @property
  def total_bytes(self) -> int:
    return self.weight_bytes + self.kv_read_bytes + self.kv_written_bytes + self.read_bytes + self.written_bytes

  def estimate(self) -> pl.CostEstimate:
    """This cost as XLA's scheduler and profilers read it."""
    return pl.CostEstimate(flops=self.flops, transcendentals=0, bytes_accessed=self.total_bytes)


@dataclasses.dataclass(frozen=True)
class Call:
  """One kernel of the program, which runs `repeats` times a step (once a layer of its segment)."""

  operation: str
  cost: Cost
  repeats: int


class Recording(list[Call]):
  """The calls so far, in the order of tracing. lengths: tokens each sequence holds when the step ends."""

  def __init__(self, lengths: Sequence[int]):
    self.lengths, self.repeats = tuple(lengths), 1


_current: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("recording", default=None)


@contextlib.contextmanager
def recording(lengths: Sequence[int]) -> Iterator[Recording]:
  """Records the kernels that are traced while open."""
  record = Recording(lengths)
  token = _current.set(record)
  try:
    yield record
  finally:
    _current.reset(token)


@contextlib.contextmanager
def repeated(times: int) -> Iterator[None]:
  """What is traced while open runs `times` times: the body of a loop over layers."""
  record = _current.get()
  if record is None:
    yield
    return
  before = record.repeats
  record.repeats = before * times
  try:
    yield
  finally:
    record.repeats = before


def record(operation: str, cost: Cost) -> None:
  """Called by a kernel's wrapper, once a kernel."""
  if (current := _current.get()) is not None:
    current.append(Call(operation, cost, current.repeats))


def lengths() -> tuple[int, ...] | None:
  """What the recorded step's sequences hold; None where nobody records."""
  current = _current.get()
  return None if current is None else current.lengths


def bytes_of(*arrays: jax.Array | jax.ShapeDtypeStruct | None) -> int:
  """Bytes of arrays or their shapes; None counts as none."""
  return sum(x.size * x.dtype.itemsize for x in arrays if x is not None)
