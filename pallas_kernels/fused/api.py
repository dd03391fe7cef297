"""The small operations between a layer's products, fused so that a decode layer is few launches.

    residual_norm   x + y, RMSNorm, and float8 for the linear that follows
    rope_write      the sums of qkv finished, RoPE, keys and values quantized and put into their pages
    silu_multiply   the sums of gate and up finished, SwiGLU, and float8 for the linear that follows
    page_write      entries of tokens into pages, without a kernel

Where a result goes into a float8 linear (`quantize`), an implementation that can round it on the way out returns Quantized, and
others the plain array: linears take both. Letters as in paged_attention; D model width, F MLP width.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import debug, dispatch
from pallas_kernels.float8 import Quantized
from pallas_kernels.fp8_matmul.api import PartialSums


def residual_norm(
  x_TD: jax.Array,
  y_TD: jax.Array,
  weight_D: jax.Array,
  *,
  eps: float,
  quantize: bool = False,
  static_scale: jax.Array | None = None,
  grouped: bool = False,
  implementation: str = "auto",
  target: dispatch.Target | None = None,
) -> tuple[jax.Array, jax.Array | Quantized]:
  """(x + y, (x + y) / rms(x + y) * weight): RMSNorm in float32 (Zhang and Sennrich, arXiv 1910.07467).

  Args:
    x_TD, y_TD: the residual stream and what the last sublayer adds to it, bf16 or f32.
    weight_D: float32.
    quantize, static_scale, grouped: the second result goes into a float8 linear, whose inputs have this static scale (float32
      []), or with None one scale per token, or if `grouped` one per token and group of 128 columns.

  Raises:
    ValueError: shapes or dtypes disagree, or a forced implementation cannot run.
  """
  T, D = x_TD.shape
  if y_TD.shape != (T, D) or y_TD.dtype != x_TD.dtype or weight_D.shape != (D,):
    raise ValueError(
      f"residual_norm: y must be {x_TD.dtype} [T, D]={(T, D)} as x and weight [D]; got {y_TD.dtype} {y_TD.shape} and "
      f"{weight_D.shape}."
    )
  target = target or dispatch.default_target()
  options = {"eps": eps, "quantize": quantize, "static_scale": static_scale, "grouped": grouped}
  return dispatch.run("residual_norm", implementation, target, x_TD, y_TD, weight_D, **options)


def rope_write(
  qkv: PartialSums,
  cos_TH: jax.Array,
  sin_TH: jax.Array,
  pages: tuple[jax.Array, ...],
  page_table_BM: jax.Array,
  query_starts: jax.Array | None,
  lengths_B: jax.Array,
  *,
  first_page: jax.Array | int = 0,
  static_scales: tuple[jax.Array, jax.Array] | None = None,
  dtype: DTypeLike = jnp.bfloat16,
  implementation: str = "auto",
  target: dispatch.Target | None = None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Returns (rotated queries [T, N, H] in `dtype`, the pools with these tokens' keys and values in them).

  RoPE in float32 on the two halves of each head (Hugging Face's order of the pairs). The pools are written in place where
  they are donated or carried by a loop.

  Args:
    qkv: the product [T, K * (G + 2) * H] as it left its kernel: for each KV head its G query heads, its key, its value.
    cos_TH, sin_TH: float32 [T, H / 2] of each token's angles.
    pages: k_pages [P, K, C, H] and v_pages [P, K, H, C]; float8 ones with k_scale and v_scale float32 [P, K, C].
    page_table_BM, query_starts, lengths_B: as in `paged_attention`; padding and empty places write nothing.
    first_page: added to every entry of the table.
    static_scales: float32 [K] of keys and of values, for float8 pages; None: one scale per token and head.

  Raises:
    ValueError: shapes or dtypes disagree, or a forced implementation cannot run.
  """
  _, K, _, H = pages[0].shape
  T, F = qkv.splits_STF.shape[1:]
  if F % (K * H) or F < 3 * K * H or cos_TH.shape != (T, H // 2) or sin_TH.shape != (T, H // 2):
    raise ValueError(
      f"rope_write: with pages of K={K} heads of H={H}, qkv must be [T, K * (G + 2) * H] and cos and sin [T, H / 2]; got "
      f"{(T, F)}, {cos_TH.shape} and {sin_TH.shape}."
    )
  if len(pages) != (4 if pages[0].dtype == jnp.float8_e4m3fn else 2):
    raise ValueError(f"rope_write: float8 pages need their two scales and others have none; got {len(pages)} pools.")
  target = target or dispatch.default_target()
  sizes = {"num_tokens": T, "page_size": pages[0].shape[2], "num_pages": pages[0].shape[0] - first_page}
  page_arrays = debug.checked_pages("rope_write", page_table_BM, query_starts, lengths_B, **sizes)
  options = {"first_page": first_page, "static_scales": static_scales, "dtype": jnp.dtype(dtype)}
  return dispatch.run("rope_write", implementation, target, qkv, cos_TH, sin_TH, pages, *page_arrays, **options)


def silu_multiply(
  gate_up: PartialSums,
  *,
  quantize: bool = False,
  static_scale: jax.Array | None = None,
  grouped: bool = False,
  dtype: DTypeLike = jnp.bfloat16,
  implementation: str = "auto",
  target: dispatch.Target | None = None,
) -> jax.Array | Quantized:
  """silu(gate) * up [T, F] in `dtype` (SwiGLU, Shazeer, arXiv 2002.05202), of a product [T, 2 * F]: gates, then ups.

  quantize, static_scale, grouped: as in `residual_norm`. Raises ValueError where a forced implementation cannot run.
  """
  if gate_up.splits_STF.shape[2] % 2:
    raise ValueError(f"silu_multiply: needs gates and as many ups; got {gate_up.splits_STF.shape[2]} columns.")
  target = target or dispatch.default_target()
  options = {"quantize": quantize, "static_scale": static_scale, "grouped": grouped, "dtype": jnp.dtype(dtype)}
  return dispatch.run("silu_multiply", implementation, target, gate_up, **options)


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
  """Writes an entry of each query token into pools of pages; in place where the pools are donated or carried by a loop.

  No model calls this operation: `rope_write` writes keys and values. It is for programs with arrays of their own.

  Args:
    pages: pools [P, K, ...] whose axis token_axes[i] counts the tokens of a page: K pages [P, K, C, H] (axis 2), V pages
      [P, K, H, C] (axis 3), scales [P, K, C] (axis 2).
    values: the entries, [T, K, ...] without the token axis, in the pool's dtype.
    page_table_BM, query_starts, lengths_B: as in `paged_attention`; padding and empty slots write nothing.

  Returns: the pools with the tokens in them.

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
  page_arrays = debug.checked_pages("page_write", page_table_BM, query_starts, lengths_B, **sizes)
  return dispatch.run("page_write", implementation, target, pages, values, token_axes, *page_arrays)
