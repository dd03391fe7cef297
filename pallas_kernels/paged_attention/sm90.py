"""paged_attention on Hopper (sm_90a): flash decoding (Dao et al. 2023) with the context on wgmma's 64-row side.

    CTA = (split of the context, KV head, tile of queries): one warpgroup, a ring of stages, one page (or two of 32) a stage

    TMA         | K0 V0 | K1 V1 | K2 V2 |            | K3 V3 |  (the stage that was just read)
    warpgroup           | S = K0 q^T, softmax, O += V0 P | S = K1 q^T, ... | ...

    S^T [tokens, queries] = K [tokens, H] q^T        K is wgmma's left operand, q lies in shared memory
    O^T [H, queries]     += V [H, tokens] P^T        V pages are [H, tokens] already; P goes through shared memory

A tile is one token's G query heads (decode) or 64 / G tokens of one sequence (prefill), padded to 16, 32 or 64 columns: the
padded side is the short one, and a page is read once for all its query heads. Float8 pages are widened to float16 in registers
(exact), so queries and probabilities keep 11 bits; a query carries a power of two so that it fits float16.

V's scales would underflow in float16 (they are about amax / 448). They go into the exponent instead: with t = s + log2(v_scale)
and m = max t, the weight 2^(s - m) * v_scale is at most 1 and the largest of them is 1, whatever the scales. The sum is of
2^(s - m), in float32. So no scale is left on the output and no page needs one of its own.

Each split writes its normalized output and the logarithm of its sum; combine.py or XLA joins them. Empty splits and tiles give
zeros.
Pages past a sequence's length are not read. A value that is not finite anywhere in a page that is read spoils its queries,
masked or not (0 * inf): so does plain attention.
"""

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import costs
from pallas_kernels.dispatch import Target
from pallas_kernels.float8 import Quantized
from pallas_kernels.fp8_matmul.sm90 import power_of_two, shift_of, transforms
from pallas_kernels.paged_attention.combine import combine
from pallas_kernels.paged_attention.cost import call_cost
from pallas_kernels.paged_attention.operands import Operands, Shared, Splits
from pallas_kernels.paged_attention.tiling import (
  HEAD_SIZES,
  PAGE_SIZES,
  ROWS,
  CallShape,
  Tiling,
  choose_tiling,
  prefill_tiles,
  query_rows,
)
from pallas_kernels.register_layouts import row_layout

_LOWEST = -1e30  # below every score; a masked one is lower still, so that its weight is an exact 0
_MASKED = -2e30
_TINY = 2.0**-126
_LEAST_SCALE = 2.0**-120  # a place in a page that nothing was written to has scale 0
_LAYOUT = plgpu.Layout.WGMMA


def paged_attention(
  q_TNH,
  k_pages,
  v_pages,
  page_table_BM,
  query_starts,
  lengths_B,
  *,
  k_scale,
  v_scale,
  first_page=0,
  quantize=False,
  static_scale=None,
  grouped=False,
  target: Target,
) -> jax.Array | Quantized:
  T, N, H = q_TNH.shape
  _, K, C, _ = k_pages.shape
  B, M = page_table_BM.shape
  _check(q_TNH, k_pages)
  decode = query_starts is None
  tiling = choose_tiling(CallShape(T, N, K, H, C, B, M, decode, k_pages.dtype), target)
  q = q_TNH.reshape(T, K, N // K, H)
  if decode:
    tiles, lengths, limits = None, lengths_B, None
  else:
    tiles = prefill_tiles(query_starts, lengths_B, T, tiling.tokens)
    q = q[tiles.tokens].transpose(0, 2, 1, 3, 4).reshape(-1, K, tiling.tokens * N // K, H)
    limits = jnp.pad(jnp.repeat(tiles.limits, N // K, axis=1), ((0, 0), (0, tiling.columns - q.shape[2])))
    lengths = jnp.max(limits, axis=1)
  q = jnp.pad(q, ((0, 0), (0, 0), (0, query_rows(tiling, N // K) - q.shape[2]), (0, 0)))
  first = jnp.asarray(first_page, jnp.int32).reshape(1)
  sequences = None if tiles is None else tiles.sequences
  operands = Operands(q, k_pages, v_pages, page_table_BM, first, lengths, limits, sequences, k_scale, v_scale)
  pools = (k_pages, v_pages) if k_scale is None else (k_pages, v_pages, k_scale, v_scale)
  out_type = _out_type(operands, tiling, q_TNH.dtype)
  # The estimate is for full sequences, whether or not somebody records what they hold.
  estimate = call_cost(q_TNH, pools, out_type, T, [M * C] * B).estimate()
  splits = _attend(operands, tiling, out_type, estimate)
  if (held := costs.lengths()) is not None:
    costs.record("paged_attention", call_cost(q_TNH, pools, splits, T, held))
  if decode and (quantize or tiling.splits > 1):
    rounding = {"quantize": quantize, "static_scale": static_scale, "grouped": grouped}
    return combine(*splits, N // K, dtype=q_TNH.dtype, **rounding)
  out = splits.values[:, :, 0] if tiling.splits == 1 else _joined(*splits, q_TNH.dtype)
  out = out[:, :, : tiling.tokens * N // K]  # [tiles, K, tokens * G, H]
  if tiles is None:
    return out.reshape(T, N, H)
  out = out.reshape(-1, K, tiling.tokens, N // K, H).transpose(0, 2, 1, 3, 4)
  return tiles.untile(out.reshape(-1, N, H))


def _joined(out, log_sum, dtype):
  """The splits of each tile weighed by their sums."""
  log_sum = log_sum[..., : out.shape[3]]
  weights = jnp.exp2(log_sum - jnp.max(log_sum, axis=2, keepdims=True))  # mutant: weights of splits
  weights = weights / jnp.sum(weights, axis=2, keepdims=True)
  return jnp.sum(out * weights[..., None], axis=2).astype(dtype)


def _check(q_TNH, k_pages):
  H, C = q_TNH.shape[2], k_pages.shape[2]
  if k_pages.dtype == jnp.float32 or q_TNH.dtype == jnp.float32:
    raise NotImplementedError(f"sm90 multiplies float8 and bfloat16, not {q_TNH.dtype} by {k_pages.dtype} pages")
  if H not in HEAD_SIZES or C not in PAGE_SIZES:
    raise NotImplementedError(f"sm90 needs heads of 64 or 128 and pages of 32, 64 or 128 tokens; got H={H}, C={C}")


def _out_type(operands: Operands, tiling: Tiling, dtype) -> Splits:
  num_tiles, K, rows, H = operands.q.shape
  rows = -(-rows // 4) * 4  # as many as warps, so that none repeats another's work
  shapes: Any = (
    jax.ShapeDtypeStruct((num_tiles, K, tiling.splits, rows, H), jnp.float32 if tiling.splits > 1 else dtype),
    jax.ShapeDtypeStruct((num_tiles, K, tiling.splits, tiling.columns), jnp.float32),
  )
  return Splits(*shapes)


def _shared_memory(operands: Operands, tiling: Tiling, p_dtype, p_swizzle: int) -> Shared:
  C, H = operands.k_pages.shape[2:]
  page, columns, stages = operands.k_pages.dtype, tiling.columns, tiling.stages
  step_tokens = tiling.pages * C
  widen, ragged = operands.k_scale is not None, operands.limits is not None
  scale = plgpu.SMEM((stages, step_tokens), jnp.float32) if widen else None
  return Shared(
    q=plgpu.SMEM((columns, H), p_dtype, transforms=transforms(p_dtype, H)),
    k=plgpu.SMEM((stages, step_tokens, H), page, transforms=transforms(page, H, ROWS * page.itemsize)),
    v=plgpu.SMEM((stages, tiling.pages, H, C), page, transforms=transforms(page, C)),
    p=plgpu.SMEM((step_tokens, columns), p_dtype, transforms=transforms(p_dtype, columns, p_swizzle)),
    out=plgpu.SMEM((ROWS, columns), jnp.float32),
    k_barrier=plgpu.Barrier(num_arrivals=tiling.pages * (3 if widen else 1), num_barriers=stages),
    v_barrier=plgpu.Barrier(num_arrivals=tiling.pages, num_barriers=stages),
    q_barrier=plgpu.Barrier(num_arrivals=2 if ragged else 1),  # mutant: arrivals
    given=plgpu.SMEM((columns, H), operands.q.dtype) if widen else None,
    k_scale=scale,
    v_scale=scale,
    limits=plgpu.SMEM((columns,), jnp.int32) if ragged else None,
  )


def _attend(operands: Operands, tiling: Tiling, out_type: Splits, estimate: pl.CostEstimate) -> Splits:
  """Attention of each tile over each split of its context."""
  num_tiles, K, _, H = operands.q.shape
  rows, out_dtype = out_type.values.shape[3], out_type.values.dtype
  C, columns = operands.k_pages.shape[2], tiling.columns
  step_tokens = tiling.pages * C
  halves, blocks = step_tokens // ROWS, H // ROWS
  widen = operands.k_scale is not None
  p_dtype = jnp.dtype(jnp.float16) if widen else operands.q.dtype
  summed = columns == ROWS  # sums in every step cost a barrier, sums at the end cost registers
  p_swizzle = min(128, 2 * columns, 2 * C)

  def kernel(gmem: Any, out: Any, *, smem: Shared):  # gmem: Operands, out: Splits, of references
    split, head, tile = lax.axis_index("split"), lax.axis_index("head"), lax.axis_index("tile")
    sequence = tile if gmem.sequences is None else gmem.sequences[tile]
    length, first_page = gmem.lengths[tile], gmem.first_page[0]
    num_pages = lax.div(length + (C - 1), jnp.int32(C))
    steps = lax.div(num_pages + (tiling.pages - 1), jnp.int32(tiling.pages))
    per_split = lax.div(steps + (tiling.splits - 1), jnp.int32(tiling.splits))
    first = jnp.minimum(split * per_split, steps)
    last = jnp.minimum(first + per_split, steps)

    def page_ids(step):
      # A second page that does not exist is the last one again, all masked: memory that was never written may hold NaN.
      numbers = [jnp.clip(step * tiling.pages + j, 0, num_pages - 1) for j in range(tiling.pages)]
      return [first_page + gmem.table[sequence, jnp.maximum(number, 0)] for number in numbers]  # mutant: page id

    def load(ids, slot):
      for j, page in enumerate(ids):
        tokens = pl.ds(j * C, C)
        plgpu.copy_gmem_to_smem(gmem.k_pages.at[page, head], smem.k.at[slot, tokens], smem.k_barrier.at[slot])  # mutant: K copy
        plgpu.copy_gmem_to_smem(gmem.v_pages.at[page, head], smem.v.at[slot, j], smem.v_barrier.at[slot])  # mutant: V copy
        if widen:
          # V's scales come with K: the softmax needs them.
          plgpu.copy_gmem_to_smem(gmem.k_scale.at[page, head], smem.k_scale.at[slot, tokens], smem.k_barrier.at[slot])
          plgpu.copy_gmem_to_smem(gmem.v_scale.at[page, head], smem.v_scale.at[slot, tokens], smem.k_barrier.at[slot])

    # Rows past the last are zeros from TMA, for the columns that pad the tile.
    given_smem = smem.given if widen else smem.q
    plgpu.copy_gmem_to_smem(gmem.q.at[tile, head, pl.ds(tile * 0, columns)], given_smem, smem.q_barrier)
    for i, ids in enumerate([page_ids(first + i) for i in range(tiling.stages)]):
      pl.when(first + i < last)(functools.partial(load, ids, i))
    if gmem.limits is not None:
      plgpu.copy_gmem_to_smem(gmem.limits.at[tile], smem.limits, smem.q_barrier)
    shape = (ROWS, columns)

    def over_columns(x):
      return lax.broadcast_in_dim(x, shape, [1])

    def over_rows(x):
      return lax.broadcast_in_dim(x, shape, [0])

    def left(ref, right_swizzle):
      """A left operand; float8 in registers, loaded four to a register and widened in pairs."""
      if not widen:
        # Both operands may stay in shared memory where they are swizzled alike.
        return ref if min(128, 2 * ref.shape[1]) == right_swizzle else plgpu.load(ref, layout=_LAYOUT)
      return plgpu.layout_cast(plgpu.load(ref, layout=plgpu.Layout.WGMMA_UPCAST_2X).astype(p_dtype), _LAYOUT)

    def product(a, b):
      def multiply(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]  # waits

      return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

    def scores(k):
      def multiply(acc):
        for start in range(0, H, ROWS):
          columns_of_h = pl.ds(start, ROWS)
          plgpu.wgmma(acc, left(k.at[:, columns_of_h], 128), smem.q.at[:, columns_of_h].transpose((1, 0)))
        return acc[...]

      return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

    def filled(value):
      return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), _LAYOUT)

    plgpu.barrier_wait(smem.q_barrier)  # mutant: wait for queries
    factor = jnp.float32(math.log2(math.e) / math.sqrt(H))
    if widen:
      pairs = row_layout(columns, 2)
      given = plgpu.load(given_smem, layout=pairs).astype(jnp.float32)
      # Bits are looked at in vectors, since Mosaic has no bitcast of a scalar.
      shift = jnp.min(shift_of(jnp.max(jnp.abs(given), axis=1)))
      up = power_of_two(plgpu.layout_cast(jnp.full(given.shape, shift, jnp.int32), pairs))
      plgpu.store(smem.q, (given * up).astype(p_dtype), optimized=False)  # mutant: power of two
      plgpu.commit_smem()
      factor = factor * power_of_two(plgpu.layout_cast(jnp.full(shape, -shift, jnp.int32), _LAYOUT))

    def step(i, carry):
      acc, row_sum, row_max = carry
      slot = lax.rem(i, jnp.int32(tiling.stages))
      # Early, so that the table's latency is hidden.
      next_ids = page_ids(first + i + tiling.stages)  # mutant: next pages
      plgpu.barrier_wait(smem.k_barrier.at[slot])  # mutant: wait for K
      exponents, v_scales = [], []
      for half in range(halves):
        tokens = pl.ds(half * ROWS, ROWS)
        s = scores(smem.k.at[slot, tokens]) * factor
        if widen:
          scales = (plgpu.load(ref.at[slot, tokens], layout=_LAYOUT.reduce(1)) for ref in (smem.k_scale, smem.v_scale))
          k_scale, v_scale = scales  # mutant: order of scales
          v_scale = jnp.maximum(v_scale, _LEAST_SCALE)
          s = s * over_rows(k_scale)  # mutant: scale of K
          s = s + over_rows(jnp.log2(v_scale))  # mutant: scale of V
          v_scales.append(v_scale)
        position = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_LAYOUT) + ((first + i) * step_tokens + half * ROWS)
        limit = length
        if gmem.limits is not None:
          limit = over_columns(plgpu.load(smem.limits, layout=_LAYOUT.reduce(0), optimized=False))
        exponents.append(jnp.where(position < limit, s, _MASKED))  # mutant: mask
      new_max = functools.reduce(jnp.maximum, (t.max(axis=0) for t in exponents), row_max)
      rescale = jnp.exp2(row_max - new_max)
      row_sum = row_sum * (rescale if summed else over_columns(rescale))
      for half, t in enumerate(exponents):
        weight = jnp.exp2(t - over_columns(new_max))  # V's scale included, at most 1
        share = weight * over_rows(1 / v_scales[half]) if widen else weight
        row_sum = row_sum + (share.sum(axis=0) if summed else share)
        smem.p[pl.ds(half * ROWS, ROWS)] = weight.astype(p_dtype)
      plgpu.commit_smem()  # mutant: fence of P
      plgpu.barrier_wait(smem.v_barrier.at[slot])  # mutant: wait for V
      acc = [block * over_columns(rescale) for block in acc]  # mutant: rescale
      for j in range(tiling.pages):
        for block in range(blocks):
          v = left(smem.v.at[slot, j, pl.ds(block * ROWS, ROWS)], p_swizzle)
          acc[block] = acc[block] + product(v, smem.p.at[pl.ds(j * C, C)])
      # These reads come before TMA's next write to the stage.
      plgpu.commit_smem()  # mutant: fence of a stage
      pl.when(first + i + tiling.stages < last)(lambda: load(next_ids, slot))
      return acc, row_sum, new_max

    lowest = plgpu.layout_cast(jnp.full((columns,), _LOWEST, jnp.float32), _LAYOUT.reduce(0))
    no_sum = plgpu.layout_cast(jnp.zeros((columns,), jnp.float32), _LAYOUT.reduce(0)) if summed else filled(0.0)
    start = [filled(0.0) for _ in range(blocks)], no_sum, lowest
    acc, row_sum, row_max = lax.fori_loop(0, last - first, step, start)
    row_sum = jnp.maximum(row_sum if summed else row_sum.sum(axis=0), _TINY)
    for block in range(blocks):
      smem.out[...] = acc[block] / over_columns(row_sum)
      plgpu.commit_smem()
      transposed = smem.out.at[:, pl.ds(0, rows)].transpose((1, 0))
      transposed = plgpu.load(transposed, layout=row_layout(rows), optimized=False)
      channels = pl.ds(block * ROWS, ROWS)
      plgpu.store(out.values.at[tile, head, split, :, channels], transposed.astype(out_dtype), optimized=False)
    plgpu.store(out.log_sum.at[tile, head, split], row_max + jnp.log2(row_sum), optimized=False)

  return plgpu.kernel(
    kernel,
    out_type=(out_type,),
    grid=(tiling.splits, K, num_tiles),
    grid_names=("split", "head", "tile"),
    scratch_types={"smem": _shared_memory(operands, tiling, p_dtype, p_swizzle)},
    compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024),
    cost_estimate=estimate,
  )(operands)[0]
