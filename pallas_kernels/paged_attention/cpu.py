"""paged_attention for XLA:CPU: page by page with an online softmax (Milakov and Gimelshein, arXiv 1805.02867), in float32.

A query's bits do not depend on what else is in the batch, on how its prompt was cut, or on the padded context:
  - pages are taken in order, and a page that a query does not see changes nothing (its weights are exact zeros);
  - products have at least two rows (see fp8_matmul/cpu.py), and the softmax's sum is one more row of the V product,
    since XLA:CPU's plain sums round differently at different sizes;
  - a barrier keeps the maximum out of the exponential's fusion, which otherwise rounds differently at different sizes.

Decode runs all sequences together, one page of each at a time; prefill runs tiles of one sequence's queries.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.float8_bytes import to_bytes
from pallas_kernels.fp8_matmul.cpu import widen

_TILE = 32  # queries of one sequence at a time
_LOWEST = -1e30


def paged_attention(
  q_TNH, k_pages, v_pages, page_table_BM, query_starts, lengths_B, *, k_scale, v_scale, first_page=0, target=None, **_
):
  page_table_BM = page_table_BM + first_page
  pages = (to_bytes(k_pages), to_bytes(v_pages), k_scale, v_scale)
  if query_starts is None:
    return _decode(q_TNH, pages, page_table_BM, lengths_B).astype(q_TNH.dtype)
  return _prefill(q_TNH, pages, page_table_BM, query_starts, lengths_B).astype(q_TNH.dtype)


def _decode(q_TNH, pages, page_table_BM, lengths_B):
  C = pages[0].shape[2]
  q = _grouped(q_TNH, pages[0].shape[1])  # [B, K, rows, H]

  def body(m, state):
    k, v, k_scale = _take(pages, page_table_BM[:, m])
    visible = (m * C + jnp.arange(C))[None] < lengths_B[:, None]  # [B, C]
    return _add_page(state, q, k, v, k_scale, visible[:, None, None])

  num_pages = (jnp.max(lengths_B) + C - 1) // C
  out = _ungrouped(jax.lax.fori_loop(0, num_pages, body, _start(q)), q_TNH.shape[1])
  return jnp.where((lengths_B > 0)[:, None, None], out, 0)


def _prefill(q_TNH, pages, page_table_BM, query_starts, lengths_B):
  T, N, H = q_TNH.shape
  _, K, C, _ = pages[0].shape
  padded = jnp.pad(q_TNH, ((0, _TILE), (0, 0), (0, 0)))

  def one_sequence(b, out):
    num_queries = query_starts[b + 1] - query_starts[b]

    def one_tile(tile, out):
      first = query_starts[b] + tile * _TILE
      q = _grouped(jax.lax.dynamic_slice_in_dim(padded, first, _TILE), K)  # [tile, K, rows, H]
      rows = q.shape[2]
      q = q.transpose(1, 0, 2, 3).reshape(K, _TILE * rows, H)
      position = lengths_B[b] - num_queries + tile * _TILE + jnp.arange(_TILE)

      def body(m, state):
        k, v, k_scale = _take(pages, page_table_BM[b, m])
        visible = (m * C + jnp.arange(C))[None] <= position[:, None]  # [tile, C]
        return _add_page(state, q, k, v, k_scale, jnp.repeat(visible, rows, axis=0)[None])

      last = jnp.minimum(position[-1], lengths_B[b] - 1)
      acc, top = jax.lax.fori_loop(0, last // C + 1, body, _start(q))
      acc = acc.reshape(K, _TILE, rows, H + 1).transpose(1, 0, 2, 3)
      # Rows past the sequence's end are garbage until the next sequence, which comes later, writes its own there.
      return jax.lax.dynamic_update_slice_in_dim(out, _ungrouped((acc, top), N), first, axis=0)

    return jax.lax.fori_loop(0, (num_queries + _TILE - 1) // _TILE, one_tile, out)

  out = jax.lax.fori_loop(0, lengths_B.shape[0], one_sequence, jnp.zeros(padded.shape, jnp.float32))[:T]
  return jnp.where((jnp.arange(T) < query_starts[-1])[:, None, None], out, 0)


def _grouped(q_TNH, K):
  """[T, N, H] -> float32 [T, K, rows, H] scaled by 1/sqrt(H), with at least two rows a KV head."""
  T, N, H = q_TNH.shape
  q = q_TNH.astype(jnp.float32).reshape(T, K, N // K, H) * (H**-0.5)
  return jnp.concatenate([q, q], axis=2) if N == K else q


def _start(q):
  """(weighted sum of [v, 1], running maximum) before the first page."""
  return jnp.zeros((*q.shape[:-1], q.shape[-1] + 1), jnp.float32), jnp.full(q.shape[:-1], _LOWEST, jnp.float32)


def _take(pages, index):
  """Pages `index` (one, or one per sequence) widened to float32; V gets a row of ones, whose product is the softmax's sum."""
  k_pages, v_pages, k_scale, v_scale = pages
  k, v = k_pages[index], v_pages[index]
  if k_scale is not None:
    k, v = widen(k, jnp.float32), widen(v, jnp.float32) * v_scale[index][..., None, :]
    k_scale = k_scale[index]
  k, v = k.astype(jnp.float32), v.astype(jnp.float32)
  return k, jnp.concatenate([v, jnp.ones_like(v[..., :1, :])], axis=-2), k_scale


def _add_page(state, q, k, v, k_scale, visible):
  """One page of the online softmax. q [.., rows, H], k [.., C, H], v [.., H + 1, C], visible broadcasts to [.., rows, C]."""
  acc, top = state
  scores = _batched_dot(q, k)
  if k_scale is not None:
    scores = scores * k_scale[..., None, :]
  scores = jnp.where(visible, scores, _LOWEST)
  new_top = jax.lax.optimization_barrier(jnp.maximum(top, jnp.max(scores, axis=-1)))
  weights = jnp.where(visible, jnp.exp(scores - new_top[..., None]), 0)
  acc = acc * jnp.exp(top - new_top)[..., None] + _batched_dot(weights, v)
  return acc, new_top


def _batched_dot(a, b):
  """a [.., rows, k] times b [.., columns, k] over the last axis."""
  batch = tuple(range(a.ndim - 2))
  contract = ((a.ndim - 1,), (a.ndim - 1,))
  return jax.lax.dot_general(a, b, (contract, (batch, batch)))


def _ungrouped(state, N):
  """Divides by the softmax's sum: [T, K, rows, H + 1] -> [T, N, H]."""
  acc, _ = state
  T, K, _, H = acc.shape
  acc = acc[:, :, : N // K]
  return (acc[..., :-1] / jnp.maximum(acc[..., -1:], 1e-30)).reshape(T, N, H - 1)
