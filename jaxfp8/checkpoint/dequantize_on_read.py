"""Float8 matrices that a model cannot hold as float8, widened while they are read.

A merged array has one dtype and one kind of scales. What is stored otherwise (a manifest's `exceptions`) is multiplied out into
the stream's dtype, range by range, so that a process still reads only its part.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from jaxfp8.checkpoint.device_arrays import Range, Read
from jaxfp8.checkpoint.layout import scale_of_key, split_key
from jaxfp8.recipe import BLOCK


def widened(read: Read, exceptions: Mapping[str, str], expected: Mapping[str, tuple], dtype: np.dtype) -> Read:
  """`read` for `filling.fill`: arrays of modules in `exceptions` come in `dtype`.

  exceptions: module -> "channel" or "block128". expected: key -> (shape, dtype) of what is stored.
  """

  def read_widened(ranges: Iterable[Range]) -> dict[Range, np.ndarray]:
    ranges = list(ranges)
    scales = {}
    for where in ranges:
      module, _ = split_key(where.key)
      if module in exceptions:
        scale = scale_of_key(where.key, exceptions[module])
        scales[where] = Range(scale, 0, 0, expected[scale][0][0])
    arrays = dict(read({*ranges, *scales.values()}))
    for where, scale in scales.items():
      row, column = (where.start, 0) if where.axis == 0 else (0, where.start)
      arrays[where] = dequantize(arrays[where], arrays[scale], row, column).astype(dtype)
    return arrays

  return read_widened if exceptions else read


def dequantize(weight: np.ndarray, scale: np.ndarray, row: int = 0, column: int = 0) -> np.ndarray:
  """float32 [out, in] of a float8 weight with scales per channel or per block of 128.

  row, column: where in the matrix that `scale` belongs to this part of it begins.
  """
  wide = weight.astype(np.float32)
  if scale.ndim == 1:
    wide *= scale[row : row + len(wide), None]
    return wide
  factors = scale[(row + np.arange(len(wide))) // BLOCK]
  for block in range(column // BLOCK, -(-(column + wide.shape[1]) // BLOCK)):
    wide[:, max(0, block * BLOCK - column) : (block + 1) * BLOCK - column] *= factors[:, block, None]
  return wide
