"""One safetensors file: names, dtypes and shapes from its header, tensors by `pread`.

The library validates the header when the file is opened. It does not read the tensors: its numpy side has no float8, and it
maps the file, whose pages would stay resident until a 70 GB conversion has all of them in memory.
"""

import dataclasses
import json
import math
import pathlib
import struct

import ml_dtypes
import numpy as np
import safetensors

from jaxfp8.checkpoint.readers.file_bytes import read_bytes
from jaxfp8.checkpoint.readers.source import FLOAT8
from jaxfp8.errors import InputError

_DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": FLOAT8,
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


@dataclasses.dataclass(frozen=True)
class Header:
  """The header of one tensor. `dtype` is safetensors' own name (`I8`) for dtypes that are never read; start, stop: bytes."""

  path: pathlib.Path
  dtype: np.dtype | str
  shape: tuple[int, ...]
  start: int
  stop: int


def read_headers(path: pathlib.Path) -> dict[str, Header]:
  """The header of every tensor. Raises InputError for a file that is no whole safetensors file."""
  try:
    with safetensors.safe_open(path, framework="np"):  # compares header and size
      pass
    with open(path, "rb") as file:
      (length,) = struct.unpack("<Q", file.read(8))
      entries = json.loads(file.read(length))
    size, headers = path.stat().st_size, {}
    for name, entry in entries.items():
      if name == "__metadata__":
        continue
      start, stop = (8 + length + offset for offset in entry["data_offsets"])
      dtype, shape = _DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"])
      if not 8 + length <= start <= stop <= size:
        raise ValueError(f"{name} lies outside the file")
      if isinstance(dtype, np.dtype) and math.prod(shape) * dtype.itemsize != stop - start:
        raise ValueError(f"{name} has {stop - start} bytes for {entry['dtype']} {list(shape)}")
      headers[name] = Header(path, dtype, shape, start, stop)
    return headers
  except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, struct.error) as error:
    raise InputError(f"readers: {path} is not a whole safetensors file: {error}. Fetch it again.") from error


def read_tensor(name: str, header: Header) -> np.ndarray:
  """A new, writable array. Raises InputError if the file has become shorter or cannot be read."""
  return np.frombuffer(read_bytes(header.path, header.start, header.stop, name), header.dtype).reshape(header.shape)
