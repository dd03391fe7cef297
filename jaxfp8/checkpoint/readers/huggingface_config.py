"""config.json of a Hugging Face folder, with the generation_config.json beside it, as a `LlamaConfig`."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxfp8.checkpoint.readers.arithmetic_keys import refuse_features
from jaxfp8.checkpoint.readers.fields import (
  COUNT,
  FLAG,
  NUMBER,
  OBJECT,
  POSITIVE,
  TEXT,
  TEXTS,
  TOKEN_ID,
  TOKEN_IDS,
  check_fields,
  refuse_architecture,
  refuse_model,
  require,
)
from jaxfp8.checkpoint.readers.huggingface_rope import rope_from_hf
from jaxfp8.checkpoint.readers.json_file import as_list, read_json
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError

_KINDS = {
  **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), COUNT),
  **dict.fromkeys(("num_key_value_heads", "head_dim", "max_position_embeddings"), COUNT),
  **dict.fromkeys(("rms_norm_eps", "rope_theta"), POSITIVE),
  **dict.fromkeys(("sliding_window", "partial_rotary_factor"), NUMBER),
  **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), FLAG),
  **dict.fromkeys(("model_type", "hidden_act"), TEXT),
  **dict.fromkeys(("rope_parameters", "rope_scaling", "quantization_config", "compression_config"), OBJECT),
  "architectures": TEXTS,
  "bos_token_id": TOKEN_ID,
  "eos_token_id": TOKEN_IDS,
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Mistral's layers are Llama's but for the sliding window; LLaMAForCausalLM is the name before transformers 4.28.
_ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel", "MistralForCausalLM")
_FBGEMM_BOUND = 1200.0
_DEFAULTS = {
  "llama": {"max_position_embeddings": 2048},
  "mistral": {"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
}


def read_folder_config(folder: pathlib.Path, *, zero_biases: bool = False) -> LlamaConfig:
  return config_from_file(folder / "config.json", name=folder.resolve().name, zero_biases=zero_biases)


def config_from_file(path: pathlib.Path, name: str = "llama", *, zero_biases: bool = False) -> LlamaConfig:
  """From config.json, with the eos ids of the generation_config.json beside it (only there is Llama 3's <|eom_id|>).

  zero_biases: as for `config_from_hf`.
  """
  config = config_from_hf(read_json(path), name, path, zero_biases=zero_biases)
  beside = path.parent / "generation_config.json"
  if not beside.exists():
    return config
  generation = read_json(beside)
  check_fields(generation, {"eos_token_id": TOKEN_IDS}, beside)
  ends = (*config.eos_ids, *_below(config.vocab_size, "eos_token_id", generation, beside))
  return dataclasses.replace(config, eos_ids=tuple(dict.fromkeys(ends)))


def config_from_hf(
  hf: Mapping[str, Any], name: str = "llama", where: object = "config.json", *, zero_biases: bool = False
) -> LlamaConfig:
  """From the contents of a `config.json` (both transformers 4's and 5's names for RoPE).

  Args:
    hf: the file's object.
    name: of the model.
    where: the file, for messages.
    zero_biases: whether the checkpoint's biases are known to be zeros, so that attention_bias and mlp_bias change nothing.

  Raises:
    InputError: a field is missing or has another type; two fields contradict each other; the model is no Llama, or a Llama
      with a feature that jaxfp8 does not compute.
  """
  check_fields(hf, _KINDS, where)
  _refuse_other_architectures(hf, where)
  require(hf, _REQUIRED, where, "Pass a folder with the config.json of a LlamaForCausalLM.")
  hf = _with_defaults(hf)
  if hf.get("head_dim") is None and hf["hidden_size"] < hf["num_attention_heads"]:
    raise InputError(
      f"config: hidden_size in {where} must be at least num_attention_heads {hf['num_attention_heads']}; got "
      f"{hf['hidden_size']}. Compare the file with the published one."
    )
  config = LlamaConfig(
    vocab_size=hf["vocab_size"],
    d_model=hf["hidden_size"],
    d_ff=hf["intermediate_size"],
    num_layers=hf["num_hidden_layers"],
    num_heads=hf["num_attention_heads"],
    num_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
    head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
    max_context=hf["max_position_embeddings"],
    rms_norm_eps=hf.get("rms_norm_eps") or 1e-6,
    rope=rope_from_hf(hf, where),
    tied_embeddings=hf.get("tie_word_embeddings") or False,
    bos_id=next(iter(_below(hf["vocab_size"], "bos_token_id", hf, where)), None),
    eos_ids=_below(hf["vocab_size"], "eos_token_id", hf, where),
    name=name,
    activation_scale_ub=_activation_bound(hf),
  )
  refuse_features(hf, config, where)
  for key in ("attention_bias", "mlp_bias"):
    if hf.get(key) and not zero_biases:
      raise refuse_model(key, hf[key], where)
  return config


def config_notes(hf: Mapping[str, Any]) -> tuple[str, ...]:
  """One sentence for each field that a Llama does not have and that changes nothing. hf: what `config_from_hf` has accepted."""
  others = [name for name in as_list(hf.get("architectures")) if name != "LlamaForCausalLM"]
  notes = [f"{name} with these settings is the same mathematics as LlamaForCausalLM, and is read as that" for name in others]
  biases = [key for key in ("attention_bias", "mlp_bias") if hf.get(key)]
  return (*notes, *(f"config.json says {key}, and the checkpoint has no bias but zeros" for key in biases))


def _refuse_other_architectures(hf: Mapping[str, Any], where: object) -> None:
  for name in as_list(hf.get("architectures")):
    if name not in _ARCHITECTURES:
      raise refuse_architecture("architectures", name, where)
  if hf.get("model_type") not in (None, *_DEFAULTS):
    raise refuse_architecture("model_type", hf["model_type"], where)
  if (hf.get("hidden_act") or "silu") not in ("silu", "swish"):
    raise refuse_model("hidden_act", hf["hidden_act"], where)


def _with_defaults(hf: Mapping[str, Any]) -> dict[str, Any]:
  """With the values that transformers takes for absent keys: Mistral's sliding window is 4096 unless config.json says null."""
  mistral = hf.get("model_type") == "mistral" or "MistralForCausalLM" in as_list(hf.get("architectures"))
  filled = {**_DEFAULTS["mistral" if mistral else "llama"], **hf}
  if filled["max_position_embeddings"] is None:
    filled["max_position_embeddings"] = _DEFAULTS["llama"]["max_position_embeddings"]
  return filled


def _below(vocab_size: int, key: str, fields: Mapping[str, Any], where: object) -> tuple[int, ...]:
  """The token ids in a field, each once. Raises InputError, naming the field, for an id that the vocabulary does not have."""
  ids = as_list(fields.get(key))
  for token in ids:
    if token >= vocab_size:
      raise InputError(
        f"config: {key} in {where} must be below vocab_size {vocab_size}; got {token}. Compare the file with the published one."
      )
  return tuple(dict.fromkeys(ids))


def _activation_bound(hf: Mapping[str, Any]) -> float | None:
  """FBGEMM's `activation_scale_ub`; where it is absent, the default of transformers' FbgemmFp8Config."""
  scheme = hf.get("quantization_config") or {}
  return scheme.get("activation_scale_ub", _FBGEMM_BOUND) if scheme.get("quant_method") == "fbgemm_fp8" else None
