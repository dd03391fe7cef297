"""Every float8 dialect: the values and scales that come in are kept to the bit, and give the logits of their own library."""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxfp8.checkpoint import convert, load, readers
from jaxfp8.checkpoint.open import Checkpoint
from jaxfp8.checkpoint.quantized_source import source_granularity
from jaxfp8.errors import InputError
from jaxfp8.recipe import Recipe
from tests.helpers import dialect_files, numpy_llama, tiny_llamas, tiny_models
from tests.helpers.dialect_files import compressed_tensors

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "dialects"
LIMIT = 1e-4
CONFIG = tiny_models.make_config("gqa_9_3_untied")  # F = 91: no multiple of anything
RAGGED = dataclasses.replace(CONFIG, d_model=144, d_ff=130, num_layers=2, head_dim=32)  # blocks of 128 with ragged edges
Q = "model.layers.1.self_attn.q_proj"


def inputs(value, suffix="input_scale", shape=(), dtype=np.float32):
  """Adds a static scale of every module's input, different for each."""

  def extra(names):
    modules = [name.rsplit(".", 1)[0] for name in names if name.endswith(("weight_scale", "weight_scale_inv"))]
    return {f"{m}.{suffix}": np.full(shape, value + i / 256, np.float32).astype(dtype) for i, m in enumerate(modules)}

  return extra


def layers(**tensors):
  """Adds tensors to the attention of every layer."""
  return lambda names: {f"model.layers.{l}.self_attn.{n}": v for l in range(2) for n, v in tensors.items()}


def both(*extras):
  return lambda names: {key: value for extra in extras for key, value in extra(names).items()}


F32 = np.float32
# name: (config, arguments of dialect_files.write, granularity, dialect, static scales per layer)
DIALECTS = {
  "compressed-tensors tensor static, bf16 scales": (
    CONFIG,
    {
      "kind": "tensor",
      "shape": lambda s, x: x.reshape(1),
      "scale_dtype": ml_dtypes.bfloat16,
      "extra": inputs(0.5, shape=(1,)),
      "scheme": compressed_tensors("tensor", {"dynamic": False, "strategy": "tensor", "num_bits": 8, "type": "float"}),
    },
    "tensor",
    "compressed-tensors",
    7,
  ),
  "compressed-tensors channel dynamic": (
    CONFIG,
    {
      "shape": lambda s, x: x.reshape(-1, 1),
      "scale_dtype": ml_dtypes.bfloat16,
      "plain": ("layers.0.self_attn",),
      "scheme": compressed_tensors(
        "channel", {"dynamic": True, "strategy": "token"}, ignore=["lm_head", "re:.*layers\\.0\\.self_attn.*"]
      ),
    },
    "channel",
    "compressed-tensors",
    0,
  ),
  "compressed-tensors block": (
    RAGGED,
    {"kind": "block", "scheme": compressed_tensors("block")},
    "block128",
    "compressed-tensors",
    0,
  ),
  "compressed-tensors, heads' KV scales": (
    CONFIG,
    {
      "scheme": compressed_tensors("channel", kv_cache_scheme={"strategy": "attn_head"}),
      "extra": layers(
        k_scale=np.full((3, 1, 1), 0.25, F32), v_scale=np.full((3, 1, 1), 0.5, F32), q_scale=np.ones((9, 1, 1), F32)
      ),
    },
    "channel",
    "compressed-tensors",
    2,
  ),
  "modelopt": (
    CONFIG,
    {
      "kind": "tensor",
      "extra": both(inputs(0.5), layers(**{"k_proj.k_scale": np.array(0.25, F32), "v_proj.v_scale": np.array(0.5, F32)})),
      "quant_file": {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
      },
    },
    "tensor",
    "modelopt FP8",
    9,
  ),
  "modelopt per channel": (
    CONFIG,
    {
      "plain": ("layers.0.self_attn",),
      "quant_file": {
        "quantization": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "exclude_modules": ["model.layers.0.self_attn*"]}
      },
    },
    "channel",
    "modelopt FP8_PER_CHANNEL_PER_TOKEN",
    0,
  ),
  "modelopt blocks": (
    RAGGED,
    {
      "kind": "block",
      "shape": lambda s, x: x[:, None, :, None],
      "scheme": {"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"},
    },
    "block128",
    "modelopt FP8_PB_WO",
    0,
  ),
  "fbgemm": (
    CONFIG,
    {
      "shape": lambda s, x: x.reshape(-1, 1),
      "plain": ("self_attn", "layers.0"),
      "scheme": {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": 1200.0,
        "modules_to_not_convert": ["lm_head", "model.layers.0"]
        + [f"model.layers.{l}.self_attn.{n}_proj" for l in (1, 2) for n in "qkvo"],
      },
    },
    "channel",
    "fbgemm_fp8",
    0,
  ),
  "autofp8 static": (
    CONFIG,
    {
      "kind": "tensor",
      "extra": both(inputs(0.5, "act_scale"), layers(kv_scale=np.array([0.75], F32))),
      "scheme": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
    },
    "tensor",
    "fp8 static",
    9,
  ),
  "autofp8 dynamic, output scales": (
    CONFIG,
    {
      "kind": "tensor",
      "extra": layers(**{"k_proj.output_scale": np.array(0.25, F32), "v_proj.output_scale": np.array(0.5, F32)}),
      "scheme": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    },
    "tensor",
    "fp8 dynamic",
    2,
  ),
  "deepseek blocks": (
    RAGGED,
    {
      "kind": "block",
      "suffix": "weight_scale_inv",
      "scheme": {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
    },
    "block128",
    "fp8 block128",
    0,
  ),
  "no config": (CONFIG, {}, "channel", "float8 tensors without a config", 0),
}


@pytest.fixture(params=DIALECTS)
def dialect(request, tmp_path):
  config, how, granularity, name, static = DIALECTS[request.param]
  folder, tensors, meaning = dialect_files.write(tmp_path / "model", config, **how)
  return config, folder, tensors, meaning, granularity, name, static


def test_logits_are_those_of_the_dequantized_weights(dialect):
  config, folder, _, meaning, granularity, name, _ = dialect
  source = readers.open_source(folder)
  assert (source_granularity(source), source.dialect) == (granularity, name)
  assert source.notes == (("the config names no quantization, and weights are float8",) if name.startswith("float8") else ())
  tokens = tiny_models.make_tokens(config, 24)
  truth = numpy_llama.forward(config, meaning, tokens)
  dequantized = [tiny_llamas.F32] if name in ("fbgemm_fp8", "modelopt FP8_PB_WO") else []
  for recipe in (Recipe("fp8", granularity, "f32", "f32"), *dequantized):
    logits, _ = tiny_llamas.run_pieces(load.load_source(source, recipe), tokens, [24])
    assert np.abs(logits - truth).max() < LIMIT * max(1, np.abs(truth).max() / 10)


def test_a_checkpoint_keeps_every_bit(dialect, tmp_path):
  """Values and scales on disk are those of the source, one scale a channel where it had one a tensor, bf16 scales upcast."""
  config, folder, tensors, _, granularity, name, static = dialect
  convert.convert_checkpoint(folder, tmp_path / "ours", activations="dynamic" if not static else None)
  ours = Checkpoint(tmp_path / "ours")
  assert ours.manifest.provenance["dialect"] == name and ours.manifest.recipe.granularity == granularity
  for weight in ours.names():
    array = ours.read(weight)
    if tensors[weight].dtype != dialect_files.FLOAT8:
      assert array.dtype != dialect_files.FLOAT8
      continue
    assert array.tobytes() == tensors[weight].tobytes(), weight
    (scale,) = (tensors[key] for key in (weight + "_scale", weight + "_scale_inv") if key in tensors)
    rows = len(array) if granularity == "tensor" else scale.size
    np.testing.assert_array_equal(ours.read_scale(weight).reshape(-1), np.broadcast_to(scale.astype(F32).reshape(-1), (rows,)))
  assert len(ours.static_scales()) == static * (config.num_layers if static in (7,) else 2) + (7 if static == 9 else 0)
  for scale in ours.static_scales():
    value, K = ours.read_static(scale), config.num_kv_heads
    assert value.shape == ((K,) if scale.endswith(("k_scale", "v_scale")) else ()) and value.dtype == F32
    if value.shape:
      assert (value == {"fp8 static": 0.75}.get(name, 0.25 if scale.endswith("k_scale") else 0.5)).all()


class TestOwnLibraries:
  """Checkpoints that the dialects' own libraries wrote, and the logits of the weights that these libraries dequantized."""

  FOLDERS = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())

  def test_all_are_there(self):
    assert {name.split("_")[0] for name in self.FOLDERS} == {"ct", "modelopt", "fp8"} and len(self.FOLDERS) >= 6

  @pytest.mark.parametrize("name", FOLDERS)
  def test_logits(self, name, tmp_path, capsys):
    golden = np.load(GOLDENS / name / "golden.npz")
    source = readers.open_source(GOLDENS / name)
    assert source.notes == () and source_granularity(source) == EXPECTED[name][0] and source.dialect == EXPECTED[name][1]
    recipe = Recipe("fp8", source_granularity(source), "f32", "f32")
    tokens = golden["tokens"]
    logits, _ = tiny_llamas.run_pieces(load.load_source(source, recipe), tokens, [len(tokens)])
    assert np.abs(logits - golden["logits"]).max() < LIMIT
    convert.convert_checkpoint(source, tmp_path / "ours", recipe)
    again, _ = tiny_llamas.run_pieces(load.load(tmp_path / "ours"), tokens, [len(tokens)])
    np.testing.assert_array_equal(again, logits)
    assert len(source.static_scales()) == EXPECTED[name][2]


# granularity, dialect, number of static scales
EXPECTED = {
  "ct_tensor_static": ("tensor", "compressed-tensors", 8),
  "ct_channel_dynamic": ("channel", "compressed-tensors", 0),
  "ct_block": ("block128", "compressed-tensors", 0),
  "modelopt_tensor": ("tensor", "modelopt FP8", 7),
  "modelopt_channel": ("channel", "modelopt FP8_PER_CHANNEL_PER_TOKEN", 0),
  "modelopt_block": ("block128", "modelopt FP8_PB_WO", 0),
  "fp8_block": ("block128", "fp8 block128", 0),
}


def test_float8_is_never_rounded_again(tmp_path):
  folder, _, _ = dialect_files.write(tmp_path / "model", RAGGED, kind="block")
  with pytest.raises(InputError, match=r"float8 weights with block128 scales.*got granularity='channel'\. Leave it out"):
    convert.convert_checkpoint(folder, tmp_path / "ours", Recipe("fp8", "channel"))
  assert not (tmp_path / "ours").exists()


# --- refused ---


def _edit(change):
  def edit(folder):
    path = folder / "model.safetensors"
    tensors = load_file_with_float8(path)
    change(tensors)
    save_file(tensors, path)

  return edit


def load_file_with_float8(path):
  from jaxfp8.checkpoint.readers.safetensors_file import read_headers, read_tensor

  return {name: read_tensor(name, header) for name, header in read_headers(path).items()}


def _config(**scheme):
  def edit(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": scheme}))

  return edit


REFUSED = {
  "F8 without a scale": (
    _edit(lambda t: t.pop(Q + ".weight_scale")),
    rf"{Q}\.weight .*needs one scale, {Q}\.weight_scale or {Q}\.weight_scale_inv; absent",
  ),
  "scale without F8": (
    _edit(lambda t: t.update({Q + ".weight": t[Q + ".weight"].astype(F32)})),
    rf"{Q}\.weight_scale .* beside {Q}\.weight, which is float32",
  ),
  "scale without a weight": (
    _edit(lambda t: t.update({"model.norm.weight_scale": np.ones(1, F32)})),
    r"model\.norm\.weight_scale .* beside model\.norm\.weight, which is float32",
  ),
  "both scales": (_edit(lambda t: t.update({Q + ".weight_scale_inv": np.ones(1, F32)})), "both are there"),
  "odd shape": (
    _edit(lambda t: t.update({Q + ".weight_scale": np.ones((3, 5), F32)})),
    rf"one a block of 128 x 128; {Q}\.weight_scale .*\[3, 5\] beside {Q}\.weight of shape \[144, 63\]",
  ),
  "integer scale": (_edit(lambda t: t.update({Q + ".weight_scale": np.ones(144, np.int32)})), r"F8_E8M0; .* is I32"),
  "float8 norm": (
    _edit(lambda t: t.update({"model.norm.weight": np.ones(63, dialect_files.FLOAT8)})),
    r"model\.norm\.weight .*float8",
  ),
  "e5m2": (
    _edit(lambda t: t.update({Q + ".weight": t[Q + ".weight"].astype(ml_dtypes.float8_e5m2)})),
    "F8_E4M3; .* is F8_E5M2|beside .*F8_E5M2",
  ),
  "nvfp4": (
    lambda f: (f / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}'),
    "quant_algo 'NVFP4'",
  ),
  "mixed precision": (_config(quant_method="modelopt", quant_algo="MIXED_PRECISION"), "quant_algo 'MIXED_PRECISION'"),
  "awq": (_config(quant_method="awq", bits=4), "quant_method 'awq'"),
  "gptq": (_config(quant_method="gptq", bits=4), "quant_method 'gptq'"),
  "int4 groups": (
    _config(quant_method="compressed-tensors", config_groups={"g": {"weights": {"num_bits": 4, "type": "int"}}}),
    "4 bits and type 'int'",
  ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_sentence(what, tmp_path):
  folder, _, _ = dialect_files.write(tmp_path / "model", CONFIG)
  spoil, says = REFUSED[what]
  spoil(folder)
  with pytest.raises(InputError, match=says) as error:
    readers.open_source(folder)
  assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(("value", "says"), [(np.nan, "finite"), (-1.0, "not negative"), (np.inf, "finite")])
def test_bad_scales(value, says, tmp_path):
  folder, _, _ = dialect_files.write(tmp_path / "model", CONFIG)
  _edit(lambda t: t[Q + ".weight_scale"].__setitem__(3, value))(folder)
  source = readers.open_source(folder)
  with pytest.raises(InputError, match=rf"{says}.*{Q}\.weight_scale"):
    load.load_source(source, Recipe("fp8", "channel"))


@pytest.mark.parametrize("shape", [(2,), (5, 1), (0,)])
def test_bad_kv_scales(shape, tmp_path):
  folder, _, _ = dialect_files.write(tmp_path / "model", CONFIG, extra=layers(k_scale=np.ones(shape, F32)))
  with pytest.raises(InputError, match=r"self_attn\.k_scale .*1 or 3 positive numbers"):
    convert.convert_checkpoint(folder, tmp_path / "ours")
  assert not (tmp_path / "ours").exists()


def test_nan_among_float8_values(tmp_path):
  folder, _, _ = dialect_files.write(tmp_path / "model", CONFIG)
  _edit(lambda t: t[Q + ".weight"].view(np.uint8).__setitem__((2, 7), 0xFF))(folder)
  with pytest.raises(InputError, match=rf"{Q}\.weight .* is nan at \[2, 7\]"):
    readers.open_source(folder).read(Q + ".weight")


def test_disagreement_with_the_config_is_said(tmp_path):
  scheme = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": [Q]}
  folder, _, _ = dialect_files.write(tmp_path / "model", CONFIG, scheme=scheme, plain=("layers.2.mlp.up",))
  first, second, third = readers.open_source(folder).notes
  assert first == "the config quantizes model.layers.2.mlp.up_proj, and the weights are not float8"
  assert second == f"the config leaves out {Q}, and the weights are float8"
  assert third.startswith("the config says that inputs have static scales, and model.layers.0.")
