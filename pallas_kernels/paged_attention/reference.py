"""The plain truth: every sequence's pages gathered into one dense array, softmax in float32. Has a derivative.

Every query is scored against all B sequences and the others are dropped: B times too much work, and short.
"""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def paged_attention(
  q_TNH, k_pages, v_pages, page_table_BM, query_starts, lengths_B, *, k_scale, v_scale, first_page=0, target=None, **_
):
  page_table_BM = page_table_BM + first_page
  T, N, H = q_TNH.shape
  B, M = page_table_BM.shape
  _, K, C, _ = k_pages.shape
  sequence_T, position_T = query_places(query_starts, lengths_B, T)

  k = k_pages[page_table_BM].astype(jnp.float32)  # [B, M, K, C, H]
  v = v_pages[page_table_BM].astype(jnp.float32)  # [B, M, K, H, C]
  if k_scale is not None:
    k = k * k_scale[page_table_BM][..., None]
    v = v * v_scale[page_table_BM][..., None, :]
  q = q_TNH.astype(jnp.float32).reshape(T, K, N // K, H) * (H**-0.5)
  scores = jnp.einsum("tkgh,bmkch->tbkgmc", q, k, precision=HIGHEST).reshape(T, B, K, N // K, M * C)
  scores = jnp.take_along_axis(scores, sequence_T[:, None, None, None, None], axis=1)[:, 0]  # [T, K, G, S]
  visible = jnp.arange(M * C)[None] <= position_T[:, None]
  probabilities = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -1e30), axis=-1)
  own = jax.nn.one_hot(sequence_T, B, dtype=jnp.float32)
  probabilities = probabilities.reshape(T, K, N // K, M, C)
  out = jnp.einsum("tb,tkgmc,bmkhc->tkgh", own, probabilities, v, precision=HIGHEST)
  return jnp.where((position_T >= 0)[:, None, None], out.reshape(T, N, H), 0).astype(q_TNH.dtype)


def query_places(query_starts, lengths_B, num_tokens):
  """Sequence and position of each of T query tokens: two int32 [T]; padding has sequence 0 and position -1."""
  if query_starts is None:
    return jnp.arange(num_tokens), lengths_B - 1
  token = jnp.arange(num_tokens)
  sequence = jnp.searchsorted(query_starts[1:], token, side="right", method="compare_all")
  sequence = jnp.minimum(sequence, lengths_B.shape[0] - 1)
  position = lengths_B[sequence] - (query_starts[sequence + 1] - token)
  padding = token >= query_starts[-1]
  return jnp.where(padding, 0, sequence), jnp.where(padding, -1, position)
