"""Digests of stored arrays: whole ones (SHA-256), and blocks of at most 8 MB (XXH3), so that a part is verified alone.

    blocks_of(array)                         when it is written
    digests.cover(range)  ->  bounds         the blocks that a range touches, which a process reads whole
    digests.first_wrong(array, bounds)       compares what was read

The bytes in memory are compared, so damage of data, index and metadata is noticed alike. XXH3 finds damage and no attacker; it
is eight times as fast as SHA-256, which a start could not afford (docs/checkpoints.md). Refuses to know files. Imports no jax.
"""

import dataclasses
import functools
import hashlib
import importlib
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

BLOCK_BYTES = 8 << 20  # also the largest chunk of the file: a block is the least that can be read
_DIGITS = 16  # hexadecimal, of a digest of 64 bits

Bounds = tuple[tuple[int, int], ...]  # start and stop for each axis


@dataclasses.dataclass(frozen=True)
class BlockDigests:
  """The digests of an array's blocks.

  size: the shape of the array. shape: that of a block; blocks at the edges may be smaller. digests: in row-major order.
  """

  size: tuple[int, ...]
  shape: tuple[int, ...]
  digests: tuple[str, ...]

  @classmethod
  def from_json(cls, size: tuple[int, ...], data: Mapping[str, Any]) -> "BlockDigests":
    """Raises ValueError for another number of digests than blocks."""
    shape, text = tuple(data["shape"]), data["xxh3_64"]
    digests = tuple(text[start : start + _DIGITS] for start in range(0, len(text), _DIGITS))
    blocks = cls(tuple(size), shape, digests)
    if len(shape) != len(size) or math.prod(blocks._grid) != len(digests):
      raise ValueError(f"{len(digests)} digests of blocks of {shape} for an array of {tuple(size)}")
    return blocks

  def to_json(self) -> dict[str, Any]:
    return {"shape": list(self.shape), "xxh3_64": "".join(self.digests)}

  @property
  def _grid(self) -> tuple[int, ...]:
    return tuple(-(-size // block) for size, block in zip(self.size, self.shape, strict=True))

  def cover(self, axis: int, start: int, stop: int) -> Bounds:
    """The bounds of the blocks that hold indices start .. stop - 1 of an axis."""
    bounds = [(0, size) for size in self.size]
    block = self.shape[axis]
    bounds[axis] = start // block * block, min(-(-stop // block) * block, self.size[axis])
    return tuple(bounds)

  def first_wrong(self, array: np.ndarray, bounds: Bounds) -> Bounds | None:
    """The bounds of the first block in `array` whose bytes are not those that were written; None if all are.

    bounds: the place of `array`, as `cover` gives it.
    """
    for block in _blocks(bounds, self.shape):
      index = 0
      for (start, _), shape, count in zip(block, self.shape, self._grid, strict=True):
        index = index * count + start // shape
      part = array[tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(block, bounds, strict=True))]
      if _digest(part) != self.digests[index]:
        return block
    return None


def blocks_of(array: np.ndarray) -> BlockDigests:
  """The digests of an array that is about to be written."""
  shape = block_shape(array.shape, array.dtype.itemsize)
  whole = tuple((0, size) for size in array.shape)
  parts = (array[tuple(slice(*bound) for bound in block)] for block in _blocks(whole, shape))
  return BlockDigests(array.shape, shape, tuple(map(_digest, parts)))


def block_shape(size: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
  """The largest axis is halved until a block has 8 MB: Orbax cuts its chunks so too, so that no chunk is read in vain."""
  shape = [max(1, length) for length in size]
  while math.prod(shape) * itemsize > BLOCK_BYTES:
    axis = shape.index(max(shape))
    shape[axis] = -(-shape[axis] // 2)
  return tuple(shape)


def sha256_of(array: np.ndarray) -> str:
  """sha256 of an array's bytes in row-major order."""
  return hashlib.sha256(_bytes(array)).hexdigest()


def _digest(array: np.ndarray) -> str:
  return _xxhash().xxh3_64_hexdigest(_bytes(array))


@functools.cache
def _xxhash() -> Any:
  """Loaded where arrays are read or written: what only opens a checkpoint does without."""
  return importlib.import_module("xxhash")


def _bytes(array: np.ndarray) -> memoryview:
  return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _blocks(bounds: Bounds, shape: tuple[int, ...]) -> Iterator[Bounds]:
  """The blocks in `bounds`, which begin where a block begins, in row-major order."""
  axes = (
    [(start, min(start + block, stop)) for start in range(first, stop, block)]
    for (first, stop), block in zip(bounds, shape, strict=True)
  )
  yield from itertools.product(*axes)
