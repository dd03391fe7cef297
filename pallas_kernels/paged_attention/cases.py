"""Representative calls of paged_attention."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.case import BF16, F32, FP8, I32, NUM_PAGES, Flight, TunableCase
from pallas_kernels.dispatch import Target
from pallas_kernels.float8 import Quantized
from pallas_kernels.paged_attention import api, cost
from pallas_kernels.paged_attention.tiling import CallShape, Tiling, bytes_in_flight, choose_tiling, key_of


@dataclasses.dataclass(frozen=True)
class AttentionCase(TunableCase):
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
  grouped: bool = False  # decode: the result in float8 with scales of groups
  operation: ClassVar[str] = "paged_attention"
  uses_tensor_cores: ClassVar[bool] = True

  def arguments(self) -> tuple:
    q = jax.ShapeDtypeStruct((self.T or self.B, self.N, self.H), BF16)
    k = jax.ShapeDtypeStruct((NUM_PAGES, self.K, self.C, self.H), self._dtype)
    v = jax.ShapeDtypeStruct((NUM_PAGES, self.K, self.H, self.C), self._dtype)
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=I32)
    scale = jax.ShapeDtypeStruct((NUM_PAGES, self.K, self.C), F32) if self.widens else None
    starts = None if self.T is None else ints((self.B + 1,))
    return q, k, v, ints((self.B, self.M)), starts, ints((self.B,)), scale, scale

  def call(self, *arguments, target: Target, implementation: str = "sm90") -> jax.Array | Quantized:
    *arrays, k_scale, v_scale = arguments
    options = {"implementation": implementation, "target": target, "quantize": self.grouped, "grouped": self.grouped}
    return api.paged_attention(*arrays, k_scale=k_scale, v_scale=v_scale, **options)

  def flight(self, target: Target) -> Flight:
    tiling = self.tiling(target)
    tiles = self.B if self.T is None else self.T // tiling.tokens + self.B
    return Flight(tiles * self.K * tiling.splits, bytes_in_flight(self.H, self.C, tiling=tiling, dtype=self._dtype))

  def cost(self, target: Target) -> tuple[int, int]:
    """For full sequences; in prefill every tile sees all of its sequence."""
    tiling = self.tiling(target)
    tiles = self.B if self.T is None else self.T // tiling.tokens
    return cost.tma_cost([self.M * self.C] * tiles, self.N, self.K, self.H, self.C, tiling=tiling, dtype=self._dtype)

  def least_work(self, target: Target) -> tuple[int, int]:
    q, k, *_ = self.arguments()
    return cost.least_work(q, k, num_sequences=self.B, context=self.M * self.C)

  def query_starts(self) -> jax.Array | None:
    return None if self.T is None else jnp.linspace(0, self.T, self.B + 1).astype(I32)

  @property
  def is_skinny(self) -> bool:
    return self.T is None

  @property
  def widens(self) -> bool:
    return self.pages == "fp8"

  @property
  def num_kernels(self) -> int:
    """Decode has a second one, which joins the splits."""
    return 2 if self.T is None else 1

  @property
  def _dtype(self) -> jnp.dtype:
    return FP8 if self.pages == "fp8" else BF16

  def shape(self) -> CallShape:
    """The static sizes of this case, for `choose_tiling` and `key_of`."""
    sizes = self.T or self.B, self.N, self.K, self.H, self.C, self.B, self.M
    return CallShape(*sizes, decode=self.T is None, dtype=self._dtype)

  @property
  def size_names(self) -> tuple[str, ...]:
    return ("stages", "splits") if self.T is None else ("stages", "splits", "tokens")

  def tiling(self, target: Target) -> Tiling:
    return choose_tiling(self.shape(), target)

  def tuning_key(self) -> dict[str, str | int]:
    return key_of(self.shape())

  def choices(self, start) -> dict[str, list[int]]:
    splits = sorted({max(1, start["splits"] * n // 4) for n in (1, 2, 3, 6, 8, 12)} | {1})
    tokens = {} if self.T is None else {"tokens": [1, 2, 4, 8, 16]}
    return {"splits": splits, "stages": [2, 3, 4, 5, 6, 8], **tokens}


CASES = (
  AttentionCase("decode-fp8", "fp8", None, 8, 8, 1, 128, 64, 64),
  AttentionCase("decode-fp8-pages-of-32", "fp8", None, 8, 9, 3, 64, 32, 64),
  AttentionCase("decode-fp8-pages-of-128", "fp8", None, 8, 32, 8, 128, 128, 64),
  AttentionCase("decode-fp8-128k", "fp8", None, 1, 16, 1, 128, 64, 2048),
  AttentionCase("decode-fp8-groups", "fp8", None, 8, 32, 4, 128, 64, 64, grouped=True),
  AttentionCase("decode-fp8-groups-of-two-heads", "fp8", None, 8, 32, 8, 64, 64, 64, grouped=True),
  AttentionCase("decode-bf16", "bf16", None, 8, 8, 1, 128, 64, 32),
  AttentionCase("prefill-fp8", "fp8", 512, 4, 8, 1, 128, 64, 64),
  AttentionCase("prefill-fp8-pages-of-32", "fp8", 512, 4, 9, 3, 64, 32, 64),
  AttentionCase("prefill-fp8-pages-of-128", "fp8", 512, 4, 32, 8, 128, 128, 64),
  AttentionCase("prefill-bf16", "bf16", 512, 4, 8, 1, 128, 64, 64),
  AttentionCase("prefill-bf16-pages-of-128", "bf16", 512, 4, 8, 1, 128, 128, 64),
)
