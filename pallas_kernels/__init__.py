"""The operations of an FP8 Llama on raw arrays: `fp8_matmul`, `paged_attention`, and the small operations between them.

Each operation is a folder: `api.py` checks the call and dispatches, `reference.py` is the plain truth, and every implementation
is a file named after the hardware that it runs on; README.md lists the files. `dispatch.py` has the one table of kernels.
Refuses to know models, checkpoints and engines. Imports jax and nothing of jaxfp8.
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
