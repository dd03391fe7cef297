"""page_write as a GPU would run it: there is no kernel yet, so plain XLA."""

from pallas_kernels.page_write.xla import page_write

__all__ = ["page_write"]
