"""Folders of one small Llama in the float8 dialects that quantize activations, for comparisons with the dialects' libraries.

Imports no jax, so that tools/make_w8a8_goldens.py runs where torch and the libraries are. The weights are the same in every
process. Every input of a linear layer is wider than a group of 128 columns, and the values of some groups are so small that
one scale per token rounds them coarsely. Where scales are static, groups are alike and the largest values saturate.
"""

import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.helpers import dialect_files

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "w8a8"
NUM_TOKENS = 48
BOUND = 1.25  # of FBGEMM's scales: below the largest input of most tokens
_D, _F, _N, _K, _H, _V = 256, 384, 8, 4, 32, 64
_STATIC = 1 / 256  # of inputs; 1.75 is the largest value that does not saturate
_SPREAD = 1e-4  # sizes of groups where scales are dynamic


def _arguments(strategy: str, dynamic: bool, **more) -> dict:
  return {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": dynamic, "strategy": strategy, **more}


def _compressed(weights: dict, inputs: dict) -> dict:
  group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
  return {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": group},
  }


# name: (kind of the weights' scales, suffix of their names, whether inputs have static scales, quantization_config)
DIALECTS = {
  "compressed-tensors block": (
    "block",
    "weight_scale",
    False,
    _compressed(_arguments("block", False, block_structure=[128, 128]), _arguments("group", True, group_size=128)),
  ),
  "compressed-tensors channel": (
    "channel",
    "weight_scale",
    False,
    _compressed(_arguments("channel", False), _arguments("token", True)),
  ),
  "compressed-tensors static": (
    "tensor",
    "weight_scale",
    True,
    _compressed(_arguments("tensor", False), _arguments("tensor", False)),
  ),
  "deepseek block": (
    "block",
    "weight_scale_inv",
    False,
    {
      "quant_method": "fp8",
      "activation_scheme": "dynamic",
      "fmt": "e4m3",
      "weight_block_size": [128, 128],
      "modules_to_not_convert": ["lm_head"],
    },
  ),
  "fbgemm": (
    "channel",
    "weight_scale",
    False,
    {"quant_method": "fbgemm_fp8", "activation_scale_ub": BOUND, "modules_to_not_convert": ["lm_head"]},
  ),
}


def make_tokens() -> np.ndarray:
  return np.random.default_rng([2, 1]).integers(0, _V, NUM_TOKENS, dtype=np.int32)


def hf_config() -> dict:
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": _V,
    "hidden_size": _D,
    "intermediate_size": _F,
    "num_hidden_layers": 1,
    "num_attention_heads": _N,
    "num_key_value_heads": _K,
    "head_dim": _H,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
  }


def make_weights(dialect: str) -> dict[str, np.ndarray]:
  """float32 values that bfloat16 holds, linears [out, in]."""
  spread = 1 if DIALECTS[dialect][2] else _SPREAD
  rng = np.random.default_rng([2, 0])

  def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)

  def linear(out: int, inside: int, sizes=1.0) -> np.ndarray:
    """`sizes` is how large the inputs are, so that the outputs are near 1."""
    return rounded(rng.standard_normal((out, inside)) / np.sqrt(inside) / sizes)

  def channels(size: int) -> np.ndarray:
    """Sizes of channels: groups of 128 differ, and a few channels stand out."""
    value = np.exp(0.3 * rng.standard_normal(size)) * np.repeat([1.0, spread, spread], 128)[:size]
    value[rng.integers(0, size, 4)] *= 6
    return value

  norms, ups, values = [rounded(channels(_D)) for _ in range(3)], channels(_F), channels(_K * _H)
  layer, attention, mlp = "model.layers.0.", "model.layers.0.self_attn.", "model.layers.0.mlp."
  v, up = linear(_K * _H, _D, norms[0]), linear(_F, _D, norms[1])
  return {
    "model.embed_tokens.weight": rounded(rng.standard_normal((_V, _D))),
    layer + "input_layernorm.weight": norms[0],
    attention + "q_proj.weight": 1.5 * linear(_N * _H, _D, norms[0]),
    attention + "k_proj.weight": 1.5 * linear(_K * _H, _D, norms[0]),
    attention + "v_proj.weight": rounded(v * values[:, None]),
    attention + "o_proj.weight": linear(_D, _N * _H, np.repeat(values.reshape(_K, 1, _H), _N // _K, 1).reshape(-1)),
    layer + "post_attention_layernorm.weight": norms[1],
    mlp + "gate_proj.weight": linear(_F, _D, norms[1]),
    mlp + "up_proj.weight": rounded(up * ups[:, None]),
    mlp + "down_proj.weight": 2 * linear(_D, _F, ups),
    "model.norm.weight": norms[2],
    "lm_head.weight": 0.55 * linear(_V, _D, norms[2]),
  }


def write(folder: pathlib.Path, dialect: str) -> pathlib.Path:
  """Writes the model in one of `DIALECTS` as a Hugging Face folder; returns the folder."""
  kind, suffix, static, scheme = DIALECTS[dialect]
  tensors = {}
  for name, weight in make_weights(dialect).items():
    module = name.removesuffix(".weight")
    if "_proj" not in name:
      tensors[name] = weight.astype(ml_dtypes.bfloat16)
      continue
    value, scale = dialect_files.quantize(weight, kind)
    tensors |= {name: value, f"{module}.{suffix}": scale.reshape({"tensor": (1,), "channel": (-1, 1)}.get(kind, scale.shape))}
    if static:
      tensors[f"{module}.input_scale"] = np.full(1, _STATIC, np.float32)
  folder.mkdir(parents=True)
  save_file(
    {name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
  )
  (folder / "config.json").write_text(json.dumps({**hf_config(), "quantization_config": scheme}, indent=1))
  return folder
