"""A folder as Hugging Face transformers saves it: config.json, safetensors in one or many shards, tokenizer.json.

    config.json, generation_config.json  ->  LlamaConfig
    model.safetensors[.index.json]       ->  names, shapes, dtypes from the headers; weights when asked for
    tokenizer.json, tokenizer_config.json, chat_template.jinja  ->  TokenizerFiles

Where the headers of the tensors and the config disagree, the headers are right.
"""

import functools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxfp8.checkpoint.readers import dialects
from jaxfp8.checkpoint.readers.safetensors_file import Header, read_headers, read_tensor
from jaxfp8.checkpoint.readers.source import (
  FLOAT8,
  Source,
  check_finite,
  check_tensors,
  expand_scale,
  expected_tensors,
  read_text,
)
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.config import ROPE_TYPES, LlamaConfig, RopeConfig, refuse_model
from jaxfp8.errors import InputError

_INDEX = "model.safetensors.index.json"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class HuggingFaceSource(Source):
  """An opened folder. The constructor raises InputError for a folder that is no Llama that jaxfp8 reads."""

  def __init__(self, folder: pathlib.Path):
    self.path = folder
    self.config = read_folder_config(folder)
    self._headers: dict[str, Header] = {}
    for path in _shard_paths(folder):
      self._add_headers(path)
    _check_index(folder, self._headers)
    quant_file = folder / "hf_quant_config.json"
    self._all = dict(self._headers)
    self._scheme = dialects.recognize(
      folder, read_json(folder / "config.json"), read_json(quant_file) if quant_file.exists() else None, self._headers
    )
    self.dialect, self.notes = self._scheme.dialect, self._scheme.notes
    shapes = {name: header.shape for name, header in self._headers.items()}
    quantized = {f"{module}.weight" for module in self._scheme.weights}
    check_tensors(folder, self.config, shapes, {name: h.dtype for name, h in self._headers.items()}, quantized)

  def _add_headers(self, path: pathlib.Path) -> None:
    for name, header in read_headers(path).items():
      if name.endswith("rotary_emb.inv_freq"):  # a buffer that old exports saved; it follows from the config
        continue
      if name in self._headers:
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
    return expand_scale(scale, array, self.shape(name), granularity, self.path)

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

  @functools.cached_property
  def tokenizer(self) -> TokenizerFiles:
    return read_tokenizer(self.path)

  def files(self) -> list[pathlib.Path]:
    return folder_files(self.path)


def folder_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files whose content determines weights, config and tokenizer. Parses only the index."""
  beside = ("config.json", "generation_config.json", "hf_quant_config.json", _INDEX, *_TEXT_FILES)
  return [*(folder / name for name in beside if (folder / name).exists()), *_shard_paths(folder)]


def read_folder_config(folder: pathlib.Path) -> LlamaConfig:
  return config_from_file(folder / "config.json", name=folder.resolve().name)


def config_from_file(path: pathlib.Path, name: str = "llama") -> LlamaConfig:
  """From config.json, with the eos ids of the generation_config.json beside it (only there is Llama 3's <|eom_id|>)."""
  hf = read_json(path)
  beside = path.parent / "generation_config.json"
  extra = read_json(beside).get("eos_token_id") if beside.exists() else None
  return config_from_hf({**hf, "eos_token_id": [*_as_list(hf.get("eos_token_id")), *_as_list(extra)]}, name)


def config_from_hf(hf: Mapping[str, Any], name: str = "llama") -> LlamaConfig:
  """From the contents of a `config.json` (both transformers 4's and 5's names for RoPE)."""
  _refuse_what_is_no_llama(hf)
  try:
    num_heads = hf["num_attention_heads"]
    return LlamaConfig(
      vocab_size=hf["vocab_size"],
      d_model=hf["hidden_size"],
      d_ff=hf["intermediate_size"],
      num_layers=hf["num_hidden_layers"],
      num_heads=num_heads,
      num_kv_heads=hf.get("num_key_value_heads") or num_heads,
      head_dim=hf.get("head_dim") or hf["hidden_size"] // num_heads,
      max_context=hf.get("max_position_embeddings", 2048),
      rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
      rope=_rope_from_hf(hf),
      tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
      bos_id=hf.get("bos_token_id"),
      eos_ids=tuple(dict.fromkeys(_as_list(hf.get("eos_token_id")))),
      name=name,
    )
  except KeyError as error:
    raise InputError(f"config: config.json lacks {error}. Pass a folder with the config.json of a LlamaForCausalLM.") from error
  except (TypeError, ZeroDivisionError) as error:
    raise InputError(
      f"config: config.json holds a value of the wrong kind: {error}. Compare it with the published one."
    ) from error


def _refuse_what_is_no_llama(hf: Mapping[str, Any]) -> None:
  if hf.get("model_type", "llama") != "llama":
    raise refuse_model("model_type", hf["model_type"])
  if (hf.get("architectures") or ["LlamaForCausalLM"]) != ["LlamaForCausalLM"]:
    raise refuse_model("architectures", hf["architectures"])
  for key in ("attention_bias", "mlp_bias", "sliding_window", "rope_interleaved"):
    if hf.get(key):
      raise refuse_model(key, hf[key])
  if hf.get("hidden_act", "silu") not in ("silu", "swish"):
    raise refuse_model("hidden_act", hf["hidden_act"])


def _rope_from_hf(hf: Mapping[str, Any]) -> RopeConfig:
  scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
  if not isinstance(scaling, Mapping):
    raise refuse_model("rope_scaling", scaling)
  rope_type = scaling.get("rope_type", scaling.get("type", "default"))
  partial = scaling.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
  if partial != 1.0:
    raise refuse_model("partial_rotary_factor", partial)
  if rope_type not in ROPE_TYPES:
    raise refuse_model("rope type", rope_type)
  fields = {"theta": scaling.get("rope_theta", hf.get("rope_theta", 10000.0)), "type": rope_type}
  names = {"factor": "factor"} if rope_type != "default" else {}
  if rope_type == "llama3":
    names |= {
      "low_freq_factor": "low_freq_factor",
      "high_freq_factor": "high_freq_factor",
      "original_max_position_embeddings": "original_max_context",
    }
  for theirs, ours in names.items():
    if theirs not in scaling:
      raise InputError(
        f"config: rope type {rope_type!r} needs {theirs} in config.json, and it is absent. Compare it with the published one."
      )
    fields[ours] = scaling[theirs]
  return RopeConfig(**fields)


def read_tokenizer(folder: pathlib.Path) -> TokenizerFiles:
  """Reads every file of the tokenizer once. Raises InputError if tokenizer.json is absent or not JSON."""
  path = folder / "tokenizer.json"
  if not path.exists():
    raise InputError(
      f"readers: text needs a tokenizer, and {folder} has no tokenizer.json. Fetch it with the checkpoint, or pass token ids."
    )
  settings = {}
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    if (folder / name).exists():
      settings |= read_json(folder / name)
  special = {}
  for name in _SPECIAL:
    token = settings.get(name)
    token = token.get("content") if isinstance(token, Mapping) else token
    if isinstance(token, str):
      special[name] = token
  text, add_bos = read_text(path), settings.get("add_bos_token")
  if not isinstance(add_bos, bool):
    add_bos = _post_processor_adds(_parse_json(text, path).get("post_processor"), special.get("bos_token"))
  return TokenizerFiles(text, _chat_template(folder, settings), special, add_bos)


def _chat_template(folder: pathlib.Path, settings: Mapping[str, Any]) -> str | None:
  """chat_template.jinja, or else the text or the list of named texts in tokenizer_config.json."""
  if (folder / "chat_template.jinja").exists():
    return read_text(folder / "chat_template.jinja")
  template = settings.get("chat_template")
  if isinstance(template, list):
    named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
    template = named.get("default")
  return template if isinstance(template, str) else None


def _post_processor_adds(processor: Any, bos: str | None) -> bool:
  """Whether a tokenizer.json puts `bos` before the text: the first piece of a TemplateProcessing, perhaps in a Sequence."""
  if not isinstance(processor, Mapping) or bos is None:
    return False
  if processor.get("type") == "Sequence":
    return any(_post_processor_adds(inner, bos) for inner in _as_list(processor.get("processors")))
  first = next(iter(_as_list(processor.get("single"))), None)
  special = first.get("SpecialToken") if isinstance(first, Mapping) else None
  return isinstance(special, Mapping) and special.get("id") == bos


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Raises InputError unless the file is a JSON object."""
  return _parse_json(read_text(path), path)


def _parse_json(text: str, path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise InputError(f"readers: {path} is not valid JSON: {error}. Fetch the file again.") from error
  if not isinstance(value, dict):
    raise InputError(f"readers: {path} must hold a JSON object; got {type(value).__name__}. Fetch the file again.")
  return value


def _as_list(value: Any) -> list[Any]:
  return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _shard_paths(folder: pathlib.Path) -> list[pathlib.Path]:
  """The shards that the index names, or the only safetensors file. Raises InputError for missing and ambiguous files."""
  if (folder / _INDEX).exists():
    shards = sorted(set(_weight_map(folder).values()))
    for shard in shards:
      if not (folder / shard).is_file():
        raise InputError(f"readers: {folder / _INDEX} names the shard {shard}, and it is missing. Fetch the whole checkpoint.")
    return [folder / shard for shard in shards]
  if (folder / "model.safetensors").is_file():
    return [folder / "model.safetensors"]
  shards = sorted(folder.glob("*.safetensors"))
  if len(shards) == 1:
    return shards
  if shards:
    raise InputError(f"readers: {folder} holds {len(shards)} safetensors files and no {_INDEX}. Fetch the index too.")
  way_out = "Pass a folder with config.json and model.safetensors."
  if any(folder.glob("*.bin")):
    way_out = "Save its PyTorch weights again as safetensors."
  raise InputError(f"readers: {folder} holds no safetensors file. {way_out}")


def _weight_map(folder: pathlib.Path) -> dict[str, str]:
  mapping = read_json(folder / _INDEX).get("weight_map")
  if not isinstance(mapping, dict) or not mapping:
    raise InputError(f"readers: {folder / _INDEX} must hold a weight_map of tensor names to shards. Fetch the index again.")
  for shard in mapping.values():
    # Names only: a path could leave the folder. (Symlinks are followed, since download caches are made of them.)
    if not isinstance(shard, str) or not re.fullmatch(r"(?!\.{1,2}$)[^/\\\x00-\x1f\ud800-\udfff]{1,200}", shard):
      raise InputError(
        f"readers: shards must lie in the checkpoint's own folder; {folder / _INDEX} names {shard!r}. Fetch the index again."
      )
  return mapping


def _check_index(folder: pathlib.Path, headers: Mapping[str, Header]) -> None:
  if not (folder / _INDEX).exists():
    return
  for name, shard in _weight_map(folder).items():
    if name not in headers and not name.endswith("rotary_emb.inv_freq"):
      raise InputError(f"readers: {_INDEX} says that {name} is in {shard}, and it is not. Fetch {folder / shard} again.")
