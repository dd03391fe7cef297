"""Representative calls of every kernel, by name: compiled and inspected for an absent GPU, compared, timed and tuned on one.

Sizes are those of real Llamas (70B cut over eight GPUs, 8B, SmolLM2, a 405B's longest row), so that tiles, rings and registers
are the ones of real models.
"""

from pallas_kernels.case import Case
from pallas_kernels.fp8_matmul import cases as fp8_matmul
from pallas_kernels.fused import cases as fused
from pallas_kernels.paged_attention import cases as paged_attention

CASES: tuple[Case, ...] = (*fp8_matmul.CASES, *paged_attention.CASES, *fused.CASES)


def by_name(name: str) -> Case:
  """Raises KeyError for a name that no case has."""
  return {case.name: case for case in CASES}[name]
