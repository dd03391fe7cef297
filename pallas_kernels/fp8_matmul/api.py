"""`fp8_matmul`: the linear layer's product, checked once here and dispatched.

Letters: T tokens, D inputs, F outputs. Weights are [out, in], since FP8 tensor cores want both operands K-major.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import dispatch

BLOCK = 128  # side of a weight-scale block


class PartialSums(NamedTuple):
  """A product whose last steps are left to its reader: y [T, F] = (sum over S of splits_STF) * w_scale * x_scale.

  splits_STF: float32 sums over each split of D; for S = 1 the product itself, if both scales are None.
  w_scale: float32 [F], or None if already applied. x_scale: float32 [T] or [], or None if already applied, as scales of groups
  of columns always are.
  """

  splits_STF: jax.Array
  w_scale: jax.Array | None = None
  x_scale: jax.Array | None = None

  def finish(self, dtype: DTypeLike) -> jax.Array:
    """y [T, F] in `dtype`."""
    y = self.splits_STF[0] if self.splits_STF.shape[0] == 1 else jnp.sum(self.splits_STF, axis=0)
    if self.w_scale is not None:
      y = y * self.w_scale
    if self.x_scale is not None:
      y = y * (self.x_scale[:, None] if self.x_scale.ndim else self.x_scale)
    return y.astype(dtype)


def fp8_matmul(*args, out_dtype: DTypeLike = jnp.bfloat16, **kwargs) -> jax.Array:
  """(x * x_scale) @ (w * w_scale)^T, [T, F], accumulated in float32. Arguments and errors are those of `fp8_matmul_sums`."""
  return fp8_matmul_sums(*args, out_dtype=out_dtype, **kwargs).finish(out_dtype)


def fp8_matmul_sums(
  x_TD: jax.Array,
  w_FD: jax.Array,
  w_scale: jax.Array | None = None,
  x_scale: jax.Array | None = None,
  *,
  out_dtype: DTypeLike = jnp.bfloat16,
  implementation: str = "auto",
  target: dispatch.Target | None = None,
) -> PartialSums:
  """The product as it leaves its kernel: splits to be summed and scaled, or a finished product in `out_dtype`.

  Args:
    x_TD: activations, bf16 or f32; float8_e4m3fn with `x_scale` (W8A8).
    w_FD: weights, float8_e4m3fn with `w_scale`, or bf16 / f32 without.
    w_scale: float32, [F] per output channel, or [F / R, ceil(D / 128)] per block of R rows and 128 columns, where R is a
      power of two that divides F (128 for ordinary linears, less where a head is smaller than a block).
    x_scale: only with float8 activations, float32: [T] per token, [] for a static scale, or [ceil(D / 128), T] per group
      of 128 columns and token, which needs block scales of the weights.
    implementation: "auto", or the name of an implementation (`dispatch.implementations`).
    target: what the program is compiled for; None means the default device.

  Raises:
    ValueError: a shape or dtype breaks these rules, or a forced implementation cannot run.
  """
  _check(x_TD, w_FD, w_scale, x_scale)
  target = target or dispatch.default_target()
  y = dispatch.run("fp8_matmul", implementation, target, x_TD, w_FD, w_scale, x_scale, out_dtype=out_dtype)
  return y if isinstance(y, PartialSums) else PartialSums(y[None])


def is_float8(x: jax.Array) -> bool:
  return x.dtype == jnp.float8_e4m3fn


def is_grouped(x_scale: jax.Array | None) -> bool:
  """Whether activations have a scale per group of 128 columns and token."""
  return x_scale is not None and x_scale.ndim == 2


def block_rows(w_FD: jax.Array, w_scale: jax.Array) -> int:
  """R: rows of w that share one scale row (1 for per-channel scales)."""
  return w_FD.shape[0] // w_scale.shape[0]


def _check(x_TD, w_FD, w_scale, x_scale):
  if x_TD.ndim != 2 or w_FD.ndim != 2 or x_TD.shape[1] != w_FD.shape[1]:
    raise ValueError(
      f"fp8_matmul: x [T, D] and w [F, D] must agree in D; got x {x_TD.shape} and w {w_FD.shape}. "
      "Store weights as [out, in] and flatten x to two axes."
    )
  if is_float8(w_FD) != (w_scale is not None):
    raise ValueError(
      f"fp8_matmul: float8 weights need w_scale and others must not have one; got {w_FD.dtype} and "
      f"w_scale={'None' if w_scale is None else w_scale.shape}."
    )
  if is_float8(x_TD) != (x_scale is not None):
    raise ValueError(
      f"fp8_matmul: float8 activations need x_scale and others must not have one; got {x_TD.dtype} and "
      f"x_scale={'None' if x_scale is None else x_scale.shape}."
    )
  for name, x in (("x", x_TD), ("w", w_FD)):
    if x.dtype not in (jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32):
      raise ValueError(f"fp8_matmul: {name} must be float8_e4m3fn, bfloat16 or float32; got {x.dtype}. Cast it first.")
  if x_scale is not None:
    _check_x_scale(x_TD, x_scale, w_scale)
  if w_scale is not None:
    _check_w_scale(w_FD, w_scale)


def _check_x_scale(x_TD, x_scale, w_scale):
  T, D = x_TD.shape
  groups = (-(-D // BLOCK), T)
  if x_scale.dtype != jnp.float32 or x_scale.shape not in ((), (T,), groups):
    raise ValueError(
      f"fp8_matmul: x_scale must be float32 [] or [T={T}] or [ceil(D / {BLOCK}), T]={groups}; got {x_scale.dtype} "
      f"{x_scale.shape}. Use one scale for all, one per token, or one per {BLOCK} columns and token."
    )
  if is_grouped(x_scale) and (w_scale is None or w_scale.ndim != 2):
    raise ValueError(
      f"fp8_matmul: one x_scale per {BLOCK} columns and token needs weights with block scales; got w_scale "
      f"{'None' if w_scale is None else w_scale.shape}. Use one scale per token."
    )


def _check_w_scale(w_FD, w_scale):
  F, D = w_FD.shape
  blocks = -(-D // BLOCK)
  per_channel = w_scale.shape == (F,)
  per_block = w_scale.ndim == 2 and w_scale.shape[1] == blocks and _divides_into_blocks(F, w_scale.shape[0])
  if w_scale.dtype != jnp.float32 or not (per_channel or per_block):
    raise ValueError(
      f"fp8_matmul: w_scale must be float32 [F={F}] or [F / R, ceil(D / {BLOCK})={blocks}] with R a power of two that divides "
      f"F; got {w_scale.dtype} {w_scale.shape}. Expand a per-tensor scale to one per channel, and the scales of ragged blocks "
      "to smaller ones (both exact)."
    )


def _divides_into_blocks(F: int, rows: int) -> bool:
  """Powers of two only: 130 rows with two scales are a block of 128 and a ragged one of 2, not two of 65."""
  return rows == 1 or (rows > 0 and F % rows == 0 and (F // rows).bit_count() == 1)
