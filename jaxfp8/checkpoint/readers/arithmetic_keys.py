# ruff: noqa: SIM905 - a table of names reads best as words
"""Which keys of a config change a Llama's arithmetic, and which of their values change nothing.

Hugging Face's config.json is open: trainers and tools write keys of their own into it, and transformers ignores every key that
its LlamaConfig does not have. So a key is refused if its name is that of a feature of a related model (`_TURNED_OFF_BY`, or a
word of `_FEATURE`) and its value is not neutral; other unknown keys are ignored.

GGUF's `llama.*` is closed: llama.cpp's src/llama-arch.cpp lists its keys. So every key that is not listed here is refused
unless its value is neutral. Keys of other groups (`general.*`, `tokenizer.*`, `quantize.*`, ...) change no arithmetic.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxfp8.checkpoint.readers.fields import NUMBER, refuse_model
from jaxfp8.config import LlamaConfig

_Neutral = Callable[[Any, LlamaConfig], bool]


def _off(value: Any, config: LlamaConfig) -> bool:
  """None, false, 0 and what is empty; a list of them too."""
  return (
    value is None or (isinstance(value, (bool, int, float, str, list, tuple, dict)) and not value) or _each(_off)(value, config)
  )


def _each(neutral: _Neutral) -> _Neutral:
  return lambda value, config: isinstance(value, (list, tuple)) and all(neutral(entry, config) for entry in value)


def _factor(value: Any, config: LlamaConfig) -> bool:
  """A factor of something: 1, or null."""
  return value is None or (value == 1 and not isinstance(value, bool)) or _each(_factor)(value, config)


def _off_or_factor(value: Any, config: LlamaConfig) -> bool:
  """0 means "not set", as in GGUF."""
  return _off(value, config) or _factor(value, config) or _each(_off_or_factor)(value, config)


def _softmax_scale(value: Any, config: LlamaConfig) -> bool:
  return value is None or (NUMBER.holds(value) and math.isclose(value, config.head_dim**-0.5, rel_tol=1e-6))


def _equals(field: str) -> _Neutral:
  return lambda value, config: value is None or (NUMBER.holds(value) and value == getattr(config, field))


def _window(value: Any, config: LlamaConfig) -> bool:
  """No window, or one that no context outgrows; a query sees `sliding_window` tokens, itself among them."""
  return _off(value, config) or (NUMBER.holds(value) and value >= config.max_context) or _each(_window)(value, config)


def _words(*neutral: Any) -> _Neutral:
  return lambda value, config: (
    value is None or value in neutral or (isinstance(value, list) and all(v in neutral for v in value))
  )


def _never_changes(value: Any, config: LlamaConfig) -> bool:
  return True


_WINDOWS = "sliding_window sliding_window_size window_size attention_window local_attention_window attention_chunk_size".split()
# config.json: features of related models whose neutral value is a special one.
_TURNED_OFF_BY: dict[str, _Neutral] = {
  **dict.fromkeys(("attention_multiplier", "attention_scale", "attn_scale", "softmax_scale"), _softmax_scale),
  **dict.fromkeys(_WINDOWS, _window),
  **dict.fromkeys(("rotary_dim", "rope_dim", "qk_rope_head_dim", "v_head_dim", "query_pre_attn_scalar"), _equals("head_dim")),
  **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rope_pct", "rotary_percent"), _factor),
  **dict.fromkeys(("rotary_emb_base", "rope_base", "rotary_base"), lambda value, config: value in (None, config.rope.theta)),
  **dict.fromkeys(("use_rope", "rope", "use_rotary", "no_bias"), _words(True)),
  "rope_type": _words("default"),
  "dim_model_base": _equals("d_model"),
  "scale_depth": _off,
  "layer_types": _words("full_attention"),
  "no_rope_layers": _words(1),
  "position_embedding_type": _words("rope", "rotary", "absolute"),  # "absolute" is the default of old transformers' base class
  "norm_type": _words("rmsnorm", "rms_norm", "RMSNorm"),
}
# config.json: words in the names of such features. Their neutral values: null, false, 0, 1 and what is empty.
_FEATURE = re.compile(
  r"multiplier|softcap|logit_cap|logits?_scal|(embed\w*|residual|attn|attention|output|emb|query|key|value|lm_head|head)_scal"
  r"|scale_(emb|attn|depth|logit)|alibi|qk_?(layer_?)?norm|(query|key|q|k|attn|attention)_(layer_?)?norm|(pre|post)\w*_norm"
  r"|experts?(_|$)|^moe|_moe|clip_qkv|clamp|rotary|^(no_)?rope|_rope|temperature_tuning|attention_sink|parallel_(attn|residual)"
  r"|(^|_)bias$|^use_bias|lora_rank|_lambda$|nextn|num_loops|^mup|_mup|^(text|vision|audio)_config$|logn_attn|ntk"
)
# Names with such a word that change no result of inference.
_NO_FEATURE = re.compile(r"^unsloth|^_|init|loss|aux|dropout|^rope_(theta|scaling|parameters)$|^(attention|mlp)_bias$|^lora_")


def refuse_features(hf: Mapping[str, Any], config: LlamaConfig, where: object) -> None:
  """Raises InputError, naming key and value, for a key of config.json that changes the arithmetic of `config`'s Llama."""
  windowed = hf.get("use_sliding_window") is not False  # qwen2's switch: a window without it is never used
  for key, value in hf.items():
    neutral = _TURNED_OFF_BY.get(key)
    if neutral is _window and not windowed:
      continue
    if neutral is None and _FEATURE.search(key) and not _NO_FEATURE.search(key):
      neutral = _off_or_factor
    if neutral is not None and not neutral(value, config):
      raise refuse_model(key, value, where)


_ONE_OR_UNSET = ("logit_scale", "embedding_scale", "residual_scale", "attention.output_scale", "attention.value_scale")
_SAME_HEAD = ("attention.key_length", "attention.value_length", "rope.dimension_count")
# Keys of `llama.*` behind "llama.", whose values are read elsewhere, or change nothing, or are neutral at a special value.
_GGUF: dict[str, _Neutral] = {
  **dict.fromkeys(
    (
      "vocab_size context_length embedding_length block_count feed_forward_length attention.head_count attention.head_count_kv "
      "attention.layer_norm_rms_epsilon rope.freq_base rope.scale_linear rope.scaling.type rope.scaling.factor "
      "rope.scaling.original_context_length rope.scaling.finetuned rope.scaling.yarn_log_multiplier "
      "rope.scaling.yarn_ext_factor rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow "
      "tensor_data_layout attention.sliding_window_pattern attention.layer_norm_epsilon pooling_type"
    ).split(),
    _never_changes,
  ),
  **dict.fromkeys((*_ONE_OR_UNSET, "rope.scaling.attn_factor", "rope.scaling.alpha", "expert_weights_scale"), _off_or_factor),
  **dict.fromkeys(_SAME_HEAD, _equals("head_dim")),
  **dict.fromkeys((f"{key}_swa" for key in _SAME_HEAD), lambda value, config: not value or value == config.head_dim),
  "embedding_length_out": lambda value, config: not value or value == config.d_model,
  "attention.scale": lambda value, config: not value or _softmax_scale(value, config),
  "attention.sliding_window": _window,
  "attention.causal": _words(True),
  "rope.freq_base_swa": lambda value, config: not value or value == config.rope.theta,
}


def refuse_gguf_features(metadata: Mapping[str, Any], config: LlamaConfig, where: object) -> None:
  """Raises InputError, naming key and value, for a key of `llama.*` that changes the arithmetic of `config`'s Llama."""
  for key, value in metadata.items():
    if key.startswith("llama.") and not _GGUF.get(key.removeprefix("llama."), _off)(value, config):
      raise refuse_model(key, value, where)
