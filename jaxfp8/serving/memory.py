"""How much memory devices have free, and whether a KV pool fits into it: the same answer in every process."""

import resource
from typing import Any

from jax.sharding import Mesh

from jaxfp8.distributed import processes as hosts
from jaxfp8.errors import InputError
from jaxfp8.model.kv_cache import KVCache
from jaxfp8.model.llama import Llama
from jaxfp8.serving.limits import EngineLimits
from jaxfp8.sharding import KV


def free_bytes(device: Any) -> int:
  """Memory that this process may still take on `device`; on a CPU, what the operating system calls available."""
  if device.platform == "cpu":
    with open("/proc/meminfo", encoding="ascii") as file:
      fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024
  stats = device.memory_stats() or {}
  return stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)


def room_for_pages(model: Llama, mesh: Mesh, share: float) -> int:
  """Pages of a data shard's pool that `share` of the free memory holds, where the least of it is free."""
  page_bytes = KVCache.abstract(model.config, 1, model.recipe.kv).nbytes
  room = int(least_free_bytes(mesh) * share) // _sharing(mesh)
  return room * mesh.shape[KV] // page_bytes


def least_free_bytes(mesh: Mesh) -> int:
  """What is free for a device of the mesh (on CPUs: for all of a process's), in the process that has least."""
  free = free_bytes(mesh.local_devices[0])
  return hosts.least(free) if hosts.spans_processes(mesh) else free


def _sharing(mesh: Mesh) -> int:
  """Devices of the mesh that share one memory: on a CPU all of a process."""
  return len(mesh.local_devices) if mesh.local_devices[0].platform == "cpu" else 1


def require_kv_fits(model: Llama, limits: EngineLimits, mesh: Mesh) -> int:
  """Bytes of the KV pool over all devices. Raises InputError if a device's part is more than it has free."""
  shards = mesh.devices.shape[0]
  pool = KVCache.abstract(model.config, limits.num_pages * shards, model.recipe.kv, limits.page_size).nbytes
  needed, free = pool // (shards * mesh.shape[KV]) * _sharing(mesh), least_free_bytes(mesh)
  if needed > free:
    raise InputError(
      f"engine: a KV pool of {limits.num_pages} pages of {limits.page_size} tokens needs {needed / 1e9:.2f} GB; "
      f"{free / 1e9:.2f} GB are free. Use fewer or shorter sequences, or --kv_cache=fp8."
    )
  return pool


def peak_bytes() -> int:
  """Most memory of this process that was resident. (getrusage counts what its parent had when it was started, too.)"""
  try:
    with open("/proc/self/status", encoding="ascii") as file:
      return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
  except (OSError, StopIteration):
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
