"""The free memory of devices, and whether a KV pool fits into it.

Functions that take a mesh give the same answer in every process.
"""

from typing import Any

from jax.sharding import Mesh

from jaxfp8.distributed import processes
from jaxfp8.errors import InputError
from jaxfp8.host_memory import memory_bytes
from jaxfp8.host_memory import peak_bytes as peak_bytes
from jaxfp8.model.kv_cache import KVCache
from jaxfp8.model.llama import Llama
from jaxfp8.serving.limits import EngineLimits
from jaxfp8.sharding import KV


def free_bytes(device: Any) -> int:
  """Bytes that this process may still allocate on `device`. On a CPU: what the machine and the container have left."""
  if device.platform == "cpu":
    return memory_bytes()[1]
  stats = device.memory_stats() or {}
  return stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)


def room_for_pages(model: Llama, mesh: Mesh, share: float) -> int:
  """The number of pages, per data shard, that fit into `share` (0 .. 1) of `least_free_bytes`."""
  page_bytes = KVCache.abstract(model.config, 1, model.recipe.kv).nbytes
  room = int(least_free_bytes(mesh) * share) // _sharing(mesh)
  return room * mesh.shape[KV] // page_bytes


def least_free_bytes(mesh: Mesh) -> int:
  """Free bytes of one device of the mesh, in the process with the fewest. CPU devices of a process share these bytes."""
  free = free_bytes(mesh.local_devices[0])
  return processes.least(free) if processes.spans_processes(mesh) else free


def _sharing(mesh: Mesh) -> int:
  """The number of devices that share one memory: on a CPU all local devices of the mesh, on a GPU 1."""
  return len(mesh.local_devices) if mesh.local_devices[0].platform == "cpu" else 1


def require_kv_fits(model: Llama, limits: EngineLimits, mesh: Mesh) -> int:
  """Bytes of the KV pool over all devices. Raises InputError if a device's part exceeds its free memory."""
  shards = mesh.devices.shape[0]
  pool = KVCache.abstract(model.config, limits.num_pages * shards, model.recipe.kv, limits.page_size).nbytes
  needed, free = pool // (shards * mesh.shape[KV]) * _sharing(mesh), least_free_bytes(mesh)
  if needed > free:
    raise InputError(
      f"engine: a KV pool of {limits.num_pages} pages of {limits.page_size} tokens needs {needed / 1e9:.2f} GB; "
      f"{free / 1e9:.2f} GB are free. Use fewer or shorter sequences, or --kv_cache=fp8."
    )
  return pool
