"""One safetensors file: names, dtypes and shapes from its header, tensors by `pread`.

The header is checked here, so that a message names the tensor at fault; the library then judges what remains. It does
not read the tensors: its numpy side has no float8, and it maps the file, whose pages would stay resident until a 70 GB
conversion has all of them in memory.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from jaxfp8 import regular_files
from jaxfp8.checkpoint.readers.file_bytes import read_bytes
from jaxfp8.checkpoint.readers.file_kinds import FETCH_AGAIN, describe
from jaxfp8.checkpoint.readers.json_file import first_twice
from jaxfp8.checkpoint.readers.source import FLOAT8
from jaxfp8.errors import InputError, shown

_DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": FLOAT8,
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_BITS = {
  **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
  **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16), **dict.fromkeys(("U32", "I32", "F32"), 32),
  **dict.fromkeys(("U64", "I64", "F64", "C64"), 64), "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_MAX_DIMENSIONS = 64  # numpy's own limit
_WRITE_AGAIN = "Fetch the file again, or write it again with the safetensors library."


@dataclasses.dataclass(frozen=True)
class Header:
  """The header of one tensor. `dtype` is safetensors' own name (`I8`) for dtypes that are never read; start, stop: bytes."""

  path: pathlib.Path
  dtype: np.dtype | str
  shape: tuple[int, ...]
  start: int
  stop: int


def read_headers(path: pathlib.Path) -> dict[str, Header]:
  """The header of every tensor. Raises InputError, naming the tensor at fault, for a file that is no whole safetensors file."""
  regular_files.require_link(path, path.parent)
  kind = describe(path)
  if kind.name not in ("safetensors", "other"):
    raise InputError(f"readers: {path} is not a whole safetensors file: {kind.sentence}")
  try:
    length, entries = _read_json_header(path)
    size = path.stat().st_size - 8 - length
    offsets = {name: _check_entry(path, name, entry, size) for name, entry in entries.items()}
    _check_order(path, offsets, size)
    with safetensors.safe_open(path, framework="np"):
      pass
  except (safetensors.SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
    if isinstance(error, InputError):
      raise
    raise _refuse(path, str(error)) from error
  headers = {}
  for name, entry in entries.items():
    start, stop = (8 + length + offset for offset in offsets[name])
    headers[name] = Header(path, _DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"]), start, stop)
  return headers


def read_tensor(name: str, header: Header) -> np.ndarray:
  """A new, writable array. Raises InputError if the file has become shorter or cannot be read."""
  return np.frombuffer(read_bytes(header.path, header.start, header.stop, name), header.dtype).reshape(header.shape)


def _read_json_header(path: pathlib.Path) -> tuple[int, dict[str, Any]]:
  """(bytes of the JSON header, its entries without __metadata__)."""
  size = path.stat().st_size
  with regular_files.open_file(path, within=path.parent) as file:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
      raise _refuse(path, f"the header says that it is {length} bytes long, and the file has {size}")
    if length > _MAX_HEADER_BYTES:
      raise _refuse(path, f"the header says that it is {length} bytes long, more than safetensors allows", _WRITE_AGAIN)
    data = file.read(length)

  def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
      raise _refuse(path, f"its header holds {shown(first_twice(pairs))} twice", _WRITE_AGAIN)
    return entries

  try:
    entries = json.loads(data, object_pairs_hook=once)
  except InputError:
    raise
  except (ValueError, RecursionError) as error:
    raise _refuse(path, f"its header is no JSON ({error})") from error
  if not isinstance(entries, dict):
    raise _refuse(path, "its header is no JSON object")
  entries.pop("__metadata__", None)
  return length, entries


def _check_entry(path: pathlib.Path, name: str, entry: Any, size: int) -> tuple[int, int]:
  """The offsets of one tensor in the data, which has `size` bytes."""
  match entry:
    case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]} if (
      all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 63 for n in (*shape, start, stop))
      and len(shape) <= _MAX_DIMENSIONS
    ):
      pass
    case _:
      raise _refuse(path, f"its header must hold dtype, shape and data_offsets of {name}; got {str(entry)[:100]}")
  if not start <= stop <= size:
    raise _refuse(path, f"{name} has the bytes {start} to {stop}, and the data ends at byte {size}")
  bits = _BITS.get(dtype)
  if bits is not None and math.prod(shape) * bits != 8 * (stop - start):
    raise _refuse(
      path, f"{name} of dtype {dtype} and shape {shape} needs {math.prod(shape) * bits // 8} bytes; it has {stop - start}"
    )
  return start, stop


def _check_order(path: pathlib.Path, offsets: Mapping[str, tuple[int, int]], size: int) -> None:
  """Raises InputError unless the tensors cover the data without overlaps and holes."""
  ordered = sorted(offsets.items(), key=lambda item: item[1])
  for (first, (_, stop)), (second, (start, _)) in itertools.pairwise([("the header", (0, 0)), *ordered]):
    if start < stop:
      raise _refuse(path, f"{first} and {second} share bytes from {start} to {stop}")
    if start > stop:
      raise _refuse(path, f"the bytes {stop} to {start}, between {first} and {second}, belong to no tensor", _WRITE_AGAIN)
  end = ordered[-1][1][1] if ordered else 0
  if end < size:
    raise _refuse(path, f"the last {size - end} bytes belong to no tensor", _WRITE_AGAIN)


def _refuse(path: pathlib.Path, fault: str, way_out: str = FETCH_AGAIN) -> InputError:
  return InputError(f"readers: {path} is not a whole safetensors file: {fault}. {way_out}")
