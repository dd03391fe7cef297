"""Representative calls of fp8_matmul."""

import dataclasses
import math
from typing import ClassVar

import jax

from pallas_kernels.case import BF16, F32, FP8, Flight, TunableCase
from pallas_kernels.dispatch import HOPPER_SMS, Target
from pallas_kernels.fp8_matmul import api, cost
from pallas_kernels.fp8_matmul.tiling import MAX_FEW, MAX_SKINNY, Form, Tiling, choose_tiling, form_of, key_of


@dataclasses.dataclass(frozen=True)
class MatmulCase(TunableCase):
  """y [T, F] = x [T, D] w^T; form is "w8a8", "w8a16" or "bf16", block_rows 0 means a scale per channel.

  With block scales of the weights, float8 activations have a scale per token and 128 columns.
  """

  name: str
  form: str
  T: int
  F: int
  D: int
  block_rows: int = 0
  operation: ClassVar[str] = "fp8_matmul"
  uses_tensor_cores: ClassVar[bool] = True

  def arguments(self) -> tuple:
    x = jax.ShapeDtypeStruct((self.T, self.D), FP8 if self.form == "w8a8" else BF16)
    w = jax.ShapeDtypeStruct((self.F, self.D), BF16 if self.form == "bf16" else FP8)
    shape = (self.F // self.block_rows, -(-self.D // api.BLOCK)) if self.block_rows else (self.F,)
    w_scale = None if self.form == "bf16" else jax.ShapeDtypeStruct(shape, F32)
    groups = (-(-self.D // api.BLOCK),) if self.block_rows else ()
    return x, w, w_scale, jax.ShapeDtypeStruct((*groups, self.T), F32) if self.form == "w8a8" else None

  def call(self, *arguments, target: Target, implementation: str = "sm90") -> jax.Array:
    return api.fp8_matmul(*arguments, implementation=implementation, target=target)

  def flight(self, target: Target) -> Flight:
    tiling = self.tiling(target)
    tiles = -(-self.F // tiling.rows) * -(-self.T // tiling.tokens) * tiling.splits
    ctas = tiles if self.is_skinny else min(tiles, target.num_sms or HOPPER_SMS)
    return Flight(ctas, tiling.weight_bytes_in_flight(self._form.w_dtype), self.F * self.D)

  def cost(self, target: Target) -> tuple[int, int]:
    return cost.tma_cost(self.T, self.F, self.D, self._form, target)

  def least_work(self, target: Target) -> tuple[int, int]:
    x, w, *scales = self.arguments()
    return cost.least_work(x, w, scales)

  @property
  def is_skinny(self) -> bool:
    return self.T <= MAX_SKINNY

  @property
  def number_format(self) -> str:
    return "fp8" if self.form == "w8a8" else "bf16"

  @property
  def widens(self) -> bool:
    return self.form == "w8a16"

  @property
  def _form(self) -> Form:
    return form_of(*self.arguments())

  @property
  def size_names(self) -> tuple[str, ...]:
    return ("stages", "splits", "rows", "depth", *(() if self.is_skinny else ("tokens",)))

  def tiling(self, target: Target) -> Tiling:
    return choose_tiling(self.T, self.F, self.D, self._form, target)

  def tuning_key(self) -> dict[str, str | int]:
    return key_of(self.T, self.F, self.D, self._form)

  def choices(self, start) -> dict[str, list[int]]:
    tiles = {"depth": [64, 128, 256, 512], "rows": [64, 128], "stages": [2, 3, 4, 5, 6, 8, 12, 16]}
    if not self.is_skinny:
      return {"tokens": [32, 48, 64, 96, 128], **tiles}
    steps = self.D // start["depth"]
    splits = [n for n in range(1, steps + 1) if steps % n == 0]
    return {"splits": sorted(splits, key=lambda n: abs(math.log(n / start["splits"])))[:6], **tiles}

  def regimes(self) -> tuple["MatmulCase", ...]:
    """Both skinny entries of a matrix cut D alike, or a row's bits would depend on its company."""
    return tuple(dataclasses.replace(self, T=tokens) for tokens in (MAX_FEW, MAX_SKINNY)) if self.is_skinny else (self,)


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
)
