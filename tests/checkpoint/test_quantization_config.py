"""quantization_config: every key is read, is known to change nothing, or is refused by name with its value."""

import pytest

from jaxfp8.checkpoint.readers.quantization_config import read_quantization
from jaxfp8.errors import InputError
from tests.helpers.dialect_files import compressed_tensors

TOKEN = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
GROUP = {**TOKEN, "strategy": "group", "group_size": 128}
STATIC = {**TOKEN, "dynamic": False, "strategy": "tensor"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def read(scheme, quant_file=None, **hf):
  return read_quantization("/ck", {"quantization_config": scheme, **hf}, quant_file)


def channel(**more):
  return compressed_tensors("channel", TOKEN, **more)


def transform(*locations):
  apply = [{"targets": ["Linear"], "location": location, "inverse": False, "ignore": []} for location in locations]
  return {"config_groups": {"R4": {"type": "hadamard", "apply": apply, "randomize": False, "head_dim": None}}}


def weights(**change):
  scheme = channel()
  scheme["config_groups"]["ANY_NAME"]["weights"].update(change)
  return scheme


@pytest.mark.parametrize(
  "scheme",
  [
    channel(transform_config=transform("weight_input", "weight_output"), sparsity_config={}, kv_cache_scheme=None),
    channel(transform_config={}, sparsity_config={"format": "dense", "global_sparsity": 0.1}, quantization_status="compressed"),
    channel(kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "attn_head", "dynamic": False, "symmetric": True}),
    channel(a_key_of_tomorrow=None, another=False, version="0.9", format="mixed-precision"),
    compressed_tensors("block", GROUP),
    compressed_tensors("tensor", STATIC),
    weights(actorder=None, group_size=None, block_structure=None, observer="minmax", observer_kwargs={}, zp_dtype=None),
    {**FP8, "weight_block_size": [128, 128], "fmt": "e4m3", "scale_fmt": "float", "modules_to_not_convert": ["lm_head"]},
    {**FP8, "activation_scheme": "static", "kv_cache_scheme": "static", "is_checkpoint_fp8_serialized": True},
    {
      "quant_method": "modelopt",
      "quant_algo": "FP8",
      "kv_cache_quant_algo": "FP8",
      "group_size": None,
      "has_zero_point": False,
    },
    {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}, "output_tensors": None}, "exclude": []},
  ],
)
def test_what_is_computed_and_what_changes_nothing_is_read(scheme):
  config = read(scheme)
  assert config.names_scheme and config.notes == ()


@pytest.mark.parametrize(
  ("scheme", "says"),
  [
    (channel(transform_config=transform("weight_output", "input")), "transform_config .*'input'.*weight_output"),
    (channel(transform_config=transform("q_attn")), "transform_config"),
    (channel(transform_config={"something": 1}), "transform_config"),
    (compressed_tensors("channel", {**TOKEN, "type": "int"}), "input_activations of 8 bits and type 'int'"),
    (compressed_tensors("channel", {**TOKEN, "num_bits": 4}), "input_activations of 4 bits and type 'float'"),
    (compressed_tensors("channel", {**TOKEN, "symmetric": False}), "input_activations.symmetric False"),
    (compressed_tensors("channel", {**TOKEN, "strategy": "tensor"}), "dynamic=True, strategy='tensor'"),
    (compressed_tensors("channel", GROUP), "strategy='group' and group_size=128"),
    (compressed_tensors("block", {**GROUP, "group_size": 64}), "group_size=64"),
    (compressed_tensors("block", TOKEN), "dynamic=True, strategy='token'"),
    (weights(symmetric=False), "weights.symmetric False"),
    (weights(actorder="group"), "weights.actorder 'group'"),
    (weights(strategy="group", group_size=128), "weights.strategy 'group'"),
    (weights(group_size=64), "weights.group_size 64"),
    (weights(block_structure=[64, 64]), r"weights.block_structure \[64, 64\]"),
    (weights(num_bits=4, type="int"), "weights of 4 bits and type 'int'"),
    (weights(a_key_of_tomorrow=3), "weights.a_key_of_tomorrow 3"),
    ({**channel(), "config_groups": {"g": {"targets": ["Linear"], "output_activations": TOKEN}}}, "g.output_activations"),
    (channel(kv_cache_scheme={"num_bits": 8, "type": "int"}), "kv_cache_scheme .*'int'"),
    (channel(kv_cache_scheme={"num_bits": 4, "type": "float"}), "kv_cache_scheme"),
    (channel(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config .*sparse-24-bitmask"),
    (channel(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
    (channel(linear_class="AutoBitLinear"), "linear_class 'AutoBitLinear'"),
    (channel(a_key_of_tomorrow=7), "a_key_of_tomorrow 7"),
    ({**FP8, "scale_fmt": "ue8m0"}, "scale_fmt 'ue8m0'.* powers of two. Remove scale_fmt"),
    ({**FP8, "weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]"),
    ({**FP8, "fmt": "e5m2"}, "fmt 'e5m2'"),
    ({**FP8, "activation_scheme": "none"}, "activation_scheme 'none'"),
    ({**FP8, "activation_scale_ub": 1200.0}, "activation_scale_ub 1200.0"),
    ({"quant_method": "fbgemm_fp8", "activation_scale_ub": "1200"}, "activation_scale_ub in .* must be a positive number"),
    ({"quant_method": "modelopt", "quant_algo": "FP8", "pre_quant_scale": True}, "pre_quant_scale True"),
    ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "INT8"}, "kv_cache_quant_algo 'INT8'"),
    ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int8"}}}, "global_quant_config"),
    ({"quant_method": "quark", "algo_config": [{"name": "rotation"}]}, "algo_config"),
    ({**FP8, "modules_to_not_convert": "lm_head"}, "modules_to_not_convert in .* must be a list of texts"),
  ],
)
def test_what_is_not_computed_is_refused_by_name(scheme, says):
  with pytest.raises(InputError, match=says):
    read(scheme)


def test_spellings_that_contradict_each_other_are_both_named():
  modelopt = {"quant_method": "modelopt", "quant_algo": "fp8", "ignore": ["lm_head"]}
  inner = {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}
  assert read(modelopt, {"quantization": inner}).notes == ()
  with pytest.raises(InputError, match=r"quant_algo of config.json 'fp8' and quant_algo of hf_quant_config.json 'FP8_PB_WO'"):
    read(modelopt, {"quantization": {**inner, "quant_algo": "FP8_PB_WO"}})
  (note,) = read(modelopt, {"quantization": {**inner, "exclude_modules": ["lm_head", "model.layers.0*"]}}).notes
  assert "ignore" in note and "exclude_modules" in note
  with pytest.raises(InputError, match=r"quantization_config .* and compression_config .* contradict"):
    read(channel(), compression_config=FP8)
