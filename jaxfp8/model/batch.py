"""The tokens of one step: `PrefillBatch` (ragged) and `DecodeBatch` (one token a sequence), as records of dense arrays.

`check` compares shapes and dtypes while a step is traced; `checked` compares values, if debug checks are on. Refuses to know
requests and who owns which page (serving/scheduler.py).
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxfp8.errors import InputError
from jaxfp8.recipe import DEFAULT_PAGE_SIZE
from pallas_kernels.debug import checked_pages
from pallas_kernels.paged_attention.reference import query_places


class _Batch:
  """The position of each token, and the checks of the arrays; shared by both batches."""

  tokens_T: jax.Array
  lengths_B: jax.Array
  page_table_BM: jax.Array
  query_starts: Any  # int32 [B + 1], or None
  replace: Callable[..., Self]
  _way_out: ClassVar[str]

  def token_positions(self) -> tuple[jax.Array, jax.Array]:
    """(sequence of each token, its position in it), both int32 [T]; padding has position -1."""
    return query_places(self.query_starts, self.lengths_B, self.tokens_T.shape[0])

  def check(self) -> None:
    """Raises InputError, naming the axis and both sizes, if the arrays do not fit together. Free at run time."""
    batch, starts = type(self).__name__, self.query_starts
    axes = {"tokens_T": "T", "lengths_B": "B", "page_table_BM": "BM"} | ({} if starts is None else {"query_starts": "B"})
    for name, letters in axes.items():
      array = getattr(self, name)
      shape = ", ".join(letters) if name != "query_starts" else "B + 1"
      if array.ndim != len(letters):
        raise InputError(f"{batch}: {name} must be [{shape}]; got {array.ndim} axes, {tuple(array.shape)}. {self._way_out}")
      if not jnp.issubdtype(array.dtype, jnp.integer):
        raise InputError(f"{batch}: {name} must hold whole numbers (int32); got {array.dtype}. {self._way_out}")
    B = self.lengths_B.shape[0]
    rows = [("page_table_BM", "B", B), ("tokens_T", "T", B) if starts is None else ("query_starts", "B + 1", B + 1)]
    for name, axis, expected in rows:
      size = getattr(self, name).shape[0]
      if size != expected:
        reason = "the B of lengths_B" if expected == B else f"one more than the B = {B} of lengths_B"
        raise InputError(f"{batch}: {name} must have {axis} = {expected}, {reason}; got {size}. {self._way_out}")

  def checked(self, num_pages: int, page_size: int) -> Self:
    """This batch. Under `pallas_kernels.debug_checks` its values are checked first.

    num_pages, page_size: of the pool. Raises ValueError for pages, lengths or query starts that cannot be.
    """
    sizes = {"num_tokens": self.tokens_T.shape[0], "page_size": page_size, "num_pages": num_pages}
    arrays = checked_pages(type(self).__name__, self.page_table_BM, self.query_starts, self.lengths_B, **sizes)
    return self.replace(**{name: x for name, x in zip(_CHECKED, arrays, strict=True) if x is not None})


_CHECKED = ("page_table_BM", "query_starts", "lengths_B")


@flax.struct.dataclass
class PrefillBatch(_Batch):
  """T tokens of up to B sequences, one sequence after the other.

  tokens_T: int32; the tokens of sequence b are query_starts[b] .. query_starts[b + 1] - 1, the rest is padding.
  query_starts: int32 [B + 1].
  lengths_B: int32, the length of each context with these tokens (0: no sequence).
  page_table_BM: int32, the pages of each sequence in order.
  """

  tokens_T: jax.Array
  query_starts: jax.Array
  lengths_B: jax.Array
  page_table_BM: jax.Array

  _way_out = "PrefillBatch.from_prompts makes one from lists of token ids."

  @classmethod
  def from_prompts(cls, prompts: Sequence[Sequence[int]], page_size: int = DEFAULT_PAGE_SIZE) -> "PrefillBatch":
    """Whole prompts, each with its own pages, numbered from 0: enough for a forward pass over an empty cache.

    Raises InputError if there is no prompt or an empty one.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
      raise InputError("PrefillBatch.from_prompts: needs at least one prompt, and every prompt at least one token.")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    pages = -(-lengths // page_size)
    table = np.zeros((len(prompts), pages.max()), np.int32)
    for row, (first, count) in enumerate(zip(np.cumsum(pages) - pages, pages, strict=True)):
      table[row, :count] = np.arange(first, first + count)
    return cls(
      tokens_T=jnp.asarray(np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts])),
      query_starts=jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
      lengths_B=jnp.asarray(lengths),
      page_table_BM=jnp.asarray(table),
    )

  def last_tokens(self) -> jax.Array:
    """The row of tokens_T with the last token of each sequence, int32 [B] (0 for an empty sequence)."""
    return jnp.maximum(self.query_starts[1:] - 1, 0)


@flax.struct.dataclass
class DecodeBatch(_Batch):
  """One token of each of B sequences: the fast case T == B.

  tokens_T: int32 [B]. lengths_B: int32, the length of each context with this token (0: no sequence). page_table_BM: int32.
  """

  tokens_T: jax.Array
  lengths_B: jax.Array
  page_table_BM: jax.Array

  _way_out = "Give each sequence one token, its length with that token, and its row of pages."

  @property
  def query_starts(self) -> None:
    """None: every sequence has one query."""
    return None

  def last_tokens(self) -> jax.Array:
    """As in PrefillBatch: every row, int32 [B]."""
    return jnp.arange(self.tokens_T.shape[0])
