"""Operations of an FP8 Llama on raw arrays: `fp8_matmul`, `paged_attention`, `page_write` and what lies between them.

Each operation is a folder: `api.py` checks the call and dispatches, `reference.py` is the plain truth, the other files are
implementations for one kind of hardware. This package never imports jaxfp8.
"""

from pallas_kernels.debug import debug_checks
from pallas_kernels.dispatch import Target
from pallas_kernels.float8 import Quantized
from pallas_kernels.fp8_matmul.api import PartialSums, fp8_matmul, fp8_matmul_sums
from pallas_kernels.fused.api import page_write, residual_norm, rope_write, silu_multiply
from pallas_kernels.paged_attention.api import paged_attention

__all__ = [
  "PartialSums",
  "Quantized",
  "Target",
  "debug_checks",
  "fp8_matmul",
  "fp8_matmul_sums",
  "page_write",
  "paged_attention",
  "residual_norm",
  "rope_write",
  "silu_multiply",
]
