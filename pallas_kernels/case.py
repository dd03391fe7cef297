"""`Case`: one representative call of one operation, as each operation's cases.py makes them (cases.py collects all).

A case is compiled and inspected for an absent GPU, compared with the reference, timed beside its least work, and tuned.
"""

import abc
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Target
from pallas_kernels.float8 import to_float8

FP8, BF16, F32, I32 = (jnp.dtype(x) for x in (jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32, jnp.int32))
NUM_PAGES = 1024  # of a pool


@dataclasses.dataclass(frozen=True)
class Flight:
  """The loads of a kernel: CTAs in the grid, bytes of weights or pages in flight to each CTA while its ring is full.

  total_bytes: all that the kernel loads; a smaller amount than the ring holds is in flight as a whole.
  """

  ctas: int
  bytes_per_cta: int
  total_bytes: float = math.inf

  def per_sm(self, ctas_per_sm: int, num_sms: int) -> int:
    return min(ctas_per_sm, -(-self.ctas // num_sms)) * self.bytes_per_cta


class Case(abc.ABC):
  """One call of `operation`. Subclasses are frozen dataclasses of its sizes."""

  name: str
  operation: ClassVar[str]  # a key of dispatch.OPERATIONS
  uses_tensor_cores: ClassVar[bool] = False

  @abc.abstractmethod
  def arguments(self) -> tuple:
    """The arguments of `call` as ShapeDtypeStructs; None for an absent one."""

  @abc.abstractmethod
  def call(self, *arguments, target: Target, implementation: str = "sm90") -> Any:
    """The operation, by an implementation that `dispatch` knows."""

  @abc.abstractmethod
  def flight(self, target: Target) -> Flight:
    """The loads that are in flight at once."""

  @abc.abstractmethod
  def cost(self, target: Target) -> tuple[int, int]:
    """(bytes, float operations) of the kernel for `target`."""

  def least_work(self, target: Target) -> tuple[int, int]:
    """(bytes over the memory bus, float operations) that no implementation can avoid."""
    return self.cost(target)

  @property
  def is_skinny(self) -> bool:
    """Whether reading weights or pages bounds the call: few tokens of a matrix, or decode."""
    return False

  @property
  def rounds(self) -> bool:
    """Whether the kernel rounds its result to float8."""
    return False

  @property
  def number_format(self) -> str:
    """The format whose peak bounds the arithmetic: "fp8" or "bf16"."""
    return "bf16"

  @property
  def widens(self) -> bool:
    """Whether the kernel converts float8 to float16 for its tensor cores."""
    return False

  @property
  def num_kernels(self) -> int:
    """Kernels that one call launches."""
    return 1

  def query_starts(self) -> jax.Array | None:
    """The values of the argument of that name; None for a call without it."""
    return None

  def values(self, seed: int = 0) -> tuple:
    """Random arguments on the default device. Every sequence fills its row of pages; queries are shared out evenly."""
    numbers = itertools.count()
    leaves = jax.tree.leaves(self.arguments())
    pages = next((x for x in leaves if x.ndim == 4), None)
    table = next((x for x in leaves if x.dtype == I32 and x.ndim == 2), None)

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
      key = jax.random.fold_in(jax.random.key(seed), next(numbers))
      if x.dtype == I32:
        return integers(x, key)
      noise = jax.random.normal(key, x.shape)
      if x.dtype == FP8:
        return to_float8(100 * noise)
      return noise.astype(x.dtype) if x.dtype == BF16 else 0.01 * jnp.exp(noise)

    def integers(x: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
      assert pages is not None and table is not None  # only calls on pages have integers
      starts = self.query_starts()
      if x.ndim == 2:
        return jax.random.permutation(key, math.prod(x.shape)).reshape(x.shape).astype(I32) % pages.shape[0]
      if starts is not None and x.shape == starts.shape:
        return starts
      return jnp.full(x.shape, table.shape[1] * pages.shape[-2], I32)

    return jax.jit(lambda: jax.tree.map(fill, self.arguments()))()


class TunableCase(Case):
  """A case whose tile sizes can be measured (tuned.py)."""

  size_names: tuple[str, ...]  # of the sizes that an entry has

  @abc.abstractmethod
  def tiling(self, target: Target) -> Any:
    """The tile sizes that the kernel takes now. Raises ValueError for measured ones that are impossible."""

  @abc.abstractmethod
  def tuning_key(self) -> dict[str, Any]:
    """The key of its entry."""

  @abc.abstractmethod
  def choices(self, start: Mapping[str, int]) -> dict[str, list[int]]:
    """Values to try for each size, the most promising size first."""

  def regimes(self) -> Sequence[Self]:
    """The calls that need an entry each. All of them must have the first one's `splits`."""
    return (self,)

  def sizes(self, target: Target) -> dict[str, int]:
    """The sizes that the kernel takes now, by the names that an entry has."""
    tiling = self.tiling(target)
    return {name: getattr(tiling, name) for name in self.size_names}
