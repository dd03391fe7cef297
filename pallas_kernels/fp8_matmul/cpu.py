"""fp8_matmul for XLA:CPU: float8 is widened by bit operations, the product is a bf16 or f32 dot, scales come after it.

Five facts decide everything here (measured on AVX-512 cores):
  - XLA:CPU's own float8 -> float32 conversion is fifteen times slower than the bit trick of `widen`.
  - With at least two rows, a dot's result for a row has the same bits whatever the number of rows; with one row it takes
    another path that rounds differently and uses one core. So one row is padded to two.
  - XLA:CPU cannot slice float8, so loops carry it as bytes (see float8_bytes.py).
  - Every e4m3 value is exact in bf16, and products accumulate in float32, so widening to bf16 loses nothing.
  - Widening uses one core a matrix: as many blocks of rows as there are cores, widened side by side, use them all and keep
    what is widened in the caches (twice as fast on two cores).
"""

import os

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.float8_bytes import to_bytes
from pallas_kernels.fp8_matmul import api

_MAX_WIDENED = 1 << 24  # elements of w widened at once: larger matrices (a 70B's gate_up) go block by block
_LEAST_ROWS = 128  # of a block that is worth a core
_NUM_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_SHRINK = 256.0  # what the bit trick divides by; a power of two, so that the scales undo it exactly


def fp8_matmul(x_TD, w_FD, w_scale, x_scale, *, out_dtype, target=None):
  if x_TD.shape[0] == 1:
    two = jnp.concatenate([x_TD, x_TD])
    scale = x_scale if x_scale is None or x_scale.ndim == 0 else jnp.concatenate([x_scale, x_scale], axis=-1)
    return fp8_matmul(two, w_FD, w_scale, scale, out_dtype=out_dtype)[:1]
  x = x_TD
  if api.is_float8(x_TD):
    x, x_scale = _shrunk(x_TD, jnp.bfloat16), x_scale * _SHRINK
  grouped, x_scale = (jnp.asarray(x_scale), None) if api.is_grouped(x_scale) else (None, x_scale)
  y = _in_row_blocks(x, to_bytes(w_FD), None if w_scale is None else w_scale * _SHRINK, grouped)
  if x_scale is not None:
    y = y * (x_scale[:, None] if x_scale.ndim else x_scale)
  return y.astype(out_dtype)


def widen(x: jax.Array, dtype: DTypeLike) -> jax.Array:
  """float8_e4m3fn (or its bytes) -> bf16 or f32, exact for every finite value."""
  return (_shrunk(x, jnp.float32) * _SHRINK).astype(dtype)


def _shrunk(x: jax.Array, dtype: DTypeLike) -> jax.Array:
  """float8 (or its bytes) / 256 as bf16 or f32, exact: e4m3's seven lower bits in float16's places, subnormals included."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int8).astype(jnp.int16)
  half = jax.lax.bitcast_convert_type((bits << 7) & jnp.int16(-0x4001), jnp.float16)
  wide = half.astype(jnp.float32)
  if dtype != jnp.bfloat16:
    return wide.astype(dtype)
  # Cutting off zeros is exact, and several times faster than a conversion that rounds.
  upper = jax.lax.bitcast_convert_type(wide, jnp.uint32) >> 16
  return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


def _in_row_blocks(x, w_FD, w_scale, scale_BT):
  """x @ w^T in float32, [T, F]: rows of w in blocks, as many side by side as there are cores. w is plain or float8's bytes.

  scale_BT: that of each token's groups of columns, or None.
  """
  F, D = w_FD.shape
  if F * D > _MAX_WIDENED:
    if w_scale is None:
      return _dot(x, w_FD)
    blocks = _most_blocks(w_FD, w_scale, F * D // _MAX_WIDENED + 1)
    parts = w_FD.reshape(blocks, F // blocks, D), w_scale.reshape(blocks, -1, *w_scale.shape[1:])
    y = jax.lax.map(lambda part: _product(x, part[0], part[1], scale_BT), parts)
    return y.transpose(1, 0, 2).reshape(x.shape[0], F)
  blocks = _most_blocks(w_FD, w_scale, min(_NUM_CORES, F // _LEAST_ROWS))
  weights = jnp.split(w_FD, blocks)
  scales = [None] * blocks if w_scale is None else jnp.split(w_scale, blocks)
  return jnp.concatenate([_product(x, w, scale, scale_BT) for w, scale in zip(weights, scales, strict=True)], axis=1)


def _most_blocks(w_FD, w_scale, wanted: int) -> int:
  """The largest number of equal blocks of rows, up to `wanted`, that cuts no block that shares a scale."""
  units = w_FD.shape[0] if w_scale is None else w_scale.shape[0]
  return next((count for count in range(wanted, 1, -1) if units % count == 0), 1)


def _product(x, w_FD, w_scale, scale_BT):
  """x @ w^T in float32, [T, F]. w is plain, or float8's bytes whose scale makes up for their being shrunk."""
  if w_scale is None:
    return _dot(x, w_FD)
  w = _shrunk(w_FD, x.dtype)
  if w_scale.ndim == 1:
    return _dot(x, w) * w_scale[None]
  return _block_scaled_dot(x, w, jnp.repeat(w_scale, api.block_rows(w_FD, w_scale), axis=0), scale_BT)


def _dot(x, w):
  if x.dtype != w.dtype:
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
  return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _block_scaled_dot(x, w, scale_FB, scale_BT):
  """One partial product per 128 columns, added in order, so that a row's bits do not depend on the number of rows."""
  T, D = x.shape
  pad = -D % api.BLOCK
  x, w = jnp.pad(x, ((0, 0), (0, pad))), jnp.pad(w, ((0, 0), (0, pad)))

  def add_block(total, block):
    start = block * api.BLOCK
    x_block = jax.lax.dynamic_slice_in_dim(x, start, api.BLOCK, axis=1)
    w_block = jax.lax.dynamic_slice_in_dim(w, start, api.BLOCK, axis=1)
    product = _dot(x_block, w_block) * scale_FB[:, block][None]
    return total + (product if scale_BT is None else product * scale_BT[block][:, None]), None

  zero = jnp.zeros((T, w.shape[0]), jnp.float32)
  return jax.lax.scan(add_block, zero, jnp.arange(scale_FB.shape[1]))[0]
