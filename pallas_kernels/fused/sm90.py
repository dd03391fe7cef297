"""The small operations on Hopper: loads and stores only, no instruction that is Hopper's own.

    residual_norm   CTA = one token; up to 4 warpgroups share its row (rows.py)
    silu_multiply   likewise
    rope_write      CTA = one token and KV head, one warpgroup: a warp takes a query head, a lane one pair of channels in 32

A row is read once, kept in registers, and written once. Sums over a row meet in shared memory where warpgroups share it. All
loads are issued before the first barrier, since latency is all that these kernels cost.
Sizes: D and F multiples of 128; heads of 64 or 128.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import jax.ref
from jax import lax

from pallas_kernels import costs
from pallas_kernels.float8 import Quantized, scale_of, to_float8
from pallas_kernels.fp8_matmul.api import PartialSums
from pallas_kernels.fused import cost as costs_of
from pallas_kernels.fused.operands import Activations, NormOperands, NormOutputs, Pools, RopeOperands, SiluOperands
from pallas_kernels.fused.rows import Rounding, Row
from pallas_kernels.paged_attention.reference import query_places
from pallas_kernels.paged_attention.tiling import HEAD_SIZES
from pallas_kernels.register_layouts import row_layout


def residual_norm(
  x_TD, y_TD, weight_D, *, eps, quantize, static_scale, grouped, target
) -> tuple[jax.Array, jax.Array | Quantized]:
  T, D = x_TD.shape
  _require_bf16("residual_norm", x_TD.dtype)
  rounding = Rounding(quantize, static_scale, grouped)
  row = Row("residual_norm", D, grouped=rounding.grouped)

  def kernel(gmem: NormOperands, out: NormOutputs, *, meeting_smem, meeting_barrier):
    meet = row.meeting(meeting_smem, meeting_barrier)
    token = lax.axis_index("token")
    x, y = row.load(gmem.x.at[token]), row.load(gmem.y.at[token])
    weight = row.load(gmem.weight)
    added = (a.astype(jnp.float32) + b.astype(jnp.float32) for a, b in zip(x, y, strict=True))  # mutant: residual
    x = [a.astype(x_TD.dtype) for a in added]
    wide = [a.astype(jnp.float32) for a in x]
    total = meet(row.sum([a * a for a in wide]), jnp.add)
    factor = lax.rsqrt(total * (1 / D) + eps)
    normed = [(a * factor * w).astype(x_TD.dtype) for a, w in zip(wide, weight, strict=True)]  # mutant: weight of the norm
    row.store(out.x.at[token], x)
    rounding.store(row, normed, token, out.normed, gmem.static_scale, meet=meet)

  out_type = NormOutputs(jax.ShapeDtypeStruct((T, *row.shape), x_TD.dtype), rounding.output_types(T, row, x_TD.dtype))
  cost = costs_of.residual_norm(x_TD, y_TD, weight_D, jax.tree.leaves(out_type))
  (out,) = plgpu.kernel(
    kernel,
    out_type=(out_type,),
    grid=(T,),
    grid_names=("token",),
    cost_estimate=cost.estimate(),
    **row.threads(),
  )(NormOperands(row.view(x_TD), row.view(y_TD), row.view(weight_D), rounding.operand))
  costs.record("residual_norm", cost)
  return out.x.reshape(T, D), rounding.result(out.normed)


def silu_multiply(gate_up: PartialSums, *, quantize, static_scale, grouped, dtype, target) -> jax.Array | Quantized:
  S, T, F = gate_up.splits_STF.shape
  F //= 2
  _require_bf16("silu_multiply", dtype)
  rounding = Rounding(quantize, static_scale, grouped)
  row = Row("silu_multiply", F, grouped=rounding.grouped)
  token_scales = _has_token_scales(gate_up)

  def kernel(gmem: SiluOperands, out: Activations, *, meeting_smem, meeting_barrier):
    meet = row.meeting(meeting_smem, meeting_barrier)
    token = lax.axis_index("token")

    def half(i):
      pieces = [row.load(gmem.sums.splits_STF.at[s, token, i]) for s in range(S)]
      total = [functools.reduce(jnp.add, (a.astype(jnp.float32) for a in same)) for same in zip(*pieces, strict=True)]
      return _scaled(total, gmem.sums, token if token_scales else 0, lambda scale: row.load(scale.at[i]))

    gate, up = half(0), half(1)  # mutant: gate and up
    hidden = [(g / (1 + jnp.exp(-g)) * u).astype(dtype) for g, u in zip(gate, up, strict=True)]
    rounding.store(row, hidden, token, out, gmem.static_scale, meet=meet)

  halves = gate_up.splits_STF.reshape(S, T, 2, *row.shape)
  sums = PartialSums(halves, *_reshaped_scales(gate_up, (2, *row.shape)))
  out_type = rounding.output_types(T, row, dtype)
  cost = costs_of.silu_multiply(gate_up, jax.tree.leaves(out_type))
  (activations,) = plgpu.kernel(
    kernel,
    out_type=(out_type,),
    grid=(T,),
    grid_names=("token",),
    cost_estimate=cost.estimate(),
    **row.threads(),
  )(SiluOperands(sums, rounding.operand))
  costs.record("silu_multiply", cost)
  return rounding.result(activations)


def rope_write(
  qkv: PartialSums, cos_TH, sin_TH, pages, page_table_BM, query_starts, lengths_B, *, first_page, static_scales, dtype, target
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  _require_bf16("rope_write", dtype)
  _require_bf16("rope_write", pages[0].dtype if len(pages) == 2 else jnp.bfloat16)
  _, K, C, H = pages[0].shape
  S, T, F = qkv.splits_STF.shape
  rows, half = F // (K * H), H // 2
  G = rows - 2
  if H not in HEAD_SIZES:
    raise NotImplementedError(f"sm90's rope_write needs heads of 64 or 128; got {H}")
  decode, token_scales = query_starts is None, _has_token_scales(qkv)
  # In decode token b is the last one of sequence b, and nothing is to be computed ahead.
  sequences, positions = (None, lengths_B) if decode else query_places(query_starts, lengths_B, T)

  def kernel(gmem: Any, q_out):  # gmem: RopeOperands, of references
    token, head = lax.axis_index("token"), lax.axis_index("head")

    def load(first, count):
      """Both halves of `count` rows from row `first` of the head, as the product rounds them, in float32."""
      head_rows, layout = pl.ds(head * rows + first, count), row_layout(count)

      def both(ref):
        return [plgpu.load(ref.at[head_rows, i], layout=layout, optimized=False).astype(jnp.float32) for i in range(2)]

      pieces = [both(gmem.sums.splits_STF.at[s, token]) for s in range(S)]
      total = [functools.reduce(jnp.add, same) for same in zip(*pieces, strict=True)]
      return [half.astype(dtype).astype(jnp.float32) for half in _scaled(total, gmem.sums, token if token_scales else 0, both)]

    def rotated(x, layout):
      cos, sin = (plgpu.load(ref.at[token], layout=layout.reduce(0), optimized=False) for ref in (gmem.cos, gmem.sin))
      cos, sin = (lax.broadcast_in_dim(y, x[0].shape, [1]) for y in (cos, sin))
      return [(x[0] * cos - x[1] * sin).astype(dtype), (x[1] * cos + x[0] * sin).astype(dtype)]  # mutant: rotation

    q = rotated(load(0, G), row_layout(G))
    k = rotated(load(G, 1), row_layout(1))  # mutant: rotated keys
    v = load(G + 1, 1)
    for i, x in enumerate(q):
      plgpu.store(q_out.at[token, pl.ds(head * G, G), pl.ds(i * half, half)], x, optimized=False)
    sequence = token if gmem.sequences is None else gmem.sequences[token]
    position = gmem.positions[token] - (1 if decode else 0)  # mutant: position
    present = jnp.maximum(position, 0)  # -1: padding, or an empty slot
    page = gmem.first_page[0] + gmem.table[sequence, lax.div(present, jnp.int32(C))]  # mutant: page id
    token_of_page = pl.ds(lax.rem(present, jnp.int32(C)), 1)

    def rounded(x, static_scale):
      """(halves in the pages' dtype, their scale [1] or None)."""
      x = [y.astype(jnp.float32) for y in x]
      if gmem.pools.k_scale is None:
        return [y.astype(gmem.pools.k.dtype) for y in x], None
      if static_scale is not None:
        scale = plgpu.load(static_scale.at[pl.ds(head, 1)], layout=row_layout(1).reduce(1), optimized=False)
      else:
        scale = scale_of(jnp.maximum(*(jnp.max(jnp.abs(y), axis=1) for y in x)))
      factor = lax.broadcast_in_dim(1 / scale, x[0].shape, [0])
      return [to_float8(y * factor) for y in x], scale

    @pl.when(position >= 0)  # mutant: padding
    def _():
      channels = [pl.ds(i * half, half) for i in range(2)]
      k_slots = [gmem.pools.k.at[page, head, token_of_page, c] for c in channels]
      v_slots = [gmem.pools.v.at[page, head, c, token_of_page].transpose((1, 0)) for c in channels]
      given_k, given_v = (None, None) if gmem.static_scales is None else gmem.static_scales
      for x, given, slots, scale_pool in (
        (k, given_k, k_slots, gmem.pools.k_scale),  # mutant: keys
        (v, given_v, v_slots, gmem.pools.v_scale),
      ):
        x, scale = rounded(x, given)
        for y, slot in zip(x, slots, strict=True):
          plgpu.store(slot, y, optimized=False)
        if scale is not None:
          plgpu.store(scale_pool.at[page, head, token_of_page], scale, optimized=False)  # mutant: scale of pages

  w_scale, x_scale = _reshaped_scales(qkv, (K * rows, 2, half))
  pools = Pools(*(jax.new_ref(pool) for pool in pages))
  first = jnp.asarray(first_page, jnp.int32).reshape(1)
  splits = qkv.splits_STF.reshape(S, T, K * rows, 2, half)
  page_arrays = page_table_BM, first, sequences, positions
  operands = RopeOperands(splits, cos_TH, sin_TH, *page_arrays, w_scale, x_scale, static_scales, pools)
  out_type = jax.ShapeDtypeStruct((T, K * G, H), dtype)
  cost = costs_of.rope_write(qkv, cos_TH, sin_TH, pages, out_type)
  q_TNH = plgpu.kernel(kernel, out_type=out_type, grid=(T, K), grid_names=("token", "head"), cost_estimate=cost.estimate())(
    operands
  )
  costs.record("rope_write", cost)
  return q_TNH, tuple(jax.ref.freeze(ref) for ref in pools if ref is not None)


def _reshaped_scales(sums: PartialSums, w_shape: tuple[int, ...]) -> tuple[jax.Array | None, jax.Array | None]:
  """(w_scale in `w_shape`, x_scale [T] or [1]) of a product, for a kernel."""
  w_scale = None if sums.w_scale is None else sums.w_scale.reshape(w_shape)
  return w_scale, None if sums.x_scale is None else sums.x_scale.reshape(-1)


def _has_token_scales(sums: PartialSums) -> bool:
  return sums.x_scale is not None and sums.x_scale.ndim > 0


def _scaled(pieces, sums: PartialSums, x_index, load_w: Callable):
  """Pieces of a token's sums, each times the scales of its weights (as `load_w` reads them) and x_scale[x_index]."""
  if sums.w_scale is not None:
    pieces = [piece * scale for piece, scale in zip(pieces, load_w(sums.w_scale), strict=True)]
  if sums.x_scale is not None:
    scale = sums.x_scale[x_index]  # mutant: token scale
    pieces = [piece * scale for piece in pieces]
  return pieces


def _require_bf16(operation, dtype):
  if dtype != jnp.bfloat16:
    raise NotImplementedError(f"sm90's {operation} computes in bfloat16; got {jnp.dtype(dtype).name}")
