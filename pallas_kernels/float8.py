"""Rounding to float8: what kernels and models share. The traps of float8 are stated in jaxfp8/fp8.py."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

FLOAT8 = jnp.float8_e4m3fn
MAX = 448.0  # largest finite e4m3fn value (OCP 8-bit floating point specification, table 1)
GROUP = 128  # columns of activations that share a dynamic scale where the weights have a scale per block of 128 x 128
TINY = 2.0**-100  # below this a scale would be subnormal, which hardware flushes to 0


class Quantized(NamedTuple):
  """Activations value ~= values * scale: float8 [..., D], and float32 scales of one of three kinds.

  scale: [...], one per token; [ceil(D / 128), T], one per group of 128 columns and token of values [T, D] (a kernel reads those
    of neighbouring tokens together); or [], a static scale for all.
  """

  values: jax.Array
  scale: jax.Array


def scale_of(amax: jax.Array) -> jax.Array:
  """float32 amax * float32(1 / 448), and 1 where amax is (next to) 0."""
  return jnp.where(amax > TINY, amax * (1 / MAX), 1.0).astype(jnp.float32)


def to_float8(x: jax.Array) -> jax.Array:
  """Rounds to nearest even, saturating at +-448."""
  return jnp.clip(x, -MAX, MAX).astype(FLOAT8)


def quantize_tokens(
  x: jax.Array, scale: jax.Array | None = None, *, grouped: bool = False, bound: float | None = None
) -> Quantized:
  """x [..., D] in float8, with one dynamic scale per vector along the last axis, or with the float32 `scale` given.

  For activations a dynamic scale is one per token; for keys and values [T, K, H], one per token and head. A given scale
  broadcasts against the result's scale [...]. grouped: dynamic scales of x [T, D] are one per group of 128
  columns and token, [ceil(D / 128), T].

  bound: the largest amax that a dynamic scale is made of; larger values saturate (`activation_scale_ub` of FBGEMM's
    quantize_fp8_per_row).
  """
  x = x.astype(jnp.float32)
  if bound is not None and scale is None:
    x = jnp.clip(x, -bound, bound)  # a clipped value is the one that saturates: bound / scale = 448
  if grouped and scale is None:
    return _quantize_groups(x)
  if scale is None:
    scale = scale_of(jnp.max(jnp.abs(x), axis=-1))
  return Quantized(to_float8(x * (1 / scale)[..., None]), scale)


def _quantize_groups(x_TD: jax.Array) -> Quantized:
  """float32 [T, D]; the last group may be narrower than 128 columns."""
  T, D = x_TD.shape
  padded = jnp.pad(x_TD, ((0, 0), (0, -D % GROUP)))
  groups = padded.reshape(T, -1, GROUP)
  scale = scale_of(jnp.max(jnp.abs(groups), axis=-1))
  values = to_float8(groups * (1 / scale)[..., None]).reshape(padded.shape)[:, :D]
  return Quantized(values, scale.T)
