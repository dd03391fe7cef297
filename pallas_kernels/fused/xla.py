"""The small operations in plain XLA, for any GPU, fused as XLA sees fit."""

import jax.numpy as jnp

from pallas_kernels.fused.reference import residual_norm, rope_write_with, silu_multiply
from pallas_kernels.paged_attention.reference import query_places

__all__ = ["page_write", "residual_norm", "rope_write", "silu_multiply"]


def page_write(pages, values, token_axes, page_table_BM, query_starts, lengths_B, *, target=None):
  """One scatter a pool, in place where the pool is donated or carried by a loop."""
  sequence_T, position_T = query_places(query_starts, lengths_B, values[0].shape[0])
  out = []
  for pool, value, axis in zip(pages, values, token_axes, strict=True):
    C = pool.shape[axis]
    page_T = page_table_BM[sequence_T, jnp.maximum(position_T, 0) // C]
    page_T = jnp.where(position_T < 0, pool.shape[0], page_T)  # out of range: dropped
    indices: list = [slice(None)] * pool.ndim
    indices[0], indices[axis] = page_T, position_T % C
    out.append(pool.at[tuple(indices)].set(value, mode="drop"))
  return tuple(out)


rope_write = rope_write_with(page_write)
