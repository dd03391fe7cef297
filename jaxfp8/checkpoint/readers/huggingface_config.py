"""config.json of a Hugging Face folder, with the generation_config.json beside it, as a `LlamaConfig`."""

import pathlib
from collections.abc import Mapping
from typing import Any

from jaxfp8.checkpoint.readers.json_file import as_list, read_json, token_ids
from jaxfp8.config import ROPE_TYPES, LlamaConfig, RopeConfig, refuse_model
from jaxfp8.errors import InputError

_FBGEMM_BOUND = 1200.0


def read_folder_config(folder: pathlib.Path) -> LlamaConfig:
  return config_from_file(folder / "config.json", name=folder.resolve().name)


def config_from_file(path: pathlib.Path, name: str = "llama") -> LlamaConfig:
  """From config.json, with the eos ids of the generation_config.json beside it (only there is Llama 3's <|eom_id|>)."""
  hf = read_json(path)
  beside = path.parent / "generation_config.json"
  ends = token_ids(hf, "eos_token_id", path)
  if beside.exists():
    ends += token_ids(read_json(beside), "eos_token_id", beside)
  return config_from_hf({**hf, "eos_token_id": list(ends)}, name)


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
      eos_ids=tuple(dict.fromkeys(as_list(hf.get("eos_token_id")))),
      name=name,
      activation_scale_ub=_activation_bound(hf),
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


def _activation_bound(hf: Mapping[str, Any]) -> float | None:
  """FBGEMM's `activation_scale_ub`; where it is absent, the default of transformers' FbgemmFp8Config."""
  scheme = hf.get("quantization_config")
  if not isinstance(scheme, Mapping) or scheme.get("quant_method") != "fbgemm_fp8":
    return None
  return scheme.get("activation_scale_ub", _FBGEMM_BOUND)
