"""Joins the parts that decode's attention was cut into, and rounds to float8 what the next linear takes in that.

A part holds the normalized output over some pages and log2 of its softmax sum. With weights 2^(log_sum - largest) the result is
that of one softmax over all pages (flash decoding, Dao et al. 2023).

    few bytes:  CTA = one token; its heads one after the other, then the token's largest value, its scale, and float8
    many:       CTA = up to 4 query heads x 32 channels, so that all SMs read; rounded only where the scale is known before

Parts come in runs whose loads are all under way at once; a run's largest sum rescales what was added before.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.costs import Cost, bytes_of, record
from pallas_kernels.float8 import FLOAT8, Quantized, scale_of, to_float8
from pallas_kernels.register_layouts import row_layout

_LOADED = 64  # registers a thread that hold parts under way
_ONE_SM_BYTES = 256 * 1024  # of a token's parts: what one SM reads in about two microseconds
_LOWEST = -1e30


def combine(out, log_sum, G: int, *, quantize: bool, dtype, static_scale=None):
  """out [T, K, S, G or more, H] (float32, or `dtype` where S is 1) and log_sum float32 [T, K, S, G or more].

  Returns [T, N, H] in dtype; or with `quantize` Quantized with values [T, N * H], where the scale is given (float32 []) or one
  SM may read a token's parts.
  """
  T, K, S, _, H = out.shape
  static = () if static_scale is None or not quantize else (static_scale.reshape(1),)
  if quantize and not static and K * S * G * H * out.dtype.itemsize <= _ONE_SM_BYTES:
    return _combine_and_quantize(out, log_sum, G, dtype)
  rows = math.gcd(G, 4)

  def kernel(out_gmem, sum_gmem, *rest):
    *static_gmem, result_gmem = rest
    token, head = lax.axis_index("token"), lax.axis_index("head")
    heads, channels = pl.ds(lax.axis_index("rows") * rows, rows), pl.ds(lax.axis_index("channels") * 32, 32)
    joined = _join(out_gmem.at[token, head, :, heads, channels], sum_gmem.at[token, head, :, heads]).astype(dtype)
    if static:
      joined = to_float8(joined.astype(jnp.float32) * (1 / static_gmem[0][0]))
    plgpu.store(result_gmem.at[token, head, heads, channels], joined, optimized=False)

  result = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((T, K, G, H), FLOAT8 if static else dtype),
    grid=(T, K, G // rows, H // 32),
    grid_names=("token", "head", "rows", "channels"),
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(out, log_sum, *static)
  record("combine", cost(out, log_sum, (result,)))
  return Quantized(result.reshape(T, -1), static_scale) if static else result.reshape(T, K * G, H)


def cost(out, log_sum, outputs) -> Cost:
  """Attention's parts joined. Their padding is not read."""
  T, K, S, _, H = out.shape
  rows = outputs[0].size // (T * K * H)
  read = T * K * S * rows * (H * out.dtype.itemsize + log_sum.dtype.itemsize)
  return Cost(read_bytes=read, written_bytes=bytes_of(*outputs), flops=4 * T * K * S * rows * H)


def _combine_and_quantize(out, log_sum, G, dtype):
  T, K, _, _, H = out.shape

  def kernel(out_gmem, sum_gmem, values_gmem, scale_gmem):
    token, heads = lax.axis_index("token"), pl.ds(0, G)
    joined = [_join(out_gmem.at[token, k, :, heads], sum_gmem.at[token, k, :, heads]).astype(dtype) for k in range(K)]
    joined = [x.astype(jnp.float32) for x in joined]
    largest = functools.reduce(jnp.maximum, (jnp.abs(x) for x in joined))
    scale = scale_of(jnp.max(jnp.max(largest, axis=1)))
    for k, x in enumerate(joined):
      plgpu.store(values_gmem.at[token, k], to_float8(x * (1 / scale)), optimized=False)
    scale_gmem[token] = scale

  values, scale = plgpu.kernel(
    kernel,
    out_type=(jax.ShapeDtypeStruct((T, K, G, H), FLOAT8), jax.ShapeDtypeStruct((T,), jnp.float32)),
    grid=(T,),
    grid_names=("token",),
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(out, log_sum)
  record("combine", cost(out, log_sum, (values, scale)))
  return Quantized(values.reshape(T, -1), scale)


def _join(parts, sums):
  """parts [S, rows, channels] and sums [S, rows] in device memory -> float32 [rows, channels] in registers."""
  S, rows, channels = parts.shape
  layout = row_layout(rows)
  at_once = min(S, _LOADED * 128 // max(rows * channels, 128))

  def over_channels(x):
    return lax.broadcast_in_dim(x, (rows, channels), [0])

  def add(first, count, carry):
    joined, total, top = carry
    log_sums = [plgpu.load(sums.at[first + s], layout=layout.reduce(1), optimized=False) for s in range(count)]
    loaded = [plgpu.load(parts.at[first + s], layout=layout, optimized=False) for s in range(count)]
    new_top = functools.reduce(jnp.maximum, log_sums, top)
    shrink = jnp.exp2(top - new_top)
    joined, total = joined * over_channels(shrink), total * shrink
    for log_sum, part in zip(log_sums, loaded, strict=True):
      weight = jnp.exp2(log_sum - new_top)
      joined, total = joined + part.astype(jnp.float32) * over_channels(weight), total + weight
    return joined, total, new_top

  def per_row(value):
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), layout.reduce(1))

  carry = plgpu.layout_cast(jnp.zeros((rows, channels), jnp.float32), layout), per_row(0.0), per_row(_LOWEST)
  if at_once < S:
    carry = lax.fori_loop(0, S // at_once, lambda i, carry: add(i * at_once, at_once, carry), carry)
    carry = add(S - S % at_once, S % at_once, carry) if S % at_once else carry
  else:
    carry = add(0, S, carry)
  joined, total, _ = carry
  return joined / over_channels(total)
