"""Tile sizes that were measured on a device, which a kernel's tiling prefers to its formula.

    <operation>/tuned/<device>.json, written by `jaxfp8 validate-gpu --tune`:
      {"device_kind": "NVIDIA H100 80GB HBM3", "compute_capability": [9, 0], "num_sms": 132, "conditions": {...},
       "entries": [{"key": {...}, "sizes": {"stages": 6, ...}, "seconds": 9.1e-6, "formula_seconds": 1.0e-5}, ...]}

An entry is found by its key (what a call is: regime, shapes, operands), in the files of devices with the target's compute
capability and number of SMs, a file of its very kind first. No file, no entry: the formula. Sizes that cannot be are an error,
never a reason to fall back silently; the tiling that asks says which sizes can be.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from pallas_kernels.dispatch import Target

_HERE = pathlib.Path(__file__).parent
_forced = jax.make_user_context(None)  # part of jit's key: what was traced with other sizes is traced again


@dataclasses.dataclass(frozen=True)
class Measured:
  """One device's entries for one operation: key (see `_frozen`) -> sizes."""

  path: pathlib.Path
  device_kind: str
  capability: tuple[int, int]
  num_sms: int
  sizes: Mapping[tuple, Mapping[str, int]]


def folder(operation: str) -> pathlib.Path:
  """Where an operation's files lie."""
  return _HERE / operation / "tuned"


def lookup(operation: str, target: Target, key: Mapping[str, Any]) -> dict[str, int]:
  """The measured sizes of the call `key` on `target`, empty where there are none. Raises ValueError for a damaged file."""
  if _forced.value is not None and _forced.value[0] == operation:
    return dict(_forced.value[1])
  matching = (
    file for file in _files(folder(operation)) if (file.capability, file.num_sms) == (target.capability, target.num_sms)
  )
  for file in sorted(matching, key=lambda file: file.device_kind != target.kind):
    if _frozen(key) in file.sizes:
      return dict(file.sizes[_frozen(key)])
  return {}


def trying(operation: str, sizes: Mapping[str, int]):
  """A context in which every call of `operation` gets these sizes: for measuring them."""
  return _forced((operation, tuple(sorted(sizes.items()))))


def refuse(operation: str, sizes: Mapping[str, int], rule: str) -> None:
  """Raises the ValueError for measured sizes that cannot be."""
  raise ValueError(
    f"{operation}: measured tile sizes need {rule}; got {json.dumps(dict(sizes))} from {folder(operation)}. "
    "Delete the entry, or measure again with jaxfp8 validate-gpu --tune."
  )


@functools.cache
def _files(where: pathlib.Path) -> tuple[Measured, ...]:
  return tuple(_read(path) for path in sorted(where.glob("*.json")))


def _read(path: pathlib.Path) -> Measured:
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
    major, minor = content["compute_capability"]
    sizes = dict(_entries(content["entries"]))
    return Measured(path, str(content["device_kind"]), (int(major), int(minor)), int(content["num_sms"]), sizes)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"tuned: {path} does not hold measured tile sizes ({type(error).__name__}: {error}). Delete it, or measure again with "
      "jaxfp8 validate-gpu --tune."
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


def write(operation: str, device: Mapping[str, Any], entries: list[Mapping[str, Any]], where: pathlib.Path) -> pathlib.Path:
  """Adds entries to the device's file in `where`, new ones in place of old ones with their key. Returns its path.

  device: device_kind, compute_capability, num_sms, conditions.
  """
  name = "".join(c if c.isalnum() else "-" for c in device["device_kind"].lower())
  path = where / f"{name}.json"
  merged: dict[tuple, Mapping[str, Any]] = {}
  if path.exists():
    _read(path)
    merged = {_frozen(entry["key"]): entry for entry in json.loads(path.read_text(encoding="utf-8"))["entries"]}
  merged |= {_frozen(entry["key"]): entry for entry in entries}
  where.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix(".part")
  lines = ",\n".join("  " + json.dumps(entry) for entry in merged.values())
  temporary.write_text(json.dumps(dict(device))[:-1] + f',\n "entries": [\n{lines}\n]}}\n', encoding="utf-8")
  temporary.replace(path)
  _files.cache_clear()
  return path
