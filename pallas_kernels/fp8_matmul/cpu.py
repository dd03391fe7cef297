"""fp8_matmul for XLA:CPU: float8 is widened by bit operations, the product is a bf16 or f32 dot, scales come after it.

Four facts decide everything here (measured on AVX-512 cores):
  - XLA:CPU's own float8 -> float32 conversion is fifteen times slower than the bit trick of `widen`.
  - With at least two rows, a dot's result for a row has the same bits whatever the number of rows; with one row it takes
    another path that rounds differently and uses one core. So one row is padded to two.
  - XLA:CPU cannot slice float8, so loops carry it as bytes (see float8_bytes.py).
  - Every e4m3 value is exact in bf16, and products accumulate in float32, so widening to bf16 costs nothing.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.float8_bytes import to_bytes
from pallas_kernels.fp8_matmul import api

_MAX_WIDENED = 1 << 24  # elements of w widened at once: larger matrices (a 70B's gate_up) go in blocks of rows


def fp8_matmul(x_TD, w_FD, w_scale, x_scale, *, out_dtype):
  if x_TD.shape[0] == 1:
    two = jnp.concatenate([x_TD, x_TD])
    scale = x_scale if x_scale is None or x_scale.ndim == 0 else jnp.concatenate([x_scale, x_scale])
    return fp8_matmul(two, w_FD, w_scale, scale, out_dtype=out_dtype)[:1]
  x = widen(x_TD, jnp.bfloat16) if api.is_float8(x_TD) else x_TD
  y = _in_row_blocks(x, w_FD, w_scale)
  if x_scale is not None:
    y = y * (x_scale[:, None] if x_scale.ndim else x_scale)
  return y.astype(out_dtype)


def widen(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """float8_e4m3fn (or its bytes) -> bf16 or f32, exact for every finite value.

  e4m3's seven lower bits are shifted into float16's places, which is the value divided by 2^8, subnormals included.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.int8).astype(jnp.int16)
  half = jax.lax.bitcast_convert_type((bits << 7) & jnp.int16(-0x4001), jnp.float16)
  return (half.astype(jnp.float32) * 256).astype(dtype)


def _in_row_blocks(x, w_FD, w_scale):
  F, D = w_FD.shape
  blocks = 1
  while api.is_float8(w_FD) and _MAX_WIDENED * blocks < F * D and F % (2 * blocks * api.BLOCK) == 0:
    blocks *= 2
  if blocks == 1:
    return _product(x, w_FD, w_scale)
  parts = to_bytes(w_FD).reshape(blocks, F // blocks, D), w_scale.reshape(blocks, -1, *w_scale.shape[1:])
  y = jax.lax.map(lambda part: _product(x, *part), parts)
  return y.transpose(1, 0, 2).reshape(x.shape[0], F)


def _product(x, w_FD, w_scale):
  """x @ w^T in float32, [T, F]."""
  if w_scale is None:
    return _dot(x, w_FD)
  w = widen(w_FD, x.dtype)
  if w_scale.ndim == 1:
    return _dot(x, w) * w_scale[None]
  return _block_scaled_dot(x, w, jnp.repeat(w_scale, api.block_rows(w_FD, w_scale), axis=0))


def _dot(x, w):
  if x.dtype != w.dtype:
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
  return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _block_scaled_dot(x, w, scale_FB):
  """One partial product per 128 columns, added in order, so that a row's bits do not depend on the number of rows."""
  T, D = x.shape
  pad = -D % api.BLOCK
  x, w = jnp.pad(x, ((0, 0), (0, pad))), jnp.pad(w, ((0, 0), (0, pad)))

  def add_block(total, block):
    start = block * api.BLOCK
    x_block = jax.lax.dynamic_slice_in_dim(x, start, api.BLOCK, axis=1)
    w_block = jax.lax.dynamic_slice_in_dim(w, start, api.BLOCK, axis=1)
    return total + _dot(x_block, w_block) * scale_FB[:, block][None], None

  zero = jnp.zeros((T, w.shape[0]), jnp.float32)
  return jax.lax.scan(add_block, zero, jnp.arange(scale_FB.shape[1]))[0]
