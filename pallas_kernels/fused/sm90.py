"""The small operations as Pallas Mosaic GPU kernels. Loads and stores only, so any GPU that Mosaic lowers for can run them.

    residual_norm   CTA = one token; up to 4 warpgroups share its row
    silu_multiply   likewise
    rope_write      CTA = one token and KV head, one warpgroup: a warp takes a query head, a lane one pair of channels in 32

A row is read once, kept in registers, and written once. Sums over a row meet in shared memory where warpgroups share it. All
loads are issued before the first barrier, since latency is all that these kernels cost.
Sizes: D and F multiples of 128; heads of 64 or 128.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import costs
from pallas_kernels.float8 import FLOAT8, Quantized, scale_of, to_float8
from pallas_kernels.fp8_matmul.api import Sums
from pallas_kernels.fused import cost
from pallas_kernels.paged_attention.reference import query_places
from pallas_kernels.register_layouts import flat_layout, row_layout

_MOST_A_THREAD = 32  # elements of one array that a thread loads at once


def residual_norm(x_TD, y_TD, weight_D, *, eps, quantize, static_scale, target):
  T, D = x_TD.shape
  _require_bf16("residual_norm", x_TD.dtype)
  row = _Row("residual_norm", D)

  def kernel(x_gmem, y_gmem, weight_gmem, *rest):
    *static_gmem, x_out, values_out = rest[: len(static) + 2]
    scale_out, meet = rest[len(static) + 2 : -2], row.meeting(*rest[-2:])
    token = lax.axis_index("token")
    x, y = row.load(x_gmem.at[token]), row.load(y_gmem.at[token])
    weight = row.load(weight_gmem)
    x = [(a.astype(jnp.float32) + b.astype(jnp.float32)).astype(x_TD.dtype) for a, b in zip(x, y, strict=True)]
    wide = [a.astype(jnp.float32) for a in x]
    total = meet(functools.reduce(jnp.add, (jnp.sum(a * a) for a in wide)), jnp.add)
    factor = lax.rsqrt(total * (1 / D) + eps)
    normed = [(a * factor * w).astype(x_TD.dtype) for a, w in zip(wide, weight, strict=True)]
    row.store(x_out.at[token], x)
    _store_activations(row, normed, token, values_out, scale_out, static_gmem, meet)

  static = _static(quantize, static_scale)
  x, *activations = plgpu.kernel(
    kernel,
    out_type=(jax.ShapeDtypeStruct((T, D), x_TD.dtype), *_activation_types(T, D, x_TD.dtype, quantize, static)),
    grid=(T,),
    grid_names=("token",),
    **row.threads(),
  )(x_TD, y_TD, weight_D, *static)
  costs.record("residual_norm", cost.residual_norm(x_TD, y_TD, weight_D, (x, *activations)))
  return x, _activations(activations, quantize, static_scale)


def silu_multiply(gate_up: Sums, *, quantize, static_scale, dtype, target):
  S, T, F = gate_up.parts_STF.shape
  F //= 2
  _require_bf16("silu_multiply", dtype)
  row = _Row("silu_multiply", F)
  parts = gate_up.parts_STF.reshape(S, T, 2, F)
  sums = _SumReader(gate_up, lambda scale: scale.reshape(2, F))

  def kernel(parts_gmem, *rest):
    scales, rest = sums.split(rest)
    *static_gmem, values_out = rest[: len(static) + 1]
    scale_out, meet = rest[len(static) + 1 : -2], row.meeting(*rest[-2:])
    token = lax.axis_index("token")

    def half(i):
      pieces = [row.load(parts_gmem.at[s, token, i]) for s in range(S)]
      total = [functools.reduce(jnp.add, (a.astype(jnp.float32) for a in same)) for same in zip(*pieces, strict=True)]
      return sums.scaled(total, scales, token, lambda scale: row.load(scale.at[i]))

    hidden = [(g / (1 + jnp.exp(-g)) * u).astype(dtype) for g, u in zip(half(0), half(1), strict=True)]
    _store_activations(row, hidden, token, values_out, scale_out, static_gmem, meet)

  static = _static(quantize, static_scale)
  activations = plgpu.kernel(
    kernel,
    out_type=_activation_types(T, F, dtype, quantize, static),
    grid=(T,),
    grid_names=("token",),
    **row.threads(),
  )(parts, *sums.arrays, *static)
  costs.record("silu_multiply", cost.silu_multiply(gate_up, activations))
  return _activations(activations, quantize, static_scale)


def rope_write(
  qkv: Sums, cos_TH, sin_TH, pages, page_table_BM, query_starts, lengths_B, *, first_page, static_scales, dtype, target
):
  _require_bf16("rope_write", dtype)
  _require_bf16("rope_write", pages[0].dtype if len(pages) == 2 else jnp.bfloat16)
  _, K, C, H = pages[0].shape
  S, T, F = qkv.parts_STF.shape
  rows, half = F // (K * H), H // 2
  G = rows - 2
  if H not in (64, 128):
    raise NotImplementedError(f"sm90's rope_write needs heads of 64 or 128; got {H}")
  # In decode token b is the last one of sequence b, and nothing is to be computed ahead.
  where = (lengths_B,) if query_starts is None else query_places(query_starts, lengths_B, T)
  sums = _SumReader(qkv, lambda scale: scale.reshape(K * rows, 2, half))
  static = () if static_scales is None else static_scales

  def kernel(parts_gmem, cos_gmem, sin_gmem, table_gmem, first_gmem, *rest):
    where_gmem, (scales, rest) = rest[: len(where)], sums.split(rest[len(where) :])
    static_gmem, (k_gmem, v_gmem, *scale_gmem, q_out) = rest[: len(static)], rest[len(static) :]
    token, head = lax.axis_index("token"), lax.axis_index("head")

    def load(first, count):
      """Both halves of `count` rows from row `first` of the head, as the product rounds them, in float32."""
      at, layout = pl.ds(head * rows + first, count), row_layout(count)

      def both(ref):
        return [plgpu.load(ref.at[at, i], layout=layout, optimized=False).astype(jnp.float32) for i in range(2)]

      pieces = [both(parts_gmem.at[s, token]) for s in range(S)]
      total = [functools.reduce(jnp.add, same) for same in zip(*pieces, strict=True)]
      return [half.astype(dtype).astype(jnp.float32) for half in sums.scaled(total, scales, token, both)]

    def turned(x, layout):
      cos, sin = (plgpu.load(ref.at[token], layout=layout.reduce(0), optimized=False) for ref in (cos_gmem, sin_gmem))
      cos, sin = (lax.broadcast_in_dim(y, x[0].shape, [1]) for y in (cos, sin))
      return [(x[0] * cos - x[1] * sin).astype(dtype), (x[1] * cos + x[0] * sin).astype(dtype)]

    q, k, v = turned(load(0, G), row_layout(G)), turned(load(G, 1), row_layout(1)), load(G + 1, 1)
    for i, x in enumerate(q):
      plgpu.store(q_out.at[token, pl.ds(head * G, G), pl.ds(i * half, half)], x, optimized=False)
    sequence = token if query_starts is None else where_gmem[0][token]
    position = where_gmem[-1][token] - (1 if query_starts is None else 0)  # -1: padding, or an empty place
    present = jnp.maximum(position, 0)
    page = first_gmem[0] + table_gmem[sequence, lax.div(present, jnp.int32(C))]
    token_of_page = pl.ds(lax.rem(present, jnp.int32(C)), 1)

    def rounded(x, number):
      """(halves as the pages hold them, their scale [1] or None)."""
      x = [y.astype(jnp.float32) for y in x]
      if not scale_gmem:
        return [y.astype(k_gmem.dtype) for y in x], None
      if static:
        scale = plgpu.load(static_gmem[number].at[pl.ds(head, 1)], layout=row_layout(1).reduce(1), optimized=False)
      else:
        scale = scale_of(jnp.maximum(*(jnp.max(jnp.abs(y), axis=1) for y in x)))
      factor = lax.broadcast_in_dim(1 / scale, x[0].shape, [0])
      return [to_float8(y * factor) for y in x], scale

    @pl.when(position >= 0)
    def _():
      for number, x in enumerate((k, v)):
        x, scale = rounded(x, number)
        for i, y in enumerate(x):
          channels = pl.ds(i * half, half)
          k_place = k_gmem.at[page, head, token_of_page, channels]
          v_place = v_gmem.at[page, head, channels, token_of_page]
          plgpu.store(v_place.transpose((1, 0)) if number else k_place, y, optimized=False)
        if scale is not None:
          plgpu.store(scale_gmem[number].at[page, head, token_of_page], scale, optimized=False)

  refs = [jax.new_ref(pool) for pool in pages]
  first = jnp.asarray(first_page, jnp.int32).reshape(1)
  q_TNH = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((T, K * G, H), dtype),
    grid=(T, K),
    grid_names=("token", "head"),
  )(qkv.parts_STF.reshape(S, T, K * rows, 2, half), cos_TH, sin_TH, page_table_BM, first, *where, *sums.arrays, *static, *refs)
  costs.record("rope_write", cost.rope_write(qkv, cos_TH, sin_TH, pages, q_TNH))
  return q_TNH, tuple(jax.ref.freeze(ref) for ref in refs)


class _Row:
  """A row of `size` elements in the registers of 1, 2 or 4 warpgroups: lists of 1D pieces."""

  def __init__(self, operation: str, size: int):
    if size % 128:
      raise NotImplementedError(f"sm90's {operation} needs rows of a multiple of 128; got {size}")
    self.num_wgs = next(n for n in (4, 2, 1) if size % (128 * n) == 0)
    a_thread = size // (128 * self.num_wgs)
    pieces = next(n for n in range(1, a_thread + 1) if a_thread % n == 0 and a_thread // n <= _MOST_A_THREAD)
    self.piece, self.num_pieces = size // (self.num_wgs * pieces), pieces

  def threads(self):
    meeting = [plgpu.SMEM((2, self.num_wgs), jnp.float32), plgpu.Barrier(num_arrivals=self.num_wgs, num_barriers=2)]
    return {"num_threads": self.num_wgs, "thread_name": "wg", "scratch_types": meeting}

  def _places(self):
    first = lax.axis_index("wg") * self.num_pieces
    return [pl.ds((first + i) * self.piece, self.piece) for i in range(self.num_pieces)]

  @property
  def _layout(self):
    return flat_layout(self.piece, 2)

  def load(self, ref):
    return [plgpu.load(ref.at[place], layout=self._layout, optimized=False) for place in self._places()]

  def store(self, ref, pieces):
    for place, piece in zip(self._places(), pieces, strict=True):
      plgpu.store(ref.at[place], piece, optimized=False)

  def meeting(self, smem, barrier):
    """A function that joins a scalar of each warpgroup; to be called at most twice, each time by all of them."""
    calls = iter(range(2))

    def meet(value, join):
      if self.num_wgs == 1:
        return value
      call = next(calls)
      smem[call, lax.axis_index("wg")] = value
      plgpu.barrier_arrive(barrier.at[call])
      plgpu.barrier_wait(barrier.at[call])
      return functools.reduce(join, (smem[call, i] for i in range(self.num_wgs)))

    return meet


class _SumReader:
  """What a kernel needs beside the parts of a product to finish it: the scales that it has, those of weights by `shape_w`."""

  def __init__(self, sums: Sums, shape_w):
    self._has_w, self._has_x = sums.w_scale is not None, sums.x_scale is not None
    self._per_token = self._has_x and sums.x_scale.ndim > 0
    self.arrays = (shape_w(sums.w_scale),) if self._has_w else ()
    if self._has_x:
      self.arrays += (sums.x_scale.reshape(-1),)

  def split(self, refs):
    return refs[: len(self.arrays)], refs[len(self.arrays) :]

  def scaled(self, pieces, scales, token, load_w):
    """Pieces of a token's sums, each times its weights' scales (as `load_w` reads them) and the token's."""
    if self._has_w:
      pieces = [piece * scale for piece, scale in zip(pieces, load_w(scales[0]), strict=True)]
    if self._has_x:
      scale = scales[-1][token if self._per_token else 0]
      pieces = [piece * scale for piece in pieces]
    return pieces


def _require_bf16(operation, dtype):
  if dtype != jnp.bfloat16:
    raise NotImplementedError(f"sm90's {operation} computes in bfloat16; got {jnp.dtype(dtype).name}")


def _static(quantize, static_scale):
  return (static_scale.reshape(1),) if quantize and static_scale is not None else ()


def _activation_types(T, width, dtype, quantize, static):
  values = jax.ShapeDtypeStruct((T, width), FLOAT8 if quantize else dtype)
  return (values, jax.ShapeDtypeStruct((T,), jnp.float32)) if quantize and not static else (values,)


def _activations(results, quantize, static_scale):
  return Quantized(results[0], results[1] if len(results) > 1 else static_scale) if quantize else results[0]


def _store_activations(row: _Row, pieces, token, values_out, scale_out, static_gmem, meet):
  """As they are, or in float8 with the scale that is given or that the token's largest value asks for."""
  if values_out.dtype == FLOAT8:
    wide = [piece.astype(jnp.float32) for piece in pieces]
    if static_gmem:
      scale = static_gmem[0][0]
    else:
      scale = scale_of(meet(functools.reduce(jnp.maximum, (jnp.max(jnp.abs(piece)) for piece in wide)), jnp.maximum))

      @pl.when(lax.axis_index("wg") == 0)
      def _():
        scale_out[0][token] = scale

    factor = 1 / scale
    pieces = [to_float8(piece * factor) for piece in wide]
  row.store(values_out.at[token], pieces)
