"""Dequantizes, while they are read, float8 matrices that a model does not hold as float8. Imports no jax.

Such matrices (a manifest's `exceptions`: head and embedding) are multiplied out into the dtype of the stream, range by range,
so that a process still reads only its shards.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from jaxfp8.checkpoint.stored_arrays import ArraySpec, Range, Read, scale_of_key, split_key
from jaxfp8.recipe import BLOCK


def dequantize_on_read(read: Read, exceptions: Mapping[str, str], expected: Mapping[str, ArraySpec], dtype: np.dtype) -> Read:
  """`read` for `load_arrays`, with the arrays of modules in `exceptions` in `dtype`.

  exceptions: module -> "channel" or "block128". expected: key -> shape and dtype of the stored array.
  """

  def read_dequantized(ranges: Iterable[Range]) -> dict[Range, np.ndarray]:
    ranges = list(ranges)
    scales = {}
    for weight in ranges:
      module, _ = split_key(weight.key)
      if module in exceptions:
        scale = scale_of_key(weight.key, exceptions[module])
        scales[weight] = Range(scale, 0, 0, expected[scale].shape[0])
    arrays = dict(read({*ranges, *scales.values()}))
    for weight, scale in scales.items():
      row, column = (weight.start, 0) if weight.axis == 0 else (0, weight.start)
      arrays[weight] = dequantize_part(arrays[weight], arrays[scale], row, column).astype(dtype)
    return arrays

  return read_dequantized if exceptions else read


def dequantize_part(weight: np.ndarray, scale: np.ndarray, row: int = 0, column: int = 0) -> np.ndarray:
  """float32 of a part of a float8 matrix [out, in], whose scales are per channel [out] or per block of 128.

  row, column: the indices in the whole matrix at which the part begins. `scale` is that of the whole matrix.
  """
  product = weight.astype(np.float32)
  if scale.ndim == 1:
    product *= scale[row : row + len(product), None]
    return product
  factors = scale[(row + np.arange(len(product))) // BLOCK]
  for block in range(column // BLOCK, -(-(column + product.shape[1]) // BLOCK)):
    product[:, max(0, block * BLOCK - column) : (block + 1) * BLOCK - column] *= factors[:, block, None]
  return product
