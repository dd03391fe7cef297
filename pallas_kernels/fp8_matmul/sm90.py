"""fp8_matmul on Hopper (sm_90a): y^T = w x^T, so that weights are the 64-row side of wgmma and tokens the other.

    skinny, up to 64 tokens: [64 or 128 rows of w] x [a part of D] per CTA. Many rows: the whole of D, scaled and transposed
                             on the way out. Few rows: partial sums in float32, for the next kernel or XLA to finish
    wide, more tokens:       persistent CTAs, tiles of 128 rows x 128 tokens, scaled and transposed on the way out

Both are one memory warpgroup that only issues TMA and one or two that only multiply, joined by barriers over a ring of stages:

    memory WG   | load 0 | load 1 | load 2 | load 3 |  wait "0 is read"  | load 4 | ...
    compute WGs          | wait 0: wgmma, promote, "0 is read" | wait 1: wgmma, promote, "1 is read" | ...

Every step multiplies into a fresh accumulator and adds it to float32 registers: Hopper's FP8 accumulator keeps about 14 bits,
so nothing stays in it for more than 128 of D; block scales, and the scales of a token's groups of columns, are multiplied in at
the same place.

Three forms: float8 x float8; float8 weights x bf16 activations, where weights are widened to float16 in registers (exact) and
activations become float16 under a power of two per token, so that 1e6 does not overflow (a value 2^24 below its token's largest
loses bits, as it would in the float32 sum); bf16 x bf16. What else there is (float32) belongs to xla.py.

Padding: tokens to a multiple of 8, a copy of x only. Weights are never copied: where tiles do not divide F or T, TMA fills what
lies outside with zeros and drops what is stored there. D must be a multiple of 64 and F of 8.
Comments `mutant: ...` mark lines that tests break on purpose, to show that a broken line does not pass (gpu_mutants.py).
A row's bits depend on the regime (skinny or wide), the shapes of w and the device, not on the number of tokens.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.costs import Cost, record
from pallas_kernels.dispatch import HOPPER_SMS, Target
from pallas_kernels.fp8_matmul import api
from pallas_kernels.fp8_matmul.cost import call_cost
from pallas_kernels.fp8_matmul.tiling import MAX_SKINNY, WG_ROWS, Form, Tiling, choose_tiling, form_of, unit_of
from pallas_kernels.register_layouts import row_layout

_WIDENED = 64  # columns widened at once, which bounds registers
_LAYOUT = plgpu.Layout.WGMMA

# Typed as Any, since JAX declares both classes abstract.
_TILING: Any = plgpu.TilingTransform
_SWIZZLE: Any = plgpu.SwizzleTransform


class _Operands(NamedTuple):
  """A kernel's inputs in device memory. A scale that the kernel does not apply is None."""

  x: jax.Array  # [tokens, D]
  w: jax.Array  # [F, D]
  block_scale: jax.Array | None = None  # [F / R, D / 128]
  group_scale: jax.Array | None = None  # [D / 128, tokens], in whole tiles
  w_scale: jax.Array | None = None  # of each row of w, in whole tiles
  x_scale: jax.Array | None = None  # of each token, in whole tiles; [1] for a static scale


def fp8_matmul(x_TD, w_FD, w_scale, x_scale, *, out_dtype, target: Target) -> jax.Array | api.PartialSums:
  form = form_of(x_TD, w_FD, w_scale, x_scale)
  T, (F, D) = x_TD.shape[0], w_FD.shape
  tiling = choose_tiling(T, F, D, form, target)
  if form.widens:
    x_TD, x_scale = power_of_two_scale(x_TD)
  block_scale, channel_scale = (w_scale, None) if form.block_rows else (None, w_scale)
  operands = _Operands(jnp.pad(x_TD, ((0, -T % 8), (0, 0))), w_FD, block_scale)
  scales = w_scale, x_scale
  if form.grouped:
    operands = operands._replace(group_scale=jnp.pad(x_scale, ((0, 0), (0, -T % tiling.tokens))))
    x_scale = None
  if T > MAX_SKINNY:
    operands = operands._replace(w_scale=_per(F, tiling.rows, channel_scale), x_scale=_per(T, tiling.tokens, x_scale))
    out_type = jax.ShapeDtypeStruct((operands.x.shape[0], -(-F // WG_ROWS) * WG_ROWS), out_dtype)
    cost = call_cost(x_TD, w_FD, scales, out_type)
    y = _wide(operands, form, tiling, out_type, cost, target=target)
    record("fp8_matmul", cost)
    return y[:T, :F]
  is_whole = tiling.splits == 1
  out_shape = tiling.splits, tiling.tokens, -(-F // tiling.rows) * tiling.rows
  out_type = jax.ShapeDtypeStruct(out_shape, out_dtype if is_whole else jnp.float32)
  cost = call_cost(x_TD, w_FD, scales if is_whole else (block_scale, operands.group_scale), out_type)
  if is_whole and channel_scale is not None:
    operands = operands._replace(w_scale=_per(F, tiling.rows, channel_scale))
  if is_whole and x_scale is not None:
    operands = operands._replace(x_scale=_per(T, tiling.tokens, x_scale) if x_scale.ndim else x_scale[None])
  y = _skinny(operands, form, tiling, out_type, cost)
  record("fp8_matmul", cost)
  return y[0, :T, :F] if is_whole else api.PartialSums(y[:, :T, :F], channel_scale, x_scale)  # mutant: splits


def power_of_two_scale(x):
  """bf16 [..., D] -> (float16, float32 scale [...]) with x = float16 * scale, powers of two, the largest value near 2^14."""
  shift = shift_of(jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1))
  return (x.astype(jnp.float32) * power_of_two(shift)[..., None]).astype(jnp.float16), power_of_two(-shift)


def shift_of(amax):
  """The exponent of two, int32, that brings float32 `amax` near 2^14, so that what is below fits float16."""
  exponent = (lax.bitcast_convert_type(amax, jnp.int32) >> 23) - 127
  return jnp.clip(14 - exponent, -126, 126)  # mutant: power of two


def power_of_two(exponent):
  return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _per(size, tile, scale):
  """A scale as float32, one entry for each of `size` rows or tokens, padded to whole tiles; None counts as 1."""
  padded = -(-size // tile) * tile
  if scale is None or scale.ndim == 0:
    return jnp.full(padded, 1.0 if scale is None else scale, jnp.float32)
  return jnp.pad(scale, (0, padded - size))


def transforms(dtype, columns, max_swizzle=128):
  """Tiling and swizzle that TMA writes and wgmma reads for rows of `columns` elements."""
  swizzle = min(plgpu.find_swizzle(columns * jnp.dtype(dtype).itemsize * 8), max_swizzle)
  return _TILING((8, swizzle // jnp.dtype(dtype).itemsize)), _SWIZZLE(swizzle)


def _specs(form: Form, tiling: Tiling, row_tile, token_tile, first_step):
  """Pipeline inputs: a tile of x and one of w, both from column block `first_step` on."""
  w_swizzle = _WIDENED if form.widens else 128
  return [
    plgpu.BlockSpec(
      (tiling.tokens, tiling.depth),
      lambda k: (token_tile, first_step + k),
      transforms=transforms(form.x_dtype, tiling.depth),
      memory_space=plgpu.SMEM,
    ),
    plgpu.BlockSpec(
      (tiling.rows, tiling.depth),
      lambda k: (row_tile, first_step + k),  # mutant: first column of a split
      transforms=transforms(form.w_dtype, tiling.depth, w_swizzle),
      memory_space=plgpu.SMEM,
    ),
  ]


def _product(w_smem, x_smem, form: Form):
  """w x^T of one warpgroup's rows over a part of a stage, in a fresh accumulator."""

  def multiply(acc):
    if form.widens:
      for start in range(0, w_smem.shape[1], _WIDENED):
        columns = pl.ds(start, _WIDENED)
        # Loaded four to a register and widened in pairs: without this layout these would be two-byte loads.
        w = plgpu.load(w_smem.at[:, columns], layout=plgpu.Layout.WGMMA_UPCAST_2X)
        w = plgpu.layout_cast(w.astype(form.x_dtype), _LAYOUT)
        plgpu.wgmma(acc, w, x_smem.at[:, columns].transpose((1, 0)))
      # These reads come before TMA's next write to the stage.
      plgpu.commit_smem()  # mutant: fence of a stage
    else:
      plgpu.wgmma(acc, w_smem, x_smem.transpose((1, 0)))
    return acc[...]  # waits

  return pl.run_scoped(multiply, plgpu.ACC((w_smem.shape[0], x_smem.shape[0]), jnp.float32))


def _step(form: Form, tiling: Tiling, gmem: Any, *, row_tile, first_token, first_step):
  """The pipeline's body: adds one stage's products to the float32 sum, times the scales of its 128 columns if there are any."""
  F, D = gmem.w.shape
  wg = lax.axis_index("wg")
  width = unit_of(D, form)

  def scale_of(column):
    """Of the products of 128 columns: one number for the block of weights, [64, tokens] with the scales of the tokens."""
    block_row = lax.div(row_tile * tiling.rows + wg * WG_ROWS, jnp.int32(form.block_rows))
    last = jnp.int32(F // form.block_rows - 1)  # the second warpgroup of the last tile may lie outside
    block_row = jnp.minimum(block_row, last)  # mutant: row of the block
    block_column = lax.div(column, jnp.int32(api.BLOCK))  # mutant: column of the block
    scale = gmem.block_scale[block_row, block_column]
    if not form.grouped:
      return scale
    of_tokens = gmem.group_scale.at[block_column, pl.ds(first_token, tiling.tokens)]  # mutant: tokens of the groups
    of_tokens = plgpu.load(of_tokens, layout=_LAYOUT.reduce(0), optimized=False)
    return lax.broadcast_in_dim(of_tokens * scale, (WG_ROWS, tiling.tokens), [1])

  def body(indices, x_smem, w_smem, total):
    rows = w_smem if tiling.rows == WG_ROWS else w_smem.at[pl.ds(wg * WG_ROWS, WG_ROWS)]  # mutant: rows of a warpgroup
    for start in range(0, tiling.depth, width):
      columns = pl.ds(start, width)
      scale = scale_of((first_step + indices[0]) * tiling.depth + start) if form.block_rows else None
      product = _product(rows.at[:, columns], x_smem.at[:, columns], form)
      if scale is not None:
        product = product * scale  # mutant: block scale
      total = total + product  # mutant: sum
    return total

  return body


def _no_step(*_, **__):
  return None


def _zeros(tiling):
  return plgpu.layout_cast(jnp.zeros((WG_ROWS, tiling.tokens), jnp.float32), _LAYOUT)


def _skinny(operands: _Operands, form: Form, tiling: Tiling, out_type: jax.ShapeDtypeStruct, cost: Cost):
  """[splits, tokens, F and padding to whole tiles]: the sums of each split of D, times the scales that are given."""
  F, D = operands.w.shape
  wgs = tiling.rows // WG_ROWS
  steps = D // tiling.depth // tiling.splits
  transposed = row_layout(tiling.tokens)

  def kernel(gmem: Any, out_gmem, *, tile_smem):  # gmem: _Operands, of references
    row_tile, split = lax.axis_index("row"), lax.axis_index("split")
    first_step = split * steps

    def compute(pipeline):
      wg = lax.axis_index("wg")
      rows = pl.ds(row_tile * tiling.rows + wg * WG_ROWS, WG_ROWS)
      tile_smem[wg] = pipeline(_zeros(tiling))
      plgpu.commit_smem()
      total = plgpu.load(tile_smem.at[wg].transpose((1, 0)), layout=transposed, optimized=False)
      if gmem.w_scale is not None:
        per_row = plgpu.load(gmem.w_scale.at[rows], layout=transposed.reduce(0), optimized=False)
        total = total * lax.broadcast_in_dim(per_row, total.shape, [1])  # mutant: channel scale
      if gmem.x_scale is not None and gmem.x_scale.size == 1:
        total = total * gmem.x_scale[0]  # mutant: static scale
      elif gmem.x_scale is not None:
        per_token = plgpu.load(gmem.x_scale, layout=transposed.reduce(1), optimized=False)
        total = total * lax.broadcast_in_dim(per_token, total.shape, [0])  # mutant: token scale
      plgpu.store(out_gmem.at[split, :, rows], total.astype(out_type.dtype), optimized=False)

    plgpu.emit_pipeline_warp_specialized(
      _step(form, tiling, gmem, row_tile=row_tile, first_token=0, first_step=first_step),
      grid=(steps,),
      memory_registers=40,
      in_specs=_specs(form, tiling, row_tile, 0, first_step),
      wg_axis="wg",
      num_compute_wgs=wgs,
      max_concurrent_steps=tiling.stages,
      compute_context=compute,
    )(gmem.x, gmem.w)

  return plgpu.kernel(
    kernel,
    out_type=out_type,
    grid=(-(-F // tiling.rows), tiling.splits),
    grid_names=("row", "split"),
    num_threads=wgs + 1,
    thread_name="wg",
    scratch_types={"tile_smem": plgpu.SMEM((wgs, WG_ROWS, tiling.tokens), jnp.float32)},
    cost_estimate=cost.estimate(),
  )(operands)


def _wide(operands: _Operands, form: Form, tiling: Tiling, out_type: jax.ShapeDtypeStruct, cost: Cost, *, target: Target):
  """[tokens, F and padding to a multiple of 64], all scales applied."""
  F, D = operands.w.shape
  T, out_dtype = operands.x.shape[0], out_type.dtype
  wgs = tiling.rows // WG_ROWS
  row_tiles, token_tiles = -(-F // tiling.rows), -(-T // tiling.tokens)
  num_ctas = min(target.num_sms or HOPPER_SMS, row_tiles * token_tiles)

  def kernel(gmem: Any, out_gmem, *, out_smem):  # gmem: _Operands, of references
    wg = lax.axis_index("wg")

    def pipeline_at(row_tile, token_tile, step, compute):
      return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(D // tiling.depth,),
        memory_registers=40,
        in_specs=_specs(form, tiling, row_tile, token_tile, 0),
        wg_axis="wg",
        num_compute_wgs=wgs,
        max_concurrent_steps=tiling.stages,
        compute_context=compute,
      )

    allocations = pipeline_at(0, 0, _no_step, _no_step).get_allocations(gmem.x, gmem.w)

    @functools.partial(pl.run_scoped, allocations=allocations, collective_axes="wg")
    def _(allocations):
      @plgpu.nd_loop((row_tiles * token_tiles,), collective_axes="cta")
      def _(loop):
        # All tokens of a tile of weights at the same time, so that weights come from device memory once, and x from L2.
        row_tile, token_tile = lax.div(loop.index[0], token_tiles), lax.rem(loop.index[0], token_tiles)
        row, token = row_tile * tiling.rows + wg * WG_ROWS, token_tile * tiling.tokens

        def compute(pipeline):
          total = pipeline(_zeros(tiling))
          w_scale = plgpu.load(gmem.w_scale.at[pl.ds(row, WG_ROWS)], layout=_LAYOUT.reduce(1), optimized=False)
          x_scale = plgpu.load(gmem.x_scale.at[pl.ds(token, tiling.tokens)], layout=_LAYOUT.reduce(0), optimized=False)
          total = total * lax.broadcast_in_dim(w_scale, total.shape, [0]) * lax.broadcast_in_dim(x_scale, total.shape, [1])
          # The last tile has left.
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # mutant: wait for a tile
          transposed = plgpu.layout_cast(total.astype(out_dtype), plgpu.Layout.WGMMA_TRANSPOSED)
          out_smem.at[wg].transpose((1, 0))[...] = transposed
          plgpu.commit_smem()  # mutant: fence of a tile
          plgpu.copy_smem_to_gmem(out_smem.at[wg], out_gmem.at[pl.ds(token, tiling.tokens), pl.ds(row, WG_ROWS)])

        step = _step(form, tiling, gmem, row_tile=row_tile, first_token=token, first_step=0)
        pipeline_at(row_tile, token_tile, step, compute)(gmem.x, gmem.w, allocations=allocations)

      plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    kernel,
    out_type=out_type,
    grid=(num_ctas,),
    grid_names=("cta",),
    num_threads=wgs + 1,
    thread_name="wg",
    scratch_types={"out_smem": plgpu.SMEM((wgs, tiling.tokens, WG_ROWS), out_dtype, transforms=transforms(out_dtype, WG_ROWS))},
    cost_estimate=cost.estimate(),
  )(operands)
