"""The header of a GGUF file: metadata, and the table of tensors, compared with the file before anything of their size is made.

    read_header(path)  ->  GgufHeader(metadata, {name: GgufTensor}), or one InputError that names the key or tensor at fault

Format: ggml's docs/gguf.md. Types and block sizes are the gguf package's. Its own reader is not used: it believes the counts of
a damaged file, and reports a fault without the key or the tensor.
"""

import dataclasses
import itertools
import mmap
import pathlib
import struct
from typing import Any

import gguf
import numpy as np

from jaxfp8 import regular_files
from jaxfp8.checkpoint.readers.file_kinds import FETCH_AGAIN, describe
from jaxfp8.errors import InputError, shown

_VERSIONS = (2, 3)
_KIND = gguf.GGUFValueType
_SCALARS = {
  _KIND.UINT8: "<u1", _KIND.INT8: "<i1", _KIND.UINT16: "<u2", _KIND.INT16: "<i2", _KIND.UINT32: "<u4", _KIND.INT32: "<i4",
  _KIND.FLOAT32: "<f4", _KIND.BOOL: "?", _KIND.UINT64: "<u8", _KIND.INT64: "<i8", _KIND.FLOAT64: "<f8",
}  # fmt: skip
_CONVERT_AGAIN = "Convert the model again with a current llama.cpp."
_MAX_DIMENSIONS = 4
_MIN_ENTRY_BYTES = 8 + 4 + 1  # of the metadata: a key's length, a type and a value
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # a name's length, one dimension, a type and an offset


@dataclasses.dataclass(frozen=True)
class GgufTensor:
  """An entry of the table. shape: as numpy counts, the fastest dimension last. start, stop: bytes in the file."""

  path: pathlib.Path
  name: str
  type: gguf.GGMLQuantizationType
  shape: tuple[int, ...]
  start: int
  stop: int


@dataclasses.dataclass(frozen=True)
class GgufHeader:
  path: pathlib.Path
  metadata: dict[str, Any]
  tensors: dict[str, GgufTensor]


def read_header(path: pathlib.Path) -> GgufHeader:
  """Raises InputError, naming key or tensor, for a file that is no whole GGUF file of version 2 or 3."""
  if not path.is_file():
    raise InputError(f"readers: {path} is not a whole GGUF file: {describe(path).sentence}")
  try:
    with regular_files.open_file(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      if data[:4] != b"GGUF":
        raise InputError(f"readers: {path} is not a whole GGUF file: {describe(path).sentence}")
      return _Parser(path, data).header()
  except (OSError, ValueError) as error:  # an empty file cannot be mapped
    if isinstance(error, InputError):
      raise
    raise InputError(f"readers: {path} is not a whole GGUF file: {describe(path).sentence}") from error


class _Parser:
  """A cursor over the bytes of one file. `_what` is the thing that is being read, for messages."""

  def __init__(self, path: pathlib.Path, data: mmap.mmap):
    self._path, self._data, self._size, self._at, self._what = path, data, len(data), 4, "the header"

  def header(self) -> GgufHeader:
    version = self._number("<I")
    if version not in _VERSIONS:
      swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
      if swapped in _VERSIONS:
        raise self._refuse("the file is big-endian", "Convert the model on, or for, a little-endian machine.")
      raise self._refuse(f"the file has version {version}", _CONVERT_AGAIN)
    num_tensors, num_entries = self._number("<Q"), self._number("<Q")
    for count, least, what in ((num_tensors, _MIN_TENSOR_BYTES, "tensors"), (num_entries, _MIN_ENTRY_BYTES, "metadata keys")):
      if count * least > self._size:
        raise self._refuse(f"the header counts {count} {what}, more than {self._size} bytes can hold")
    metadata: dict[str, Any] = {}
    for index in range(num_entries):
      self._what = f"metadata key {index + 1} of {num_entries}"
      key = self._string()
      self._what = f"the metadata key {key[:100]!r}"
      if key in metadata:
        raise self._refuse(f"{self._what} stands there twice", _CONVERT_AGAIN)
      metadata[key] = self._value(self._number("<I"))
    tensors = self._tensors(num_tensors, self._alignment(metadata))
    return GgufHeader(self._path, metadata, tensors)

  def _alignment(self, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment <= 0 or alignment & (alignment - 1):
      raise self._refuse(f"general.alignment must be a power of two; got {str(alignment)[:100]}")
    return alignment

  def _tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
    entries: dict[str, tuple[gguf.GGMLQuantizationType, tuple[int, ...], int, int]] = {}
    for index in range(count):
      self._what = f"the table's tensor {index + 1} of {count}"
      name = self._string()
      self._what = f"tensor {name[:100]!r}"
      if name in entries:
        raise self._refuse(f"{self._what} stands in the table twice", _CONVERT_AGAIN)
      num_dimensions = self._number("<I")
      if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise self._refuse(f"{self._what} has {num_dimensions} dimensions, and GGUF has 1 to {_MAX_DIMENSIONS}")
      dimensions = tuple(self._number("<Q") for _ in range(num_dimensions))  # ggml counts from the fastest: [in, out]
      kind, offset = self._number("<I"), self._number("<Q")
      if kind not in set(gguf.GGMLQuantizationType):
        way_out = "Pass a quantization of another type, or fetch the file again."
        raise self._refuse(f"{self._what} has the unknown type {kind}", way_out)
      kind = gguf.GGMLQuantizationType(kind)
      block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
      if dimensions[0] % block:
        raise self._refuse(f"rows of {self._what} have {dimensions[0]} numbers, no multiple of {kind.name}'s block of {block}")
      if offset % alignment:
        raise self._refuse(f"{self._what} begins at offset {offset}, no multiple of the file's alignment of {alignment}")
      num_bytes = block_bytes * (dimensions[0] // block)
      for size in dimensions[1:]:
        num_bytes *= size
      entries[name] = (kind, dimensions[::-1], offset, num_bytes)
    base = -(-self._at // alignment) * alignment
    tensors = {}
    for name, (kind, shape, offset, num_bytes) in entries.items():
      start, stop = base + offset, base + offset + num_bytes
      if stop > self._size:
        raise self._refuse(
          f"tensor {shown(name)} of shape {list(shape)} ends at byte {stop}, and the file at byte {self._size}"
        )
      tensors[name] = GgufTensor(self._path, name, kind, shape, start, stop)
    self._refuse_overlaps(tensors)
    return tensors

  def _refuse_overlaps(self, tensors: dict[str, GgufTensor]) -> None:
    ordered = sorted((t for t in tensors.values() if t.stop > t.start), key=lambda t: t.start)
    for first, second in itertools.pairwise(ordered):
      if second.start < first.stop:
        raise self._refuse(f"tensors {shown(first.name)} and {shown(second.name)} share the bytes from {second.start}")

  def _value(self, kind: int) -> Any:
    if kind == _KIND.STRING:
      return self._string()
    if kind == _KIND.ARRAY:
      return self._array()
    if kind not in set(_SCALARS):
      raise self._refuse(f"{self._what} has the unknown type {kind}")
    return self._numbers(_KIND(kind), 1)[0]

  def _array(self) -> list[Any]:
    kind, count = self._number("<I"), self._number("<Q")
    if kind == _KIND.STRING:
      if count * 8 > self._size - self._at:
        raise self._refuse(f"{self._what} counts {count} texts, more than the rest of the file can hold")
      return [self._string() for _ in range(count)]
    if kind not in set(_SCALARS):
      raise self._refuse(f"{self._what} is a list of the type {kind}, which GGUF does not allow")
    return self._numbers(_KIND(kind), count)

  def _numbers(self, kind: gguf.GGUFValueType, count: int) -> list[Any]:
    dtype = np.dtype(_SCALARS[kind])
    start = self._take(count * dtype.itemsize)
    values = np.frombuffer(self._data[start : self._at], dtype if kind != _KIND.BOOL else np.uint8)
    return (values != 0).tolist() if kind == _KIND.BOOL else values.tolist()

  def _number(self, form: str) -> int:
    return struct.unpack_from(form, self._data, self._take(struct.calcsize(form)))[0]

  def _string(self) -> str:
    size = self._number("<Q")
    start = self._take(size)
    try:
      return self._data[start : self._at].decode("utf-8")
    except UnicodeDecodeError as error:
      raise self._refuse(f"{self._what} is no UTF-8 text") from error

  def _take(self, size: int) -> int:
    """Steps over the next `size` bytes and returns the place of the first."""
    start = self._at
    if size > self._size - start:
      raise self._refuse(f"{self._what} needs {size} bytes at byte {start}, and the file ends at byte {self._size}")
    self._at += size
    return start

  def _refuse(self, fault: str, way_out: str = FETCH_AGAIN) -> InputError:
    return InputError(f"readers: {self._path} is not a whole GGUF file of version 2 or 3: {fault}. {way_out}")
