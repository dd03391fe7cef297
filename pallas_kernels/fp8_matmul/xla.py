"""fp8_matmul in plain XLA, for any GPU and any size: what runs where there is no kernel, and what kernels are compared with.

Scales come after the product, so that XLA may widen weights on the way in; whether it does, or writes a bf16 copy of them (and
in a scan over layers first a copy of the layer), is its choice. Block scales go block by block of columns, one product each.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.fp8_matmul import api


def fp8_matmul(x_TD, w_FD, w_scale, x_scale, *, out_dtype, target=None):
  if api.is_float8(w_FD) and not api.is_float8(x_TD):
    w_FD = w_FD.astype(x_TD.dtype)  # exact in bf16 and f32
  if w_scale is not None and w_scale.ndim == 2:
    grouped, x_scale = (x_scale, None) if api.is_grouped(x_scale) else (None, x_scale)
    y = _blocks(x_TD, w_FD, jnp.repeat(w_scale, api.block_rows(w_FD, w_scale), axis=0), grouped)
  else:
    y = _dot(x_TD, w_FD) * (1 if w_scale is None else w_scale[None])
  if x_scale is not None:
    y = y * (x_scale[:, None] if x_scale.ndim else x_scale)
  return y.astype(out_dtype)


def _dot(x, w):
  if x.dtype != w.dtype:
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  dimensions = (((1,), (1,)), ((), ()))
  return jax.lax.dot_general(x, w, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _blocks(x, w, scale_FB, scale_BT):
  """The sum of the products of each 128 columns times the scales of their blocks and, unless None, of the tokens' groups."""
  D = x.shape[1]
  y = jnp.zeros((x.shape[0], w.shape[0]), jnp.float32)
  for block in range(scale_FB.shape[1]):
    columns = slice(block * api.BLOCK, min((block + 1) * api.BLOCK, D))
    product = _dot(x[:, columns], w[:, columns]) * scale_FB[:, block][None]
    y = y + (product if scale_BT is None else product * scale_BT[block][:, None])
  return y
