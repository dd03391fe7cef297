"""The float8 dialects of Hugging Face folders: which tensor is the scale of which weight, and what the config says.

    weight F8_E4M3 [out, in]  with  weight_scale or weight_scale_inv beside it     both multiply: w ~= float(q) * scale
    (), (1,), (1, 1)          one scale for the tensor       AutoFP8, ModelOpt, compressed-tensors "tensor"
    (out,), (out, 1)          one an output row              compressed-tensors "channel", FBGEMM, ModelOpt per channel
    (out/128, in/128), also as (out/128, 1, in/128, 1)       DeepSeek, compressed-tensors "block", ModelOpt FP8_PB_WO

The tensors decide. The config (`quantization_config`) names the dialect, is refused if jaxfp8 does not compute what it says,
and is compared with the tensors: `Scheme.notes` lists the disagreements.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxfp8.checkpoint.readers.quantization_config import QuantizationConfig, read_quantization
from jaxfp8.checkpoint.readers.safetensors_file import Header, read_tensor
from jaxfp8.checkpoint.readers.source import FLOAT8, some_of
from jaxfp8.errors import InputError
from jaxfp8.recipe import BLOCK

_WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")
_INPUT_SCALES = ("input_scale", "act_scale")  # act_scale: AutoFP8's first files
# Names of a layer's KV scales after `model.layers.N.self_attn.`; the first that exists is used. kv_scale is for both.
_KV_SCALES = {
  "k": ("k_scale", "attn.k_scale", "k_proj.k_scale", "qkv_proj.k_scale", "k_proj.output_scale", "kv_scale", "attn.kv_scale"),
  "v": ("v_scale", "attn.v_scale", "v_proj.v_scale", "qkv_proj.v_scale", "v_proj.output_scale", "kv_scale", "attn.kv_scale"),
}
_UNUSED = ("self_attn.q_scale", "self_attn.q_proj.output_scale")  # jaxfp8 keeps queries in the stream's dtype
_MODULE = re.compile(r"(model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)|lm_head|model\.embed_tokens)")


@dataclasses.dataclass(frozen=True)
class Scheme:
  """How a folder's tensors are quantized, by module (`model.layers.0.mlp.up_proj`); empty for plain weights.

  weights: module -> (name of its scale's tensor, "tensor", "channel" or "block128").
  static: our name of an input or KV scale -> the tensor that holds it.
  """

  dialect: str = "plain"
  weights: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
  static: Mapping[str, str] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()


def recognize(
  folder: pathlib.Path, hf: Mapping[str, Any], quant_file: Mapping[str, Any] | None, headers: dict[str, Header]
) -> Scheme:
  """The scheme of a folder. Removes the tensors that are scales from `headers`.

  Args:
    hf: config.json.
    quant_file: hf_quant_config.json, or None.

  Raises:
    InputError: an algorithm that is not FP8; F8 without a scale; a scale without F8; a scale of an odd shape.
  """
  config = read_quantization(folder, hf, quant_file)
  weights = {}
  for name, header in headers.items():
    module, _, kind = name.rpartition(".")
    if header.dtype == FLOAT8 and kind == "weight" and _MODULE.fullmatch(module):
      weights[module] = _scale_beside(folder, module, header, headers)
  for name, header in headers.items():
    module, _, kind = name.rpartition(".")
    if kind in _WEIGHT_SCALES and module not in weights:
      weight = headers.get(f"{module}.weight")
      neighbour = f"{module}.weight, which is {_name(weight.dtype)}" if weight else f"no {module}.weight"
      raise InputError(
        f"readers: a scale must stand beside a float8 weight; {name} in {folder} stands beside {neighbour}. "
        "Fetch the checkpoint again."
      )
    if str(header.dtype).startswith("F8_"):
      raise InputError(
        f"readers: float8 weights must be F8_E4M3; {name} in {folder} is {header.dtype}. "
        "Pass the checkpoint that it was made from."
      )
  static, used = _static_scales(headers, weights)
  unset = _remove_unset(static, headers)
  for name in [scale for scale, _ in weights.values()] + used:
    headers.pop(name, None)
  notes = _disagreements(config, weights, static, headers)
  if unset:
    notes += (f"scales of keys and values that were never set (0 or -1) are ignored, such as {some_of(unset)}",)
  return Scheme(config.dialect if weights or config.names_scheme else "plain", weights, static, notes)


def _scale_beside(folder: pathlib.Path, module: str, weight: Header, headers: Mapping[str, Header]) -> tuple[str, str]:
  """Name and granularity of the scale of one float8 weight."""
  names = [f"{module}.{kind}" for kind in _WEIGHT_SCALES if f"{module}.{kind}" in headers]
  if len(names) != 1:
    state = "both are there" if names else "absent"
    raise InputError(
      f"readers: {module}.weight in {folder} is float8 and needs one scale, {module}.weight_scale or "
      f"{module}.weight_scale_inv; {state}. Fetch the whole checkpoint again."
    )
  (name,) = names
  shape, dtype = headers[name].shape, headers[name].dtype
  if not isinstance(dtype, np.dtype) or dtype == FLOAT8:
    raise InputError(
      f"readers: scales must be F32, F16, BF16 or F8_E8M0; {name} in {folder} is {_name(dtype)}. Fetch the checkpoint again."
    )
  if len(weight.shape) == 2:
    out, inside = weight.shape
    blocks = (-(-out // BLOCK), -(-inside // BLOCK))
    if shape in ((), (1,)) or (shape == (1, 1) and blocks != (1, 1)):
      return name, "tensor"
    if shape in ((out,), (out, 1)) and shape != blocks:
      return name, "channel"
    if shape in (blocks, (blocks[0], 1, blocks[1], 1)):
      # The scale of a weight within one block is of both kinds; its name tells the kind of the other scales.
      return name, "block128" if blocks != (1, 1) or len(shape) == 4 or name.endswith("_inv") else "tensor"
  raise InputError(
    f"readers: a scale must be one number, one a row or one a block of {BLOCK} x {BLOCK}; {name} in {folder} has shape "
    f"{list(shape)} beside {module}.weight of shape {list(weight.shape)}. jaxfp8 reads no other blocks."
  )


def _static_scales(headers: Mapping[str, Header], weights: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
  """(our name -> tensor, all tensors to remove): scales of inputs and of keys and values."""
  static, used = {}, []
  layers = {match[1] for name in headers if (match := re.match(r"(model\.layers\.\d+)\.", name))}
  for module in weights:
    for kind in _INPUT_SCALES:
      if f"{module}.{kind}" in headers:
        static.setdefault(f"{module}.input_scale", f"{module}.{kind}")
        used.append(f"{module}.{kind}")
  for layer in sorted(layers):
    for which, names in _KV_SCALES.items():
      tensors = [f"{layer}.self_attn.{name}" for name in names if f"{layer}.self_attn.{name}" in headers]
      if tensors:
        static[f"{layer}.self_attn.{which}_scale"] = tensors[0]
      used += tensors
    used += [f"{layer}.{name}" for name in _UNUSED if f"{layer}.{name}" in headers]
  return static, used


def _remove_unset(static: dict[str, str], headers: Mapping[str, Header]) -> list[str]:
  """Removes the KV scales of layers in which one is 0 or -1, as vLLM and AutoFP8 write a scale that was never set.

  Returns the tensors that are not set.
  """
  unset = []
  for name, tensor in list(static.items()):
    if not name.endswith(".input_scale") and isinstance(headers[tensor].dtype, np.dtype):
      values = read_tensor(tensor, headers[tensor]).astype(np.float32)
      if values.size and np.isin(values, (0, -1)).all():
        unset.append(tensor)
        for which in _KV_SCALES:
          static.pop(f"{name.rpartition('.')[0]}.{which}_scale", None)
  return list(dict.fromkeys(unset))


def _disagreements(config: QuantizationConfig, weights, static, headers: Mapping[str, Header]) -> tuple[str, ...]:
  """One sentence for each way in which config and tensors differ."""
  notes = list(config.notes)
  if not config.names_scheme:
    return ("the config names no quantization, and weights are float8",) if weights else ()
  plain = [name.removesuffix(".weight") for name in headers if name.endswith("_proj.weight")]
  plain = [module for module in plain if module not in weights and not config.ignores(module)]
  quantized = [module for module in weights if config.ignores(module)]
  if plain:
    notes.append(f"the config quantizes {some_of(plain)}, and the weights are not float8")
  if quantized:
    notes.append(f"the config leaves out {some_of(quantized)}, and the weights are float8")
  without = [module for module in weights if f"{module}.input_scale" not in static]
  if config.static and without:
    notes.append(f"the config says that inputs have static scales, and {some_of(without)} has none")
  if config.static is False and len(without) < len(weights):
    notes.append("the config says that inputs are scaled dynamically, and static scales are there")
  return tuple(notes)


def _name(dtype: np.dtype | str) -> str:
  return dtype if isinstance(dtype, str) else dtype.name
