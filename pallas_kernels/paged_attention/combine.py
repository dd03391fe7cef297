"""Joins the splits of decode's attention, and rounds the result to float8 for a linear that reads float8.

A split holds the normalized output over some pages and log2 of its softmax sum. With weights 2^(log_sum - row_max) the result
is that of one softmax over all pages (flash decoding, Dao et al. 2023).

    groups:     CTA = up to 4 groups of 128 channels, each with a scale of its own in float8
    few bytes:  CTA = one token; its heads one after the other, then the token's largest value, its scale, and float8
    many:       CTA = up to 4 query heads x 32 channels, so that all SMs read; rounded only with a scale that is given

Splits are loaded in runs, all loads of a run in flight at once; a run's maximum rescales what was added before.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.costs import record
from pallas_kernels.float8 import FLOAT8, GROUP, Quantized, scale_of, to_float8
from pallas_kernels.paged_attention.cost import combine_cost
from pallas_kernels.register_layouts import row_layout

_LOADED = 64  # registers a thread that hold splits in flight
_ONE_SM_BYTES = 256 * 1024  # of a token's splits: one SM reads them in about two microseconds
_LOWEST = -1e30


class _Operands(NamedTuple):
  """A kernel's inputs in device memory."""

  values: jax.Array  # [T, K, S, G or more, H]; for groups [T, K, S, groups, heads of a group, H]
  log_sum: jax.Array  # the same without H
  static_scale: jax.Array | None = None  # [1]


def combine(
  values, log_sum, G: int, *, quantize: bool, dtype, static_scale=None, grouped: bool = False
) -> jax.Array | Quantized:
  """values [T, K, S, G or more, H] (float32, or `dtype` for S = 1) and log_sum float32 [T, K, S, G or more].

  Returns [T, N, H] in dtype; or with `quantize` Quantized with values [T, N * H], if the scale is given (float32 []), or groups
  of 128 channels have a scale each (`grouped`) and none crosses KV heads, or one SM may read a token's splits.
  """
  T, K, S, rows, H = values.shape
  static = static_scale.reshape(1) if static_scale is not None and quantize else None
  if quantize and static is None and grouped:
    if G % (GROUP // H) or rows % (GROUP // H):
      quantize = False  # a group crosses KV heads: the linear layer rounds
    else:
      return _combine_in_groups(values, log_sum, G, dtype)
  if quantize and static is None and K * S * G * H * values.dtype.itemsize <= _ONE_SM_BYTES:
    return _combine_and_quantize(values, log_sum, G, dtype)
  rows = math.gcd(G, 4)

  def kernel(gmem: Any, result_gmem):  # gmem: _Operands, of references
    token, head = lax.axis_index("token"), lax.axis_index("head")
    heads, channels = pl.ds(lax.axis_index("rows") * rows, rows), pl.ds(lax.axis_index("channels") * 32, 32)
    joined = _join(gmem.values.at[token, head, :, heads, channels], gmem.log_sum.at[token, head, :, heads]).astype(dtype)
    if gmem.static_scale is not None:
      joined = to_float8(joined.astype(jnp.float32) * (1 / gmem.static_scale[0]))
    plgpu.store(result_gmem.at[token, head, heads, channels], joined, optimized=False)

  out_type = jax.ShapeDtypeStruct((T, K, G, H), dtype if static is None else FLOAT8)
  cost = combine_cost(values, log_sum, (out_type,))
  result = plgpu.kernel(
    kernel,
    out_type=out_type,
    grid=(T, K, G // rows, H // 32),
    grid_names=("token", "head", "rows", "channels"),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    cost_estimate=cost.estimate(),
  )(_Operands(values, log_sum, static))
  record("combine", cost)
  if static is None or static_scale is None:
    return result.reshape(T, K * G, H)
  return Quantized(result.reshape(T, -1), static_scale)


def _combine_and_quantize(values, log_sum, G: int, dtype) -> Quantized:
  """Joins all heads of a token in one CTA, which knows the token's largest value."""
  T, K, _, _, H = values.shape

  def kernel(gmem: Any, out: Any):  # gmem: _Operands, out: Quantized, of references
    token, heads = lax.axis_index("token"), pl.ds(0, G)
    joined = [_join(gmem.values.at[token, k, :, heads], gmem.log_sum.at[token, k, :, heads]).astype(dtype) for k in range(K)]
    joined = [x.astype(jnp.float32) for x in joined]
    largest = functools.reduce(jnp.maximum, (jnp.abs(x) for x in joined))  # mutant: largest value
    scale = scale_of(jnp.max(jnp.max(largest, axis=1)))
    for k, x in enumerate(joined):
      plgpu.store(out.values.at[token, k], to_float8(x * (1 / scale)), optimized=False)
    out.scale[token] = scale

  shapes: Any = (jax.ShapeDtypeStruct((T, K, G, H), FLOAT8), jax.ShapeDtypeStruct((T,), jnp.float32))
  out_type = Quantized(*shapes)
  cost = combine_cost(values, log_sum, out_type)
  (joined,) = plgpu.kernel(
    kernel,
    out_type=(out_type,),
    grid=(T,),
    grid_names=("token",),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    cost_estimate=cost.estimate(),
  )(_Operands(values, log_sum))
  record("combine", cost)
  return joined._replace(values=joined.values.reshape(T, -1))


def _combine_in_groups(values, log_sum, G: int, dtype) -> Quantized:
  """Joins up to four groups of 128 channels in a CTA, each one head of 128 or two heads of 64, and rounds each by itself."""
  T, K, S, _, H = values.shape
  heads = GROUP // H  # of a group
  groups = G // heads
  at_once = math.gcd(groups, 4)

  def kernel(gmem: Any, out: Any):  # gmem: _Operands, out: Quantized, of references
    token, head, own = lax.axis_index("token"), lax.axis_index("head"), pl.ds(lax.axis_index("groups") * at_once, at_once)

    def joined(i):
      return _join(gmem.values.at[token, head, :, own, i], gmem.log_sum.at[token, head, :, own, i]).astype(dtype)

    parts = [joined(i).astype(jnp.float32) for i in range(heads)]
    largest = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(x), axis=1) for x in parts))  # mutant: largest of a group
    scale = scale_of(largest)
    for i, x in enumerate(parts):
      factor = lax.broadcast_in_dim(1 / scale, x.shape, [0])
      plgpu.store(out.values.at[token, head, own, i], to_float8(x * factor), optimized=False)
    plgpu.store(out.scale.at[head, own, token], scale, optimized=False)

  shapes: Any = (
    jax.ShapeDtypeStruct((T, K, groups, heads, H), FLOAT8),
    jax.ShapeDtypeStruct((K, groups, T), jnp.float32),
  )
  out_type = Quantized(*shapes)
  cost = combine_cost(values, log_sum, out_type)
  (joined,) = plgpu.kernel(
    kernel,
    out_type=(out_type,),
    grid=(T, K, groups // at_once),
    grid_names=("token", "head", "groups"),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    cost_estimate=cost.estimate(),
  )(_Operands(values.reshape(T, K, S, -1, heads, H), log_sum.reshape(T, K, S, -1, heads)))
  record("combine", cost)
  return Quantized(joined.values.reshape(T, -1), joined.scale.reshape(-1, T))


def _join(splits, log_sums):
  """splits [S, rows, channels] and log_sums [S, rows] in device memory -> float32 [rows, channels] in registers."""
  S, rows, channels = splits.shape
  layout = row_layout(rows)
  at_once = min(S, _LOADED * 128 // max(rows * channels, 128))

  def over_channels(x):
    return lax.broadcast_in_dim(x, (rows, channels), [0])

  def add(first, count, carry):
    joined, row_sum, row_max = carry
    loaded_sums = [plgpu.load(log_sums.at[first + s], layout=layout.reduce(1), optimized=False) for s in range(count)]
    loaded = [plgpu.load(splits.at[first + s], layout=layout, optimized=False) for s in range(count)]
    new_max = functools.reduce(jnp.maximum, loaded_sums, row_max)
    rescale = jnp.exp2(row_max - new_max)
    joined, row_sum = joined * over_channels(rescale), row_sum * rescale  # mutant: rescale
    for log_sum, values in zip(loaded_sums, loaded, strict=True):
      weight = jnp.exp2(log_sum - new_max)  # mutant: weights of splits
      joined, row_sum = joined + values.astype(jnp.float32) * over_channels(weight), row_sum + weight
    return joined, row_sum, new_max

  def per_row(value):
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), layout.reduce(1))

  carry = plgpu.layout_cast(jnp.zeros((rows, channels), jnp.float32), layout), per_row(0.0), per_row(_LOWEST)
  if at_once < S:
    carry = lax.fori_loop(0, S // at_once, lambda i, carry: add(i * at_once, at_once, carry), carry)
    if S % at_once:
      carry = add(S - S % at_once, S % at_once, carry)  # mutant: last splits
  else:
    carry = add(0, S, carry)
  joined, row_sum, _ = carry
  return joined / over_channels(row_sum)
