"""One GGUF file of architecture "llama", as llama.cpp's converters write it.

    metadata  ->  LlamaConfig, TokenizerFiles (gguf_tokenizer)
    tensors   ->  Hugging Face names; quantized types dequantized to float32, q and k rows put back in Hugging Face's order

Format: ggml's docs/gguf.md. The file is memory-mapped; a tensor is dequantized when it is asked for.
"""

import contextlib
import functools
import mmap
import pathlib
from collections.abc import Mapping
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from jaxfp8.checkpoint.readers import gguf_tokenizer
from jaxfp8.checkpoint.readers.gguf_config import config_from_gguf
from jaxfp8.checkpoint.readers.source import Source, check_finite, check_tensors, expected_tensors
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError

_Type = gguf.GGMLQuantizationType
_NATIVE = {_Type.F32: np.dtype(np.float32), _Type.F16: np.dtype(np.float16), _Type.BF16: np.dtype(ml_dtypes.bfloat16)}
_QUANTIZED = (_Type.Q8_0, _Type.Q4_0, _Type.Q4_1, _Type.Q4_K, _Type.Q6_K)
_ROPE_FACTORS = "rope_freqs.weight"
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}


class GgufSource(Source):
  """An opened GGUF file. The constructor raises InputError for a file that is no Llama that jaxfp8 reads."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._reader = _open(path)
    self._metadata = _metadata(self._reader, path)
    self._tensors = {hugging_face_name(t.name): t for t in self._reader.tensors if t.name != _ROPE_FACTORS}
    self.config = _config(self._reader, self._metadata)
    # ggml counts dimensions from the fastest: [in, out].
    self._shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}
    check_tensors(path, self.config, self._shapes, {name: self.dtype(name) for name in self._tensors})

  def names(self) -> tuple[str, ...]:
    return tuple(expected_tensors(self.config))

  def dtype(self, name: str) -> np.dtype:
    kind = self._tensors[name].tensor_type
    if kind in _NATIVE:
      return _NATIVE[kind]
    if kind in _QUANTIZED:
      return np.dtype(np.float32)
    types = ", ".join(k.name for k in (*_NATIVE, *_QUANTIZED))
    raise InputError(
      f"readers: GGUF types must be one of {types}; {self._tensors[name].name} in {self.path} is {kind.name}. "
      "Pass another quantization of this model."
    )

  def shape(self, name: str) -> tuple[int, ...]:
    return self._shapes[name]

  def read(self, name: str) -> np.ndarray:
    # Pages of earlier tensors would stay resident until the whole file is in memory; a page that is used again is read again.
    with contextlib.suppress(AttributeError, ValueError, OSError):
      getattr(self._reader.data, "_mmap").madvise(mmap.MADV_DONTNEED)  # noqa: B009 - numpy does not declare it
    tensor = self._tensors[name]
    if tensor.tensor_type in _NATIVE:
      array = tensor.data.view(self.dtype(name))
    else:
      with np.errstate(all="ignore"):  # a broken scale is reported below, by name
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    array = array.reshape(self._shapes[name])
    check_finite(name, array, self.path)
    if name.endswith("self_attn.q_proj.weight"):
      return unpermute(array, self.config.num_heads)
    if name.endswith("self_attn.k_proj.weight"):
      return unpermute(array, self.config.num_kv_heads)
    return array

  @functools.cached_property
  def tokenizer(self) -> TokenizerFiles:
    return gguf_tokenizer.tokenizer_files(self._metadata, self.path)

  def files(self) -> list[pathlib.Path]:
    return [self.path]


def read_gguf_config(path: pathlib.Path) -> LlamaConfig:
  reader = _open(path)
  return _config(reader, _metadata(reader, path))


def _config(reader: gguf.GGUFReader, metadata: Mapping[str, Any]) -> LlamaConfig:
  factors = [np.array(t.data, np.float32) for t in reader.tensors if t.name == _ROPE_FACTORS]
  has_output = any(t.name == "output.weight" for t in reader.tensors)
  return config_from_gguf(metadata, has_output=has_output, rope_factors=factors[0] if factors else None)


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
  """Undoes the order that llama.cpp gives q and k rows, in which the two halves of each RoPE pair stand side by side."""
  out, inside = weight.shape
  return weight.reshape(num_heads, out // num_heads // 2, 2, inside).swapaxes(1, 2).reshape(out, inside)


def hugging_face_name(name: str) -> str:
  """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; a name that is not a Llama's comes back as it is."""
  stem, _, kind = name.rpartition(".")
  if stem in _TOP:
    return f"{_TOP[stem]}.{kind}"
  parts = stem.split(".")
  if len(parts) == 3 and parts[0] == "blk" and parts[2] in _IN_LAYER:
    return f"model.layers.{parts[1]}.{_IN_LAYER[parts[2]]}.{kind}"
  return name


class _Reader(gguf.GGUFReader):
  """The library's reader, with every access checked against the file's end.

  The library's own slices come back short at the end of a truncated file, and can then loop for ever; np.frombuffer
  refuses. It is also five times as fast here, since slices of an np.memmap are slow and a tokenizer takes 400,000.
  """

  def _get(self, offset, dtype, count=1, override_order=None):
    if self.byte_order != "I":
      raise ValueError("it is big-endian")
    return np.frombuffer(self.data, dtype, int(count), int(offset)) if int(count) else np.empty(0, dtype)


def _open(path: pathlib.Path) -> gguf.GGUFReader:
  """Raises InputError for a file that is no whole GGUF file."""
  try:
    reader = _Reader(path)
  except (OSError, ValueError, LookupError, TypeError, OverflowError, MemoryError, RecursionError) as error:
    raise InputError(f"readers: {path} is not a whole GGUF file of version 2 or 3: {error}. Fetch it again.") from error
  splits = reader.fields.get("split.count")
  if splits is not None and splits.contents() > 1:
    raise InputError(
      f"readers: one GGUF file must hold the whole model; {path} is one of {splits.contents()}. "
      "Merge them with llama.cpp's llama-gguf-split."
    )
  return reader


def _metadata(reader: gguf.GGUFReader, path: pathlib.Path) -> dict[str, Any]:
  try:
    return {key: field.contents() for key, field in reader.fields.items()}
  except (ValueError, LookupError) as error:
    raise InputError(f"readers: the metadata of {path} cannot be decoded: {error}. Fetch it again.") from error
