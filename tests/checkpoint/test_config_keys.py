"""Every key that changes arithmetic is read or refused by name, in config.json and in GGUF metadata; values that turn a feature
off are harmless, and so are keys that trainers write."""

import dataclasses
import json

import gguf
import ml_dtypes
import numpy as np
import pytest

from jaxfp8.checkpoint import load, readers
from jaxfp8.checkpoint.export import config_to_hf
from jaxfp8.checkpoint.readers.gguf_config import config_from_gguf
from jaxfp8.checkpoint.readers.huggingface_config import config_from_file, config_from_hf, config_notes
from jaxfp8.config import LlamaConfig, RopeConfig
from jaxfp8.errors import InputError
from tests.helpers import numpy_llama, tiny_llamas, tiny_models
from tests.helpers.gguf_files import write_gguf

KIND = gguf.GGMLQuantizationType.F32
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}


def hf(**change):
  return {**tiny_models.hf_config("mha_tied"), **change}


def metadata(**change):
  """change: by key, with __ for the dots behind "llama."; None removes the key."""
  base = {
    "general.architecture": "llama",
    "llama.vocab_size": 103,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 48,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.context_length": 256,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "tokenizer.ggml.eos_token_id": 9,
  }
  merged = {**base, **{key if "." in key else "llama." + key.replace("__", "."): value for key, value in change.items()}}
  return {key: value for key, value in merged.items() if value is not None}


def rope_of(divisors=None, **change):
  return config_from_gguf(metadata(**change), has_output=True, rope_factors=divisors).rope


# --- config.json ---


@pytest.mark.parametrize(
  "change",
  [
    {"logit_scale": 1.0, "logits_scaling": 1, "embedding_multiplier": None, "residual_multiplier": 1.0},
    {"attention_multiplier": 8**-0.5, "query_pre_attn_scalar": 8, "attn_logit_softcapping": None, "final_logit_softcapping": 0},
    {"sliding_window": 256, "layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 1], "max_window_layers": 28},
    {"sliding_window": 16, "use_sliding_window": False},
    {
      "partial_rotary_factor": 1.0,
      "rope_interleaved": False,
      "num_local_experts": 0,
      "num_experts_per_tok": 0,
      "clip_qkv": None,
    },
    {"use_qk_norm": False, "qk_layernorm": False, "alibi": False, "qkv_bias": False, "no_bias": True},
    {"unsloth_version": "2025.1", "unsloth_fixed": True, "_name_or_path": "x", "use_cache": True, "pretraining_tp": 4},
    {"auto_map": {"AutoConfig": "a.B"}, "torch_dtype": "bfloat16", "transformers_version": "4.31.0", "initializer_range": 0.02},
    {"attention_dropout": 0.1, "router_aux_loss_coef": 0.001, "temperature": 0.6, "top_p": 0.9, "a_trainers_key": 7},
    {"rope_scaling": {}, "rope_parameters": None, "_attn_implementation": "sdpa", "id2label": {"0": "L"}, "task": None},
    {"rope_parameters": {**DEFAULT, "factor": 8.0, "attention_factor": 1.2, "original_max_position_embeddings": 8192}},
    {"rope_scaling": {"rope_type": "default", "type": "default"}, "rope_parameters": DEFAULT, "rope_theta": 10000},
  ],
)
def test_harmless_keys_of_a_config_json(change):
  assert config_from_hf(hf(**change), name="mha_tied") == tiny_models.make_config("mha_tied")


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"logit_scale": 0.0625}, "logit_scale 0.0625 in config.json"),
    ({"logits_scaling": 8.0}, "logits_scaling 8.0"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier 12.0"),
    ({"attention_multiplier": 1.0}, "attention_multiplier 1.0"),
    ({"residual_multiplier": 0.22}, "residual_multiplier 0.22"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar 256"),
    ({"scale_emb": 12, "scale_depth": 1.4}, "scale_emb 12"),
    ({"sliding_window": 255}, "sliding_window 255"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .*sliding_attention"),
    ({"no_rope_layers": [1, 0]}, r"no_rope_layers \[1, 0\]"),
    ({"use_qk_norm": True}, "use_qk_norm True"),
    ({"qk_layernorm": True}, "qk_layernorm True"),
    ({"num_local_experts": 8}, "num_local_experts 8"),
    ({"n_routed_experts": 64}, "n_routed_experts 64"),
    ({"clip_qkv": 8.0}, "clip_qkv 8.0"),
    ({"alibi": True}, "alibi True"),
    ({"rope_interleaved": True}, "rope_interleaved True"),
    ({"rotary_dim": 4}, "rotary_dim 4"),
    ({"attn_temperature_tuning": True}, "attn_temperature_tuning True"),
    ({"an_unknown_multiplier": 2.0}, "an_unknown_multiplier 2.0"),
    ({"position_embedding_type": "alibi"}, "position_embedding_type 'alibi'"),
    ({"model_type": "gemma2"}, "model_type 'gemma2' .*llama.cpp or vLLM"),
    (
      {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "max_position_embeddings": 32768},
      "sliding_window 4096",
    ),
  ],
)
def test_a_key_that_changes_arithmetic_is_refused_by_name(change, says):
  with pytest.raises(InputError, match=says):
    config_from_hf(hf(**change))


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"eos_token_id": 258.5}, "eos_token_id in config.json must be a token id, .* got 258.5"),
    ({"eos_token_id": "258"}, "eos_token_id in config.json must be .* got '258'"),
    ({"eos_token_id": [[2]]}, r"eos_token_id in config.json must be .* got \[\[2\]\]"),
    ({"eos_token_id": True}, "eos_token_id in config.json must be .* got True"),
    ({"eos_token_id": 103}, "eos_token_id in config.json must be below vocab_size 103; got 103"),
    ({"bos_token_id": [1]}, r"bos_token_id in config.json must be a token id, .* got \[1\]"),
    ({"bos_token_id": -1}, "bos_token_id in config.json must be a token id, .* got -1"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings in config.json must be true or false; got 'false'"),
    ({"tie_word_embeddings": 0}, "tie_word_embeddings in config.json must be true or false; got 0"),
    ({"hidden_size": "52"}, "hidden_size in config.json must be a positive whole number; got '52'"),
    ({"hidden_size": 52.0}, "hidden_size in config.json must be a positive whole number; got 52.0"),
    ({"num_hidden_layers": True}, "num_hidden_layers in config.json .* got True"),
    ({"num_attention_heads": 0}, "num_attention_heads in config.json .* got 0"),
    ({"num_key_value_heads": 0}, "num_key_value_heads in config.json .* got 0"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps in config.json must be a positive number; got '1e-5'"),
    ({"rope_theta": float("nan")}, "rope_theta in config.json must be a positive number; got nan"),
    ({"architectures": "LlamaForCausalLM"}, "architectures in config.json must be a list of texts"),
    ({"quantization_config": "fp8"}, "quantization_config in config.json must be an object; got 'fp8'"),
    ({"hidden_size": None}, "config.json lacks 'hidden_size'"),
    ({"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": None}, "hidden_size in config.json must be at least"),
  ],
)
def test_a_field_of_another_type_is_named_with_its_file(change, says):
  with pytest.raises(InputError, match=says):
    config_from_hf(hf(**change))


def test_the_file_that_holds_the_wrong_field_is_named(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(hf()))
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": "258"}')
  with pytest.raises(InputError, match=r"eos_token_id in .*/generation_config\.json must be a token id"):
    config_from_file(tmp_path / "config.json")
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 258]}')
  with pytest.raises(InputError, match=r"eos_token_id in .*/generation_config\.json must be below vocab_size 103; got 258"):
    config_from_file(tmp_path / "config.json")


def test_a_byte_order_mark_is_accepted_and_a_key_that_stands_twice_is_refused(tmp_path):
  path = tmp_path / "config.json"
  path.write_bytes(b"\xef\xbb\xbf" + json.dumps(hf()).encode())
  assert config_from_file(path, "mha_tied") == tiny_models.make_config("mha_tied")
  path.write_text(json.dumps(hf())[:-1] + ', "rope_scaling": {"factor": 2.0, "factor": 4.0}}')
  with pytest.raises(InputError, match=r"config\.json has 'factor' twice"):
    config_from_file(path)


# transformers 5.24: MistralConfig's window is 4096 where the key is absent, and null means none; LlamaConfig has no window.
@pytest.mark.parametrize(
  ("change", "note"),
  [
    ({"architectures": ["LLaMAForCausalLM"]}, "LLaMAForCausalLM"),
    ({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}, "MistralForCausalLM"),
    ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "MistralForCausalLM"),  # 4096 is above the context
  ],
)
def test_the_same_mathematics_under_another_name_is_read_with_a_note(change, note):
  assert config_from_hf(hf(**change), name="mha_tied") == tiny_models.make_config("mha_tied")
  assert [text for text in config_notes(hf(**change)) if text.startswith(f"{note} with these settings is the same")]


# --- RoPE of config.json ---


@pytest.mark.parametrize(
  ("change", "says"),
  [
    (
      {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3},
      "rope_parameters .*default.* and rope_scaling .*llama3",
    ),
    (
      {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 1e4},
      "rope_theta 10000.0 and rope_parameters.rope_theta 500000.0",
    ),
    (
      {"rope_scaling": {"rope_type": "linear", "type": "llama3", "factor": 2.0}},
      "rope_type 'linear' and type 'llama3' in rope_scaling",
    ),
    ({"rope_scaling": {"factor": 4.0}}, "factor without a rope_type, 4.0"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 1.2}}, "attention_factor 1.2 in rope_scaling"),
    ({"rope_scaling": {"type": "default", "mrope_section": [2, 1, 1]}}, r"mrope_section \[2, 1, 1\]"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor in rope_scaling .* must be a positive number; got '2'"),
    (
      {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}},
      "needs original_max_position_embeddings in rope_scaling",
    ),
    (
      {"rope_parameters": {"full_attention": DEFAULT, "sliding_attention": DEFAULT}},
      "rope_parameters with one dictionary for each",
    ),
    ({"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' needs factor"),
  ],
)
def test_rope_fields_that_contradict_or_change_more_are_named(change, says):
  fields = hf(**change)
  if "rope_theta" not in change:
    del fields["rope_theta"]
  with pytest.raises(InputError, match=says):
    config_from_hf(fields)


# --- RoPE of GGUF: llama.cpp's src/llama-model.cpp, load_hparams ---


@pytest.mark.parametrize(
  ("change", "rope"),
  [
    ({}, RopeConfig()),
    ({"rope__scaling__factor": 4.0}, RopeConfig(type="linear", factor=4.0)),
    ({"rope__scale_linear": 4.0}, RopeConfig(type="linear", factor=4.0)),
    ({"rope__scale_linear": 4.0, "rope__scaling__factor": 2.0}, RopeConfig(type="linear", factor=2.0)),
    ({"rope__scaling__type": "linear"}, RopeConfig()),
    ({"rope__scaling__type": "linear", "rope__scaling__factor": 0.0}, RopeConfig()),
    ({"rope__scaling__type": "linear", "rope__scaling__factor": 4}, RopeConfig(type="linear", factor=4.0)),
    ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, RopeConfig()),
    ({"rope__scaling__original_context_length": 4096, "rope__scaling__finetuned": True}, RopeConfig()),
    ({"rope__scaling__attn_factor": 1.0, "rope__dimension_sections": [0, 0, 0, 0], "rope__dimension_count": 8}, RopeConfig()),
    ({"rope__freq_base": 5e5, "rope__freq_base_swa": 5e5}, RopeConfig(theta=5e5)),
  ],
)
def test_rope_of_gguf_metadata_is_that_of_llama_cpp(change, rope):
  assert rope_of(**change) == rope


def test_rope_divisors_are_used_as_they_are():
  plain = RopeConfig().inverse_frequencies(8)
  divisors = np.array([1, 1.25, 3.5, 9], np.float32)
  rope = rope_of(divisors)
  np.testing.assert_array_equal(rope.inverse_frequencies(8), plain / divisors)
  assert rope_of(np.ones(4, np.float32)) == RopeConfig()
  scaled = rope_of(divisors, rope__scaling__factor=4.0)  # ggml applies both
  np.testing.assert_allclose(scaled.inverse_frequencies(8), plain / divisors / 4, rtol=1e-6)
  assert rope_of(np.ones(4, np.float32), rope__scaling__type="linear", rope__scaling__factor=4.0).factor == 4.0
  assert rope_of(divisors, rope__scaling__type="none", rope__scaling__factor=4.0) == rope
  config = config_from_gguf(metadata(), has_output=True, rope_factors=divisors)
  assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
  with pytest.raises(InputError, match="no place for the rope divisors"):
    config_to_hf(config)


@pytest.mark.parametrize(("factor", "context"), [(2.0, 8192), (8.0, 4096), (5.0, 8192)])
def test_divisors_of_a_llama3_formula_give_the_formula_back(factor, context):
  rope = RopeConfig(theta=5e5, type="llama3", factor=factor, original_max_context=context)
  divisors = (RopeConfig(theta=5e5).inverse_frequencies(128) / rope.inverse_frequencies(128)).astype(np.float32)
  got = rope_of(divisors, attention__key_length=128, rope__freq_base=5e5)
  assert got == rope and config_to_hf(LlamaConfig(103, 32, 48, 2, 4, 2, 128, 256, rope=got))["rope_scaling"]["factor"] == factor
  off = rope_of(divisors * np.float32(1.0001), attention__key_length=128, rope__freq_base=5e5)
  assert off.type == "divisors"


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_divisors_that_are_not_positive_are_refused(value):
  with pytest.raises(InputError, match=r"rope_freqs\.weight in the GGUF file must hold positive numbers"):
    rope_of(np.array([1, 1, value, 1], np.float32))
  with pytest.raises(InputError, match=r"rope_freqs\.weight for heads of 8, of shape \(3,\)"):
    rope_of(np.ones(3, np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_logits_of_a_gguf_file_with_divisors(dtype, tmp_path):
  """Against float64 numpy, which takes the frequencies that the test computes."""
  config = tiny_models.make_config("one_layer_head_10")
  divisors = np.array([1, 1, 1.5, 3, 4], np.float32)
  weights = tiny_models.make_weights(config)
  stored = divisors.astype(dtype)
  if dtype == ml_dtypes.bfloat16:
    stored = stored.view(np.uint8), gguf.GGMLQuantizationType.BF16
  path = write_gguf(tmp_path / "m.gguf", config, weights, KIND, extra={"rope_freqs.weight": stored})
  source = readers.open_source(path)
  assert source.config.rope.divisors == tuple(divisors)
  tokens = tiny_models.make_tokens(config, 40)
  logits, _ = tiny_llamas.run_pieces(load.load_source(source, tiny_llamas.F32), tokens, [40])

  class Frequencies:
    divisors = ()

    def inverse_frequencies(self, head_dim):
      return 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim) / divisors

  truth = numpy_llama.forward(dataclasses.replace(config, rope=Frequencies()), weights, tokens)
  assert np.abs(logits - truth).max() < 1e-4 < np.abs(logits - numpy_llama.forward(config, weights, tokens)).max()


# --- other GGUF keys ---


@pytest.mark.parametrize(
  "change",
  [
    {"logit_scale": 0.0, "embedding_scale": 1.0, "residual_scale": 0.0, "attention__scale": 0.0, "attention__clamp_kqv": 0.0},
    {"attention__scale": float(np.float32(8**-0.5)), "attention__causal": True, "attention__max_alibi_bias": 0.0},
    {"expert_count": 0, "expert_used_count": 0, "attention__sliding_window": 256, "tensor_data_layout": "Meta AI original pth"},
    {"general.name": "x", "general.quantization_version": 2, "quantize.imatrix.file": "i", "mradermacher.quantized_by": "m"},
    {
      "tokenizer.ggml.pre": "llama-bpe",
      "split.no": 0,
      "split.count": 0,
      "general.type": "model",
      "use_parallel_residual": False,
    },
    {"feed_forward_length": [48, 48], "attention__head_count": [4, 4], "attention__value_length": 8},
  ],
)
def test_harmless_gguf_keys(change):
  got = config_from_gguf(metadata(**change), has_output=True)
  assert got == LlamaConfig(103, 32, 48, 2, 4, 2, 8, 256, eos_ids=(9,), name=got.name)


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"logit_scale": 0.5}, "llama.logit_scale 0.5 in the GGUF file"),
    ({"attention__scale": 0.5}, "llama.attention.scale 0.5"),
    ({"embedding_scale": 12.0}, "llama.embedding_scale 12.0"),
    ({"residual_scale": 0.25}, "llama.residual_scale 0.25"),
    ({"attention__clamp_kqv": 8.0}, "llama.attention.clamp_kqv 8.0"),
    ({"attention__max_alibi_bias": 8.0}, "llama.attention.max_alibi_bias 8.0"),
    ({"attention__temperature_scale": 0.1}, "llama.attention.temperature_scale 0.1"),
    ({"attention__causal": False}, "llama.attention.causal False"),
    ({"attention__sliding_window": 128}, "llama.attention.sliding_window 128"),
    ({"expert_count": 8}, "llama.expert_count 8"),
    ({"attn_logit_softcapping": 50.0}, "llama.attn_logit_softcapping 50.0"),
    ({"a_key_of_tomorrow": 1}, "llama.a_key_of_tomorrow 1"),
    ({"rope__scaling__attn_factor": 1.2}, "llama.rope.scaling.attn_factor 1.2"),
    ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}, "rope scaling 'yarn'"),
    ({"rope__scaling__type": "longrope"}, "rope scaling 'longrope'"),
    ({"rope__dimension_sections": [2, 1, 1, 0]}, "llama.rope.dimension_sections"),
    ({"rope__dimension_count": 4}, "llama.rope.dimension_count 4"),
    ({"rope__freq_base_swa": 5e5}, "llama.rope.freq_base_swa 500000.0"),
    ({"attention__value_length": 16}, "llama.attention.value_length 16"),
    ({"general.architecture": "gemma2"}, "general.architecture 'gemma2' in the GGUF file is another model .*llama.cpp or vLLM"),
    ({"general.type": "adapter"}, "general.type 'adapter'"),
    ({"attention__head_count": 0}, "llama.attention.head_count in the GGUF file must be a positive whole number.* got 0"),
    ({"attention__head_count_kv": [2, 0]}, r"llama.attention.head_count_kv in the GGUF file .* got \[2, 0\]"),
    ({"attention__head_count": [4, 4, 4]}, "llama.attention.head_count .* one for each of the 2 layers; got 3"),
    ({"attention__head_count": []}, "llama.attention.head_count .* one for each of the 2 layers; got 0"),
    ({"feed_forward_length": [48, 96]}, r"feed_forward_length that differs between layers, \[48, 96\]"),
    ({"block_count": 0}, "llama.block_count in the GGUF file must be a positive whole number; got 0"),
    ({"embedding_length": [32]}, r"llama.embedding_length in the GGUF file must be a positive whole number; got \[32\]"),
    ({"rope__freq_base": "10000"}, "llama.rope.freq_base in the GGUF file must be a positive number; got '10000'"),
    ({"context_length": None}, "the GGUF file lacks 'llama.context_length'"),
    ({"vocab_size": None}, "the GGUF file lacks 'llama.vocab_size'"),
    ({"tokenizer.ggml.eos_token_id": 103}, "tokenizer.ggml.eos_token_id in the GGUF file must be below .* 103; got 103"),
    ({"tokenizer.ggml.bos_token_id": [1]}, "tokenizer.ggml.bos_token_id in the GGUF file must be a token id"),
  ],
)
def test_a_gguf_key_that_changes_arithmetic_or_has_another_type_is_refused_by_name(change, says):
  with pytest.raises(InputError, match=says):
    config_from_gguf(metadata(**change), has_output=True)


# --- biases ---


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_biases_of_zeros_are_left_out_with_a_note_and_others_are_refused_by_name(kind, tmp_path):
  config = tiny_models.make_config("one_layer_head_10")
  weights = tiny_models.make_weights(config)
  layer = "model.layers.0."

  def write(folder, **biases):
    if kind == "gguf":
      names = {"q": "blk.0.attn_q.bias", "down": "blk.0.ffn_down.bias"}
      folder.mkdir()
      return write_gguf(folder / "m.gguf", config, weights, KIND, extra={names[key]: value for key, value in biases.items()})
    names = {"q": layer + "self_attn.q_proj.bias", "down": layer + "mlp.down_proj.bias"}
    tiny_models.write_hf_folder(folder, config, {**weights, **{names[key]: value for key, value in biases.items()}})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_bias": True, "mlp_bias": True}))
    return folder

  zeros = np.zeros(20, np.float32), -np.zeros(38, np.float32)
  source = readers.open_source(write(tmp_path / "zeros", q=zeros[0], down=zeros[1]))
  assert any(note.startswith("2 biases") and "zeros" in note for note in source.notes)
  np.testing.assert_array_equal(source.read(layer + "self_attn.q_proj.weight"), weights[layer + "self_attn.q_proj.weight"])
  zeros[1][7] = 1e-30
  with pytest.raises(
    InputError, match=r"(mlp\.down_proj|blk\.0\.ffn_down)\.bias in .* at \[7\]\. Run this model with llama.cpp or vLLM"
  ):
    readers.open_source(write(tmp_path / "others", q=zeros[0], down=zeros[1]))
