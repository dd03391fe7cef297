"""Reads weights into device arrays: each process only the shards of its devices, with no second copy on the host.

    load_arrays(model, read, mesh)     read(ranges) gives {range: numpy array}

A weight is cut into jobs of some layers (or rows of a table), so that little memory is in use at a time: while the arrays of
one job are copied, those of the next are read. On a CPU they are copied into the memory that the device array will own. On
other devices a piece is sent and written into the donated device array, which on unified memory is the only copy too.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfp8.checkpoint.layout import STRIDE, Leaf, Part, model_parts
from jaxfp8.checkpoint.stored_arrays import Range, Read
from jaxfp8.model.llama import Llama

_JOB_BYTES = 32 << 20  # in memory: a job that is read (which takes twice that) and a job that is copied
_THREADS = 8
_HOST_PLATFORMS = ("cpu",)  # their devices take over memory of the host
_ALIGNMENT = 64  # bytes; a CPU device takes over memory that is aligned so


def load_arrays(model: Llama, read: Read, mesh: Mesh | None) -> Llama:
  """Replaces the shapes of an abstract model by arrays, and returns the model. `mesh` None: the default device."""
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    targets = [(part, _targets(part, mesh)) for part in model_parts(model)]
    jobs = list(itertools.chain.from_iterable(_jobs(leaves) for _, leaves in targets))
    groups = _grouped(jobs)
    ahead, previous = None, []
    for group in itertools.chain(groups, [None]):
      ranges = {r for job in group for r in job.ranges()} if group else ()
      coming = (group, pool.submit(read, ranges)) if group else None
      if ahead:
        arrays = _Arrays(ahead[1].result())
        jax.block_until_ready(previous)
        previous = [x for job in ahead[0] for x in job.write(arrays, pool)]
      ahead = coming
  for part, leaves in targets:
    tree = jax.tree.structure(part.weight.get_value())
    part.weight.set_value(jax.tree.unflatten(tree, [target.finish() for target in leaves]))
  return model


def whole_arrays(read: Callable[[tuple[str, ...]], dict[str, np.ndarray]]) -> Read:
  """Reads ranges from a source that gives only whole arrays. Keeps the last arrays, since the next ranges are often theirs."""
  kept: dict[str, np.ndarray] = {}

  def read_ranges(ranges: Iterable[Range]) -> dict[Range, np.ndarray]:
    ranges = sorted(ranges)
    missing = tuple(dict.fromkeys(r.key for r in ranges if r.key not in kept))
    arrays = {r.key: kept[r.key] for r in ranges if r.key in kept} | (read(missing) if missing else {})
    kept.clear()
    kept.update(arrays)
    return {r: r.cut(arrays[r.key]) for r in ranges}

  return read_ranges


class _Run(NamedTuple):
  """`size` neighbouring rows (or columns) of one matrix that are neighbours in the shard too; matrix -1 is padding."""

  matrix: int
  source: int
  target: int
  size: int


@dataclasses.dataclass
class _Shard:
  """One shard of an array, and the devices of this process that hold it (None: the default device).

  sources: the part of `Leaf.sources` for this shard.
  """

  devices: list[Any]
  shape: tuple[int, ...]
  sources: np.ndarray
  host: np.ndarray | None = None
  arrays: list[jax.Array] = dataclasses.field(default_factory=list)

  @functools.cached_property
  def runs(self) -> list[_Run]:
    return _runs(self.sources)


class _Target:
  """One array of the model while it is loaded."""

  def __init__(self, leaf: Leaf, spec: PartitionSpec, mesh: Mesh | None):
    self.leaf, self.shape = leaf, leaf.target.shape
    self.sharding = NamedSharding(mesh, spec) if mesh is not None else None
    self.shards: dict[tuple, _Shard] = {}
    whole = tuple(slice(0, size) for size in self.shape)
    indices = self.sharding.addressable_devices_indices_map(self.shape) if self.sharding else {None: whole}
    for device, index in indices.items():
      bounds = tuple(s.indices(size)[:2] for s, size in zip(index or (), self.shape, strict=True))
      if bounds not in self.shards:
        self.shards[bounds] = _Shard([], tuple(stop - start for start, stop in bounds), self._sources(bounds))
      self.shards[bounds].devices.append(device)
    self.on_host = (jax.local_devices()[0] if mesh is None else mesh.local_devices[0]).platform in _HOST_PLATFORMS

  def _sources(self, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
    leaf = self.leaf
    cut = [slice(*bound) for bound in bounds]
    return leaf.sources[cut[-1]] if leaf.axis else leaf.sources[tuple(cut[leaf.is_stacked :][: leaf.sources.ndim])]

  @property
  def length(self) -> int:
    """The size of the axis along which jobs are cut: layers, or rows of a shard."""
    return self.shape[0] if self.leaf.is_stacked else next(iter(self.shards.values())).shape[0]

  @property
  def bytes_per_step(self) -> int:
    return sum(int(np.prod(shard.shape[1:])) for shard in self.shards.values()) * self.leaf.target.dtype.itemsize

  def runs(self, shard: _Shard, start: int, stop: int) -> list[_Run]:
    return shard.runs if self.leaf.is_stacked else _runs(shard.sources[start:stop])

  def write(self, shard: _Shard, start: int, stop: int, arrays: "_Arrays") -> None:
    """Builds steps start .. stop - 1 of a shard."""
    whole = stop - start == self.length
    dtype = self.leaf.target.dtype
    if self.on_host:
      shard.host = _aligned(shard.shape, dtype) if shard.host is None else shard.host
      piece = shard.host[start:stop]
    else:
      piece = np.empty((stop - start, *shard.shape[1:]), dtype)
    runs = self.runs(shard, start, stop)
    for step in range(start, stop) if self.leaf.is_stacked else (0,):
      self._copy(piece[step - start] if self.leaf.is_stacked else piece, self.leaf.keys[step], runs, arrays)
    if self.on_host:
      return
    if whole:
      shard.arrays = [jax.device_put(piece, device) for device in shard.devices]
      return
    if not shard.arrays:
      shard.arrays = [_zeros(shard.shape, piece.dtype, device) for device in shard.devices]
    pairs = zip(shard.arrays, shard.devices, strict=True)
    shard.arrays = [_write(array, jax.device_put(piece, device), start) for array, device in pairs]

  def _copy(self, out: np.ndarray, keys: tuple[str, ...], runs: list[_Run], arrays: "_Arrays") -> None:
    leaf = self.leaf
    flat = out if leaf.axis else out.reshape(-1, *out.shape[leaf.sources.ndim :])
    for run in runs:
      target = slice(run.target, run.target + run.size)
      if run.matrix < 0:
        flat[(slice(None), target) if leaf.axis else target] = leaf.filler
      elif leaf.axis:
        source = arrays.get(keys[run.matrix], 1, run.source, run.size)
        flat[:, target] = np.repeat(source, leaf.repeat, axis=0)[: len(flat)] if leaf.repeat > 1 else source
      else:
        flat[target] = arrays.get(keys[run.matrix], 0, run.source, run.size)

  def finish(self) -> jax.Array:
    for shard in self.shards.values():
      if self.on_host:
        shard.arrays = [jax.device_put(shard.host, device, may_alias=True) for device in shard.devices]
        shard.host = None
    if self.sharding is None:
      return next(iter(self.shards.values())).arrays[0]
    flat = [array for shard in self.shards.values() for array in shard.arrays]
    return jax.make_array_from_single_device_arrays(self.shape, self.sharding, flat)


@dataclasses.dataclass(frozen=True)
class _Job:
  """Steps start .. stop - 1 of all arrays of one weight: values and scales together."""

  targets: tuple[_Target, ...]
  start: int
  stop: int

  @property
  def num_bytes(self) -> int:
    return sum(target.bytes_per_step for target in self.targets) * (self.stop - self.start)

  def ranges(self) -> Iterator[Range]:
    """The ranges to read. Ranges that meet are joined: rows that several devices need are read once."""
    for target in self.targets:
      leaf, needed = target.leaf, {}
      for shard in target.shards.values():
        for run in target.runs(shard, self.start, self.stop):
          if run.matrix >= 0:
            needed.setdefault(run.matrix, []).append((run.source, run.source + run.size))
      for keys in leaf.keys[self.start : self.stop] if leaf.is_stacked else leaf.keys:
        for matrix, pieces in needed.items():
          yield from (Range(keys[matrix], leaf.axis, *piece) for piece in _joined(pieces))

  def write(self, arrays: "_Arrays", pool: concurrent.futures.Executor) -> list[jax.Array]:
    """Builds these steps of all shards; returns the device arrays, which may still be in transfer."""
    todo = [(target, shard) for target in self.targets for shard in target.shards.values()]
    list(pool.map(lambda pair: pair[0].write(pair[1], self.start, self.stop, arrays), todo))
    return [array for _, shard in todo for array in shard.arrays]


class _Arrays:
  """Ranges that were read; gives any range inside one of them."""

  def __init__(self, arrays: dict[Range, np.ndarray]):
    self._by_key: dict[tuple[str, int], list[tuple[Range, np.ndarray]]] = {}
    for stored, array in arrays.items():
      self._by_key.setdefault((stored.key, stored.axis), []).append((stored, array))

  def get(self, key: str, axis: int, start: int, size: int) -> np.ndarray:
    offset, array = next(
      (start - stored.start, array)
      for stored, array in self._by_key[key, axis]
      if stored.start <= start and start + size <= stored.stop
    )
    return Range(key, axis, offset, offset + size).cut(array)


def _targets(part: Part, mesh: Mesh | None) -> tuple[_Target, ...]:
  specs = jax.tree.leaves(part.weight.get_metadata("partition"), is_leaf=lambda x: isinstance(x, PartitionSpec))
  return tuple(_Target(leaf, spec, mesh) for leaf, spec in zip(part.leaves, specs, strict=True))


def _jobs(targets: tuple[_Target, ...]) -> Iterator[_Job]:
  length = targets[0].length
  steps = max(1, _JOB_BYTES // max(1, sum(target.bytes_per_step for target in targets)))
  for start in range(0, length, steps):
    yield _Job(targets, start, min(length, start + steps))


def _grouped(jobs: list[_Job]) -> Iterator[list[_Job]]:
  """Groups small jobs: many small reads at once are quicker than one after the other."""
  group: list[_Job] = []
  for job in jobs:
    if group and sum(other.num_bytes for other in group) + job.num_bytes > _JOB_BYTES:
      yield group
      group = []
    group.append(job)
  if group:
    yield group


def _runs(sources: np.ndarray) -> list[_Run]:
  flat = sources.reshape(-1)
  step = np.diff(flat)
  same = (step == 1) | ((flat[1:] < 0) & (flat[:-1] < 0))
  starts = np.concatenate([[0], np.flatnonzero(~same) + 1])
  sizes = np.diff(np.append(starts, len(flat)))
  numbers = flat[starts]
  return [
    _Run(int(number) // STRIDE if number >= 0 else -1, int(number) % STRIDE, int(start), int(size))
    for number, start, size in zip(numbers, starts, sizes, strict=True)
  ]


def _joined(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
  result: list[tuple[int, int]] = []
  for start, stop in sorted(pieces):
    if result and start <= result[-1][1]:
      result[-1] = (result[-1][0], max(stop, result[-1][1]))
    else:
      result.append((start, stop))
  return result


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  size = int(np.prod(shape)) * dtype.itemsize
  memory = np.empty(size + _ALIGNMENT, np.uint8)
  first = -memory.ctypes.data % _ALIGNMENT
  return memory[first : first + size].view(dtype).reshape(shape)


def _zeros(shape: tuple[int, ...], dtype: np.dtype, device: Any) -> jax.Array:
  """Zeros on a jax.Device, or on the default device for None."""
  with jax.default_device(device):
    array = jnp.zeros(shape, dtype)
  return array if device is None else jax.device_put(array, device)


@functools.partial(jax.jit, donate_argnums=0)
def _write(whole: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
  """Donates whole."""
  return jax.lax.dynamic_update_slice_in_dim(whole, piece, start, 0)
