"""A digest of the source of both packages, for keys that must change with the code. Imports no jax.

Compiled programs are stored under it (serving/program_cache.py), and the processes of one run compare it
(distributed/processes.py). It covers every file below jaxfp8/ and pallas_kernels/, so a file may move without being missed.
"""

import hashlib
import pathlib

PACKAGES = ("jaxfp8", "pallas_kernels")
_ROOT = pathlib.Path(__file__).parents[1]  # the folder that holds both packages, in a checkout and in an installation


def source_digest(root: pathlib.Path = _ROOT) -> str:
  """sha256, in hexadecimal, of the path and content of every Python file of both packages below `root`.

  Raises FileNotFoundError if a package has no files there: a digest of nothing would never change.
  """
  digest = hashlib.sha256()
  for package in PACKAGES:
    paths = sorted((root / package).rglob("*.py"))
    if not paths:
      raise FileNotFoundError(f"source_digest: no Python files in {root / package}")
    for path in paths:
      content = path.read_bytes()
      digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
      digest.update(content)
  return digest.hexdigest()
