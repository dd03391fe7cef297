"""Writes tests/goldens/dialects/: tiny float8 checkpoints by the libraries whose dialects they are, with their logits.

    python tools/make_dialect_goldens.py

Runs where torch, transformers, compressed-tensors, llmcompressor, nvidia-modelopt and accelerate are installed (all of them on
a CPU); neither jax nor the rest of jaxfp8 is needed. Every seed is 0. For each dialect a folder is written by its library:

    config.json, hf_quant_config.json, model.safetensors    as the library saved them
    golden.npz    tokens [T] and logits [T, V] float32: the library's own dequantized weights through transformers

llmcompressor writes `ct_*`, ModelOpt `modelopt_*`. The weights of `fp8_block` are quantized here, in DeepSeek's layout, and
dequantized by transformers' own reader of it.
"""

import importlib.metadata
import json
import pathlib
import shutil
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
GOLDENS = ROOT / "tests" / "goldens" / "dialects"
SMALL = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
BLOCKS = {"hidden_size": 136, "intermediate_size": 144, "head_dim": 16}  # two blocks of 128 along each, the second ragged
WHOLE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 16}  # transformers dequantizes only whole blocks rightly
NUM_TOKENS = 24
SEED = 1  # with 0 a weight lies between two float8 values, where ModelOpt's simulation and its export round differently


def main() -> None:
  import torch

  torch.set_num_threads(1)
  shutil.rmtree(GOLDENS, ignore_errors=True)
  GOLDENS.mkdir(parents=True)
  for name, scheme, sizes in (
    ("ct_tensor_static", "FP8", SMALL),
    ("ct_channel_dynamic", "FP8_DYNAMIC", SMALL),
    ("ct_block", "FP8_BLOCK", BLOCKS),
  ):
    write_compressed_tensors(GOLDENS / name, scheme, sizes)
  for name, algorithm, sizes in (
    ("modelopt_tensor", "FP8_DEFAULT_CFG", SMALL),
    ("modelopt_channel", "FP8_PER_CHANNEL_PER_TOKEN_CFG", SMALL),
    ("modelopt_block", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", BLOCKS),
  ):
    write_modelopt(GOLDENS / name, algorithm, sizes)
  write_fp8_block(GOLDENS / "fp8_block")
  packages = ("torch", "transformers", "compressed-tensors", "llmcompressor", "nvidia-modelopt")
  versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
  (GOLDENS / "README.md").write_text(
    f"# Float8 checkpoints of other libraries\n\nMade by `tools/make_dialect_goldens.py` with Python {sys.version.split()[0]}, "
    f"{versions}; seed {SEED}.\nIts docstring says what lies in each folder.\n"
  )
  for folder in sorted(path for path in GOLDENS.iterdir() if path.is_dir()):
    print(folder.name, sum(path.stat().st_size for path in folder.iterdir()), "bytes")


def make_model(sizes: dict):
  """A random float32 Llama whose rows differ in size, so that one scale for all is not as good as one a row."""
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM

  config = LlamaConfig(
    vocab_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, rope_theta=10000.0, **sizes,
  )  # fmt: skip
  config.architectures = ["LlamaForCausalLM"]
  model = LlamaForCausalLM(config).float()
  rng = np.random.default_rng(SEED)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if weight.ndim == 1:
        value = 1 + 0.2 * rng.standard_normal(weight.shape)
      else:
        value = rng.standard_normal(weight.shape) * np.exp(0.5 * rng.standard_normal((weight.shape[0], 1)))
        value /= np.sqrt(weight.shape[1]) * (4 if "embed" in name else 1)
      weight.copy_(torch.tensor(value.astype(np.float32)))
  return model.eval()


def write_compressed_tensors(folder: pathlib.Path, scheme: str, sizes: dict) -> None:
  from transformers import AutoModelForCausalLM

  with tempfile.TemporaryDirectory() as temporary:  # llmcompressor wants a model that came from a folder
    make_model(sizes).save_pretrained(temporary)
    model = AutoModelForCausalLM.from_pretrained(temporary, dtype="float32")
    _compress(folder, scheme, sizes, model)


def _compress(folder: pathlib.Path, scheme: str, sizes: dict, model) -> None:
  import torch
  from llmcompressor import oneshot
  from llmcompressor.modifiers.quantization import QuantizationModifier
  from tokenizers import Tokenizer, models
  from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedTokenizerFast

  recipe = QuantizationModifier(
    targets="Linear",
    scheme=scheme,
    ignore=["lm_head", "re:.*layers.0.self_attn.o_proj"],
    kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    if scheme == "FP8"
    else None,
  )
  calibration = {}
  if scheme == "FP8":
    ones = torch.ones(NUM_TOKENS, dtype=torch.long)
    rows = [{"input_ids": torch.tensor(make_tokens(seed)), "attention_mask": ones} for seed in range(1, 5)]
    words = Tokenizer(models.WordLevel({str(token): token for token in range(64)}, unk_token="0"))
    calibration = {
      "dataset": torch.utils.data.DataLoader(rows),
      "processor": PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0"),  # asked for, not used
    }
  oneshot(model=model, recipe=recipe, **calibration)
  with tempfile.TemporaryDirectory() as temporary:
    model.save_pretrained(temporary, save_compressed=True)
    plain = AutoModelForCausalLM.from_pretrained(
      temporary, dtype="float32", quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    keep(folder, pathlib.Path(temporary), plain_weights(plain.state_dict()), sizes)


def write_modelopt(folder: pathlib.Path, algorithm: str, sizes: dict) -> None:
  import modelopt.torch.quantization as mtq
  import torch
  from modelopt.torch.export import export_hf_checkpoint
  from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers

  model = make_model(sizes)

  def calibrate(model):
    for seed in range(1, 5):
      model(torch.tensor(make_tokens(seed)[None]))

  mtq.quantize(model, getattr(mtq, algorithm), calibrate)
  requantize_resmooth_fused_llm_layers(model)  # as the export does: q, k and v come to share one scale
  weights = {}
  for name, module in model.named_modules():
    quantizer = getattr(module, "weight_quantizer", None)
    if quantizer is not None and quantizer.is_enabled:
      weights[f"{name}.weight"] = quantizer(module.weight).detach().float()
  weights = plain_weights(model.state_dict()) | weights
  with tempfile.TemporaryDirectory() as temporary:
    export_hf_checkpoint(model, export_dir=temporary)
    keep(folder, pathlib.Path(temporary), weights, sizes)


def write_fp8_block(folder: pathlib.Path) -> None:
  import torch
  from safetensors.torch import save_file
  from transformers import AutoModelForCausalLM, FineGrainedFP8Config

  model = make_model(WHOLE)
  tensors = {}
  for name, weight in plain_weights(model.state_dict()).items():
    if "_proj" not in name:
      tensors[name] = weight.contiguous()
      continue
    out, inside = weight.shape
    scale = torch.zeros(-(-out // 128), -(-inside // 128))
    value = torch.zeros(out, inside)
    for row in range(scale.shape[0]):
      for column in range(scale.shape[1]):
        block = np.s_[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
        scale[row, column] = weight[block].abs().max() / 448
        value[block] = weight[block] / scale[row, column]
    tensors[name] = value.clamp(-448, 448).to(torch.float8_e4m3fn)
    tensors[name + "_scale_inv"] = scale
  with tempfile.TemporaryDirectory() as temporary:
    path = pathlib.Path(temporary)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    config["quantization_config"] = {
      "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128],
      "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config, indent=1, default=str))
    plain = AutoModelForCausalLM.from_pretrained(
      path, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True, modules_to_not_convert=["lm_head"])
    )
    keep(folder, path, plain_weights(plain.state_dict()), WHOLE)


def plain_weights(state: dict) -> dict:
  return {name: value.detach().float() for name, value in state.items() if name.endswith(".weight")}


def make_tokens(seed: int = 0) -> np.ndarray:
  return np.random.default_rng([seed, 1]).integers(0, 64, NUM_TOKENS)


def keep(folder: pathlib.Path, saved: pathlib.Path, weights: dict, sizes: dict) -> None:
  """Copies what a library saved, and computes the logits of its dequantized weights in float32."""
  import torch

  folder.mkdir()
  for name in ("config.json", "hf_quant_config.json", "model.safetensors"):
    if (saved / name).exists():
      shutil.copy(saved / name, folder / name)
  plain = make_model(sizes)
  difference = max(
    float((plain.state_dict()[name] - weight).abs().max()) for name, weight in weights.items() if "_proj" in name
  )
  assert difference > 1e-4, "the weights are not quantized"
  plain.load_state_dict(weights, strict=True)
  tokens = make_tokens()
  with torch.no_grad():
    logits = plain(torch.tensor(tokens[None])).logits[0].float().numpy()
  np.savez_compressed(folder / "golden.npz", tokens=tokens.astype(np.int32), logits=logits)


if __name__ == "__main__":
  main()
