"""float8 numbers: `QArray` and the quantizers. Plain arithmetic on arrays; refuses to know models and kernels.

Five traps, stated here once:
  - `astype(float8_e4m3fn)` does not saturate (465 and above become NaN), so values are clipped to +-448 first.
  - Test dtypes with `jnp.issubdtype` or `==`; `isinstance` says nothing about a float8 array.
  - A value is multiplied with the reciprocal of its scale. XLA compiles a division by a broadcast scale to that product, and
    at a tie between two float8 values the last bit decides.
  - A row of zeros has scale 1, not 0, since values are divided by scales.
  - XLA compiles `x / 448` as a product with float32(1 / 448), which rounds differently. Scales are therefore written as that
    product, and have the same bits inside and outside of a compiled program.
"""

import flax.struct
import jax
import jax.numpy as jnp

from jaxfp8.errors import InputError
from jaxfp8.recipe import BLOCK, Granularity
from pallas_kernels.float8 import FLOAT8, MAX, quantize_tokens, scale_of, to_float8

__all__ = ["FLOAT8", "MAX", "QArray", "dequantize", "quantize", "quantize_tokens", "scale_of", "to_float8"]


@flax.struct.dataclass
class QArray:
  """value ~= qvalue * scale. The scale always multiplies and is always float32.

  qvalue: float8_e4m3fn [..., F, D].
  scale: float32 [..., F], one per output channel, or [..., ceil(F / R), ceil(D / 128)], one per block of R rows and 128
    columns, where R is a power of two: 128 from `quantize`, less in a model's merged weights.
  """

  qvalue: jax.Array
  scale: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    """That of the values."""
    return self.qvalue.shape


def quantize(w_FD: jax.Array, granularity: str = "channel") -> QArray:
  """Rounds weights [F, D] to float8 with scale = amax / 448 per "tensor", "channel" (row) or "block128".

  A per-tensor scale is repeated for every channel (exact). Raises InputError for another granularity or rank.
  """
  if w_FD.ndim != 2:
    raise InputError(f"quantize: weights must be [F, D]; got shape {w_FD.shape}. Flatten them first.")
  w = w_FD.astype(jnp.float32)
  if granularity == Granularity.TENSOR:
    scale = jnp.broadcast_to(scale_of(jnp.max(jnp.abs(w))), w.shape[:1])
  elif granularity == Granularity.CHANNEL:
    scale = scale_of(jnp.max(jnp.abs(w), axis=1))
  elif granularity == Granularity.BLOCK128:
    return _quantize_blocks(w)
  else:
    raise InputError(f"quantize: granularity must be tensor, channel or block128; got {granularity!r}.")
  return QArray(to_float8(w * (1 / scale)[:, None]), scale)


def dequantize(q: QArray) -> jax.Array:
  """The values that `q` [F, D] stands for, float32 [F, D]."""
  scale = q.scale
  if scale.ndim == 1:
    return q.qvalue.astype(jnp.float32) * scale[:, None]
  F, D = q.qvalue.shape
  per_row = -(-F // scale.shape[0])
  rows = 1 << (per_row - 1).bit_length()  # the last block may be ragged: 130 rows with two scales are 128 and 2
  scale = jnp.repeat(jnp.repeat(scale, rows, axis=0)[:F], BLOCK, axis=1)[:, :D]
  return q.qvalue.astype(jnp.float32) * scale


def _quantize_blocks(w: jax.Array) -> QArray:
  """One scale for each block of 128 x 128 of float32 weights [F, D]; narrower blocks at the edges."""
  F, D = w.shape
  rows, columns = -(-F // BLOCK), -(-D // BLOCK)
  padded = jnp.pad(w, ((0, rows * BLOCK - F), (0, columns * BLOCK - D)))
  blocks = padded.reshape(rows, BLOCK, columns, BLOCK)
  scale = scale_of(jnp.max(jnp.abs(blocks), axis=(1, 3)))
  q = to_float8(blocks * (1 / scale)[:, None, :, None]).reshape(padded.shape)[:F, :D]
  return QArray(q, scale)
