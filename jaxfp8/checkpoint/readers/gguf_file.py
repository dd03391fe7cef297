"""A GGUF model of architecture "llama", in one file or in parts, as llama.cpp's converters write it.

    metadata  ->  LlamaConfig, TokenizerFiles (gguf_tokenizer)
    tensors   ->  Hugging Face names; quantized types dequantized to float32, q and k rows put back in Hugging Face's order

Format: ggml's docs/gguf.md, read by gguf_header. A tensor is read and dequantized when it is asked for.
"""

import functools
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from jaxfp8.checkpoint.readers import gguf_tokenizer
from jaxfp8.checkpoint.readers.file_bytes import read_bytes
from jaxfp8.checkpoint.readers.gguf_config import config_from_gguf
from jaxfp8.checkpoint.readers.gguf_header import GgufHeader, GgufTensor, read_header
from jaxfp8.checkpoint.readers.locate import gguf_parts
from jaxfp8.checkpoint.readers.source import Source, check_finite, check_tensors, expected_tensors, some_of
from jaxfp8.checkpoint.readers.zero_biases import bias_notes, zero_biases
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError, shown

_Type = gguf.GGMLQuantizationType
NATIVE = {_Type.F32: np.dtype(np.float32), _Type.F16: np.dtype(np.float16), _Type.BF16: np.dtype(ml_dtypes.bfloat16)}
# NVFP4 is not among them: half of its scale is a tensor of its own.
QUANTIZED = (
  _Type.Q4_0, _Type.Q4_1, _Type.Q5_0, _Type.Q5_1, _Type.Q8_0, _Type.Q2_K, _Type.Q3_K, _Type.Q4_K,
  _Type.Q5_K, _Type.Q6_K, _Type.IQ1_S, _Type.IQ1_M, _Type.IQ2_XXS, _Type.IQ2_XS, _Type.IQ2_S, _Type.IQ3_XXS,
  _Type.IQ3_S, _Type.IQ4_NL, _Type.IQ4_XS, _Type.TQ1_0, _Type.TQ2_0, _Type.MXFP4,
)  # fmt: skip
_ROPE_FACTORS = "rope_freqs.weight"
_UNUSED = "attn_rot_embd.weight"  # a table of frequencies in files of early converters; llama.cpp does not use it either
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
  """An opened GGUF model. The constructor raises InputError for a file that is no Llama that jaxfp8 reads."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    headers = read_parts(path)
    self._metadata = headers[0].metadata
    self.config = _config(headers)
    self._tensors = _by_hugging_face_name(headers)
    biases = zero_biases([tensor.name for tensor in self._tensors.values()], self._bias, path)
    for name in biases:
      del self._tensors[hugging_face_name(name)]
    self.notes = bias_notes(biases)
    unused = [name for name in self._tensors if name.endswith(_UNUSED)]
    for name in unused:
      del self._tensors[name]
    if unused:
      self.notes += (f"{some_of(unused)} is not used, since the frequencies of RoPE follow from the metadata",)
    self._shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
    self._files = [header.path for header in headers]
    dtypes = {name: self.dtype(name) for name in self._tensors}
    way_out = "The file's metadata and tensors contradict each other: fetch it again, or convert the model again."
    check_tensors(path, self.config, self._shapes, dtypes, way_out=way_out)

  def names(self) -> tuple[str, ...]:
    return tuple(expected_tensors(self.config))

  def dtype(self, name: str) -> np.dtype:
    tensor = self._tensors[name]
    if tensor.type in NATIVE:
      return NATIVE[tensor.type]
    if tensor.type in QUANTIZED:
      return np.dtype(np.float32)
    types = ", ".join(k.name for k in (*NATIVE, *QUANTIZED))
    raise InputError(
      f"readers: GGUF types must be one of {types}; {tensor.name} in {tensor.path} is {tensor.type.name}. "
      "Pass another quantization of this model."
    )

  def _bias(self, name: str) -> np.ndarray:
    return _array(self._tensors[hugging_face_name(name)])

  def shape(self, name: str) -> tuple[int, ...]:
    return self._shapes[name]

  def read(self, name: str) -> np.ndarray:
    array = _array(self._tensors[name]).reshape(self._shapes[name])
    check_finite(name, array, self._tensors[name].path)
    if name.endswith("self_attn.q_proj.weight"):
      return unpermute(array, self.config.num_heads)
    if name.endswith("self_attn.k_proj.weight"):
      return unpermute(array, self.config.num_kv_heads)
    return array

  @functools.cached_property
  def tokenizer(self) -> TokenizerFiles:
    return gguf_tokenizer.tokenizer_files(self._metadata, self.path)

  def files(self) -> list[pathlib.Path]:
    return self._files


def read_gguf_config(path: pathlib.Path) -> LlamaConfig:
  return _config(read_parts(path))


def read_parts(path: pathlib.Path) -> list[GgufHeader]:
  """The headers of all parts of the model that `path` is, or is a part of; the first holds the metadata.

  Raises InputError for a missing part, for parts that do not belong together, and for a GGUF file that is no language model.
  """
  paths = gguf_parts(path)
  headers = [read_header(part) for part in paths]
  for index, header in enumerate(headers):
    count, number = header.metadata.get("split.count", 1), header.metadata.get("split.no", 0)
    if len(paths) == 1 and count != 1 and isinstance(count, int) and count > 1:
      raise InputError(
        f"readers: {header.path} is part {number} (from 0) of {count} by its metadata, and its name does not say so. "
        f"Give the parts their published names, NAME-00001-of-{count:05}.gguf and so on, in one folder."
      )
    if len(paths) > 1 and (count, number) != (len(paths), index):
      raise InputError(
        f"readers: {header.path} must be part {index} (from 0) of {len(paths)} by its metadata, as its name says; "
        f"got part {number} of {count}. Fetch all parts of one model again."
      )
  _require_one_model(headers)
  _require_language_model(headers)
  return headers


def _require_one_model(headers: list[GgufHeader]) -> None:
  """Raises InputError for parts whose counts or metadata disagree."""
  first, *others = headers
  for key in ("split.tensors.count", "general.architecture", "general.name"):
    for other in others:
      if other.metadata.get(key, first.metadata.get(key)) != first.metadata.get(key):
        raise InputError(
          f"readers: the parts of a GGUF model must belong together; {key} is {shown(first.metadata.get(key))} in {first.path} "
          f"and {shown(other.metadata[key])} in {other.path.name}. Fetch all parts of one model again."
        )
  total, held = first.metadata.get("split.tensors.count"), sum(len(header.tensors) for header in headers)
  if others and total is not None and total != held:
    raise InputError(
      f"readers: {first.path} says that its {len(headers)} parts hold {total} tensors; they hold {held}. "
      "Fetch all parts of one model again."
    )


def _require_language_model(headers: list[GgufHeader]) -> None:
  """Names the GGUF files that people pass for models."""
  metadata, path = headers[0].metadata, headers[0].path
  architecture, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
  if architecture == "clip" or kind == "mmproj":
    raise InputError(f"readers: {path} is the image encoder (mmproj) of a model. Pass the GGUF file of the language model.")
  if kind == "adapter":
    raise InputError(f"readers: {path} is a LoRA adapter. Merge it into its model with llama.cpp's llama-export-lora.")
  if kind == "imatrix":
    raise InputError(f"readers: {path} is an importance matrix, which quantizers use. Pass the GGUF file of the model.")
  if not any(header.tensors for header in headers):
    held = "a vocabulary and no weights" if metadata.get("tokenizer.ggml.tokens") else "no weights"
    raise InputError(f"readers: {path} holds {held}. Pass the GGUF file of the model.")


def _by_hugging_face_name(headers: Iterable[GgufHeader]) -> dict[str, GgufTensor]:
  tensors: dict[str, GgufTensor] = {}
  for header in headers:
    for name, tensor in header.tensors.items():
      if name == _ROPE_FACTORS:
        continue
      known = tensors.setdefault(hugging_face_name(name), tensor)
      if known is not tensor:
        raise InputError(
          f"readers: a tensor may be in a GGUF model once; {known.name} in {known.path} and {name} in {tensor.path.name} "
          f"are both {hugging_face_name(name)}. Convert the model again with a current llama.cpp."
        )
  return tensors


def _config(headers: list[GgufHeader]) -> LlamaConfig:
  tensors: Mapping[str, GgufTensor] = {name: tensor for header in headers for name, tensor in header.tensors.items()}
  metadata: dict[str, Any] = headers[0].metadata
  factors = _array(tensors[_ROPE_FACTORS]).astype(np.float32) if _ROPE_FACTORS in tensors else None
  return config_from_gguf(metadata, has_output="output.weight" in tensors, rope_factors=factors, where=headers[0].path)


def _array(tensor: GgufTensor) -> np.ndarray:
  """The numbers of a tensor in their order in the file, dequantized to float32 unless its type is native."""
  data = np.frombuffer(read_bytes(tensor.path, tensor.start, tensor.stop, tensor.name), np.uint8)
  if tensor.type in NATIVE:
    return data.view(NATIVE[tensor.type])
  with np.errstate(all="ignore"):  # a broken scale is reported by `check_finite`, by name
    return gguf.quants.dequantize(data.reshape(*tensor.shape[:-1], -1), tensor.type)


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
