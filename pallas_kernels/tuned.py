"""Tile sizes that were measured on a device, which a kernel's tiling prefers to its formula.

    use_folder(cache / "tuned")                  the folder of this user's measurements, <folder>/<operation>/<device>.json
    <package>/<operation>/tuned/<device>.json    measurements that are shipped
      {"device_kind": "NVIDIA H100 80GB HBM3", "compute_capability": [9, 0], "num_sms": 132, "conditions": {...},
       "entries": [{"key": {...}, "sizes": {"stages": 6, ...}, "seconds": 9.1e-6, "formula_seconds": 1.0e-5}, ...]}

An entry is found by its key (regime, shapes and operands of a call), in the files of devices with the target's compute
capability and number of SMs: those of its very kind first, the user's before shipped ones. Without an entry the formula holds.
Impossible sizes are an error, never a reason to fall back silently; each tiling says which sizes are possible. `jaxfp8
validate-gpu` measures and writes. Nothing is ever written into the package.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from pallas_kernels.dispatch import OPERATIONS, Target


def write_bytes(path: pathlib.Path, data: bytes) -> None:
  """Replaces a small file whole; this user alone can read and write it. Raises OSError."""
  path.parent.mkdir(parents=True, exist_ok=True)
  descriptor, temporary = tempfile.mkstemp(dir=path.parent)
  try:
    with os.fdopen(descriptor, "wb") as file:
      file.write(data)
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


_HERE = pathlib.Path(__file__).parent
_user_folder: pathlib.Path | None = None
_read_user: Callable[[pathlib.Path], bytes] = pathlib.Path.read_bytes
_write_user: Callable[[pathlib.Path, bytes], Any] = write_bytes
_forced = jax.make_user_context(None)  # part of jit's key: what was traced with other sizes is traced again


@dataclasses.dataclass(frozen=True)
class Measured:
  """One device's entries for one operation: key (see `_frozen`) -> sizes."""

  path: pathlib.Path
  device_kind: str
  capability: tuple[int, int]
  num_sms: int
  sizes: Mapping[tuple, Mapping[str, int]]


def use_folder(
  path: str | os.PathLike | None,
  *,
  read: Callable[[pathlib.Path], bytes] = pathlib.Path.read_bytes,
  write: Callable[[pathlib.Path, bytes], Any] = write_bytes,
) -> None:
  """Sets the folder of this user's measurements for the whole process; None: only shipped ones count.

  read, write: read and replace the folder's files. A file for which `read` raises OSError, since another user may have written
  it, counts as absent.
  """
  global _user_folder, _read_user, _write_user
  _user_folder = None if path is None else pathlib.Path(path)
  _read_user, _write_user = read, write
  _files.cache_clear()


def folders(operation: str) -> tuple[pathlib.Path, ...]:
  """The folders that hold an operation's files, the user's first."""
  shipped = _HERE / OPERATIONS[operation] / "tuned"
  return (shipped,) if _user_folder is None else (_user_folder / operation, shipped)


def lookup(operation: str, target: Target, key: Mapping[str, Any]) -> dict[str, int]:
  """The measured sizes of the call `key` on `target`, empty where there are none. Raises ValueError for a damaged file."""
  if _forced.value is not None and _forced.value[0] == operation:
    return dict(_forced.value[1])
  files = (file for folder in folders(operation) for file in _files(folder))
  matching = (file for file in files if (file.capability, file.num_sms) == (target.capability, target.num_sms))
  for file in sorted(matching, key=lambda file: file.device_kind != target.kind):
    if _frozen(key) in file.sizes:
      return dict(file.sizes[_frozen(key)])
  return {}


def trying(operation: str, sizes: Mapping[str, int]):
  """A context in which every call of `operation` gets these sizes, to measure them."""
  return _forced((operation, tuple(sorted(sizes.items()))))


def refuse(operation: str, sizes: Mapping[str, int], rule: str) -> None:
  """Raises the ValueError for impossible measured sizes."""
  raise ValueError(
    f"{operation}: measured tile sizes need {rule}; got {json.dumps(dict(sizes))} from "
    f"{' or '.join(map(str, folders(operation)))}. Delete the entry, or measure again with jaxfp8 validate-gpu."
  )


def read_bytes(path: pathlib.Path) -> bytes:
  """The content of a file of measurements. Raises OSError."""
  return _read_user(path) if _user_folder is not None and path.is_relative_to(_user_folder) else path.read_bytes()


@functools.cache
def _files(folder: pathlib.Path) -> tuple[Measured, ...]:
  files = []
  for path in sorted(folder.glob("*.json")):
    with contextlib.suppress(OSError):
      files.append(_parse(path, read_bytes(path)))
  return tuple(files)


def _parse(path: pathlib.Path, data: bytes) -> Measured:
  try:
    content = json.loads(data)
    major, minor = content["compute_capability"]
    sizes = dict(_entries(content["entries"]))
    return Measured(path, str(content["device_kind"]), (int(major), int(minor)), int(content["num_sms"]), sizes)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"tuned: {path} does not hold measured tile sizes ({type(error).__name__}: {error}). Delete it, or measure again with "
      "jaxfp8 validate-gpu."
    ) from error


def _entries(entries: list[Mapping]) -> Iterator[tuple[tuple, dict[str, int]]]:
  for entry in entries:
    sizes = dict(entry["sizes"])
    for name, value in sizes.items():
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive whole number, not {value!r}")
    yield _frozen(entry["key"]), sizes


def _frozen(key: Mapping[str, Any]) -> tuple:
  return tuple(sorted(key.items()))


def write(operation: str, device: Mapping[str, Any], entries: list[dict[str, Any]]) -> pathlib.Path:
  """Adds entries to the device's file in the user's folder, in place of those with their keys. Returns the file's path.

  device: device_kind, compute_capability, num_sms, conditions. Raises ValueError if no folder has been set.
  """
  if _user_folder is None:
    raise ValueError("tuned: measured tile sizes need a folder; got none. Call use_folder first.")
  folder = _user_folder / operation
  name = "".join(c if c.isalnum() else "-" for c in device["device_kind"].lower())
  path = folder / f"{name}.json"
  merged: dict[tuple, Mapping[str, Any]] = {}
  with contextlib.suppress(OSError):
    data = read_bytes(path)
    _parse(path, data)
    merged = {_frozen(entry["key"]): entry for entry in json.loads(data)["entries"]}
  merged |= {_frozen(entry["key"]): entry for entry in entries}
  lines = ",\n".join("  " + json.dumps(entry) for entry in merged.values())
  _write_user(path, (json.dumps(dict(device))[:-1] + f',\n "entries": [\n{lines}\n]}}\n').encode())
  _files.cache_clear()
  return path
