"""A cache on disk of compiled CPU programs: a later run loads a program and calls it.

JAX's own persistent cache saves XLA's compilation, but every start still traces and lowers the model in Python, which takes
longer. This cache stores the whole executable in jax_compilation_cache_dir. The key covers everything that a program depends
on, this package's source included. The cache works only while JAX's own cache is off (jax_enable_compilation_cache): a program
from JAX's cache serializes without its code, and fails when it runs. It serves only CPUs: loading a serialized executable
on a GPU has not been verified. A GPU uses JAX's cache, which `verify_jax_cache` teaches to compare digests too. Both hold
native code: whoever could write a file of theirs could run code. So both load only files that no other user can have written
(stored_files.py); the digests reveal damage, not an attacker.
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
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from jaxfp8 import private_files, stored_files
from jaxfp8.source_digest import source_digest

_REMEDY = "the program is compiled again"
_SUFFIX = "-cache"  # of the names of JAX's files
_AUTOTUNED = "xla_gpu_per_fusion_autotune_cache_dir"  # JAX's name


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

  To be called before the first compilation, with the folder set. JAX has no public way to wrap its cache; the release of jax is
  pinned, and a test damages an entry.
  """
  compilation_cache.get_file_cache = _verified_cache
  # XLA writes and reads the choices of its autotuner itself, in a folder beside the programs.
  try:
    private_files.require_tree(pathlib.Path(jax.config.jax_compilation_cache_dir or "", _AUTOTUNED))
  except (FileNotFoundError, NotADirectoryError):  # `stored_files.write` says that the folder is impossible
    return
  except OSError as error:
    reason = error if isinstance(error, private_files.NotPrivate) else f"{error.filename}: {error.strerror}"
    stored_files.say(f"{reason}; XLA does not keep the choices of its autotuner")
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


class _VerifiedCache(CacheInterface):
  """The files of JAX's cache, each with the digest of its content. The least recently written ones leave a full cache."""

  def __init__(self, path: pathlib.Path):
    self._path = path

  def get(self, key: str) -> bytes | None:
    return stored_files.read(self._path / f"{key}{_SUFFIX}", _REMEDY)

  def put(self, key: str, value: bytes) -> None:
    max_bytes = jax.config.jax_compilation_cache_max_size  # -1: no limit
    if max_bytes >= 0:
      if len(value) > max_bytes:
        return
      with contextlib.suppress(OSError):
        self._make_room(max_bytes - len(value))
    stored_files.write(self._path / f"{key}{_SUFFIX}", value)

  def _make_room(self, max_bytes: int) -> None:
    files = [(path.lstat(), path) for path in self._path.glob(f"*{_SUFFIX}")]
    left = sum(info.st_size for info, _ in files)
    for info, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
      if left <= max_bytes:
        break
      path.unlink(missing_ok=True)
      left -= info.st_size


def _verified_cache(path: str) -> tuple[CacheInterface, str] | None:
  try:
    private_files.make_folder(pathlib.Path(path))
  except OSError as error:
    stored_files.warn_unwritable(pathlib.Path(path), error)
    return None
  return _VerifiedCache(pathlib.Path(path)), path


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
