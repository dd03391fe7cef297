"""The operands, outputs and scratch of the attention kernel by name. An absent one is None.

The order of the fields is the order of the kernel's operands in the compiled program.
"""

from typing import Any, NamedTuple

import jax


class Operands(NamedTuple):
  """The kernel's inputs in device memory. In decode, tile b is sequence b, and all its queries see as many keys."""

  q: jax.Array  # [tiles, K, rows, H]
  k_pages: jax.Array  # [P, K, C, H]
  v_pages: jax.Array  # [P, K, H, C]
  table: jax.Array  # [B, M]
  first_page: jax.Array  # [1]
  lengths: jax.Array  # [tiles], the most keys that a query of the tile sees
  limits: jax.Array | None  # prefill: [tiles, columns], keys that each column sees
  sequences: jax.Array | None  # prefill: [tiles], the sequence of each tile
  k_scale: jax.Array | None  # float8 pages: [P, K, C]
  v_scale: jax.Array | None


class Splits(NamedTuple):
  """The kernel's results: normalized outputs of each split of the context, and log2 of their softmax sums."""

  values: jax.Array  # [tiles, K, splits, rows and up to 3 more, H], float32; q's dtype for a single split
  log_sum: jax.Array  # float32 [tiles, K, splits, columns]


class Shared(NamedTuple):
  """Shared memory and barriers, in the order of their addresses (a dict would sort them by name)."""

  q: Any  # [columns, H], as the tensor cores read queries
  k: Any  # [stages, tokens of a step, H]
  v: Any  # [stages, pages of a step, H, C]
  p: Any  # [tokens of a step, columns], the weights
  out: Any  # [ROWS, columns], a block of the result, to be read transposed
  k_barrier: Any
  v_barrier: Any
  q_barrier: Any
  given: Any  # float8 pages: [columns, H], queries as they come
  k_scale: Any  # float8 pages: [stages, tokens of a step]
  v_scale: Any
  limits: Any  # prefill: [columns]; last, since the others are aligned to 1024 bytes
