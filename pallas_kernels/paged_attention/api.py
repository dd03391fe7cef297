"""`paged_attention`: one operation for decode, ragged chunked prefill and the check of a few guessed tokens.

Letters: T query tokens, B sequences, N query heads, K KV heads, G = N / K, H head size, P pages, C tokens a page,
M pages a sequence. Query heads are grouped by KV head: heads k*G .. k*G + G - 1 read KV head k.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import debug, dispatch
from pallas_kernels.float8 import Quantized


def paged_attention(
  q_TNH: jax.Array,
  k_pages: jax.Array,
  v_pages: jax.Array,
  page_table_BM: jax.Array,
  query_starts: jax.Array | None,
  lengths_B: jax.Array,
  *,
  k_scale: jax.Array | None = None,
  v_scale: jax.Array | None = None,
  first_page: jax.Array | int = 0,
  quantize: bool = False,
  static_scale: jax.Array | None = None,
  grouped: bool = False,
  implementation: str = "auto",
  target: dispatch.Target | None = None,
) -> jax.Array | Quantized:
  """Causal softmax(q k^T / sqrt(H)) v over each sequence's pages; returns [T, N, H] in q's dtype.

  The pages already hold the keys and values of the queries themselves. Sequence b's queries are its last
  query_starts[b + 1] - query_starts[b] tokens, and see everything up to their own position.

  Args:
    q_TNH: queries of all sequences one after the other, bf16 or f32.
    k_pages: [P, K, C, H], v_pages: [P, K, H, C]; both float8_e4m3fn, bf16 or f32.
    page_table_BM: int32, the pages of each sequence in order; entries past its length are not read.
    query_starts: int32 [B + 1], ascending; rows of q from query_starts[B] on are padding and give zeros.
      None means one query each (decode), T == B.
    lengths_B: int32, tokens in each sequence's context, its queries included; 0 for an empty place, which gives zeros.
    k_scale, v_scale: float32 [P, K, C], one per token and head, with float8 pages only.
    first_page: added to every entry of the table: where a layer's pages begin in a pool of all layers.
    quantize, static_scale, grouped: the result goes into a float8 linear, whose inputs have this static scale (float32 []), or
      with None one scale per token, or if `grouped` one per token and group of 128 columns. An implementation that can round
      it on the way out returns Quantized(values [T, N * H], scale [], [T] or [N * H / 128, T]) instead.

  Raises:
    ValueError: a shape or dtype breaks these rules, or a forced implementation cannot run.
  """
  _check(q_TNH, k_pages, v_pages, page_table_BM, query_starts, lengths_B, k_scale, v_scale)
  target = target or dispatch.default_target()
  sizes = {"num_tokens": q_TNH.shape[0], "page_size": k_pages.shape[2], "num_pages": k_pages.shape[0] - first_page}
  page_arrays = debug.checked_pages("paged_attention", page_table_BM, query_starts, lengths_B, **sizes)
  return dispatch.run(
    "paged_attention",
    implementation,
    target,
    q_TNH,
    k_pages,
    v_pages,
    *page_arrays,
    k_scale=k_scale,
    v_scale=v_scale,
    first_page=first_page,
    quantize=quantize,
    static_scale=static_scale,
    grouped=grouped,
  )


def _check(q_TNH, k_pages, v_pages, page_table_BM, query_starts, lengths_B, k_scale, v_scale):
  T, N, H = q_TNH.shape
  P, K, C, k_head = k_pages.shape
  B = lengths_B.shape[0]
  if k_head != H or v_pages.shape != (P, K, H, C) or N % K:
    raise ValueError(
      f"paged_attention: with q [T, N, H]={q_TNH.shape}, k_pages must be [P, K, C, H] and v_pages [P, K, H, C] with K "
      f"dividing N; got {k_pages.shape} and {v_pages.shape}. V pages keep the token axis last."
    )
  if page_table_BM.shape[0] != B or (T != B if query_starts is None else query_starts.shape != (B + 1,)):
    starts = "None" if query_starts is None else query_starts.shape
    raise ValueError(
      f"paged_attention: page_table [B, M], query_starts [B + 1] (None for decode, T == B) and lengths [B] must agree in B; "
      f"got {page_table_BM.shape}, {starts} and {lengths_B.shape} with T={T}."
    )
  if k_pages.dtype != v_pages.dtype:
    raise ValueError(f"paged_attention: k_pages and v_pages must have one dtype; got {k_pages.dtype} and {v_pages.dtype}.")
  for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
    if (k_pages.dtype == jnp.float8_e4m3fn) != (scale is not None):
      raise ValueError(f"paged_attention: float8 pages need {name} and others must not have one; got {k_pages.dtype} pages.")
    if scale is not None and (scale.shape != (P, K, C) or scale.dtype != jnp.float32):
      raise ValueError(f"paged_attention: {name} must be float32 [P, K, C]={(P, K, C)}; got {scale.dtype} {scale.shape}.")
