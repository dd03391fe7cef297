"""The small operations as a GPU would run them, on a CPU (see pallas_kernels/interpret.py). For tests."""

from pallas_kernels import interpret
from pallas_kernels.fused import mosaic, xla


def _interpreted(name):
  def operation(*args, target=None, **kwargs):
    with interpret.mode():
      try:
        return getattr(mosaic, name)(*args, target=interpret.gpu(target), **kwargs)
      except NotImplementedError:
        return getattr(xla, name)(*args, **kwargs)

  return operation


residual_norm, rope_write, silu_multiply = (_interpreted(name) for name in ("residual_norm", "rope_write", "silu_multiply"))
