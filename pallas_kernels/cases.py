"""Representative calls of every kernel, by name: what is compiled and inspected for a GPU that is not there.

Sizes are those of real Llamas (70B cut over eight GPUs, 8B, SmolLM2, a 405B's longest row), so that tiles, rings and registers
are the ones a user gets.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Target
from pallas_kernels.fp8_matmul import api as matmul_api
from pallas_kernels.fp8_matmul import tiling as matmul_tiling
from pallas_kernels.fused import api as fused_api
from pallas_kernels.fused import cost as fused_cost
from pallas_kernels.paged_attention import api as attention_api
from pallas_kernels.paged_attention import tiling as attention_tiling

FP8, BF16, F32 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
_NUM_PAGES = 1024


@dataclasses.dataclass(frozen=True)
class Flight:
  """ctas in the grid; bytes of weights or pages under way to each while its ring is full."""

  ctas: int
  bytes_per_cta: int

  def per_sm(self, ctas_per_sm: int, num_sms: int) -> int:
    return min(ctas_per_sm, -(-self.ctas // num_sms)) * self.bytes_per_cta


@dataclasses.dataclass(frozen=True)
class MatmulCase:
  """y [T, F] = x [T, D] w^T; form is "w8a8", "w8a16" or "bf16", block_rows 0 means a scale per channel."""

  name: str
  form: str
  T: int
  F: int
  D: int
  block_rows: int = 0
  kernel: str = "fp8_matmul"

  @property
  def skinny(self) -> bool:
    return self.T <= matmul_tiling.MAX_SKINNY

  def arguments(self) -> tuple:
    x = jax.ShapeDtypeStruct((self.T, self.D), FP8 if self.form == "w8a8" else BF16)
    w = jax.ShapeDtypeStruct((self.F, self.D), BF16 if self.form == "bf16" else FP8)
    shape = (self.F // self.block_rows, -(-self.D // matmul_api.BLOCK)) if self.block_rows else (self.F,)
    w_scale = None if self.form == "bf16" else jax.ShapeDtypeStruct(shape, F32)
    return x, w, w_scale, jax.ShapeDtypeStruct((self.T,), F32) if self.form == "w8a8" else None

  def call(self, *arguments, target: Target, implementation: str = "sm90"):
    return matmul_api.fp8_matmul(*arguments, implementation=implementation, target=target)

  def _tiling(self, target):
    form = matmul_tiling.form_of(*self.arguments()[:3])
    return form, matmul_tiling.choose_tiling(self.T, self.F, self.D, form, target)

  def flight(self, target: Target) -> Flight:
    form, tiling = self._tiling(target)
    tiles = -(-self.F // tiling.rows) * -(-self.T // tiling.tokens) * tiling.splits
    ctas = tiles if self.skinny else min(tiles, target.num_sms)
    return Flight(ctas, tiling.weight_bytes_in_flight(form.w_dtype))

  def cost(self, target: Target) -> tuple[int, int]:
    return matmul_tiling.cost(self.T, self.F, self.D, self._tiling(target)[0], target)


@dataclasses.dataclass(frozen=True)
class AttentionCase:
  """B sequences of up to M pages; T query tokens, or None for decode."""

  name: str
  pages: str
  T: int | None
  B: int
  N: int
  K: int
  H: int
  C: int
  M: int
  kernel: str = "paged_attention"

  @property
  def skinny(self) -> bool:
    return self.T is None

  def arguments(self) -> tuple:
    dtype = FP8 if self.pages == "fp8" else BF16
    q = jax.ShapeDtypeStruct((self.T or self.B, self.N, self.H), BF16)
    k = jax.ShapeDtypeStruct((_NUM_PAGES, self.K, self.C, self.H), dtype)
    v = jax.ShapeDtypeStruct((_NUM_PAGES, self.K, self.H, self.C), dtype)
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    scale = jax.ShapeDtypeStruct((_NUM_PAGES, self.K, self.C), F32) if dtype == FP8 else None
    starts = None if self.T is None else ints((self.B + 1,))
    return q, k, v, ints((self.B, self.M)), starts, ints((self.B,)), scale, scale

  def call(self, *arguments, target: Target, implementation: str = "sm90"):
    *arrays, k_scale, v_scale = arguments
    kernel = {"implementation": implementation, "target": target}
    return attention_api.paged_attention(*arrays, k_scale=k_scale, v_scale=v_scale, **kernel)

  def _tiling(self, target):
    q, k, _, table, *_ = self.arguments()
    shapes = q.shape[0], self.N, self.K, self.H, self.C, *table.shape
    return attention_tiling.choose_tiling(*shapes, self.T is None, k.dtype, target)

  def flight(self, target: Target) -> Flight:
    tiling = self._tiling(target)
    tiles = self.B if self.T is None else self.T // tiling.tokens + self.B
    dtype = FP8 if self.pages == "fp8" else BF16
    return Flight(tiles * self.K * tiling.splits, attention_tiling.bytes_in_flight(self.H, self.C, tiling, dtype))

  def cost(self, target: Target) -> tuple[int, int]:
    """Every sequence full; in prefill every tile sees all of it."""
    tiling = self._tiling(target)
    tiles = self.B if self.T is None else self.T // tiling.tokens
    lengths = [self.M * self.C] * tiles
    return attention_tiling.cost(lengths, self.N, self.K, self.H, self.C, tiling, FP8 if self.pages == "fp8" else BF16)


@dataclasses.dataclass(frozen=True)
class NormCase:
  """residual_norm of T tokens of D, to float8."""

  name: str
  T: int
  D: int
  kernel: str = "residual_norm"
  skinny: bool = False

  def arguments(self) -> tuple:
    x = jax.ShapeDtypeStruct((self.T, self.D), BF16)
    return x, x, jax.ShapeDtypeStruct((self.D,), F32)

  def call(self, *arguments, target: Target, implementation: str = "sm90"):
    return fused_api.residual_norm(*arguments, eps=1e-5, quantize=True, implementation=implementation, target=target)

  def flight(self, target: Target) -> Flight:
    return Flight(self.T, 8 * self.D)

  def cost(self, target: Target) -> tuple[int, int]:
    outputs = jax.ShapeDtypeStruct((self.T, self.D), BF16), *_quantized(self.T, self.D)
    return _sum(fused_cost.residual_norm(*self.arguments(), outputs))


@dataclasses.dataclass(frozen=True)
class SiluCase:
  """silu_multiply of T tokens of F, in S parts (1: a finished product), to float8."""

  name: str
  T: int
  F: int
  S: int
  kernel: str = "silu_multiply"
  skinny: bool = False

  def arguments(self) -> tuple:
    return _sums(self.S, self.T, 2 * self.F)

  def call(self, *arguments, target: Target, implementation: str = "sm90"):
    sums = matmul_api.Sums(*arguments)
    return fused_api.silu_multiply(sums, quantize=True, implementation=implementation, target=target)

  def flight(self, target: Target) -> Flight:
    return Flight(self.T, 2 * self.F * self.S * self.arguments()[0].dtype.itemsize)

  def cost(self, target: Target) -> tuple[int, int]:
    return _sum(fused_cost.silu_multiply(matmul_api.Sums(*self.arguments()), _quantized(self.T, self.F)))


@dataclasses.dataclass(frozen=True)
class RopeCase:
  """rope_write of T decoded tokens into pages, from qkv in S parts (1: a finished product)."""

  name: str
  pages: str
  T: int
  K: int
  G: int
  H: int
  S: int
  kernel: str = "rope_write"
  skinny: bool = False

  def arguments(self) -> tuple:
    dtype, ints = FP8 if self.pages == "fp8" else BF16, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    k, v = (_NUM_PAGES, self.K, 64, self.H), (_NUM_PAGES, self.K, self.H, 64)
    scale = (jax.ShapeDtypeStruct((_NUM_PAGES, self.K, 64), F32),) * (2 if dtype == FP8 else 0)
    pages = jax.ShapeDtypeStruct(k, dtype), jax.ShapeDtypeStruct(v, dtype), *scale
    angles = jax.ShapeDtypeStruct((self.T, self.H // 2), F32)
    return *_sums(self.S, self.T, self.K * (self.G + 2) * self.H), angles, angles, pages, ints((self.T, 64)), ints((self.T,))

  def call(self, *arguments, target: Target, implementation: str = "sm90"):
    *sums, cos, sin, pages, table, lengths = arguments
    kernel = {"implementation": implementation, "target": target}
    return fused_api.rope_write(matmul_api.Sums(*sums), cos, sin, pages, table, None, lengths, **kernel)

  def flight(self, target: Target) -> Flight:
    return Flight(self.T * self.K, self.S * (self.G + 2) * self.H * self.arguments()[0].dtype.itemsize)

  def cost(self, target: Target) -> tuple[int, int]:
    *sums, cos, sin, pages, _, _ = self.arguments()
    q = jax.ShapeDtypeStruct((self.T, self.K * self.G, self.H), BF16)
    return _sum(fused_cost.rope_write(matmul_api.Sums(*sums), cos, sin, pages, q))


def _sums(S, T, F) -> tuple:
  """The arrays of fp8_matmul's `Sums`."""
  if S == 1:
    return jax.ShapeDtypeStruct((S, T, F), BF16), None, None
  return jax.ShapeDtypeStruct((S, T, F), F32), jax.ShapeDtypeStruct((F,), F32), jax.ShapeDtypeStruct((T,), F32)


def _quantized(T, width) -> tuple:
  """What a kernel leaves that rounds to float8 with a scale per token."""
  return jax.ShapeDtypeStruct((T, width), FP8), jax.ShapeDtypeStruct((T,), F32)


def _sum(cost) -> tuple[int, int]:
  return cost.total_bytes, cost.flops


CASES = (
  MatmulCase("skinny-w8a8", "w8a8", 8, 3584, 8192),
  MatmulCase("skinny-w8a8-64-tokens", "w8a8", 64, 7168, 8192),
  MatmulCase("skinny-w8a8-block-405b", "w8a8", 1, 16384, 53248, 128),
  MatmulCase("skinny-w8a8-odd-rows", "w8a8", 3, 16032, 576),
  MatmulCase("skinny-w8a16", "w8a16", 1, 28672, 4096),
  MatmulCase("skinny-w8a16-block", "w8a16", 16, 7168, 8192, 128),
  MatmulCase("skinny-w8a16-64-tokens-block", "w8a16", 64, 3584, 8192, 64),
  MatmulCase("skinny-w8a16-135m", "w8a16", 8, 960, 576),
  MatmulCase("skinny-bf16-head", "bf16", 8, 128256, 4096),
  MatmulCase("skinny-bf16-64-tokens", "bf16", 64, 4096, 4096),
  MatmulCase("wide-w8a8", "w8a8", 512, 3584, 8192),
  MatmulCase("wide-w8a8-block", "w8a8", 512, 8192, 3584, 128),
  MatmulCase("wide-w8a16", "w8a16", 300, 16032, 576),
  MatmulCase("wide-w8a16-block", "w8a16", 512, 3584, 8192, 128),
  MatmulCase("wide-bf16", "bf16", 512, 6144, 4096),
  AttentionCase("decode-fp8", "fp8", None, 8, 8, 1, 128, 64, 64),
  AttentionCase("decode-fp8-pages-of-32", "fp8", None, 8, 9, 3, 64, 32, 64),
  AttentionCase("decode-fp8-pages-of-128", "fp8", None, 8, 32, 8, 128, 128, 64),
  AttentionCase("decode-fp8-128k", "fp8", None, 1, 16, 1, 128, 64, 2048),
  AttentionCase("decode-bf16", "bf16", None, 8, 8, 1, 128, 64, 32),
  AttentionCase("prefill-fp8", "fp8", 512, 4, 8, 1, 128, 64, 64),
  AttentionCase("prefill-fp8-pages-of-32", "fp8", 512, 4, 9, 3, 64, 32, 64),
  AttentionCase("prefill-fp8-pages-of-128", "fp8", 512, 4, 32, 8, 128, 128, 64),
  AttentionCase("prefill-bf16", "bf16", 512, 4, 8, 1, 128, 64, 64),
  AttentionCase("prefill-bf16-pages-of-128", "bf16", 512, 4, 8, 1, 128, 128, 64),
  NormCase("norm-70b", 8, 8192),
  NormCase("norm-405b", 8, 16384),
  NormCase("norm-odd-width", 8, 640),
  SiluCase("silu-70b", 8, 3584, 1),
  SiluCase("silu-405b-parts", 8, 6656, 4),
  SiluCase("silu-70b-on-one", 8, 28672, 1),
  RopeCase("rope-70b", "fp8", 8, 1, 8, 128, 8),
  RopeCase("rope-8b-on-one", "fp8", 8, 8, 4, 128, 1),
  RopeCase("rope-3-heads", "fp8", 8, 3, 3, 64, 6),
  RopeCase("rope-bf16-405b", "bf16", 8, 1, 16, 128, 8),
)
Case = MatmulCase | AttentionCase | NormCase | SiluCase | RopeCase


def by_name(name: str) -> Case:
  """Raises KeyError for a name that no case has."""
  return {case.name: case for case in CASES}[name]
