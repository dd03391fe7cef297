"""A token's row in the registers of a CTA's warpgroups: how it is read, joined, rounded and written.

flat     [size]: each thread holds runs of neighbours
grouped  [size / 128, 128]: a warp holds a group of 128 columns, so that the largest value of a group, which is the scale of
         the group, needs no shared memory
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.float8 import FLOAT8, GROUP, Quantized, scale_of, to_float8
from pallas_kernels.fused.operands import Activations
from pallas_kernels.register_layouts import flat_layout, row_layout

_MOST_A_THREAD = 32  # elements of one array that a thread loads at once
_RUN = 4  # neighbours of a group that a thread holds


class Row:
  """A row of `size` elements in the registers of 1, 2 or 4 warpgroups, as a list of pieces.

  Arrays go to a kernel through `view`, which gives their last axis the form of the row.
  """

  def __init__(self, operation: str, size: int, *, grouped: bool = False):
    if size % GROUP:
      raise NotImplementedError(f"sm90's {operation} needs rows of a multiple of {GROUP}; got {size}")
    self.size, self.grouped = size, grouped
    groups = size // GROUP
    # A warpgroup of a grouped row holds four groups at a time, one a warp, where their number allows.
    unit = math.gcd(groups, 4) if grouped else 1
    self.num_wgs = next(n for n in (4, 2, 1) if groups % (n * unit) == 0)
    a_wg = groups // self.num_wgs  # also the elements a thread holds, or a fourth of them where warps repeat work
    count = next(n for n in range(1, a_wg + 1) if a_wg % n == 0 and a_wg // n <= _MOST_A_THREAD and (a_wg // n) % unit == 0)
    self.num_pieces, self.piece = count, (a_wg // count if grouped else a_wg // count * GROUP)

  def view(self, x: jax.Array) -> jax.Array:
    """`x` [..., size] in the form that `load` reads."""
    return x.reshape(*x.shape[:-1], *self.shape)

  @property
  def shape(self) -> tuple[int, ...]:
    return (self.size // GROUP, GROUP) if self.grouped else (self.size,)

  def threads(self) -> dict[str, Any]:
    """Arguments of plgpu.kernel: the warpgroups, and what `meeting` takes."""
    barrier = plgpu.Barrier(num_arrivals=self.num_wgs, num_barriers=2)
    scratch = {"meeting_smem": plgpu.SMEM((2, self.num_wgs), jnp.float32), "meeting_barrier": barrier}
    return {"num_threads": self.num_wgs, "thread_name": "wg", "scratch_types": scratch}

  def slices(self) -> list:
    """Each piece's part of the first axis of the row's form."""
    first = lax.axis_index("wg") * self.num_pieces
    return [pl.ds((first + i) * self.piece, self.piece) for i in range(self.num_pieces)]

  @property
  def layout(self):
    return row_layout(self.piece, _RUN) if self.grouped else flat_layout(self.piece, 2)

  def load(self, ref) -> list:
    return [plgpu.load(ref.at[piece], layout=self.layout, optimized=False) for piece in self.slices()]

  def store(self, ref, pieces) -> None:
    for part, piece in zip(self.slices(), pieces, strict=True):
      plgpu.store(ref.at[part], piece, optimized=False)

  def sum(self, pieces) -> jax.Array:
    """The sum of a warpgroup's pieces, a scalar."""
    sums = (jnp.sum(jnp.sum(piece, axis=1)) if self.grouped else jnp.sum(piece) for piece in pieces)
    return functools.reduce(jnp.add, sums)

  def meeting(self, smem, barrier) -> Callable:
    """A function that joins a scalar of each warpgroup. All warpgroups must call it, at most twice."""
    calls = iter(range(2))

    def meet(value, join):
      if self.num_wgs == 1:  # mutant: lone warpgroup
        return value
      call = next(calls)  # mutant: number of the meeting
      smem[call, lax.axis_index("wg")] = value
      plgpu.barrier_arrive(barrier.at[call])
      plgpu.barrier_wait(barrier.at[call])  # mutant: wait for warpgroups
      return functools.reduce(join, (smem[call, i] for i in range(self.num_wgs)))

    return meet


class Rounding:
  """How a row leaves a kernel: as it is, or in float8 with a static scale, a scale of the token, or scales of its groups."""

  def __init__(self, quantize: bool, static_scale: jax.Array | None, grouped: bool):
    self.quantize = quantize
    self.static_scale = static_scale if quantize else None
    self.grouped = quantize and grouped and static_scale is None

  @property
  def operand(self) -> jax.Array | None:
    """The static scale as a kernel reads it, [1]."""
    return None if self.static_scale is None else self.static_scale.reshape(1)

  def output_types(self, T: int, row: Row, dtype) -> Activations:
    values = jax.ShapeDtypeStruct((T, *row.shape), FLOAT8 if self.quantize else dtype)
    shape = (row.size // GROUP, T) if self.grouped else (T,)
    has_scale = self.quantize and self.static_scale is None
    return Activations(values, jax.ShapeDtypeStruct(shape, jnp.float32) if has_scale else None)

  def store(self, row: Row, pieces, token, out: Activations, static_gmem, *, meet: Callable) -> None:
    """Stores a token's row, within a kernel."""
    if self.quantize:
      wide = [piece.astype(jnp.float32) for piece in pieces]
      pieces = (
        _in_groups(row, wide, out.scale.at[:, token]) if self.grouped else _in_float8(wide, token, out, static_gmem, meet)
      )
    row.store(out.values.at[token], pieces)

  def result(self, out: Activations) -> jax.Array | Quantized:
    values = out.values.reshape(out.values.shape[0], -1)
    if not self.quantize:
      return values
    scale = self.static_scale if out.scale is None else out.scale
    assert scale is not None
    return Quantized(values, scale)


def _in_float8(pieces, token, out: Activations, static_gmem, meet: Callable) -> list:
  """Pieces in float8, with the static scale or one from the token's largest value, which is stored."""
  if static_gmem is not None:
    scale = static_gmem[0]
  else:
    scale = scale_of(meet(functools.reduce(jnp.maximum, (jnp.max(jnp.abs(piece)) for piece in pieces)), jnp.maximum))

    @pl.when(lax.axis_index("wg") == 0)  # mutant: writer of the scale
    def _():
      out.scale[token] = scale

  factor = 1 / scale
  return [to_float8(piece * factor) for piece in pieces]


def _in_groups(row: Row, pieces, scale_gmem) -> list:
  """Pieces [groups, 128] in float8, with a scale from each group's largest value, which is stored."""
  rounded = []
  for part, piece in zip(row.slices(), pieces, strict=True):
    scale = scale_of(jnp.max(jnp.abs(piece), axis=1))  # mutant: scale of a group
    plgpu.store(scale_gmem.at[part], scale, optimized=False)  # mutant: place of a group's scale
    rounded.append(to_float8(piece * lax.broadcast_in_dim(1 / scale, piece.shape, [0])))
  return rounded
