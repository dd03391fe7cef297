"""The static sizes of an engine (`EngineLimits`) and the two kinds of step (`StepKind`). Imports no jax.

Refuses to know models and devices: serving/memory.py says how many pages a device holds.
"""

import dataclasses
import enum
import itertools
from collections.abc import Sequence

from jaxfp8.errors import InputError
from jaxfp8.recipe import DEFAULT_PAGE_SIZE


class StepKind(enum.StrEnum):
  """The two kinds of step. A prefill step computes prompts and may carry decoding sequences; a decode step has no prompts."""

  PREFILL = "prefill"
  DECODE = "decode"


@dataclasses.dataclass(frozen=True)
class EngineLimits:
  """The static sizes of a run, per data shard.

  num_pages: pages of the KV pool. max_sequences: sequences in flight. max_pages: pages of one sequence.
  prefill_sizes, decode_sizes: the batch sizes of the compiled programs, in tokens and in sequences, ascending; the last decode
    size is at least max_sequences.
  num_logprobs: the number of most probable tokens returned with each token.

  Raises InputError for sizes that are not positive or not in order.
  """

  num_pages: int
  max_sequences: int
  max_pages: int
  prefill_sizes: tuple[int, ...] = (32, 128, 512)
  decode_sizes: tuple[int, ...] = (2, 8, 32)
  page_size: int = DEFAULT_PAGE_SIZE
  num_logprobs: int = 0

  def __post_init__(self):
    for name in ("prefill_sizes", "decode_sizes"):
      sizes = getattr(self, name)
      if not sizes or sizes[0] < 1 or any(a >= b for a, b in itertools.pairwise(sizes)):
        raise InputError(f"limits: {name} must be positive and ascending; got {sizes}.")
    for name in ("num_pages", "max_sequences", "max_pages"):
      if getattr(self, name) < 1:
        raise InputError(f"limits: {name} must be at least 1; got {getattr(self, name)}.")
    if self.decode_sizes[-1] < self.max_sequences:
      raise InputError(
        f"limits: the last of decode_sizes must hold max_sequences={self.max_sequences}; got {self.decode_sizes}. Add a size."
      )

  def decode_size(self, num_sequences: int) -> int:
    """The smallest decode batch that holds `num_sequences`."""
    return next(size for size in self.decode_sizes if size >= num_sequences)

  def prefill_size(self, num_tokens: int) -> int:
    """The smallest prefill batch that holds `num_tokens`."""
    return next(size for size in self.prefill_sizes if size >= num_tokens)


def sizes_up_to(largest: int, sizes: Sequence[int]) -> tuple[int, ...]:
  """The sizes below `largest`, and the first size that is at least `largest` (or `largest` itself if there is none)."""
  below = [size for size in sizes if size < largest]
  return (*below, next((size for size in sizes if size >= largest), largest))
