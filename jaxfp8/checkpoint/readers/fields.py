"""The types of a file's fields, and the sentences that refuse a field. Used for JSON files and GGUF metadata alike.

A reader lists its fields in a table, name -> `Kind`, and calls `check_fields` once; behind it the values have those types.
A whole number is an int: 4096.0 is refused, as transformers 5 refuses it, and so are true and "4096". A number is an int or a
float that is finite. null counts as an absent field.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

from jaxfp8.errors import InputError, shown


@dataclasses.dataclass(frozen=True)
class Kind:
  """A type of a field: its name in a message, and the test of a value."""

  words: str
  holds: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  # A whole number above every float64 is no number that RoPE or a norm could take.
  return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_list(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
  return lambda value: isinstance(value, (list, tuple)) and all(map(holds, value))


def _is_id(value: Any) -> bool:
  return _is_whole(value) and value >= 0


COUNT = Kind("a positive whole number", lambda value: _is_whole(value) and 0 < value < 1 << 63)
COUNTS = Kind("a positive whole number, or one for each layer", lambda v: COUNT.holds(v) or _is_list(COUNT.holds)(v))
NUMBER = Kind("a number", _is_number)
POSITIVE = Kind("a positive number", lambda value: _is_number(value) and value > 0)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str))
TEXTS = Kind("a list of texts", _is_list(TEXT.holds))
OBJECT = Kind("an object", lambda value: isinstance(value, Mapping))
TOKEN_ID = Kind("a token id, a whole number", _is_id)
TOKEN_IDS = Kind("a token id, a whole number, or a list of ids", lambda value: _is_id(value) or _is_list(_is_id)(value))


def check_fields(fields: Mapping[str, Any], kinds: Mapping[str, Kind], where: object) -> None:
  """Raises InputError, naming the field and `where` (the file), for a value that is not of its kind; null and absent pass."""
  for name, kind in kinds.items():
    value = fields.get(name)
    if value is not None and not kind.holds(value):
      raise InputError(
        f"config: {name} in {where} must be {kind.words}; got {shown(value)}. Compare the file with the published one."
      )


def require(fields: Mapping[str, Any], names: tuple[str, ...], where: object, way_out: str) -> None:
  """Raises InputError, naming the fields that are absent or null."""
  missing = [name for name in names if fields.get(name) is None]
  if missing:
    raise InputError(f"config: {where} lacks {', '.join(map(repr, missing))}. {way_out}")


def refuse_model(feature: str, value: Any, where: object = "the config") -> InputError:
  """The error, for readers to raise, for a Llama with a feature that jaxfp8 does not compute, a key and its value."""
  return InputError(
    f"config: {feature} {shown(value)} in {where} changes what a Llama computes, and jaxfp8 does not compute that. "
    "Run this model with llama.cpp or vLLM, or pass a checkpoint without it."
  )


def refuse_architecture(key: str, value: Any, where: object) -> InputError:
  """The error, for readers to raise, for a model that is no Llama."""
  return InputError(
    f"config: {key} {shown(value)} in {where} is another model than a Llama, and jaxfp8 runs Llama models only. "
    "Run this one with llama.cpp or vLLM."
  )


def refuse_contradiction(first: tuple[str, Any], second: tuple[str, Any], where: object) -> InputError:
  """The error, for readers to raise, for two fields (name, value) that say different things of one fact."""
  return InputError(
    f"config: {first[0]} {shown(first[1])} and {second[0]} {shown(second[1])} in {where} contradict each other. "
    "Remove the wrong one; the published file has the right one."
  )
