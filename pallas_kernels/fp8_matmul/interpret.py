"""fp8_matmul as a GPU would run it, on a CPU (see pallas_kernels/interpret.py). For tests."""

from pallas_kernels import interpret
from pallas_kernels.fp8_matmul import wgmma, xla


def fp8_matmul(x_TD, w_FD, w_scale, x_scale, *, out_dtype, target=None):
  with interpret.mode():
    try:
      return wgmma.fp8_matmul(x_TD, w_FD, w_scale, x_scale, out_dtype=out_dtype, target=interpret.gpu(target))
    except NotImplementedError:
      return xla.fp8_matmul(x_TD, w_FD, w_scale, x_scale, out_dtype=out_dtype)
