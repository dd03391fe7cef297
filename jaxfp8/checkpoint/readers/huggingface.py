"""A folder as Hugging Face transformers saves it: config.json, safetensors in one or many shards, tokenizer.json.

    config.json, generation_config.json  ->  LlamaConfig
    model.safetensors[.index.json]       ->  names, shapes, dtypes from the headers; weights when asked for
    tokenizer.json, tokenizer_config.json, chat_template.jinja  ->  TokenizerFiles

Where the headers of the tensors and the config disagree, the headers are right.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from jaxfp8 import regular_files
from jaxfp8.checkpoint.readers import dialects
from jaxfp8.checkpoint.readers.huggingface_config import config_notes, read_folder_config
from jaxfp8.checkpoint.readers.huggingface_tokenizer import TEXT_FILES, FolderTokenizer
from jaxfp8.checkpoint.readers.json_file import read_json
from jaxfp8.checkpoint.readers.locate import ADAPTER, foreign, unfinished
from jaxfp8.checkpoint.readers.safetensors_file import Header, read_headers, read_tensor
from jaxfp8.checkpoint.readers.source import (
  FLOAT8,
  Source,
  check_finite,
  check_tensors,
  check_zero_scales,
  expand_scale,
  expected_tensors,
)
from jaxfp8.checkpoint.readers.tensor_names import is_unused, plain_names
from jaxfp8.checkpoint.readers.zero_biases import bias_notes, zero_biases
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError, shown

_INDEX = "model.safetensors.index.json"
_NOT_SHARDS = ("consolidated", "adapter_", "optimizer")  # a copy in Mistral's own format, a LoRA adapter, a training state


class HuggingFaceSource(Source):
  """An opened folder. The constructor raises InputError for a folder that is no Llama that jaxfp8 reads."""

  def __init__(self, folder: pathlib.Path):
    self.path = folder
    if (folder / ADAPTER).exists():
      raise InputError(
        f"readers: {folder} holds a LoRA adapter ({ADAPTER}), which changes the weights. Merge it (merge_and_unload of peft), "
        "or remove the adapter's files."
      )
    folder_files(folder)  # which refuses pipes, devices, and links out of the folder
    self._tokenizer = FolderTokenizer(folder)
    self._headers: dict[str, Header] = {}
    for path in _shard_paths(folder):
      self._add_headers(path)
    _check_index(folder, self._headers)
    self._headers, renamed = plain_names(self._headers, folder)
    biases = zero_biases(self._headers, self._bias, folder)
    for name in biases:
      del self._headers[name]
    self.config = self._with_end_ids(read_folder_config(folder, zero_biases=True))
    hf = read_json(folder / "config.json")
    quant_file = folder / "hf_quant_config.json"
    self._all = dict(self._headers)
    self._scheme = dialects.recognize(folder, hf, read_json(quant_file) if quant_file.exists() else None, self._headers)
    self.dialect = self._scheme.dialect
    self.notes = (*renamed, *config_notes(hf), *bias_notes(biases), *self._scheme.notes)
    shapes = {name: header.shape for name, header in self._headers.items()}
    quantized = {f"{module}.weight" for module in self._scheme.weights}
    check_tensors(folder, self.config, shapes, {name: h.dtype for name, h in self._headers.items()}, quantized)

  def _bias(self, name: str) -> np.ndarray | None:
    header = self._headers[name]
    return read_tensor(name, header) if isinstance(header.dtype, np.dtype) else None

  def _with_end_ids(self, config: LlamaConfig) -> LlamaConfig:
    """Adds the EOS token of the tokenizer, which may be another one than that of config.json."""
    with contextlib.suppress(InputError):  # a broken tokenizer is reported when text needs it
      ids = (token for token in self._tokenizer.end_ids() if token < config.vocab_size)
      return dataclasses.replace(config, eos_ids=tuple(dict.fromkeys((*config.eos_ids, *ids))))
    return config

  def _add_headers(self, path: pathlib.Path) -> None:
    for name, header in read_headers(path).items():
      if name in self._headers and not is_unused(name):
        raise InputError(
          f"readers: a tensor may stand in one shard only; {name} is in {self._headers[name].path.name} and {path.name}. "
          f"Remove the shards that do not belong to {self.path}."
        )
      self._headers[name] = header

  def names(self) -> tuple[str, ...]:
    return tuple(expected_tensors(self.config))

  def dtype(self, name: str) -> np.dtype:
    dtype = self._headers[name].dtype
    assert isinstance(dtype, np.dtype), "check_tensors has refused every other"
    return dtype

  def shape(self, name: str) -> tuple[int, ...]:
    return self._headers[name].shape

  def read(self, name: str) -> np.ndarray:
    array = read_tensor(name, self._headers[name])
    check_finite(name, array, self._headers[name].path)
    return array

  def granularity(self, name: str) -> str | None:
    return self._scheme.weights.get(name.removesuffix(".weight"), (None, None))[1]

  def read_scale(self, name: str) -> np.ndarray:
    scale, granularity = self._scheme.weights[name.removesuffix(".weight")]
    array = read_tensor(scale, self._all[scale]).astype(np.float32)
    array = expand_scale(scale, array, self.shape(name), granularity, self.path)
    if not array.all():
      check_zero_scales(name, read_tensor(name, self._headers[name]), array, self.path)
    return array

  def static_scales(self) -> tuple[str, ...]:
    return tuple(self._scheme.static)

  def read_static(self, name: str) -> np.ndarray:
    tensor = self._scheme.static[name]
    header = self._all[tensor]
    if not isinstance(header.dtype, np.dtype) or header.dtype == FLOAT8:
      raise InputError(f"readers: scales must be F32, F16 or BF16; {tensor} in {self.path} is {header.dtype}.")
    size = self.config.num_kv_heads if name.endswith(("k_scale", "v_scale")) else 1
    array = read_tensor(tensor, header).astype(np.float32).reshape(-1)
    if array.size not in (1, size) or not (np.isfinite(array) & (array > 0)).all():
      count = "one positive number" if size == 1 else f"1 or {size} positive numbers"
      raise InputError(
        f"readers: {tensor} in {self.path} must hold {count}; "
        f"got {array[:4].tolist()} of shape {list(header.shape)}. Fetch the checkpoint again."
      )
    return np.broadcast_to(array, (size,)).copy() if size > 1 or name.endswith(("k_scale", "v_scale")) else array.reshape(())

  @property
  def tokenizer(self) -> TokenizerFiles:
    return self._tokenizer.files

  def files(self) -> list[pathlib.Path]:
    return folder_files(self.path)


def folder_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files whose content determines weights, config and tokenizer. Parses only the index.

  Raises InputError for one that is not regular, or that a link leads to out of the folder.
  """
  beside = ("config.json", "generation_config.json", "hf_quant_config.json", _INDEX, *TEXT_FILES)
  files = [*(folder / name for name in beside if (folder / name).exists()), *_shard_paths(folder)]
  for path in files:
    try:
      regular_files.require_regular(path, within=folder)
    except OSError as error:
      raise InputError(f"readers: cannot read {path}: {os.strerror(error.errno or 0)}. Fetch the checkpoint again.") from error
  return files


def _shard_paths(folder: pathlib.Path) -> list[pathlib.Path]:
  """The shards that the index names, or the only safetensors file. Raises InputError for missing and ambiguous files."""
  if (folder / _INDEX).exists():
    shards = sorted(set(_weight_map(folder).values()))
    for shard in shards:
      if not (folder / shard).exists():
        raise InputError(
          f"readers: {folder / _INDEX} names the shard {shard}, and it is missing{unfinished(folder / shard)}. "
          "Fetch the whole checkpoint."
        )
    return [folder / shard for shard in shards]
  if (folder / "model.safetensors").exists():
    return [folder / "model.safetensors"]
  shards = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith(_NOT_SHARDS))
  if len(shards) == 1:
    return shards
  if shards:
    raise InputError(f"readers: {folder} holds {len(shards)} safetensors files and no {_INDEX}. Fetch the index too.")
  found = foreign(folder) or f"{unfinished(folder / 'model.safetensors')}. Pass a folder with config.json and model.safetensors"
  raise InputError(f"readers: {folder} holds no safetensors file of a model{found}.")


def _weight_map(folder: pathlib.Path) -> dict[str, str]:
  mapping = read_json(folder / _INDEX).get("weight_map")
  if not isinstance(mapping, dict) or not mapping:
    raise InputError(f"readers: {folder / _INDEX} must hold a weight_map of tensor names to shards. Fetch the index again.")
  for shard in mapping.values():
    # Names only: a path could leave the folder.
    if not isinstance(shard, str) or not re.fullmatch(r"(?!\.{1,2}$)[^/\\\x00-\x1f\ud800-\udfff]{1,200}", shard):
      raise InputError(
        f"readers: shards must lie in the checkpoint's own folder; {folder / _INDEX} names {shown(shard)}. "
        "Fetch the index again."
      )
  return mapping


def _check_index(folder: pathlib.Path, headers: Mapping[str, Header]) -> None:
  if not (folder / _INDEX).exists():
    return
  for name, shard in _weight_map(folder).items():
    if name not in headers and not is_unused(name):
      raise InputError(f"readers: {_INDEX} says that {name} is in {shard}, and it is not. Fetch {folder / shard} again.")
