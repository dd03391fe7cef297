"""Operations of an FP8 Llama on raw arrays: `fp8_matmul`, `paged_attention` and `page_write`.

Each operation is a folder: `api.py` checks the call and dispatches, `reference.py` is the plain truth, the other files are
implementations for one kind of hardware. This package never imports jaxfp8.
"""

from pallas_kernels.dispatch import Target
from pallas_kernels.fp8_matmul.api import fp8_matmul
from pallas_kernels.page_write.api import page_write
from pallas_kernels.paged_attention.api import paged_attention

__all__ = ["Target", "fp8_matmul", "page_write", "paged_attention"]
