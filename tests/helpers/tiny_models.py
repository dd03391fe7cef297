"""Tiny Llamas with random weights, the same in every process: the models of the tests and of the goldens.

Imports only numpy and jaxfp8.config (which imports only numpy), so that tools/make_goldens.py runs without jax. Weights are
float32 from numpy's default_rng (PCG64, which is stable across releases for normal()).
"""

import json
import pathlib
from typing import Any

import numpy as np

from jaxfp8.config import LlamaConfig

HF_CONFIGS = pathlib.Path(__file__).parents[1] / "goldens" / "hf_configs.json"
# No size is a multiple of a kernel's tile; N/K covers MHA and odd groups; head_dim differs from D / N
# (transformers nevertheless requires D to be a multiple of N).
_ODD = {"vocab_size": 103, "d_model": 52, "d_ff": 91, "num_layers": 2, "max_context": 256, "bos_id": 1, "eos_ids": [2]}
CASES: dict[str, dict[str, Any]] = {
  "mha_tied": {**_ODD, "num_heads": 4, "num_kv_heads": 4, "head_dim": 8, "tied_embeddings": True},
  "gqa_9_3_untied": {**_ODD, "d_model": 63, "num_heads": 9, "num_kv_heads": 3, "head_dim": 16, "num_layers": 3},
  "gqa_6_2_linear": {
    **_ODD,
    "d_model": 54,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 16,
    "rope": {"type": "linear", "factor": 4.0, "theta": 5e4},
    "tied_embeddings": True,
  },
  "gqa_5_1_llama3": {
    **_ODD,
    "d_model": 55,
    "num_heads": 5,
    "num_kv_heads": 1,
    "head_dim": 64,
    # original_max_context is below the tests' contexts and between the wavelengths: the scaling takes all three branches.
    "rope": {
      "type": "llama3",
      "theta": 5e5,
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_context": 64,
    },
  },
  "head_64_eps": {
    **_ODD,
    "d_model": 96,
    "d_ff": 160,
    "num_heads": 3,
    "num_kv_heads": 1,
    "head_dim": 64,
    "rms_norm_eps": 1e-3,
    "tied_embeddings": True,
    "rope": {"theta": 1e5},
  },
  "one_layer_head_10": {**_ODD, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 10, "d_model": 38, "d_ff": 53},
}


def make_config(case: str) -> LlamaConfig:
  return LlamaConfig.from_dict({"name": case, **CASES[case]})


def make_tokens(config: LlamaConfig, length: int = 150, seed: int = 0) -> np.ndarray:
  """int32 [length]; 150 crosses the borders of pages of 32, 64 and 128 tokens."""
  return np.random.default_rng([seed, 1]).integers(0, config.vocab_size, length, dtype=np.int32)


def make_weights(config: LlamaConfig, seed: int = 0) -> dict[str, np.ndarray]:
  """float32 under Hugging Face's names, linears [out, in]. Norms are near 1 but not 1; lm_head only if untied."""
  rng = np.random.default_rng([seed, 0])
  D, F, H = config.d_model, config.d_ff, config.head_dim

  def linear(out: int, inside: int) -> np.ndarray:
    return (rng.standard_normal((out, inside)) / np.sqrt(inside)).astype(np.float32)

  def norm() -> np.ndarray:
    return (1 + 0.2 * rng.standard_normal(D)).astype(np.float32)

  # A quarter keeps the logits of tied models near 10, where float32 itself rounds by 1e-5 or so.
  weights = {"model.embed_tokens.weight": (0.25 * rng.standard_normal((config.vocab_size, D))).astype(np.float32)}
  for layer in range(config.num_layers):
    prefix = f"model.layers.{layer}."
    weights[prefix + "input_layernorm.weight"] = norm()
    # q and k are larger than usual: flat attention would hide a wrong position or a wrong head.
    weights[prefix + "self_attn.q_proj.weight"] = 2 * linear(config.num_heads * H, D)
    weights[prefix + "self_attn.k_proj.weight"] = 2 * linear(config.num_kv_heads * H, D)
    weights[prefix + "self_attn.v_proj.weight"] = linear(config.num_kv_heads * H, D)
    weights[prefix + "self_attn.o_proj.weight"] = linear(D, config.num_heads * H)
    weights[prefix + "post_attention_layernorm.weight"] = norm()
    weights[prefix + "mlp.gate_proj.weight"] = linear(F, D)
    weights[prefix + "mlp.up_proj.weight"] = linear(F, D)
    weights[prefix + "mlp.down_proj.weight"] = linear(D, F)
  weights["model.norm.weight"] = norm()
  if not config.tied_embeddings:
    weights["lm_head.weight"] = linear(config.vocab_size, D)
  return weights


def hf_config(case: str) -> dict[str, Any]:
  """The stored config.json of a case in the form of transformers 4; a new dictionary for each call."""
  return json.loads(HF_CONFIGS.read_text())[case]


def _config_json(config: LlamaConfig) -> dict[str, Any]:
  """The stored config.json of a case; for a config that is no case the one that jaxfp8 exports."""
  if config.name in CASES and config == make_config(config.name):
    return hf_config(config.name)
  from jaxfp8.checkpoint.export import config_to_hf  # needs the rest of jaxfp8, which the goldens do without

  return config_to_hf(config)


def write_hf_folder(
  folder: pathlib.Path, config: LlamaConfig, weights: dict[str, np.ndarray], *, dtype=np.float32, shards=1, tokenizer=True
) -> pathlib.Path:
  """Writes a folder as transformers saves it, with an index for more than one shard; returns its path.

  dtype: of the stored weights; may be ml_dtypes.bfloat16. tokenizer: whether to write a tokenizer and a chat template.
  """
  from safetensors.numpy import save_file

  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(_config_json(config)))
  arrays = {name: np.ascontiguousarray(array.astype(dtype)) for name, array in weights.items()}
  if shards == 1:
    save_file(arrays, folder / "model.safetensors")
  else:
    weight_map = {name: f"model-{i * shards // len(arrays) + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(arrays)}
    for shard in sorted(set(weight_map.values())):
      save_file({name: arrays[name] for name in arrays if weight_map[name] == shard}, folder / shard)
    total = sum(array.nbytes for array in arrays.values())
    (folder / "model.safetensors.index.json").write_text(
      json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
  if tokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(tiny_tokenizer(config.vocab_size)))
    (folder / "tokenizer_config.json").write_text(
      json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "chat_template": CHAT_TEMPLATE})
    )
  return folder


CHAT_TEMPLATE = (
  "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}{{ eos_token }}{% endfor %}"
  "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tiny_tokenizer(vocab_size: int) -> dict[str, Any]:
  """A tokenizer.json of single characters: <unk> <s> </s>, then printable ASCII up to `vocab_size` tokens."""
  specials = ["<unk>", "<s>", "</s>"]
  letters = [chr(code) for code in [*range(32, 127), 10, 9, 0xE9, 0xFC, 0xDF]][: vocab_size - len(specials)]
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
      {
        "id": i,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
      }
      for i, token in enumerate(specials)
    ],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": {
      "type": "TemplateProcessing",
      "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
      "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
      "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    },
    "decoder": {"type": "Fuse"},
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": "<unk>",
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": False,
      "byte_fallback": False,
      "ignore_merges": False,
      "vocab": {token: i for i, token in enumerate([*specials, *letters])},
      "merges": [],
    },
  }
