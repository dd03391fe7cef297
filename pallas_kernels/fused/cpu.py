"""The small operations for XLA:CPU; the plain truth, with pages written by page_write's cpu.py."""

from pallas_kernels.fused.reference import residual_norm, rope_write_with, silu_multiply

__all__ = ["residual_norm", "rope_write", "silu_multiply"]

rope_write = rope_write_with("cpu")
