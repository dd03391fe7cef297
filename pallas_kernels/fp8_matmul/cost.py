"""The bytes and operations of a call of fp8_matmul, from the shapes of its arguments and results."""

import jax.numpy as jnp

from pallas_kernels.costs import Cost, bytes_of
from pallas_kernels.dispatch import Target
from pallas_kernels.fp8_matmul.tiling import Form, choose_tiling


def tma_cost(T: int, F: int, D: int, form: Form, target: Target) -> tuple[int, int]:
  """(bytes that TMA reads, float operations) of the sm90 kernel, without scales and without the sums over splits."""
  tiling = choose_tiling(T, F, D, form, target)
  tokens = -(-T // 8) * 8
  read_w = -(-tokens // tiling.tokens) * F * D * jnp.dtype(form.w_dtype).itemsize
  read_x = -(-F // tiling.rows) * tokens * D * jnp.dtype(form.x_dtype).itemsize
  return read_w + read_x, 2 * T * F * D


def call_cost(x_TD, w_FD, scales, y) -> Cost:
  """The traffic with device memory, without what tiles read again from L2.

  scales: those of w and of x that the kernel reads, each an array or None. y: the kernel's result.
  """
  w_scale, x_scale = scales
  number_format = "fp8" if x_TD.dtype == jnp.float8_e4m3fn else "bf16"
  return Cost(
    bytes_of(w_FD, w_scale),
    read_bytes=bytes_of(x_TD, x_scale),
    written_bytes=bytes_of(y),
    flops=2 * x_TD.shape[0] * w_FD.size,
    number_format=number_format,
  )


def least_work(x_TD, w_FD, scales) -> tuple[int, int]:
  """(bytes, float operations) that no implementation avoids: each operand read once, a bf16 result written once."""
  T, F = x_TD.shape[0], w_FD.shape[0]
  return bytes_of(x_TD, w_FD, *scales) + 2 * T * F, 2 * T * w_FD.size
