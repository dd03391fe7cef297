"""`page_write`: puts what belongs to each query token at its place in the pages. Letters as in paged_attention."""

import jax

from pallas_kernels import debug, dispatch


def page_write(
  pages: tuple[jax.Array, ...],
  values: tuple[jax.Array, ...],
  token_axes: tuple[int, ...],
  page_table_BM: jax.Array,
  query_starts: jax.Array | None,
  lengths_B: jax.Array,
  *,
  implementation: str = "auto",
  target: dispatch.Target | None = None,
) -> tuple[jax.Array, ...]:
  """Returns the pools with the tokens in them; in place where the pools are donated or carried by a loop.

  Args:
    pages: pools [P, K, ...] whose axis token_axes[i] counts the tokens of a page: K pages [P, K, C, H] (axis 2), V pages
      [P, K, H, C] (axis 3), scales [P, K, C] (axis 2).
    values: what to write, [T, K, ...] without the token axis, in the pool's dtype.
    page_table_BM, query_starts, lengths_B: as in `paged_attention`; padding and empty places write nothing.

  Raises:
    ValueError: shapes or dtypes disagree, or a forced implementation cannot run.
  """
  for pool, value, axis in zip(pages, values, token_axes, strict=True):
    entry = (*pool.shape[1:axis], *pool.shape[axis + 1 :])
    if value.shape[1:] != entry or value.dtype != pool.dtype:
      raise ValueError(
        f"page_write: a pool {pool.dtype} {pool.shape} with tokens on axis {axis} takes {pool.dtype} [T, "
        f"{', '.join(map(str, entry))}]; got {value.dtype} {value.shape}. Quantize or cast before writing."
      )
  target = target or dispatch.default_target()
  sizes = {"num_tokens": values[0].shape[0], "page_size": pages[0].shape[token_axes[0]], "num_pages": pages[0].shape[0]}
  where = debug.checked_pages("page_write", page_table_BM, query_starts, lengths_B, **sizes)
  return dispatch.run(__package__, "page_write", implementation, target, pages, values, token_axes, *where)
