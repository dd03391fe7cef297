"""The plain truth, on any device, with derivatives. Bits do not depend on the number of tokens."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.float8 import quantize_tokens
from pallas_kernels.paged_attention.reference import query_places


def residual_norm(x_TD, y_TD, weight_D, *, eps, target=None, **_):
  x_TD = x_TD + y_TD
  x = x_TD.astype(jnp.float32)
  return x_TD, (x * jax.lax.rsqrt(_mean_square(x) + eps) * weight_D).astype(x_TD.dtype)


def _mean_square(x_TD):
  """Mean of x^2 along D, float32 [T, 1].

  As a product with ones: on a CPU a plain sum rounds differently for few rows than for many, a product of at least two
  rows and columns does not, and results must not depend on what else is in the batch.
  """
  T, D = x_TD.shape
  square = x_TD * x_TD
  if T == 1:
    square = jnp.concatenate([square, square])
  total = jax.lax.dot_general(square, jnp.ones((8, D)), (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
  return total[:T, :1] / D


def page_write(pages, values, token_axes, page_table_BM, query_starts, lengths_B, *, target=None):
  """One scatter a pool."""
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


def rope_write_with(page_write: Callable):
  """`rope_write` whose pages are written by an implementation of `page_write`."""

  def rope_write(
    qkv, cos_TH, sin_TH, pages, page_table_BM, query_starts, lengths_B, *, first_page, static_scales, dtype, target=None
  ):
    _, K, _, H = pages[0].shape
    heads = qkv.finish(dtype)
    heads = heads.reshape(heads.shape[0], K, -1, H)  # [T, K, G + 2, H]
    T, _, rows, _ = heads.shape
    turn = functools.partial(_rotate, cos=cos_TH[:, None], sin=sin_TH[:, None])
    q = turn(heads[:, :, : rows - 2].reshape(T, K * (rows - 2), H))
    k, v = turn(heads[:, :, rows - 2]), heads[:, :, rows - 1]
    if len(pages) == 2:
      values = k.astype(pages[0].dtype), v.astype(pages[1].dtype)
    else:
      given = (None, None) if static_scales is None else (jnp.broadcast_to(scale, (T, K)) for scale in static_scales)
      (k, k_scale), (v, v_scale) = (quantize_tokens(x, scale) for x, scale in zip((k, v), given, strict=True))
      values = k, v, k_scale, v_scale
    token_axes = (2, 3, 2, 2)[: len(pages)]
    return q, page_write(pages, values, token_axes, page_table_BM + first_page, query_starts, lengths_B)

  return rope_write


rope_write = rope_write_with(page_write)


def _rotate(x_TNH, cos, sin):
  first, second = jnp.split(x_TNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_TNH.dtype)


def silu_multiply(gate_up, *, dtype, target=None, **_):
  gate_up = gate_up.finish(dtype).astype(jnp.float32)
  F = gate_up.shape[1] // 2
  return (jax.nn.silu(gate_up[:, :F]) * gate_up[:, F:]).astype(dtype)
