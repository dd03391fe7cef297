"""The small operations for XLA:CPU: those of reference.py, and pages written by loops of dynamic-update-slice.

Such loops are in place; XLA:CPU's scatter copies the whole pool each time. Decode writes one token a sequence; prefill writes
whole pages and keeps the old tokens of a page that is only partly new.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.float8_bytes import from_bytes, to_bytes
from pallas_kernels.fused.reference import residual_norm, rope_write_with, silu_multiply

__all__ = ["page_write", "residual_norm", "rope_write", "silu_multiply"]


def page_write(pages, values, token_axes, page_table_BM, query_starts, lengths_B, *, target=None):
  pages, values = tuple(map(to_bytes, pages)), tuple(map(to_bytes, values))
  write = _write_tokens if query_starts is None else _write_pages
  return tuple(map(from_bytes, write(pages, values, token_axes, page_table_BM, query_starts, lengths_B)))


def _write_tokens(pages, values, token_axes, page_table_BM, query_starts, lengths_B):
  rows = values, page_table_BM, lengths_B
  return jax.lax.fori_loop(0, lengths_B.shape[0], lambda b, pools: _one_token(pools, token_axes, rows, b), pages)


def _write_pages(pages, values, token_axes, page_table_BM, query_starts, lengths_B):
  C = pages[0].shape[token_axes[0]]
  padded = tuple(jnp.pad(value, [(C, C)] + [(0, 0)] * (value.ndim - 1)) for value in values)

  def one_sequence(b, pools):
    start, stop = lengths_B[b] - (query_starts[b + 1] - query_starts[b]), lengths_B[b]

    def one_page(m, pools):
      # Row t of `padded` holds token t - C, so that the page's first token may lie before the sequence's first query.
      first = query_starts[b] + m * C - start + C
      position = m * C + jnp.arange(C)
      new = (position >= start) & (position < stop)
      return tuple(
        _put_page(pool, axis, jax.lax.dynamic_slice_in_dim(value, first, C), page_table_BM[b, m], new)
        for pool, value, axis in zip(pools, padded, token_axes, strict=True)
      )

    return jax.lax.fori_loop(start // C, (stop + C - 1) // C, one_page, pools)

  return jax.lax.fori_loop(0, lengths_B.shape[0], one_sequence, pages)


def _one_token(pools, token_axes, rows, b):
  values, page_table_BM, lengths_B = rows
  position = jnp.maximum(lengths_B[b] - 1, 0)
  out = []
  for pool, value, axis in zip(pools, values, token_axes, strict=True):
    C = pool.shape[axis]
    start = [0] * pool.ndim
    start[0], start[axis] = page_table_BM[b, position // C], position % C
    size = [*pool.shape]
    size[0] = size[axis] = 1
    old = jax.lax.dynamic_slice(pool, start, size)
    new = jnp.expand_dims(value[b], axis=(0, axis))
    out.append(jax.lax.dynamic_update_slice(pool, jnp.where(lengths_B[b] > 0, new, old), start))
  return tuple(out)


def _put_page(pool, axis, tokens, page, new):
  """Replaces the tokens of one page where `new` [C] is true. tokens [C, K, ...]."""
  old = jax.lax.dynamic_index_in_dim(pool, page, keepdims=False)
  tokens = jnp.moveaxis(tokens, 0, axis - 1)
  mask = new.reshape([-1 if i == axis - 1 else 1 for i in range(old.ndim)])
  return jax.lax.dynamic_update_index_in_dim(pool, jnp.where(mask, tokens, old), page, axis=0)


rope_write = rope_write_with(page_write)
