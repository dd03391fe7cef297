"""llama.cpp's own tokenizer, for goldens: the C functions of llama.h inside the package xllamacpp, through ctypes.

Run it in an environment of its own with xllamacpp and gguf; the project's environment has no llama.cpp.
"""

import ctypes
import importlib.util
import os
import pathlib

import gguf


class _Params(ctypes.Structure):
  """llama_model_params. The two booleans that matter, at their places; the room behind them is for fields of newer versions."""

  _fields_ = (
    ("pointers_before", ctypes.c_void_p * 2),
    ("numbers", ctypes.c_int32 * 5),
    ("pointers_after", ctypes.c_void_p * 4),
    ("vocab_only", ctypes.c_bool),
    ("rest", ctypes.c_char * 64),
  )


def _library() -> ctypes.CDLL:
  spec = importlib.util.find_spec("xllamacpp")
  assert spec is not None and spec.origin is not None, "install xllamacpp"
  library = ctypes.CDLL(str(pathlib.Path(spec.origin).parent / "xllamacpp.abi3.so"))
  pointer, number = ctypes.c_void_p, ctypes.c_int32
  library.llama_model_default_params.restype = _Params
  library.llama_model_load_from_file.restype = pointer
  library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Params]
  library.llama_model_get_vocab.restype = pointer
  library.llama_model_get_vocab.argtypes = [pointer]
  flag = ctypes.c_bool
  library.llama_tokenize.argtypes = [pointer, ctypes.c_char_p, number, ctypes.POINTER(number), number, flag, flag]
  for name in ("is_eog", "get_attr"):
    getattr(library, f"llama_vocab_{name}").argtypes = [pointer, number]
  library.llama_vocab_is_eog.restype = flag
  library.llama_vocab_n_tokens.argtypes = [pointer]
  silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)(lambda *_: None)
  library.silent = silent  # kept alive
  library.llama_log_set(silent, None)
  library.llama_backend_init()
  return library


CONTROL, USER_DEFINED = 8, 16  # bits of llama_token_attr


class Vocabulary:
  """The tokenizer of a GGUF file."""

  def __init__(self, path: str | os.PathLike):
    self._library = _library()
    params = self._library.llama_model_default_params()
    params.vocab_only = True
    model = self._library.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
      raise ValueError(f"llama.cpp does not load {path}")
    self._vocab = self._library.llama_model_get_vocab(model)
    self.size = self._library.llama_vocab_n_tokens(self._vocab)

  def encode(self, text: str, special: bool = True) -> list[int]:
    """special: whether BOS and EOS are added as the file says. Special tokens in the text are always recognized."""
    data = text.encode()
    ids = (ctypes.c_int32 * (2 * len(data) + 8))()
    count = self._library.llama_tokenize(self._vocab, data, len(data), ids, len(ids), special, True)
    return list(ids[:count])

  def ends(self) -> list[int]:
    return [i for i in range(self.size) if self._library.llama_vocab_is_eog(self._vocab, i)]

  def with_attribute(self, bit: int) -> list[int]:
    return [i for i in range(self.size) if self._library.llama_vocab_get_attr(self._vocab, i) & bit]


def write_vocabulary(path: str | os.PathLike, keys: dict) -> None:
  """A GGUF file of architecture "llama" without weights. keys: those of `tokenizer.ggml.`, and "general.name"."""
  writer = gguf.GGUFWriter(path, "llama")
  for add in (writer.add_block_count, writer.add_head_count):
    add(1)
  for add in (writer.add_context_length, writer.add_embedding_length, writer.add_feed_forward_length):
    add(32)
  writer.add_vocab_size(len(keys["tokens"]))
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_dimension_count(32)
  add_value = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
  for key, value in keys.items():
    add_value[type(value)](key if "." in key else f"tokenizer.ggml.{key}", value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
