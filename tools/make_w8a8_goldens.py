"""Writes tests/goldens/w8a8/: logits of a small Llama whose weights and activations are float8, by other libraries.

    python -m tools.make_w8a8_goldens

Runs where torch, transformers, compressed-tensors, accelerate, safetensors and ml_dtypes are installed, on a CPU; needs no jax.
The model and its float8 folders are those of tests/helpers/w8a8_files.py. Linear layers compute in bfloat16 from dequantized
weights and rounded activations, one thread, eager attention. NAME.npz holds `tokens` [T] and logits [T, V] float32:

    logits    with the dialect's own rounding of activations
    other     with another, to show the difference: one dynamic scale per token and no bound, or where the dialect has these,
              one per token and group of 128 columns

compressed-tensors loads its own folders and rounds the activations. The kernels of transformers' finegrained_fp8 and of FBGEMM
need a GPU, so their roundings are written here as those kernels define them.
"""

import importlib.metadata
import pathlib
import sys
import tempfile
from collections.abc import Callable

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from tests.helpers import dialect_files, w8a8_files


def main() -> None:
  import torch

  torch.set_num_threads(1)
  w8a8_files.GOLDENS.mkdir(parents=True, exist_ok=True)
  for name in w8a8_files.DIALECTS:
    with tempfile.TemporaryDirectory() as temporary:
      folder = w8a8_files.write(pathlib.Path(temporary) / "model", name)
      results = {"other": simulated(name, group_rounding if name == "compressed-tensors channel" else row_rounding)}
      if name.startswith("compressed-tensors"):
        results["logits"] = by_compressed_tensors(folder)
      elif name == "deepseek block":
        results["logits"] = simulated(name, group_rounding)
      else:
        results["logits"] = simulated(name, lambda x: row_rounding(x, w8a8_files.BOUND))
    print(f"{name}: the other rounding has a KL divergence of {divergence(results['logits'], results['other']):.5f}")
    results["tokens"] = w8a8_files.make_tokens()
    np.savez_compressed(w8a8_files.GOLDENS / f"{name.replace(' ', '_')}.npz", **results)
  packages = ("torch", "transformers", "compressed-tensors")
  print(sys.version.split()[0], ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages))


def by_compressed_tensors(folder: pathlib.Path) -> np.ndarray:
  """The library loads the folder and rounds the inputs; its weights are dequantized by its own function, for lack of a GPU."""
  import torch
  from compressed_tensors.quantization.lifecycle.forward import dequantize
  from transformers import AutoModelForCausalLM

  model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
  for module in model.modules():
    if scheme := getattr(module, "quantization_scheme", None):
      weight = dequantize(module.weight, module.weight_scale, args=scheme.weights, dtype=torch.bfloat16)
      module.weight = torch.nn.Parameter(weight, requires_grad=False)
  return logits_of(model)


def simulated(dialect: str, rounding: Callable) -> np.ndarray:
  """The dialect's dequantized weights in transformers' Llama, whose quantized layers read `rounding` of their inputs."""
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM

  kind = w8a8_files.DIALECTS[dialect][0]
  model = LlamaForCausalLM._from_config(LlamaConfig(**w8a8_files.hf_config()), attn_implementation="eager")
  weights = {}
  for name, weight in w8a8_files.make_weights(dialect).items():
    is_quantized = "_proj" in name
    weights[name] = torch.tensor(dialect_files.dequantize(*dialect_files.quantize(weight, kind)) if is_quantized else weight)
  model.load_state_dict(weights)
  model = model.to(torch.bfloat16).eval()
  for name, module in model.named_modules():
    if name.endswith("_proj"):
      module.register_forward_pre_hook(lambda _, inputs: (rounding(inputs[0].float()).to(torch.bfloat16),))
  return logits_of(model)


def group_rounding(x):
  """transformers' finegrained_fp8 (`act_quant`): one scale, amax / 448, per token and group of 128 columns."""
  return row_rounding(x.unflatten(-1, (-1, 128))).flatten(-2)


def row_rounding(x, bound: float | None = None):
  """FBGEMM's quantize_fp8_per_row: scale = clamp(amax, max=bound) / 448 of each row; values saturate."""
  import torch

  scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12, max=bound) / 448
  return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def logits_of(model) -> np.ndarray:
  """Logits in float32 from the last hidden states, so that bfloat16 does not round them."""
  import torch

  with torch.no_grad():
    hidden = model.model(torch.tensor(w8a8_files.make_tokens()[None].astype(np.int64))).last_hidden_state
    return (hidden[0].float() @ model.lm_head.weight.float().T).numpy()


def divergence(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
  """Mean KL divergence in nats."""

  def log_softmax(x):
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))

  p, q = log_softmax(reference), log_softmax(logits)
  return (np.exp(p) * (p - q)).sum(-1).mean()


if __name__ == "__main__":
  main()
