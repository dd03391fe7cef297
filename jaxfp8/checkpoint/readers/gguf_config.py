"""The metadata of a GGUF file of architecture "llama" as a `LlamaConfig`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxfp8.checkpoint.readers.gguf_special import end_ids
from jaxfp8.config import LlamaConfig, RopeConfig, refuse_model
from jaxfp8.errors import InputError


def config_from_gguf(metadata: Mapping[str, Any], *, has_output: bool, rope_factors: np.ndarray | None = None) -> LlamaConfig:
  """`has_output` says whether the file has `output.weight` (untied); `rope_factors` is its `rope_freqs.weight`."""
  _refuse_what_is_no_llama(metadata)
  try:
    num_heads = _uniform(metadata["llama.attention.head_count"], "head_count")
    d_model = metadata["llama.embedding_length"]
    head_dim = metadata.get("llama.attention.key_length") or d_model // num_heads
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
      if metadata.get(key, head_dim) != head_dim:
        raise refuse_model(f"{key} other than the head size {head_dim}, here", metadata[key])
    return LlamaConfig(
      vocab_size=metadata["llama.vocab_size"] if "llama.vocab_size" in metadata else len(metadata["tokenizer.ggml.tokens"]),
      d_model=d_model,
      d_ff=_uniform(metadata["llama.feed_forward_length"], "feed_forward_length"),
      num_layers=metadata["llama.block_count"],
      num_heads=num_heads,
      num_kv_heads=_uniform(metadata.get("llama.attention.head_count_kv", num_heads), "head_count_kv"),
      head_dim=head_dim,
      max_context=metadata["llama.context_length"],
      # GGUF stores float32: 9.999999747378752e-06 is what 1e-5 becomes there.
      rms_norm_eps=float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
      rope=_rope_from_gguf(metadata, head_dim, rope_factors),
      tied_embeddings=not has_output,
      bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
      eos_ids=end_ids(metadata),
      name=str(metadata.get("general.name", "llama")),
    )
  except KeyError as error:
    raise InputError(f"config: the GGUF file lacks {error}. Convert the model again with a current llama.cpp.") from error
  except (TypeError, ValueError, ZeroDivisionError) as error:
    if isinstance(error, InputError):
      raise
    raise InputError(f"config: the GGUF file holds a value of the wrong kind: {error}. Convert the model again.") from error


def _refuse_what_is_no_llama(metadata: Mapping[str, Any]) -> None:
  architecture = metadata.get("general.architecture")
  if architecture != "llama":
    raise refuse_model("GGUF architecture", architecture)
  for key in ("llama.expert_count", "llama.attention.sliding_window"):
    if metadata.get(key):
      raise refuse_model(key, metadata[key])


def _uniform(value: Any, name: str) -> int:
  """The value of all layers. GGUF allows one per layer; raises InputError unless they are equal."""
  if isinstance(value, int):
    return value
  if len(set(value)) != 1:
    raise refuse_model(f"GGUF {name} that differs between layers,", list(value)[:4])
  return value[0]


def _rope_from_gguf(metadata: Mapping[str, Any], head_dim: int, rope_factors: np.ndarray | None) -> RopeConfig:
  theta = float(metadata.get("llama.rope.freq_base", 10000.0))
  if rope_factors is not None:
    return _match_llama3(theta, head_dim, rope_factors)
  scaling = metadata.get("llama.rope.scaling.type", "none")
  if scaling == "linear":
    return RopeConfig(theta=theta, type="linear", factor=float(metadata["llama.rope.scaling.factor"]))
  if scaling != "none":
    raise refuse_model("rope scaling", scaling)
  return RopeConfig(theta=theta)


def _match_llama3(theta: float, head_dim: int, rope_factors: np.ndarray) -> RopeConfig:
  """The published llama3 scaling that gives these factors: GGUF stores only the divisor of each frequency."""
  if rope_factors.shape != (head_dim // 2,):  # before anything as long as head_dim is made
    raise refuse_model(f"rope_freqs.weight for heads of {head_dim}, of shape", rope_factors.shape)
  plain = RopeConfig(theta=theta).inverse_frequencies(head_dim)
  for factor in (8.0, 32.0, 16.0, 4.0):
    rope = RopeConfig(theta=theta, type="llama3", factor=factor)
    if np.allclose(plain / rope.inverse_frequencies(head_dim), rope_factors, rtol=1e-4):
      return rope
  raise refuse_model("rope_freqs.weight that no published llama3 scaling gives, up to", float(np.max(rope_factors)))
