"""RoPE in a config.json, as a `RopeConfig`: `rope_parameters` of transformers 5, `rope_scaling` and `rope_theta` of 4.

Files of both times may hold all three fields. Two fields that say different things are refused, since transformers' versions
differ in which one they take.
"""

from collections.abc import Mapping
from typing import Any

from jaxfp8.checkpoint.readers.fields import (
  FLAG,
  NUMBER,
  POSITIVE,
  TEXT,
  check_fields,
  refuse_contradiction,
  refuse_model,
)
from jaxfp8.config import ROPE_TYPES, RopeConfig
from jaxfp8.errors import InputError, shown

_KINDS = {
  **dict.fromkeys(("rope_type", "type"), TEXT),
  **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor"), POSITIVE),
  **dict.fromkeys(("original_max_position_embeddings", "beta_fast", "beta_slow"), NUMBER),
  **dict.fromkeys(("finetuned", "truncate"), FLAG),
}
_UNUSED_BY_DEFAULT = ("attention_factor", "mscale", "mscale_all_dim", "short_factor", "long_factor")
_FORMULA = {
  "factor": "factor",
  "low_freq_factor": "low_freq_factor",
  "high_freq_factor": "high_freq_factor",
  "original_max_position_embeddings": "original_max_context",
}
_NEEDS = {"default": (), "linear": ("factor",), "llama3": tuple(_FORMULA)}


def rope_from_hf(hf: Mapping[str, Any], where: object) -> RopeConfig:
  """Raises InputError, naming the field and `where`, for types and keys that jaxfp8 does not compute and for contradictions."""
  spellings = {name: hf[name] for name in ("rope_parameters", "rope_scaling") if hf.get(name)}
  for name, fields in spellings.items():
    _check(name, fields, where)
  theta = _agreed("rope_theta", {"rope_theta": hf.get("rope_theta")}, spellings, where)
  partial = _agreed("partial_rotary_factor", {"partial_rotary_factor": hf.get("partial_rotary_factor")}, spellings, where)
  if partial not in (None, 1):
    raise refuse_model("partial_rotary_factor", partial, where)
  ropes = {name: _formula(name, fields, float(theta or 10000.0), where) for name, fields in spellings.items()}
  if len(set(ropes.values())) > 1:
    first, second = spellings.items()
    raise refuse_contradiction(first, second, where)
  return next(iter(ropes.values()), RopeConfig(theta=float(theta or 10000.0)))


def _check(name: str, fields: Mapping[str, Any], where: object) -> None:
  """One dictionary by itself: the types of its fields, its rope type, and keys that no rope type of jaxfp8 reads."""
  inside = f"{name} in {where}"
  if any(isinstance(value, Mapping) for value in fields.values()):
    raise refuse_model(f"{name} with one dictionary for each type of layer", fields, where)
  check_fields(fields, _KINDS, inside)
  named, old = fields.get("rope_type"), fields.get("type")
  if None not in (named, old) and named != old:
    raise refuse_contradiction(("rope_type", named), ("type", old), inside)
  if (named or old or "default") not in ROPE_TYPES:
    raise refuse_model("rope type", named or old, inside)
  if not (named or old) and fields.get("factor", 1) != 1:
    raise refuse_model("factor without a rope_type,", fields["factor"], inside)
  for key, value in fields.items():
    neutral = not value or (value == 1 and value is not True) or (named == "default" and key in _UNUSED_BY_DEFAULT)
    if key not in _KINDS and not neutral:
      raise refuse_model(key, value, inside)


def _agreed(key: str, top: Mapping[str, Any], spellings: Mapping[str, Mapping[str, Any]], where: object) -> Any:
  """The one value of a key that may stand in several places; None if it stands nowhere."""
  found = {**top, **{f"{name}.{key}": fields.get(key) for name, fields in spellings.items()}}
  given = [(place, value) for place, value in found.items() if value is not None]
  for place in given[1:]:
    if place[1] != given[0][1]:
      raise refuse_contradiction(given[0], place, where)
  return given[0][1] if given else None


def _formula(name: str, fields: Mapping[str, Any], theta: float, where: object) -> RopeConfig:
  rope_type = fields.get("rope_type") or fields.get("type") or "default"
  needs = _NEEDS[rope_type]
  missing = [key for key in needs if fields.get(key) is None]
  if missing:
    raise InputError(
      f"config: rope type {shown(rope_type)} needs {', '.join(missing)} in {name} of {where}, and it is absent. "
      "Compare the file with the published one."
    )
  return RopeConfig(theta=theta, type=rope_type, **{_FORMULA[key]: fields[key] for key in needs})
