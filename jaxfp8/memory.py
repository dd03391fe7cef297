"""How much memory a device has free, and whether a KV pool fits into it."""

import jax
from jax.sharding import Mesh

from jaxfp8.cache import KVCache
from jaxfp8.dims import KV
from jaxfp8.errors import InputError
from jaxfp8.model import Llama
from jaxfp8.steps import Limits


def free_bytes(device: jax.Device) -> int:
  """Memory that this process may still take on `device`; on a CPU, what the operating system calls available."""
  if device.platform == "cpu":
    with open("/proc/meminfo", encoding="ascii") as file:
      fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024
  stats = device.memory_stats() or {}
  return stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)


def require_kv_fits(model: Llama, limits: Limits, mesh: Mesh) -> int:
  """Bytes of the KV pool over all devices. Raises InputError if a device's part is more than it has free."""
  shards = mesh.devices.shape[0]
  pool = KVCache.abstract(model.config, limits.num_pages * shards, model.recipe.kv, limits.page_size).nbytes
  devices = mesh.devices.size
  per_device = pool // (shards * mesh.shape[KV])
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  needed, free = (per_device * devices if on_cpu else per_device), free_bytes(mesh.devices.flat[0])
  if needed > free:
    raise InputError(
      f"engine: a KV pool of {limits.num_pages} pages of {limits.page_size} tokens needs {needed / 1e9:.2f} GB; "
      f"{free / 1e9:.2f} GB are free. Use fewer or shorter sequences, or --kv_cache=fp8."
    )
  return pool
