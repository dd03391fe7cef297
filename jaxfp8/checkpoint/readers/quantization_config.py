"""The quantization that a folder's config.json and hf_quant_config.json name. Refuses to know the tensors.

Every key is read, or is known to change nothing, or is refused by name with its value: an unknown key whose value is neutral
(null, false, 0, empty) changes nothing. What is read is compared with what jaxfp8 computes: weights of 8 bits of type float,
symmetric, in blocks of 128 x 128, per row or per tensor, and inputs that are scaled per token, per 128 columns, or statically.
"""

import dataclasses
import fnmatch
import re
from collections.abc import Mapping
from typing import Any

from jaxfp8.checkpoint.readers.fields import (
  FLAG,
  OBJECT,
  POSITIVE,
  TEXT,
  TEXTS,
  check_fields,
  refuse_contradiction,
)
from jaxfp8.errors import InputError, shown
from jaxfp8.recipe import BLOCK

_METHODS = ("compressed-tensors", "modelopt", "fbgemm_fp8", "fp8", "quark")
_MODELOPT_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")
_IGNORE = ("ignore", "exclude_modules", "modules_to_not_convert", "ignored_layers", "exclude")
_E4M3 = ("e4m3", "fp8", "fp8_e4m3", "e4m3fn", "float8_e4m3fn")
_KINDS = {
  **dict.fromkeys(
    ("quant_method", "quant_algo", "activation_scheme", "format", "fmt", "scale_fmt", "kv_cache_quant_algo"), TEXT
  ),
  **dict.fromkeys(("config_groups", "transform_config", "sparsity_config"), OBJECT),
  **dict.fromkeys(_IGNORE, TEXTS),
  "activation_scale_ub": POSITIVE,
  "is_checkpoint_fp8_serialized": FLAG,
}
# Keys with any value: about the file's making, or about memory and speed, or in favour of what the tensors say.
_NO_ARITHMETIC = (
  *("version", "quantization_status", "global_compression_ratio", "producer", "dequantize", "modules_to_convert"),
  *("expert_dtype", "quant_mode", "target_device", "export", "is_checkpoint_fp8_serialized", "provider", "run_compressed"),
)
# Keys whose neutral values are these words, whatever their case; None is neutral for every key.
_WORDS = {
  "format": ("float-quantized", "naive-quantized", "mixed-precision", "dense"),
  "fmt": _E4M3,
  "qformat_weight": _E4M3,
  "weight_dtype": _E4M3,
  "kv_cache_quant_algo": ("fp8",),
  "activation_scheme": ("static", "dynamic"),
  "scale_fmt": ("float", "fp32", "float32"),
}
_ALTERNATIVES = {
  "scale_fmt": "jaxfp8's scales of activations are no powers of two. Remove scale_fmt from config.json if that will do"
}
_WEIGHT_STRATEGIES = (None, "tensor", "channel", "block")
_FUSED = ("weight_input", "weight_output")  # compressed-tensors' TransformLocation: multiplied into the stored weights


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
  """The statements of the config files.

  dialect: its name, for messages. names_scheme: whether the files name a quantization at all. ignore: the modules left out.
  static: whether inputs have static scales; None if the files do not say. notes: sentences about statements that differ.
  """

  dialect: str = "float8 tensors without a config"
  names_scheme: bool = False
  ignore: tuple[str, ...] = ()
  static: bool | None = None
  notes: tuple[str, ...] = ()

  def ignores(self, module: str) -> bool:
    return any(_names(entry, module) for entry in self.ignore)


def read_quantization(where: object, hf: Mapping[str, Any], quant_file: Mapping[str, Any] | None) -> QuantizationConfig:
  """From config.json and hf_quant_config.json (None if absent), in the folder `where`.

  Raises InputError, naming key and value, for a quantization that jaxfp8 does not compute and for contradictions.
  """
  scheme = _one_scheme(where, hf, quant_file)
  if not scheme:
    return QuantizationConfig()
  check_fields(scheme, _KINDS, f"the quantization_config of {where}")
  method = str(scheme.get("quant_method") or ("compressed-tensors" if "config_groups" in scheme else "unnamed"))
  algorithm = scheme.get("quant_algo")
  if algorithm and method == "modelopt" and algorithm.upper() not in _MODELOPT_ALGORITHMS:
    raise _refuse(where, f"quant_algo {shown(algorithm)}")
  if method not in _METHODS:
    raise _refuse(where, f"quant_method {shown(method)}")
  groups = _groups(where, scheme.get("config_groups") or {})
  for key, value in scheme.items():
    _check_key(where, method, key, value)
  lists = {key: scheme[key] for key in _IGNORE if scheme.get(key)}
  return QuantizationConfig(
    dialect=_dialect(method, scheme, algorithm),
    names_scheme=True,
    ignore=tuple(dict.fromkeys(entry for entries in lists.values() for entry in entries)),
    static=_static(method, scheme, groups),
    notes=tuple(_differing_lists(lists)),
  )


def _one_scheme(where: object, hf: Mapping[str, Any], quant_file: Mapping[str, Any] | None) -> dict[str, Any]:
  """The fields of all files. Raises InputError, naming both, for spellings that contradict each other."""
  schemes = {key: hf[key] for key in ("quantization_config", "compression_config") if hf.get(key)}
  for key, scheme in schemes.items():
    if not isinstance(scheme, Mapping):
      raise _refuse(where, f"{key} {shown(scheme)}")
  if len(schemes) == 2 and schemes["quantization_config"] != schemes["compression_config"]:
    first, second = schemes.items()
    raise refuse_contradiction(first, second, where)
  scheme = dict(next(iter(schemes.values()), {}))
  if quant_file is None:
    return scheme
  inner = quant_file.get("quantization") or {}
  if not isinstance(inner, Mapping):
    raise _refuse(where, f"quantization {shown(inner)} in hf_quant_config.json")
  inner = {"quant_method": "modelopt", **inner}
  for key in inner.keys() & scheme.keys():
    ours, theirs = scheme[key], inner[key]
    same = ours.lower() == theirs.lower() if isinstance(ours, str) and isinstance(theirs, str) else ours == theirs
    if key not in _IGNORE and None not in (ours, theirs) and not same:
      raise refuse_contradiction((f"{key} of config.json", ours), (f"{key} of hf_quant_config.json", theirs), where)
  return {**inner, **{key: value for key, value in scheme.items() if value is not None}}


def _differing_lists(lists: Mapping[str, list[str]]) -> list[str]:
  """The tensors decide which modules are float8; so lists of exceptions that differ are worth a note and no more."""
  (first, *others) = lists or ("",)
  differing = [key for key in others if set(lists[key]) != set(lists[first])]
  return [f"{first} and {key} of the config leave out different modules, and the tensors decide" for key in differing]


def _check_key(where: object, method: str, key: str, value: Any) -> None:
  """Raises InputError for a key at the top of the scheme that changes the arithmetic in a way that jaxfp8 does not compute."""
  checks = {
    "kv_cache_scheme": _is_fp8_cache,
    "transform_config": _is_fused,
    "sparsity_config": lambda v: (v.get("format") or "dense") == "dense",
    "weight_block_size": lambda v: list(v) == [BLOCK, BLOCK] if isinstance(v, (list, tuple)) else False,
    "activation_scale_ub": lambda v: method == "fbgemm_fp8",
    "group_size": lambda v: v in (-1, 0, BLOCK),
    **dict.fromkeys(("bits", "num_bits", "w_bit", "a_bit"), lambda v: v == 8),
    **dict.fromkeys(("global_quant_config", "layer_quant_config", "layer_type_quant_config"), _is_fp8_quark),
    "kv_cache_quant_config": _is_fp8_quark,
    **dict.fromkeys(("quant_method", "quant_algo", "config_groups", *_IGNORE, *_NO_ARITHMETIC), lambda v: True),
  }
  if value is None or (not value and key != "weight_block_size"):
    return
  if not (str(value).lower() in _WORDS[key] if key in _WORDS else key in checks and checks[key](value)):
    if key == "transform_config":
      value = sorted(set(re.findall(r"'location': ('\w+'|None)", repr(value)))) or value  # the rest is long
    raise _refuse(where, f"{key} {shown(value)}", _ALTERNATIVES.get(key))


def _groups(where: object, groups: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """compressed-tensors' config_groups. Raises InputError, naming group and field, for what jaxfp8 does not compute."""
  for name, group in groups.items():
    if not isinstance(group, Mapping):
      raise _refuse(where, f"config_groups.{name} {shown(group)}")
    place = f"config_groups.{name}"
    for key in ("weights", "input_activations", "output_activations"):
      if not isinstance(group.get(key) or {}, Mapping):
        raise _refuse(where, f"{place}.{key} {shown(group[key])}")
    weights, inputs, outputs = (group.get(key) or {} for key in ("weights", "input_activations", "output_activations"))
    if weights:
      _check_weights(where, f"{place}.weights", weights)
    if inputs:
      _check_inputs(where, f"{place}.input_activations", inputs, weights.get("strategy"))
    check_fields(group, {"targets": TEXTS}, f"{place} of {where}")
    keys_and_values = all(re.search(r"[kv]_proj", str(target)) for target in group.get("targets") or ("",))
    if outputs and not (keys_and_values and _is_fp8_cache(outputs)):  # old files state the KV cache's scales in this way
      raise _refuse(where, f"{place}.output_activations {shown(outputs)}")
    if not _is_float_format(group.get("format")):
      raise _refuse(where, f"{place}.format {shown(group['format'])}")
    others = set(group) - {"weights", "input_activations", "output_activations", "targets", "format"}
    for key in sorted(others):
      if group[key]:
        raise _refuse(where, f"{place}.{key} {shown(group[key])}")
  return list(groups.values())


def _is_float_format(value: Any) -> bool:
  return value is None or value in _WORDS["format"]


def _check_type(where: object, place: str, fields: Mapping[str, Any]) -> None:
  kind, bits = fields.get("type", "float"), fields.get("num_bits", 8)
  if (kind, bits) != ("float", 8):
    raise _refuse(where, f"{place} of {shown(bits)} bits and type {shown(kind)}")
  if fields.get("symmetric", True) is not True:
    raise _refuse(where, f"{place}.symmetric {shown(fields['symmetric'])}")
  if fields.get("actorder"):
    raise _refuse(where, f"{place}.actorder {shown(fields['actorder'])}")
  known = "type num_bits symmetric actorder dynamic strategy group_size block_structure observer observer_kwargs scale_dtype"
  for key in sorted(set(fields) - {*known.split(), "zp_dtype", "is_mse"}):
    if fields[key]:
      raise _refuse(where, f"{place}.{key} {shown(fields[key])}")


def _check_weights(where: object, place: str, weights: Mapping[str, Any]) -> None:
  _check_type(where, place, weights)
  if weights.get("dynamic"):
    raise _refuse(where, f"{place}.dynamic {shown(weights['dynamic'])}")
  if weights.get("strategy") not in _WEIGHT_STRATEGIES:
    raise _refuse(where, f"{place}.strategy {shown(weights['strategy'])}")
  if weights.get("group_size") not in (None, -1, 0) and weights.get("strategy") != "block":
    raise _refuse(where, f"{place}.group_size {shown(weights['group_size'])}")
  if weights.get("block_structure") not in (None, [], [BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"):
    raise _refuse(where, f"{place}.block_structure {shown(weights['block_structure'])}")


def _check_inputs(where: object, place: str, inputs: Mapping[str, Any], weights: Any) -> None:
  """What jaxfp8 computes: a static scale, or one a token, or for blocks one a token and 128 columns."""
  _check_type(where, place, inputs)
  dynamic, strategy, group_size = inputs.get("dynamic", False), inputs.get("strategy"), inputs.get("group_size")
  static = dynamic is False and strategy in (None, "tensor")
  per_token = dynamic is True and strategy in (None, "token") and weights != "block"
  per_group = dynamic is True and strategy == "group" and group_size == BLOCK and weights == "block"
  if not (static or per_token or per_group):
    raise _refuse(
      where, f"{place} with dynamic={shown(dynamic)}, strategy={shown(strategy)} and group_size={shown(group_size)}"
    )


def _is_fp8_cache(scheme: Any) -> bool:
  """AutoFP8 writes a word, the others the fields of compressed-tensors."""
  if not isinstance(scheme, Mapping):
    return str(scheme).lower() in ("static", "dynamic", "fp8", "fp8_e4m3")
  kind = (scheme.get("type", "float"), scheme.get("num_bits", 8), scheme.get("symmetric", True))
  return kind == ("float", 8, True) and scheme.get("strategy") in (None, "tensor", "attn_head")


def _is_fused(transforms: Any) -> bool:
  """Whether every Hadamard or rotation is multiplied into the stored weights, and none is computed on activations."""
  groups = transforms.get("config_groups") or {}
  if not isinstance(groups, Mapping) or any(value for key, value in transforms.items() if key != "config_groups"):
    return False
  applied = []
  for group in groups.values():
    listed = group.get("apply") if isinstance(group, Mapping) else None
    applied += listed if isinstance(listed, list) and listed else [None]
  return all(isinstance(apply, Mapping) and apply.get("location") in _FUSED for apply in applied)


def _is_fp8_quark(value: Any) -> bool:
  """AMD Quark's tables of tensors: every dtype in them is E4M3, and nothing but tensors is quantized."""
  if not isinstance(value, Mapping):
    return False
  for key, entry in value.items():
    if key == "dtype" and entry is not None and str(entry).lower() not in _E4M3:
      return False
    if isinstance(entry, Mapping) and not _is_fp8_quark(entry):
      return False
  return True


def _names(entry: str, module: str) -> bool:
  """Whether an entry of an ignore list names a module: by its name, a part of it, a wildcard, or `re:` and an expression."""
  if entry.startswith("re:"):
    try:
      return re.match(entry[3:], module) is not None
    except re.error:
      return False
  inside = entry == module or module.endswith("." + entry) or module.startswith(entry.rstrip(".") + ".")
  return inside or entry == "Linear" or ("*" in entry and fnmatch.fnmatchcase(module, entry))


def _dialect(method: str, scheme: Mapping[str, Any], algorithm: Any) -> str:
  if method == "modelopt":
    return f"modelopt {str(algorithm or 'FP8').upper()}"
  if method == "fp8":
    return "fp8 block128" if scheme.get("weight_block_size") else f"fp8 {scheme.get('activation_scheme', 'static')}"
  return method


def _static(method: str, scheme: Mapping[str, Any], groups: list[Mapping[str, Any]]) -> bool | None:
  """Whether the config says that inputs have static scales; None if it does not say."""
  if method == "fp8":
    return {"static": True, "dynamic": False}.get(str(scheme.get("activation_scheme")))
  if method == "fbgemm_fp8":
    return False
  inputs = [group.get("input_activations") for group in groups]
  if not inputs:
    return None
  return any(isinstance(entry, Mapping) and entry.get("dynamic") is False for entry in inputs)


def _refuse(where: object, scheme: str, alternative: str | None = None) -> InputError:
  return InputError(
    f"readers: quantized weights must be FP8 (compressed-tensors, ModelOpt, FBGEMM, AutoFP8 or blocks of 128) as jaxfp8 "
    f"computes it; {where} has {scheme}. {alternative or 'Pass an FP8 checkpoint, or the 16-bit one that it was made from'}."
  )
