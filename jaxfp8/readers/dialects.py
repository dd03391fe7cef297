"""Which quantized checkpoints of Hugging Face's layout are understood. Today: none; each is refused by name.

This is the one place that knows: a reader of float8 dialects replaces `refuse_quantized` and adds to `_DTYPES`.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxfp8.errors import InputError

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


def numpy_dtype(safetensors_dtype: str) -> np.dtype | str:
  """The dtype of safetensors' `F32`, `F16` or `BF16`; any other name comes back as it is, and is refused by name later."""
  return _DTYPES.get(safetensors_dtype, safetensors_dtype)


def refuse_quantized(folder: pathlib.Path, hf: Mapping[str, Any], dtypes: Mapping[str, np.dtype | str]) -> None:
  """Raises InputError when config.json, hf_quant_config.json or a float8 tensor says that the weights are quantized."""
  scheme = hf.get("quantization_config") or hf.get("compression_config")
  if scheme:
    method = scheme.get("quant_method", "unnamed") if isinstance(scheme, Mapping) else scheme
    _refuse(folder, f"quantization_config with quant_method {method!r}")
  if (folder / "hf_quant_config.json").exists():
    _refuse(folder, "hf_quant_config.json")
  for name, dtype in dtypes.items():
    if str(dtype).startswith("F8_"):
      _refuse(folder, f"{name} in {dtype}")


def _refuse(folder: pathlib.Path, what: str) -> None:
  raise InputError(
    f"readers: quantized Hugging Face checkpoints are not read yet; {folder} has {what}. "
    "Pass the float16 or bfloat16 checkpoint that it was made from."
  )
