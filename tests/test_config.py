"""LlamaConfig: accepted configs, refused ones by name, and RoPE frequencies against their published formulas."""

import json
import math

import numpy as np
import pytest

from jaxfp8.checkpoint import readers
from jaxfp8.checkpoint.export import config_to_hf
from jaxfp8.checkpoint.readers.gguf_config import config_from_gguf
from jaxfp8.checkpoint.readers.huggingface_config import config_from_hf
from jaxfp8.config import LlamaConfig, RopeConfig, configs_folder
from jaxfp8.errors import InputError
from tests.helpers import tiny_models

LLAMA3 = {"type": "llama3", "theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def _published_frequencies(head_dim, rope):
  """Python floats, pair by pair: RoFormer section 3.2, and Meta's apply_scaling for llama3."""
  out = []
  for i in range(0, head_dim, 2):
    freq = rope.theta ** (-i / head_dim)
    if rope.type == "linear":
      freq /= rope.factor
    if rope.type == "llama3":
      wavelength = 2 * math.pi / freq
      if wavelength > rope.original_max_context / rope.low_freq_factor:
        freq /= rope.factor
      elif wavelength >= rope.original_max_context / rope.high_freq_factor:
        low, high = rope.low_freq_factor, rope.high_freq_factor
        smooth = (rope.original_max_context / wavelength - low) / (high - low)
        freq = (1 - smooth) * freq / rope.factor + smooth * freq
    out.append(freq)
  return np.array(out)


@pytest.mark.parametrize(
  "rope",
  [RopeConfig(), RopeConfig(theta=1e5), RopeConfig(type="linear", factor=4.0), RopeConfig(**LLAMA3, original_max_context=8192)],
  ids=lambda rope: f"{rope.type}-{rope.theta:g}",
)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_frequencies_are_the_published_ones(rope, head_dim):
  got = rope.inverse_frequencies(head_dim)
  assert got.dtype == np.float32 and got.shape == (head_dim // 2,)
  np.testing.assert_allclose(got, _published_frequencies(head_dim, rope), rtol=3e-6)


def test_the_tiny_llama3_takes_every_branch_of_the_scaling():
  config = tiny_models.make_config("gqa_5_1_llama3")
  ratio = RopeConfig(theta=config.rope.theta).inverse_frequencies(config.head_dim) / config.rope.inverse_frequencies(
    config.head_dim
  )
  assert np.isclose(ratio, 1).any() and np.isclose(ratio, 8).any() and ((ratio > 1.01) & (ratio < 7.9)).any()


@pytest.mark.parametrize("path", sorted((configs_folder() / "models").glob("*.toml")), ids=lambda path: path.stem)
def test_every_model_file_loads_and_survives_json(path):
  config = LlamaConfig.from_name(path.stem)
  assert config == readers.read_config(path) == readers.read_config(path.stem)
  assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
  assert isinstance(config.eos_ids, tuple)


@pytest.mark.parametrize("case", tiny_models.CASES)
def test_json_keeps_every_field(case):
  config = tiny_models.make_config(case)
  assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"num_kv_heads": 3}, "multiple of num_kv_heads; got 4 and 3"),
    ({"head_dim": 7}, "even.* got 7"),
    ({"d_model": 0}, "d_model must be a positive"),
    ({"d_model": 4.0}, "d_model must be a whole number; got 4.0"),
    ({"num_layers": True}, "num_layers must be a whole number"),
    ({"eos_ids": [103]}, "below vocab_size 103; got 103"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive"),
    ({"rope": {"type": "yarn"}}, "rope type must be one of .* got 'yarn'"),
    ({"rope": {"theta": -1.0}}, "rope theta must be a positive"),
    ({"rope": {"type": "divisors"}}, "rope divisors belong to .* got type 'divisors' and 0"),
    ({"rope": {"type": "linear", "divisors": [1.0] * 4}}, "belong to .* got type 'linear' and 4"),
    ({"rope": {"type": "divisors", "divisors": [1.0, 2.0, 0.0, 4.0]}}, "every rope divisor must be a positive number; got 0.0"),
    ({"rope": {"type": "divisors", "divisors": [1.0] * 3}}, "one a pair, 4 for heads of 8; got 3"),
    ({"rope": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor > low_freq_factor"),
    ({"layers": 3}, "layers"),
    ({"rope": 5}, "fields of a LlamaConfig"),
    ({"eos_ids": 5}, "fields of a LlamaConfig"),
  ],
)
def test_a_wrong_field_is_named(change, says):
  fields = {**tiny_models.CASES["mha_tied"], **change}
  with pytest.raises(InputError, match=says):
    LlamaConfig.from_dict(fields)


def test_an_unknown_name_brings_near_ones():
  with pytest.raises(InputError, match=r"no model named 'tyni'.*tiny"):
    LlamaConfig.from_name("tyni")


def test_toml_that_is_not(tmp_path):
  path = tmp_path / "x.toml"
  path.write_text("a = = b")
  with pytest.raises(InputError, match="cannot read"):
    readers.read_config(path)
  with pytest.raises(InputError, match="cannot read"):
    readers.read_config(tmp_path / "absent.toml")


@pytest.mark.parametrize("case", tiny_models.CASES)
def test_hugging_face_config_is_the_same_model(case):
  config = tiny_models.make_config(case)
  hf = tiny_models.hf_config(case)
  assert config_from_hf(hf, name=case) == config
  # transformers 5 moved both RoPE keys into rope_parameters, and writes dtype for torch_dtype.
  parameters = {"rope_type": "default", **(hf.pop("rope_scaling") or {}), "rope_theta": hf.pop("rope_theta")}
  assert config_from_hf({**hf, "rope_parameters": parameters, "dtype": "bfloat16"}, name=case) == config


@pytest.mark.parametrize("case", tiny_models.CASES)
def test_export_writes_the_stored_hugging_face_config(case):
  exported = config_to_hf(tiny_models.make_config(case))
  assert exported.pop("eos_token_id") == 2  # a single id stands alone; transformers accepts both forms
  hf = tiny_models.hf_config(case)
  assert hf.pop("eos_token_id") == [2] and exported == hf


def test_hugging_face_defaults():
  hf = tiny_models.hf_config("head_64_eps")
  for key in ("head_dim", "num_key_value_heads", "rope_theta", "rope_scaling", "tie_word_embeddings", "architectures"):
    del hf[key]
  config = config_from_hf({**hf, "eos_token_id": 5})
  assert (config.head_dim, config.num_kv_heads, config.rope) == (96 // 3, 3, RopeConfig(theta=10000.0))
  assert not config.tied_embeddings and config.eos_ids == (5,)


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"model_type": "qwen2"}, "model_type 'qwen2'"),
    ({"architectures": ["Gemma2ForCausalLM"]}, "architectures 'Gemma2ForCausalLM' in .*Llama models only.*llama.cpp or vLLM"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"sliding_window": 128}, "sliding_window 128 in config.json"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor"),
    ({"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
    ({"rope_scaling": "linear"}, "rope_scaling in config.json must be an object; got 'linear'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
  ],
)
def test_what_is_no_llama_is_refused_by_name(change, says):
  hf = tiny_models.hf_config("mha_tied")
  with pytest.raises(InputError, match=says):
    config_from_hf({**hf, **change})


def test_a_missing_key_is_named():
  hf = tiny_models.hf_config("mha_tied")
  del hf["intermediate_size"]
  with pytest.raises(InputError, match="lacks 'intermediate_size'"):
    config_from_hf(hf)


def _gguf_metadata(**change):
  metadata = {
    "general.architecture": "llama",
    "llama.vocab_size": 103,
    "llama.embedding_length": 52,
    "llama.feed_forward_length": 91,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.context_length": 256,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "llama.rope.freq_base": 5e5,
    "llama.attention.key_length": 128,
    "tokenizer.ggml.eos_token_id": 9,
    "tokenizer.ggml.eot_token_id": 7,
  }
  return {**metadata, **change}


def test_gguf_metadata():
  config = config_from_gguf(_gguf_metadata(), has_output=True)
  assert (config.rms_norm_eps, config.tied_embeddings, config.eos_ids, config.head_dim) == (1e-5, False, (9, 7), 128)
  assert config_from_gguf(_gguf_metadata(**{"llama.attention.head_count_kv": [2, 2]}), has_output=False).num_kv_heads == 2
  linear = _gguf_metadata(**{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0})
  assert config_from_gguf(linear, has_output=True).rope == RopeConfig(theta=5e5, type="linear", factor=2.0)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_rope_factors_give_llama3_back(factor):
  rope = RopeConfig(**{**LLAMA3, "factor": factor}, original_max_context=8192)
  divisors = (_published_frequencies(128, RopeConfig(theta=5e5)) / _published_frequencies(128, rope)).astype(np.float32)
  assert config_from_gguf(_gguf_metadata(), has_output=True, rope_factors=divisors).rope == rope


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"general.architecture": "qwen2"}, "'qwen2'"),
    ({"llama.expert_count": 8}, "expert_count 8"),
    ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn'"),
    ({"llama.rope.dimension_count": 64}, "dimension_count"),
    ({"llama.attention.head_count_kv": [2, 4]}, "head_count_kv that differs"),
    ({"llama.block_count": "two"}, "llama.block_count in the GGUF file must be a positive whole number; got 'two'"),
  ],
)
def test_gguf_metadata_is_refused_by_name(change, says):
  with pytest.raises(InputError, match=says):
    config_from_gguf(_gguf_metadata(**change), has_output=True)
