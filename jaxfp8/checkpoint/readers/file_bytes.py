"""Reads a range of a file's bytes by `pread`: no page stays mapped, and a file that shrinks is an error instead of a signal."""

import os
import pathlib

from jaxfp8 import regular_files
from jaxfp8.errors import InputError


def read_bytes(path: pathlib.Path, start: int, stop: int, name: str) -> bytearray:
  """The bytes [start, stop) of the file. Raises InputError, naming the tensor `name`, if they cannot be read."""
  data = bytearray(stop - start)
  try:
    with regular_files.open_file(path) as file:
      done, view = 0, memoryview(data)
      while done < len(data):
        count = os.preadv(file.fileno(), [view[done : done + (1 << 30)]], start + done)
        if not count:
          raise OSError(None, "the file ends too early")
        done += count
  except OSError as error:
    raise InputError(f"readers: cannot read {name} from {path}: {error.strerror}. Fetch the file again.") from error
  return data
