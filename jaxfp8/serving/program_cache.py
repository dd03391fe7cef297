"""A cache on disk of compiled CPU programs: a later run loads a program and calls it.

JAX's own persistent cache saves XLA's compilation, but every start still traces and lowers the model in Python, which takes
longer. This cache stores the whole executable in jax_compilation_cache_dir. The key covers everything that a program depends
on, this package's source included. The cache works only while JAX's own cache is off (jax_enable_compilation_cache): a program
from JAX's cache serializes without its code, and fails when it runs. It serves only CPUs: loading a serialized executable
on a GPU has not been verified. A GPU uses JAX's cache, which `verify_jax_cache` teaches to compare digests too: they reveal
damage, not an attacker. Like JAX's cache, it holds native code: whoever can write to the folder can run code.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import pickle

import jax
import jaxlib
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface
from jax._src.lru_cache import LRUCache
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from jaxfp8 import stored_files
from jaxfp8.source_digest import source_digest

_REMEDY = "the program is compiled again"


def load(key: str, mesh: Mesh) -> jax.stages.Compiled | None:
  """The program stored under `key`, or None if there is no such program, or the stored one is damaged.

  Native code with one wrong bit ends the process by a signal, so the file's SHA-256 is compared before anything reads it.
  """
  path = _path(key, mesh)
  content = stored_files.read(path, _REMEDY) if path else None
  if content is None:
    return None
  try:
    payload, inputs, outputs = pickle.loads(content)
    return serialize_executable.deserialize_and_load(payload, inputs, outputs, execution_devices=list(mesh.devices.flat))
  except Exception as error:  # of XLA, of pickle: whole, and yet not a program of this jax
    stored_files.say(f"{path} cannot be loaded ({type(error).__name__}); {_REMEDY}")
  return None


def store(key: str, program: jax.stages.Compiled, mesh: Mesh) -> None:
  """Stores a program under `key`. If the folder cannot be written, the next start compiles again."""
  if path := _path(key, mesh):
    stored_files.write(path, pickle.dumps(serialize_executable.serialize(program)))


def verify_jax_cache() -> None:
  """Makes JAX's own persistent cache, which GPUs use, compare a program's SHA-256 before the program is loaded.

  To be called before the first compilation. JAX has no public way to wrap its cache; the release of jax is pinned, and a test
  damages an entry.
  """
  compilation_cache.get_file_cache = _verified_cache


class _VerifiedCache(CacheInterface):
  """The files of JAX's cache, each with the digest of its content."""

  def __init__(self, files: LRUCache):
    self._files, self._path = files, files.path

  def get(self, key: str) -> bytes | None:
    stored = self._files.get(key)
    content = None if stored is None else stored_files.without_digest(stored)
    if stored is not None and content is None:
      path = self._path / f"{key}-cache"
      stored_files.say_damaged(path, stored, _REMEDY)
      path.unlink(missing_ok=True)  # JAX never replaces a file
    return content

  def put(self, key: str, value: bytes) -> None:
    try:
      self._files.put(key, stored_files.with_digest(value))
    except OSError as error:
      stored_files.warn_unwritable(self._path, error)


def _verified_cache(path: str) -> tuple[CacheInterface, str] | None:
  try:
    return _VerifiedCache(LRUCache(path, max_size=jax.config.jax_compilation_cache_max_size)), path
  except OSError as error:
    stored_files.warn_unwritable(pathlib.Path(path), error)
    return None


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
