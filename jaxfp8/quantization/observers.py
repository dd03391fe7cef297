"""Histograms of magnitudes, and the static float8 scales chosen from them: maximum, percentile, least squared error.

A bin spans a 64th of an octave, so that one pass over a text serves every choice of a scale. Imports no jax; refuses to know
the model and the text.
"""

import ml_dtypes
import numpy as np

from jaxfp8.recipe import FLOAT8_MAX

SCALE_CHOICES = ("max", "percentile", "mse")
PERCENTILE = 99.999
_BIN_BITS = 17  # of a float32, dropped: sign, exponent and six bits of mantissa stay
_NUM_BINS = 1 << (31 - _BIN_BITS)


class HistogramObserver:
  """A histogram of magnitudes in bins of a 64th of an octave, and the maximum, for each of `count` groups."""

  def __init__(self, count: int = 1):
    self.bins = np.zeros((count, _NUM_BINS), np.int64)
    self.amax = np.zeros(count, np.float32)

  def add(self, values: np.ndarray) -> None:
    """Counts the magnitudes of values [count, ...], float32."""
    for row, (bins, part) in enumerate(zip(self.bins, values, strict=True)):
      size = np.abs(np.ascontiguousarray(part, np.float32)).reshape(-1)
      bins += np.bincount(size.view(np.uint32) >> _BIN_BITS, minlength=_NUM_BINS)[:_NUM_BINS]
      self.amax[row] = max(self.amax[row], size.max(initial=0))

  def scales(self) -> dict[str, np.ndarray]:
    """float32 [count] for each of SCALE_CHOICES. A group of zeros alone has scale 1."""
    amax_of_choice = {
      "max": self.amax,
      "percentile": np.minimum(self.amax, [_percentile(bins) for bins in self.bins]),
      "mse": np.array([_least_squares(*pair) for pair in zip(self.bins, self.amax, strict=True)]),
    }
    return {name: np.where(amax > 2.0**-100, amax / FLOAT8_MAX, 1).astype(np.float32) for name, amax in amax_of_choice.items()}


def _centres() -> np.ndarray:
  """float64 [_NUM_BINS]: the magnitude in the middle of each bin."""
  bits = (np.arange(_NUM_BINS, dtype=np.uint32) << _BIN_BITS) | (1 << (_BIN_BITS - 1))
  return np.nan_to_num(bits.view(np.float32)).astype(np.float64)


def _percentile(bins: np.ndarray) -> float:
  """The magnitude that PERCENTILE percent of the values other than zero do not exceed."""
  bins = np.where(np.arange(_NUM_BINS) > 0, bins, 0)
  index = int(np.searchsorted(np.cumsum(bins), bins.sum() * PERCENTILE / 100))
  return float(_centres()[min(index, _NUM_BINS - 1)])


def _least_squares(bins: np.ndarray, amax: float | np.floating) -> float:
  """The largest magnitude to represent, from amax down to a 64th of amax, that gives the least squared error."""
  occupied = np.flatnonzero(bins)
  size, weight = np.minimum(_centres()[occupied], amax), bins[occupied]

  def error(candidate: float | np.floating) -> float:
    scale = candidate / FLOAT8_MAX
    rounded = np.minimum(size / scale, FLOAT8_MAX).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    return float(np.sum(weight * np.square(size - rounded)))

  return min((float(amax) * 2 ** (-step / 8) for step in range(49)), key=error) if amax > 0 else 0.0
