"""A cache on disk of compiled CPU programs: a later run loads a program and calls it.

JAX's own persistent cache saves XLA's compilation, but every start still traces and lowers the model in Python, which takes
longer. This cache stores the whole executable in jax_compilation_cache_dir. The key covers everything that a program depends
on, this package's source included. The cache works only while JAX's own cache is off (jax_enable_compilation_cache): a program
from JAX's cache serializes without its code, and fails when it runs. It serves only CPUs: loading a serialized executable
on a GPU has not been verified. Like JAX's cache, it holds native code: whoever can write to the folder can run code.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import pickle

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from jaxfp8.source_digest import source_digest
from jaxfp8.unfinished import write_atomically


def load(key: str, mesh: Mesh) -> jax.stages.Compiled | None:
  """The program stored under `key`, or None if there is no such program or this jax cannot load it."""
  path = _path(key, mesh)
  if path is None:
    return None
  # A damaged or foreign file counts as no file: the program is compiled again and overwrites the file.
  with contextlib.suppress(Exception):
    payload, inputs, outputs = pickle.loads(path.read_bytes())
    return serialize_executable.deserialize_and_load(payload, inputs, outputs, execution_devices=list(mesh.devices.flat))
  return None


def store(key: str, program: jax.stages.Compiled, mesh: Mesh) -> None:
  """Stores a program under `key`. If the folder cannot be written, the next start compiles again."""
  path = _path(key, mesh)
  if path is None:
    return
  with contextlib.suppress(OSError):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, pickle.dumps(serialize_executable.serialize(program)))


def _path(key: str, mesh: Mesh) -> pathlib.Path | None:
  """The file of `key`; None without a folder, with JAX's own cache on, off CPUs, or with several processes."""
  folder = jax.config.jax_compilation_cache_dir
  if (
    not folder
    or jax.config.jax_enable_compilation_cache
    or any(device.platform != "cpu" for device in mesh.devices.flat)
    or jax.process_count() > 1
  ):
    return None
  devices = [device.id for device in mesh.devices.flat]
  digest = hashlib.sha256(f"{_environment()} {devices} {len(jax.devices())} {key}".encode()).hexdigest()
  return pathlib.Path(folder) / f"step-{digest[:32]}"


@functools.cache
def _environment() -> str:
  """A digest of a program's dependencies besides the key: versions, flags, the CPU and its number of cores, our source."""
  digest = hashlib.sha256(f"{jax.__version__} {jaxlib.__version__} {os.environ.get('XLA_FLAGS', '')}".encode())
  with contextlib.suppress(OSError):
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    digest.update("\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})).encode())
  digest.update(str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()).encode())
  digest.update(source_digest().encode())
  return digest.hexdigest()
