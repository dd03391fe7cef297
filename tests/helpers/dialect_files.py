"""Float8 checkpoints written byte by byte, as FORMATS of the dialects say: for tests of readers and converters.

`write` takes a tiny model's weights, quantizes them in numpy by a scheme, and gives the folder and what its weights mean.
"""

import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.helpers import tiny_models
from tests.helpers.numpy_llama import scale_of, to_float8

FLOAT8 = ml_dtypes.float8_e4m3fn
BLOCK = 128


def quantize(weight: np.ndarray, kind: str, scale_dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
  """(float8 [out, in], scale) with scales for a "tensor", (out,) rows ("channel") or blocks of 128, in `scale_dtype`."""
  out, inside = weight.shape
  if kind == "block":
    shape = -(-out // BLOCK), -(-inside // BLOCK)
    scale, value = np.empty(shape, np.float32), np.empty(weight.shape, FLOAT8)
    for row in range(shape[0]):
      for column in range(shape[1]):
        part = np.s_[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK]
        scale[row, column] = scale_of(weight[part], (0, 1)).item()
        value[part] = to_float8(weight[part], scale[row, column])
    return value, scale.astype(scale_dtype)
  scale = scale_of(weight, (0, 1) if kind == "tensor" else 1).astype(scale_dtype).astype(np.float32)
  return to_float8(weight, scale), scale.reshape(()) if kind == "tensor" else scale[:, 0]


def dequantize(value: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """float64."""
  value, scale = value.astype(np.float64), scale.astype(np.float64)
  if scale.size == 1:
    return value * scale.reshape(())
  if scale.size == len(value):
    return value * scale.reshape(-1, 1)
  scale = scale.reshape(-(-value.shape[0] // BLOCK), -(-value.shape[1] // BLOCK))
  return value * np.repeat(np.repeat(scale, BLOCK, 0), BLOCK, 1)[: value.shape[0], : value.shape[1]]


def write(
  folder: pathlib.Path,
  config,
  *,
  kind="channel",
  shape=None,
  suffix="weight_scale",
  scale_dtype=np.float32,
  plain=(),
  scheme=None,
  quant_file=None,
  extra=None,
  quantize_also=(),
) -> tuple[pathlib.Path, dict[str, np.ndarray], dict[str, np.ndarray]]:
  """(folder, the tensors in it, what each weight means in float64).

  Args:
    kind: one of `quantize`, or a function of the module's name that gives one.
    shape: from (out, in) and the scale to how it is stored.
    plain: parts of modules' names that stay as they are.
    extra: function of the weights' names that gives more tensors.
  """
  tensors, meaning = {}, {}
  for name, weight in tiny_models.make_weights(config).items():
    module = name.removesuffix(".weight")
    meaning[name] = tensors[name] = weight
    if ("_proj" in name and not any(part in name for part in plain)) or module in quantize_also:
      how = kind(module) if callable(kind) else kind
      value, scale = quantize(weight, how, scale_dtype)
      stored = (shape(weight.shape, scale) if shape else scale).astype(scale_dtype)
      tensors |= {name: value, f"{module}.{suffix}": stored}
      meaning[name] = dequantize(value, stored.astype(np.float32))
  tensors |= extra(list(tensors)) if extra else {}
  tiny_models.write_hf_folder(folder, config, tiny_models.make_weights(config))
  contiguous = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in tensors.items()}
  save_file(contiguous, folder / "model.safetensors")
  if scheme is not None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": scheme}))
  if quant_file is not None:
    (folder / "hf_quant_config.json").write_text(json.dumps(quant_file))
  return folder, tensors, meaning


def compressed_tensors(strategy: str, inputs=None, **more) -> dict:
  weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy}
  group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
  return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"ANY_NAME": group}, **more}
