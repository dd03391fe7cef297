"""Rounding to float8: what kernels and models share. The traps of float8 are stated in jaxfp8/fp8.py."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

FLOAT8 = jnp.float8_e4m3fn
MAX = 448.0  # largest finite e4m3fn value (OCP 8-bit floating point specification, table 1)
TINY = 2.0**-100  # below this a scale would be subnormal, which hardware flushes to 0


class Quantized(NamedTuple):
  """Activations value ~= values * scale: float8 [..., D] and float32 [...], or [] for a static scale."""

  values: jax.Array
  scale: jax.Array


def scale_of(amax: jax.Array) -> jax.Array:
  """float32 amax * float32(1 / 448), and 1 where amax is (next to) 0."""
  return jnp.where(amax > TINY, amax * (1 / MAX), 1.0).astype(jnp.float32)


def to_float8(x: jax.Array) -> jax.Array:
  """Rounds to nearest even, saturating at +-448."""
  return jnp.clip(x, -MAX, MAX).astype(FLOAT8)


def quantize_tokens(x: jax.Array, scale: jax.Array | None = None) -> Quantized:
  """x [..., D] in float8, with one dynamic scale per vector along the last axis, or with the float32 `scale` given.

  For activations a dynamic scale is one per token; for keys and values [T, K, H], one per token and head. A given scale
  broadcasts against the result's scale [...].
  """
  x = x.astype(jnp.float32)
  if scale is None:
    scale = scale_of(jnp.max(jnp.abs(x), axis=-1))
  return Quantized(to_float8(x * (1 / scale)[..., None]), scale)
