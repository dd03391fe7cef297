"""The operands and outputs of the fused kernels by name, in device memory. An absent one is None.

The order of the fields is the order of a kernel's operands in the compiled program.
"""

from typing import Any, NamedTuple

import jax

from pallas_kernels.fp8_matmul.api import PartialSums


class Activations(NamedTuple):
  """A kernel's outputs that the next linear reads: [T, *row.shape], and the scales that it measured: [T] or [groups, T]."""

  values: Any
  scale: Any = None


class NormOperands(NamedTuple):
  x: jax.Array  # [T, D]
  y: jax.Array
  weight: jax.Array  # [D]
  static_scale: jax.Array | None  # [1]


class NormOutputs(NamedTuple):
  x: Any  # [T, D]
  normed: Activations


class SiluOperands(NamedTuple):
  sums: PartialSums  # [S, T, 2, F], w_scale [2, F], x_scale [T] or [1]
  static_scale: jax.Array | None  # [1]


class Pools(NamedTuple):
  """The pools of pages: references that the kernel writes in place."""

  k: Any  # [P, K, C, H]
  v: Any  # [P, K, H, C]
  k_scale: Any = None  # float8 pages: [P, K, C]
  v_scale: Any = None


class RopeOperands(NamedTuple):
  splits: jax.Array  # [S, T, K * (G + 2), 2, H / 2]
  cos: jax.Array  # [T, H / 2]
  sin: jax.Array
  table: jax.Array  # [B, M]
  first_page: jax.Array  # [1]
  sequences: jax.Array | None  # prefill: [T]; in decode token b is that of sequence b
  positions: jax.Array  # prefill: [T], -1 for padding; decode: lengths [B]
  w_scale: jax.Array | None  # [K * (G + 2), 2, H / 2]
  x_scale: jax.Array | None  # [T] or [1]
  static_scales: tuple[jax.Array, jax.Array] | None  # [K] of keys and of values
  pools: Pools

  @property
  def sums(self) -> PartialSums:
    return PartialSums(self.splits, self.w_scale, self.x_scale)
