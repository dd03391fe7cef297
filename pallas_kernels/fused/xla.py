"""The small operations in plain XLA, for any GPU, fused as XLA sees fit; pages are written by page_write's xla.py."""

from pallas_kernels.fused.reference import residual_norm, rope_write_with, silu_multiply

__all__ = ["residual_norm", "rope_write", "silu_multiply"]

rope_write = rope_write_with("xla")
