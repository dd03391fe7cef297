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

  def call(self, *arguments, target: Target, implementation: str = "wgmma"):
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

  def call(self, *arguments, target: Target, implementation: str = "wgmma"):
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
)


def by_name(name: str) -> MatmulCase | AttentionCase:
  """Raises KeyError for a name that no case has."""
  return {case.name: case for case in CASES}[name]
