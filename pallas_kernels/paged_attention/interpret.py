"""paged_attention as a GPU would run it, on a CPU (see pallas_kernels/interpret.py). For tests."""

from pallas_kernels import interpret
from pallas_kernels.paged_attention import wgmma, xla


def paged_attention(*args, target=None, **kwargs):
  with interpret.mode():
    try:
      return wgmma.paged_attention(*args, target=interpret.gpu(target), **kwargs)
    except NotImplementedError:
      return xla.paged_attention(*args, **kwargs)
