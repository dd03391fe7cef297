"""The plain truth: widen, scale, multiply in float32. Runs anywhere, has a derivative, copies every weight."""

import jax
import jax.numpy as jnp

from pallas_kernels.fp8_matmul import api


def fp8_matmul(x_TD, w_FD, w_scale, x_scale, *, out_dtype, target=None):
  x = x_TD.astype(jnp.float32)
  w = w_FD.astype(jnp.float32)
  if w_scale is not None:
    w = w * expand_scale(w_FD, w_scale)
  if api.is_grouped(x_scale):
    x, x_scale = x * jnp.repeat(x_scale.T, api.BLOCK, axis=1)[:, : x.shape[1]], None
  y = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
  if x_scale is not None:
    y = y * (x_scale[:, None] if x_scale.ndim else x_scale)
  return y.astype(out_dtype)


def expand_scale(w_FD, w_scale):
  """w_scale as an array that broadcasts against w [F, D]."""
  if w_scale.ndim == 1:
    return w_scale[:, None]
  rows = jnp.repeat(w_scale, api.block_rows(w_FD, w_scale), axis=0)
  return jnp.repeat(rows, api.BLOCK, axis=1)[:, : w_FD.shape[1]]
