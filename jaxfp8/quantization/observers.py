"""How large numbers were, and the static float8 scales that follow: the largest, a percentile, the least squared error.

Sizes are counted in bins of a 64th of an octave, so that one pass over a text serves every choice. Numpy only; refuses to know
where the numbers come from.
"""

import ml_dtypes
import numpy as np

from jaxfp8.recipe import FLOAT8_MAX

SCALES = ("max", "percentile", "mse")
PERCENTILE = 99.999
_BIN_BITS = 17  # of a float32, dropped: sign, exponent and six bits of mantissa stay
_NUM_BINS = 1 << (31 - _BIN_BITS)


class HistogramObserver:
  """How often each size of a number occurred, in bins of a 64th of an octave, for `count` groups side by side."""

  def __init__(self, count: int = 1):
    self.bins = np.zeros((count, _NUM_BINS), np.int64)
    self.amax = np.zeros(count, np.float32)

  def add(self, values: np.ndarray) -> None:
    """values: [count, ...], float32."""
    for row, (bins, part) in enumerate(zip(self.bins, values, strict=True)):
      size = np.abs(np.ascontiguousarray(part, np.float32)).reshape(-1)
      bins += np.bincount(size.view(np.uint32) >> _BIN_BITS, minlength=_NUM_BINS)[:_NUM_BINS]
      self.amax[row] = max(self.amax[row], size.max(initial=0))

  def scales(self) -> dict[str, np.ndarray]:
    """float32 [count] for each of SCALES. A group that was zero throughout has scale 1."""
    found = {
      "max": self.amax,
      "percentile": np.minimum(self.amax, [_percentile(bins) for bins in self.bins]),
      "mse": np.array([_least_squares(*pair) for pair in zip(self.bins, self.amax, strict=True)]),
    }
    return {name: np.where(amax > 2.0**-100, amax / FLOAT8_MAX, 1).astype(np.float32) for name, amax in found.items()}


def _centres() -> np.ndarray:
  bits = (np.arange(_NUM_BINS, dtype=np.uint32) << _BIN_BITS) | (1 << (_BIN_BITS - 1))
  return np.nan_to_num(bits.view(np.float32)).astype(np.float64)


def _percentile(bins: np.ndarray) -> float:
  """What PERCENTILE of all sizes but zero do not exceed."""
  bins = np.where(np.arange(_NUM_BINS) > 0, bins, 0)
  place = int(np.searchsorted(np.cumsum(bins), bins.sum() * PERCENTILE / 100))
  return float(_centres()[min(place, _NUM_BINS - 1)])


def _least_squares(bins: np.ndarray, amax: float | np.floating) -> float:
  """The largest size to represent, from amax down to a 64th of it, with the least squared error of all values."""
  there = np.flatnonzero(bins)
  size, weight = np.minimum(_centres()[there], amax), bins[there]

  def error(candidate: float | np.floating) -> float:
    scale = candidate / FLOAT8_MAX
    rounded = np.minimum(size / scale, FLOAT8_MAX).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    return float(np.sum(weight * np.square(size - rounded)))

  return min((float(amax) * 2 ** (-step / 8) for step in range(49)), key=error) if amax > 0 else 0.0
