"""Representative calls of the fused small operations."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax

from pallas_kernels.case import BF16, F32, FP8, I32, NUM_PAGES, Case, Flight
from pallas_kernels.costs import Cost
from pallas_kernels.dispatch import Target
from pallas_kernels.fp8_matmul.api import PartialSums
from pallas_kernels.fused import api, cost

_PAGE_SIZE = 64


@dataclasses.dataclass(frozen=True)
class NormCase(Case):
  """residual_norm of T tokens of D, to float8."""

  name: str
  T: int
  D: int
  grouped: bool = False
  operation: ClassVar[str] = "residual_norm"

  def arguments(self) -> tuple:
    x = jax.ShapeDtypeStruct((self.T, self.D), BF16)
    return x, x, jax.ShapeDtypeStruct((self.D,), F32)

  def call(self, *arguments, target: Target, implementation: str = "sm90") -> tuple:
    options = {"quantize": True, "grouped": self.grouped, "implementation": implementation, "target": target}
    return api.residual_norm(*arguments, eps=1e-5, **options)

  def flight(self, target: Target) -> Flight:
    return Flight(self.T, 8 * self.D)

  def cost(self, target: Target) -> tuple[int, int]:
    outputs = jax.ShapeDtypeStruct((self.T, self.D), BF16), *_quantized(self.T, self.D, self.grouped)
    x, y, weight = self.arguments()
    return _bytes_and_flops(cost.residual_norm(x, y, weight, outputs))

  @property
  def rounds(self) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class SiluCase(Case):
  """silu_multiply of T tokens of F, from S splits of the product (1: a finished product), to float8."""

  name: str
  T: int
  F: int
  S: int
  grouped: bool = False
  operation: ClassVar[str] = "silu_multiply"

  def arguments(self) -> tuple:
    return _sums(self.S, self.T, 2 * self.F)

  def call(self, *arguments, target: Target, implementation: str = "sm90") -> Any:
    options = {"quantize": True, "grouped": self.grouped, "implementation": implementation, "target": target}
    return api.silu_multiply(PartialSums(*arguments), **options)

  def flight(self, target: Target) -> Flight:
    return Flight(self.T, 2 * self.F * self.S * self.arguments()[0].dtype.itemsize)

  def cost(self, target: Target) -> tuple[int, int]:
    return _bytes_and_flops(cost.silu_multiply(PartialSums(*self.arguments()), _quantized(self.T, self.F, self.grouped)))

  @property
  def rounds(self) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class RopeCase(Case):
  """rope_write of T decoded tokens into pages, from qkv in S splits (1: a finished product)."""

  name: str
  pages: str
  T: int
  K: int
  G: int
  H: int
  S: int
  operation: ClassVar[str] = "rope_write"

  def arguments(self) -> tuple:
    dtype, ints = FP8 if self.pages == "fp8" else BF16, functools.partial(jax.ShapeDtypeStruct, dtype=I32)
    k, v = (NUM_PAGES, self.K, _PAGE_SIZE, self.H), (NUM_PAGES, self.K, self.H, _PAGE_SIZE)
    scale = (jax.ShapeDtypeStruct((NUM_PAGES, self.K, _PAGE_SIZE), F32),) * (2 if dtype == FP8 else 0)
    pages = jax.ShapeDtypeStruct(k, dtype), jax.ShapeDtypeStruct(v, dtype), *scale
    angles = jax.ShapeDtypeStruct((self.T, self.H // 2), F32)
    return *_sums(self.S, self.T, self.K * (self.G + 2) * self.H), angles, angles, pages, ints((self.T, 64)), ints((self.T,))

  def call(self, *arguments, target: Target, implementation: str = "sm90") -> tuple:
    *sums, cos, sin, pages, table, lengths = arguments
    options = {"implementation": implementation, "target": target}
    return api.rope_write(PartialSums(*sums), cos, sin, pages, table, None, lengths, **options)

  def flight(self, target: Target) -> Flight:
    return Flight(self.T * self.K, self.S * (self.G + 2) * self.H * self.arguments()[0].dtype.itemsize)

  def cost(self, target: Target) -> tuple[int, int]:
    *sums, cos, sin, pages, _, _ = self.arguments()
    q = jax.ShapeDtypeStruct((self.T, self.K * self.G, self.H), BF16)
    return _bytes_and_flops(cost.rope_write(PartialSums(*sums), cos, sin, pages, q))

  @property
  def rounds(self) -> bool:
    return self.pages == "fp8"


def _sums(S, T, F) -> tuple:
  """The arrays of fp8_matmul's `PartialSums`."""
  if S == 1:
    return jax.ShapeDtypeStruct((S, T, F), BF16), None, None
  return jax.ShapeDtypeStruct((S, T, F), F32), jax.ShapeDtypeStruct((F,), F32), jax.ShapeDtypeStruct((T,), F32)


def _quantized(T, width, grouped) -> tuple:
  """The results of a kernel that rounds to float8 with a scale per token, or per group of 128 columns and token."""
  groups = (width // 128,) if grouped else ()
  return jax.ShapeDtypeStruct((T, width), FP8), jax.ShapeDtypeStruct((*groups, T), F32)


def _bytes_and_flops(cost: Cost) -> tuple[int, int]:
  return cost.total_bytes, cost.flops


CASES = (
  NormCase("norm-70b", 8, 8192),
  NormCase("norm-405b", 8, 16384),
  NormCase("norm-odd-width", 8, 640),
  NormCase("norm-70b-groups", 8, 8192, grouped=True),
  NormCase("norm-405b-groups", 8, 16384, grouped=True),
  NormCase("norm-odd-width-groups", 8, 640, grouped=True),
  SiluCase("silu-70b", 8, 3584, 1),
  SiluCase("silu-405b-parts", 8, 6656, 4),
  SiluCase("silu-70b-on-one", 8, 28672, 1),
  SiluCase("silu-70b-groups", 8, 3584, 1, grouped=True),
  SiluCase("silu-405b-parts-groups", 8, 6656, 4, grouped=True),
  RopeCase("rope-70b", "fp8", 8, 1, 8, 128, 8),
  RopeCase("rope-8b-on-one", "fp8", 8, 8, 4, 128, 1),
  RopeCase("rope-3-heads", "fp8", 8, 3, 3, 64, 6),
  RopeCase("rope-bf16-405b", "bf16", 8, 1, 16, 128, 8),
)
