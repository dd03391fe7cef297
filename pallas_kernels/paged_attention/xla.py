"""paged_attention in plain XLA, for any GPU: each sequence's pages are gathered into a dense copy, then softmax in float32.

Decode copies the keys and values that it reads, up to the page table's width, once more than a kernel; prefill goes one
sequence after the other, so that scores stay [T, N, S].
"""

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.reference import query_places


def paged_attention(
  q_TNH, k_pages, v_pages, page_table_BM, query_starts, lengths_B, *, k_scale, v_scale, first_page=0, target=None, **_
):
  page_table_BM = page_table_BM + first_page
  _, N, H = q_TNH.shape
  B, M = page_table_BM.shape
  _, K, C, _ = k_pages.shape
  q = q_TNH.reshape(-1, K, N // K, H)

  def attend(q, pages, limits):
    """q [T, K, G, H] over one sequence's pages; query t sees limits[t] keys."""
    k, v = k_pages[pages].astype(jnp.bfloat16), v_pages[pages].astype(jnp.bfloat16)  # [M, K, C, H], [M, K, H, C]
    if k_pages.dtype == jnp.float32:
      k, v = k_pages[pages], v_pages[pages]
    scores = jnp.einsum("tkgh,mkch->tkgmc", q.astype(k.dtype), k, preferred_element_type=jnp.float32) * H**-0.5
    if k_scale is not None:
      scores = scores * k_scale[pages].transpose(1, 0, 2)[None, :, None]
    visible = jnp.arange(M * C).reshape(M, C) < limits[:, None, None]
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -1e30), axis=(-2, -1))
    if v_scale is not None:
      weights = weights * v_scale[pages].transpose(1, 0, 2)[None, :, None]
    return jnp.einsum("tkgmc,mkhc->tkgh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)

  if query_starts is None:
    out = jax.vmap(attend)(q[:, None], page_table_BM, lengths_B[:, None])[:, 0]
    seen = lengths_B
  else:
    sequence_T, position_T = query_places(query_starts, lengths_B, q.shape[0])
    seen = position_T + 1

    def add(b, out):
      mine = (sequence_T == b) & (seen > 0)
      return jnp.where(mine[:, None, None, None], attend(q, page_table_BM[b], seen), out)

    out = jax.lax.fori_loop(0, B, add, jnp.zeros(q.shape, jnp.float32))
  return jnp.where((seen > 0)[:, None, None], out.reshape(-1, N, H), 0).astype(q_TNH.dtype)
