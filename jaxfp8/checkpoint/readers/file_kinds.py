"""What a file is, by its first bytes: for the message about a file that is not what a reader needs.

describe(path)  ->  FileKind(name, sentence): "a Git LFS pointer, not the file itself. Run `git lfs pull` ..."
"""

import dataclasses
import os
import pathlib
import stat

from jaxfp8 import regular_files
from jaxfp8.errors import InputError

FETCH_AGAIN = "Fetch the file again."
LFS_TEXT = "version https://git-lfs.github.com/spec/"
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2")
_HEAD_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class FileKind:
  """name: one of the words below, for code. sentence: what the file is, and the way out, for a message."""

  name: str
  sentence: str


LFS_POINTER = FileKind("lfs", "it is a Git LFS pointer, not the file itself. Run `git lfs pull` in its folder.")
_EMPTY = FileKind("empty", f"it is empty (0 bytes). {FETCH_AGAIN}")
_UNFINISHED = FileKind("unfinished", "it is an unfinished download. Finish or repeat the download.")
_GGUF = FileKind("gguf", f"it begins like a GGUF file. {FETCH_AGAIN}")
_SAFETENSORS = FileKind("safetensors", "it is a safetensors file. Pass the folder that holds it and config.json.")
_PYTORCH = "it holds PyTorch weights (pickle). Save them again as safetensors, with save_pretrained of transformers."
_OTHER = FileKind("other", f"it does not begin like one. {FETCH_AGAIN}")
# The first bytes of files that people pass for checkpoints.
_BEGINNINGS = {
  b"GGUF": _GGUF,
  LFS_TEXT.encode(): LFS_POINTER,
  b"PK\x03\x04": FileKind("pytorch", _PYTORCH),
  b"\x80\x02": FileKind("pytorch", _PYTORCH),
  b"\x80\x03": FileKind("pytorch", _PYTORCH),
  b"\x80\x04": FileKind("pytorch", _PYTORCH),
  b"lmgg": FileKind("ggml", "it is a ggml file from before GGUF. Convert the model again with a current llama.cpp."),
  b"fmgg": FileKind("ggml", "it is a ggml file from before GGUF. Convert the model again with a current llama.cpp."),
  b"tjgg": FileKind("ggml", "it is a ggml file from before GGUF. Convert the model again with a current llama.cpp."),
  b"FUGG": FileKind("gguf", "it is a big-endian GGUF file. Convert the model for a little-endian machine."),
  b"\x1f\x8b": FileKind("archive", "it is compressed (gzip). Unpack it and pass its content."),
  b"\x28\xb5\x2f\xfd": FileKind("archive", "it is compressed (zstd). Unpack it and pass its content."),
  b"\xfd7zXZ": FileKind("archive", "it is compressed (xz). Unpack it and pass its content."),
  b"\x89HDF": FileKind("hdf5", "it is an HDF5 file (Keras or TensorFlow). Pass a safetensors or GGUF version of the model."),
  b"%PDF": FileKind("other", "it is a PDF document. Pass a Hugging Face folder or a GGUF file."),
}


def describe(path: pathlib.Path) -> FileKind:
  """Reads the first bytes of the file. Never raises: a file that cannot be read has a kind too."""
  try:
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
      return FileKind("no file", f"it is {regular_files.mode_name(mode)}. Pass a regular file.")
    with regular_files.open_file(path) as file:
      head, size = file.read(_HEAD_BYTES), os.fstat(file.fileno()).st_size
  except (OSError, InputError) as error:
    reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else "it is no regular file"
    return FileKind("unreadable", f"it cannot be read ({reason}). Check the path and its permissions.")
  if path.suffix in UNFINISHED:
    return _UNFINISHED
  if not head:
    return _EMPTY
  is_cut = head[8:10] == b'{"' and head[6:8] == bytes(2)  # the file ends within the header
  if is_cut or (head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size):  # first: any bytes may be that length
    return _SAFETENSORS
  for beginning, kind in _BEGINNINGS.items():
    if head.startswith(beginning):
      return kind
  if path.suffix == ".onnx":
    return FileKind("onnx", "it is an ONNX file. Pass a safetensors or GGUF version of the model.")
  return _text_kind(head) or _OTHER


def _text_kind(head: bytes) -> FileKind | None:
  """The kind of a text: a page that a server sent instead of the file, JSON, or another text; None for bytes."""
  try:
    text = head.decode("utf-8", errors="strict" if len(head) < _HEAD_BYTES else "ignore").lstrip("\ufeff \t\r\n")
  except UnicodeDecodeError:
    return None
  if any(character < "\t" for character in text):
    return None
  if text[:100].lower().startswith(("<!doctype", "<html", "<?xml")):
    return FileKind(
      "page", "it is a web page, which a server sent in the file's place. Log in if the model asks for it, and fetch it."
    )
  if text.startswith(("{", "[")):
    return FileKind("json", "it is JSON text. Pass the folder that holds config.json and the weights.")
  return FileKind("text", "it is a text file. Pass a Hugging Face folder or a GGUF file.")
