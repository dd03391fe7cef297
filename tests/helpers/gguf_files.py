"""Writes small GGUF files through the gguf package, with q and k rows permuted as llama.cpp's convert_hf_to_gguf.py does."""

import pathlib

import gguf
import ml_dtypes
import numpy as np

_Type = gguf.GGMLQuantizationType
_BLOCK_BYTES = {_Type.Q4_K: 144, _Type.Q6_K: 210}
_NAMES = {
  "model.embed_tokens.weight": "token_embd.weight",
  "model.norm.weight": "output_norm.weight",
  "lm_head.weight": "output.weight",
  "input_layernorm": "attn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "post_attention_layernorm": "ffn_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}


def write_gguf(path: pathlib.Path, config, weights, kind: _Type, *, extra=None, metadata=None) -> pathlib.Path:
  """Norms stay F32, as always in GGUF. For K-quants, which the package cannot make, the matrices are random blocks instead.

  extra: more tensors by their GGUF names, as arrays, or as (rows of blocks, type).
  """
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_name(config.name)
  writer.add_vocab_size(config.vocab_size)
  writer.add_embedding_length(config.d_model)
  writer.add_feed_forward_length(config.d_ff)
  writer.add_block_count(config.num_layers)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_key_length(config.head_dim)
  writer.add_value_length(config.head_dim)
  writer.add_rope_dimension_count(config.head_dim)
  writer.add_context_length(config.max_context)
  writer.add_layer_norm_rms_eps(config.rms_norm_eps)
  writer.add_rope_freq_base(config.rope.theta)
  if config.rope.type == "linear":
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(config.rope.factor)
  writer.add_bos_token_id(config.bos_id)
  writer.add_eos_token_id(config.eos_ids[0])
  add = {int: writer.add_uint16, str: writer.add_string, list: writer.add_array}
  for key, value in (metadata or {}).items():
    add[type(value)](key, value)
  for name, weight in weights.items():
    if name.endswith(("q_proj.weight", "k_proj.weight")):
      weight = permute(weight, config.num_heads if "q_proj" in name else config.num_kv_heads)
    _add(writer, gguf_name(name), weight, _Type.F32 if weight.ndim == 1 else kind)
  for name, weight in (extra or {}).items():
    if isinstance(weight, tuple):
      writer.add_tensor(name, weight[0], raw_dtype=weight[1])
    else:
      writer.add_tensor(name, weight)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
  """convert_hf_to_gguf.py, LlamaModel.permute."""
  out, inside = weight.shape
  return weight.reshape(num_heads, 2, out // num_heads // 2, inside).swapaxes(1, 2).reshape(out, inside)


def gguf_name(name: str) -> str:
  if name in _NAMES:
    return _NAMES[name]
  _, _, layer, rest = name.split(".", 3)
  return f"blk.{layer}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def _add(writer, name, weight, kind):
  weight = np.ascontiguousarray(weight)
  if kind in (_Type.F32, _Type.F16):
    writer.add_tensor(name, weight.astype(np.float32 if kind == _Type.F32 else np.float16))
  elif kind == _Type.BF16:
    writer.add_tensor(name, weight.astype(ml_dtypes.bfloat16).view(np.uint8), raw_dtype=kind)
  elif kind in _BLOCK_BYTES:
    writer.add_tensor(name, _random_blocks(weight, kind), raw_dtype=kind)
  else:
    writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)


def _random_blocks(weight, kind):
  """Every bit random but for the float16 factors, which a random exponent would make Inf."""
  size = _BLOCK_BYTES[kind]
  blocks = np.random.default_rng(0).integers(0, 256, (weight.shape[0], weight.shape[1] // 256, size), dtype=np.uint8)
  factors = np.array([0.0123, 0.0045] if kind == _Type.Q4_K else [0.0123], np.float16).view(np.uint8)
  where = slice(0, 4) if kind == _Type.Q4_K else slice(208, 210)
  blocks[..., where] = factors
  return blocks.reshape(weight.shape[0], -1)
