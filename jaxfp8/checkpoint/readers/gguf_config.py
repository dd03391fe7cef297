"""The metadata of a GGUF file of architecture "llama" as a `LlamaConfig`, read as llama.cpp's src/llama-model.cpp reads it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxfp8.checkpoint.readers.arithmetic_keys import refuse_gguf_features
from jaxfp8.checkpoint.readers.fields import (
  COUNT,
  COUNTS,
  FLAG,
  NUMBER,
  POSITIVE,
  TEXT,
  TEXTS,
  TOKEN_ID,
  check_fields,
  refuse_architecture,
  refuse_model,
  require,
)
from jaxfp8.checkpoint.readers.gguf_special import end_ids
from jaxfp8.config import LlamaConfig, RopeConfig
from jaxfp8.errors import InputError

_PER_LAYER = ("llama.feed_forward_length", "llama.attention.head_count", "llama.attention.head_count_kv")
_IDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"))
_KINDS = {
  **dict.fromkeys(("general.architecture", "general.type", "llama.rope.scaling.type"), TEXT),
  **dict.fromkeys(("llama.vocab_size", "llama.embedding_length", "llama.block_count", "llama.context_length"), COUNT),
  **dict.fromkeys(("llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count"), COUNT),
  **dict.fromkeys(_PER_LAYER, COUNTS),
  **dict.fromkeys(("llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base"), POSITIVE),
  **dict.fromkeys(("llama.rope.scaling.factor", "llama.rope.scale_linear", "llama.rope.scaling.attn_factor"), NUMBER),
  **dict.fromkeys(_IDS, TOKEN_ID),
  "llama.rope.scaling.finetuned": FLAG,
  "tokenizer.ggml.tokens": TEXTS,
}
_REQUIRED = (
  "llama.embedding_length",
  "llama.feed_forward_length",
  "llama.block_count",
  "llama.attention.head_count",
  "llama.context_length",
  "llama.attention.layer_norm_rms_epsilon",
)
_WAY_OUT = "Convert the model again with a current llama.cpp."


def config_from_gguf(
  metadata: Mapping[str, Any], *, has_output: bool, rope_factors: np.ndarray | None = None, where: object = "the GGUF file"
) -> LlamaConfig:
  """From the metadata of a GGUF file.

  Args:
    metadata: values by key; arrays are lists.
    has_output: whether the file has `output.weight` (untied embeddings).
    rope_factors: the file's `rope_freqs.weight`, the divisor of each frequency.
    where: the file, for messages.

  Raises:
    InputError: a key is missing or has another type; the model is no Llama, or a Llama with a feature that jaxfp8 does not
      compute.
  """
  check_fields(metadata, _KINDS, where)
  require(metadata, ("general.architecture",), where, _WAY_OUT)
  architecture = metadata["general.architecture"]
  if architecture != "llama":
    raise refuse_architecture("general.architecture", architecture, where)
  if metadata.get("general.type") not in (None, "model"):
    raise refuse_architecture("general.type", metadata["general.type"], where)
  require(metadata, _REQUIRED, where, _WAY_OUT)
  num_heads = _uniform(metadata, "llama.attention.head_count", where)
  d_model = metadata["llama.embedding_length"]
  head_dim = metadata.get("llama.attention.key_length") or max(1, d_model // num_heads)
  tokens = metadata.get("tokenizer.ggml.tokens") or ()
  if not (metadata.get("llama.vocab_size") or tokens):
    require(metadata, ("llama.vocab_size",), where, _WAY_OUT)
  vocab_size = metadata.get("llama.vocab_size") or len(tokens)
  for key in _IDS:
    if (metadata.get(key) or 0) >= vocab_size:
      raise InputError(
        f"config: {key} in {where} must be below the vocabulary's size {vocab_size}; got {metadata[key]}. {_WAY_OUT}"
      )
  config = LlamaConfig(
    vocab_size=vocab_size,
    d_model=d_model,
    d_ff=_uniform(metadata, "llama.feed_forward_length", where),
    num_layers=metadata["llama.block_count"],
    num_heads=num_heads,
    num_kv_heads=_uniform(metadata, "llama.attention.head_count_kv", where, num_heads),
    head_dim=head_dim,
    max_context=metadata["llama.context_length"],
    # GGUF stores float32: 9.999999747378752e-06 is what 1e-5 becomes there.
    rms_norm_eps=float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
    rope=_rope_from_gguf(metadata, head_dim, rope_factors, where),
    tied_embeddings=not has_output,
    bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
    eos_ids=end_ids(metadata),
    name=str(metadata.get("general.name", "llama")),
  )
  refuse_gguf_features(metadata, config, where)
  return config


def _uniform(metadata: Mapping[str, Any], key: str, where: object, default: int | None = None) -> int:
  """The value of all layers. GGUF allows one per layer; raises InputError unless they are equal."""
  value = metadata.get(key, default)
  if isinstance(value, int):
    return value
  layers = metadata["llama.block_count"]
  if not value or len(value) != layers:
    raise InputError(
      f"config: {key} in {where} must be one number, or one for each of the {layers} layers; got {len(value or ())}. {_WAY_OUT}"
    )
  if len(set(value)) != 1:
    raise refuse_model(f"{key} that differs between layers,", list(value), where)
  return value[0]


def _rope_from_gguf(metadata: Mapping[str, Any], head_dim: int, divisors: np.ndarray | None, where: object) -> RopeConfig:
  """As llama.cpp: scaling is linear unless the file names another type, and the divisors of `rope_freqs.weight` come on top."""
  theta = float(metadata.get("llama.rope.freq_base") or 10000.0)
  scaling = metadata.get("llama.rope.scaling.type") or "linear"
  if scaling not in ("none", "linear"):
    raise refuse_model("llama.rope.scaling.type with the rope scaling", scaling, where)
  factor = metadata.get("llama.rope.scaling.factor")
  if factor is None:
    factor = metadata.get("llama.rope.scale_linear")  # the name before GGUF had other types of scaling
  factor = float(factor or 1.0) if scaling == "linear" else 1.0
  if factor < 0:
    raise refuse_model("llama.rope.scaling.factor", factor, where)
  if divisors is not None:
    divisors = np.asarray(divisors, np.float32)
    if divisors.shape != (head_dim // 2,):  # before anything as long as head_dim is made
      raise refuse_model(f"rope_freqs.weight for heads of {head_dim}, of shape", divisors.shape, where)
    if not (np.isfinite(divisors) & (divisors > 0)).all():
      raise InputError(
        f"config: rope_freqs.weight in {where} must hold positive numbers, the divisors of the frequencies; got "
        f"{divisors[~(np.isfinite(divisors) & (divisors > 0))][0]}. {_WAY_OUT}"
      )
    if not (divisors == 1).all():
      return _with_divisors(theta, divisors * np.float32(factor), head_dim)
  return RopeConfig(theta=theta, type="linear", factor=factor) if factor != 1 else RopeConfig(theta=theta)


def _with_divisors(theta: float, divisors: np.ndarray, head_dim: int) -> RopeConfig:
  """The llama3 scaling that gives these divisors, for an export says more than numbers; else the divisors themselves."""
  plain = RopeConfig(theta=theta).inverse_frequencies(head_dim)
  for original_max_context in (8192, 4096, 2048, 16384, 32768, 65536, 131072):
    factor = float(divisors.max())
    rope = RopeConfig(theta=theta, type="llama3", factor=factor, original_max_context=original_max_context)
    if np.allclose(plain / rope.inverse_frequencies(head_dim), divisors, rtol=3e-6, atol=0):
      return rope
  return RopeConfig(theta=theta, type="divisors", divisors=tuple(map(float, divisors)))
