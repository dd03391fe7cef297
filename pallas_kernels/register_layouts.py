"""Where a warpgroup's 128 threads hold an array, beside Mosaic's own layouts (shapes as in its TiledLayout)."""

import functools
import math

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import fragmented_array


@functools.cache
def row_layout(num_rows: int, run: int = 1):
  """For [num_rows, n * 32 * run]: a warp holds a row (or every 2nd or 4th one), its 32 lanes 32 runs of neighbours of it.

  With run = 1 rows may lie anywhere and in any order of axes, since each thread reads or writes single elements: a warp
  touches 32 consecutive ones. A row's sum needs no shared memory. Where 4 does not divide the rows, warps repeat work.
  """
  rows = math.gcd(num_rows, 4)
  tiling = fragmented_array.Tiling(((rows, 32 * run), (run,)))
  warps = (-3,) if rows > 1 else ()
  repeated = (fragmented_array.Replicated(4 // rows),) if rows < 4 else ()
  return plgpu.Layout.TILED(tiling, warp_dims=warps + repeated, lane_dims=(-2,), vector_dim=-1)


def flat_layout(size: int, itemsize: int):
  """For [size], a multiple of 128: each thread holds runs of up to 16 bytes, read and written at once.

  The same layout serves arrays of other dtypes beside one of `itemsize` bytes.
  """
  longest = 16 // itemsize
  run = math.gcd(size // 128, longest)
  return plgpu.Layout.WG_STRIDED((size,), vec_size=run)
