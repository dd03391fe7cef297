"""paged_attention on Hopper (sm_90a): flash decoding (Dao et al. 2023) with the context on wgmma's 64-row side.

    CTA = (part of the context, KV head, tile of queries): one warpgroup, a ring of stages, one page (or two of 32) a stage

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

Each part writes its normalized output and the logarithm of its sum; XLA joins the parts. An empty part or tile gives zeros.
Pages past a sequence's length are not read. A value that is not finite anywhere in a page that is read spoils its queries,
masked or not (0 * inf): so does plain attention.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import costs
from pallas_kernels.dispatch import Target
from pallas_kernels.fp8_matmul.sm90 import power_of_two, shift_of, transforms
from pallas_kernels.paged_attention.combine import combine
from pallas_kernels.paged_attention.tiling import ROWS, Tiling, call_cost, choose_tiling, prefill_tiles, query_rows
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
  target: Target,
):
  T, N, H = q_TNH.shape
  _, K, C, _ = k_pages.shape
  B, M = page_table_BM.shape
  _check(q_TNH, k_pages)
  decode = query_starts is None
  tiling = choose_tiling(T, N, K, H, C, B, M, decode, k_pages.dtype, target)
  q = q_TNH.reshape(T, K, N // K, H)
  if decode:
    tiles, lengths, ragged = None, lengths_B, ()
  else:
    tiles = prefill_tiles(query_starts, lengths_B, T, tiling.tokens)
    q = q[tiles.tokens].transpose(0, 2, 1, 3, 4).reshape(-1, K, tiling.tokens * N // K, H)
    limits = jnp.pad(jnp.repeat(tiles.limits, N // K, axis=1), ((0, 0), (0, tiling.columns - q.shape[2])))
    lengths, ragged = jnp.max(limits, axis=1), (limits, tiles.sequences)
  q = jnp.pad(q, ((0, 0), (0, 0), (0, query_rows(tiling, N // K) - q.shape[2]), (0, 0)))
  scales = () if k_scale is None else (k_scale, v_scale)
  table = page_table_BM, jnp.asarray(first_page, jnp.int32).reshape(1)
  parts = _attend(q, k_pages, v_pages, table, lengths, ragged, scales, tiling, q_TNH.dtype)
  if (held := costs.lengths()) is not None:
    costs.record("paged_attention", call_cost(q_TNH, (k_pages, v_pages, *scales), parts, T, held))
  if decode and (quantize or tiling.splits > 1):
    return combine(*parts, N // K, quantize=quantize, dtype=q_TNH.dtype, static_scale=static_scale)
  out = parts[0][:, :, 0] if tiling.splits == 1 else _joined(*parts, q_TNH.dtype)
  out = out[:, :, : tiling.tokens * N // K]  # [tiles, K, tokens * G, H]
  if decode:
    return out.reshape(T, N, H)
  out = out.reshape(-1, K, tiling.tokens, N // K, H).transpose(0, 2, 1, 3, 4)
  return tiles.untile(out.reshape(-1, N, H))


def _joined(out, log_sum, dtype):
  """The parts of each tile weighed by their sums."""
  log_sum = log_sum[..., : out.shape[3]]
  weights = jnp.exp2(log_sum - jnp.max(log_sum, axis=2, keepdims=True))
  weights = weights / jnp.sum(weights, axis=2, keepdims=True)
  return jnp.sum(out * weights[..., None], axis=2).astype(dtype)


def _check(q_TNH, k_pages):
  H, C = q_TNH.shape[2], k_pages.shape[2]
  if k_pages.dtype == jnp.float32 or q_TNH.dtype == jnp.float32:
    raise NotImplementedError(f"sm90 multiplies float8 and bfloat16, not {q_TNH.dtype} by {k_pages.dtype} pages")
  if H not in (64, 128) or C not in (32, 64, 128):
    raise NotImplementedError(f"sm90 needs heads of 64 or 128 and pages of 32, 64 or 128 tokens; got H={H}, C={C}")


def _attend(q, k_pages, v_pages, table, lengths, ragged, scales, tiling: Tiling, dtype):
  """Of q [tiles, K, rows, H]: normalized parts [tiles, K, splits, rows or up to 3 more, H], float32 or, where there is one, in
  `dtype`; and log2 of their sums [tiles, K, splits, columns].

  lengths [tiles]: how many keys of its sequence a tile sees at most. ragged: nothing in decode, where tile b is sequence b and
  all its queries see as many; in prefill how many each column sees, limits [tiles, columns], and the sequences [tiles].
  """
  num_tiles, K, rows, H = q.shape
  rows = -(-rows // 4) * 4  # as many as warps, so that none repeats another's work
  C, columns = k_pages.shape[2], tiling.columns
  step_tokens = tiling.pages * C
  halves, blocks = step_tokens // ROWS, H // ROWS
  widen = bool(scales)
  p_dtype = jnp.dtype(jnp.float16) if widen else q.dtype
  summed = columns == ROWS  # sums in every step cost a barrier, sums at the end cost registers
  p_swizzle = min(128, 2 * columns, 2 * C)

  def kernel(*refs):
    q_gmem, k_gmem, v_gmem, table_gmem, first_gmem, lengths_gmem, *rest = refs
    ragged_gmem, rest = rest[: len(ragged)], rest[len(ragged) :]
    scale_gmem, (out_gmem, sum_gmem, q_smem, k_smem, v_smem, p_smem, turn_smem, *rest) = (
      rest[: len(scales)],
      rest[len(scales) :],
    )
    (k_barrier, v_barrier, q_barrier), rest = rest[:3], rest[3:]
    given_smem, *scale_smem = rest[:3] if widen else [q_smem]
    part, head, tile = lax.axis_index("part"), lax.axis_index("head"), lax.axis_index("tile")
    sequence = ragged_gmem[1][tile] if ragged else tile
    length, first_page = lengths_gmem[tile], first_gmem[0]
    num_pages = lax.div(length + (C - 1), jnp.int32(C))
    steps = lax.div(num_pages + (tiling.pages - 1), jnp.int32(tiling.pages))
    per_part = lax.div(steps + (tiling.splits - 1), jnp.int32(tiling.splits))
    first = jnp.minimum(part * per_part, steps)
    last = jnp.minimum(first + per_part, steps)

    def page_ids(step):
      # A second page that does not exist is the last one again, all masked: memory that was never written may hold NaN.
      numbers = [jnp.clip(step * tiling.pages + j, 0, num_pages - 1) for j in range(tiling.pages)]
      return [first_page + table_gmem[sequence, jnp.maximum(number, 0)] for number in numbers]

    def load(ids, slot):
      for j, page in enumerate(ids):
        tokens = pl.ds(j * C, C)
        plgpu.copy_gmem_to_smem(k_gmem.at[page, head], k_smem.at[slot, tokens], k_barrier.at[slot])
        plgpu.copy_gmem_to_smem(v_gmem.at[page, head], v_smem.at[slot, j], v_barrier.at[slot])
        if widen:
          # V's scales come with K: the softmax needs them.
          plgpu.copy_gmem_to_smem(scale_gmem[0].at[page, head], scale_smem[0].at[slot, tokens], k_barrier.at[slot])
          plgpu.copy_gmem_to_smem(scale_gmem[1].at[page, head], scale_smem[1].at[slot, tokens], k_barrier.at[slot])

    # Rows past the last are zeros from TMA: columns that nobody asks for.
    plgpu.copy_gmem_to_smem(q_gmem.at[tile, head, pl.ds(tile * 0, columns)], given_smem, q_barrier)
    for i, ids in enumerate([page_ids(first + i) for i in range(tiling.stages)]):
      pl.when(first + i < last)(functools.partial(load, ids, i))
    if ragged:
      limits_smem = rest[-1]
      plgpu.copy_gmem_to_smem(ragged_gmem[0].at[tile], limits_smem, q_barrier)
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
          plgpu.wgmma(acc, left(k.at[:, columns_of_h], 128), q_smem.at[:, columns_of_h].transpose((1, 0)))
        return acc[...]

      return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

    def filled(value):
      return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), _LAYOUT)

    plgpu.barrier_wait(q_barrier)
    factor = jnp.float32(math.log2(math.e) / math.sqrt(H))
    if widen:
      pairs = row_layout(columns, 2)
      given = plgpu.load(given_smem, layout=pairs).astype(jnp.float32)
      # Bits are looked at in vectors, since Mosaic has no bitcast of a scalar.
      shift = jnp.min(shift_of(jnp.max(jnp.abs(given), axis=1)))
      up = power_of_two(plgpu.layout_cast(jnp.full(given.shape, shift, jnp.int32), pairs))
      plgpu.store(q_smem, (given * up).astype(p_dtype), optimized=False)
      plgpu.commit_smem()
      factor = factor * power_of_two(plgpu.layout_cast(jnp.full(shape, -shift, jnp.int32), _LAYOUT))

    def step(i, carry):
      acc, total, top = carry
      slot = lax.rem(i, jnp.int32(tiling.stages))
      next_ids = page_ids(first + i + tiling.stages)  # early, so that the table's latency is hidden
      plgpu.barrier_wait(k_barrier.at[slot])
      exponents, v_scales = [], []
      for half in range(halves):
        tokens = pl.ds(half * ROWS, ROWS)
        s = scores(k_smem.at[slot, tokens]) * factor
        if widen:
          k_scale, v_scale = (plgpu.load(ref.at[slot, tokens], layout=_LAYOUT.reduce(1)) for ref in scale_smem)
          v_scale = jnp.maximum(v_scale, _LEAST_SCALE)
          s = s * over_rows(k_scale) + over_rows(jnp.log2(v_scale))
          v_scales.append(v_scale)
        position = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_LAYOUT) + ((first + i) * step_tokens + half * ROWS)
        limit = over_columns(plgpu.load(limits_smem, layout=_LAYOUT.reduce(0), optimized=False)) if ragged else length
        exponents.append(jnp.where(position < limit, s, _MASKED))
      new_top = functools.reduce(jnp.maximum, (t.max(axis=0) for t in exponents), top)
      shrink = jnp.exp2(top - new_top)
      total = total * (shrink if summed else over_columns(shrink))
      for half, t in enumerate(exponents):
        weight = jnp.exp2(t - over_columns(new_top))  # V's scale included, at most 1
        share = weight * over_rows(1 / v_scales[half]) if widen else weight
        total = total + (share.sum(axis=0) if summed else share)
        p_smem[pl.ds(half * ROWS, ROWS)] = weight.astype(p_dtype)
      plgpu.commit_smem()
      plgpu.barrier_wait(v_barrier.at[slot])
      acc = [block * over_columns(shrink) for block in acc]
      for j in range(tiling.pages):
        for block in range(blocks):
          v = left(v_smem.at[slot, j, pl.ds(block * ROWS, ROWS)], p_swizzle)
          acc[block] = acc[block] + product(v, p_smem.at[pl.ds(j * C, C)])
      plgpu.commit_smem()  # these reads come before TMA's next write to the stage
      pl.when(first + i + tiling.stages < last)(lambda: load(next_ids, slot))
      return acc, total, new_top

    lowest = plgpu.layout_cast(jnp.full((columns,), _LOWEST, jnp.float32), _LAYOUT.reduce(0))
    no_sum = plgpu.layout_cast(jnp.zeros((columns,), jnp.float32), _LAYOUT.reduce(0)) if summed else filled(0.0)
    start = [filled(0.0) for _ in range(blocks)], no_sum, lowest
    acc, total, top = lax.fori_loop(0, last - first, step, start)
    total = jnp.maximum(total if summed else total.sum(axis=0), _TINY)
    for block in range(blocks):
      turn_smem[...] = acc[block] / over_columns(total)
      plgpu.commit_smem()
      turned = plgpu.load(turn_smem.at[:, pl.ds(0, rows)].transpose((1, 0)), layout=row_layout(rows), optimized=False)
      place = out_gmem.at[tile, head, part, :, pl.ds(block * ROWS, ROWS)]
      plgpu.store(place, turned.astype(out_dtype), optimized=False)
    plgpu.store(sum_gmem.at[tile, head, part], top + jnp.log2(total), optimized=False)

  stages = tiling.stages
  page = k_pages.dtype
  out_dtype = jnp.float32 if tiling.splits > 1 else dtype
  scratch = [
    plgpu.SMEM((columns, H), p_dtype, transforms=transforms(p_dtype, H)),
    plgpu.SMEM((stages, step_tokens, H), page, transforms=transforms(page, H, ROWS * page.itemsize)),
    plgpu.SMEM((stages, tiling.pages, H, C), page, transforms=transforms(page, C)),
    plgpu.SMEM((step_tokens, columns), p_dtype, transforms=transforms(p_dtype, columns, p_swizzle)),
    plgpu.SMEM((ROWS, columns), jnp.float32),
    plgpu.Barrier(num_arrivals=tiling.pages * (1 + len(scales)), num_barriers=stages),
    plgpu.Barrier(num_arrivals=tiling.pages, num_barriers=stages),
    plgpu.Barrier(num_arrivals=2 if ragged else 1),
    *([plgpu.SMEM((columns, H), q.dtype)] if widen else []),
    *(plgpu.SMEM((stages, step_tokens), jnp.float32) for _ in scales),
    *([plgpu.SMEM((columns,), jnp.int32)] if ragged else []),  # last: the others are aligned to 1024 bytes
  ]
  return plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((num_tiles, K, tiling.splits, rows, H), out_dtype),
      jax.ShapeDtypeStruct((num_tiles, K, tiling.splits, columns), jnp.float32),
    ),
    grid=(tiling.splits, K, num_tiles),
    grid_names=("part", "head", "tile"),
    scratch_types=scratch,
    compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024),
  )(q, k_pages, v_pages, *table, lengths, *ragged, *scales)
