"""The plain truth: one scatter a pool. Has a derivative."""

import jax.numpy as jnp

from pallas_kernels.paged_attention.reference import query_places


def page_write(pages, values, token_axes, page_table_BM, query_starts, lengths_B, *, target=None):
  sequence_T, position_T = query_places(query_starts, lengths_B, values[0].shape[0])
  out = []
  for pool, value, axis in zip(pages, values, token_axes, strict=True):
    C = pool.shape[axis]
    page_T = page_table_BM[sequence_T, jnp.maximum(position_T, 0) // C]
    page_T = jnp.where(position_T < 0, pool.shape[0], page_T)  # out of range: dropped
    tokens_first = jnp.moveaxis(pool, axis, 1)
    written = tokens_first.at[page_T, position_T % C].set(value, mode="drop")
    out.append(jnp.moveaxis(written, 1, axis))
  return tuple(out)
