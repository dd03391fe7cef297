"""What each field of jaxfp8.json may hold, and the files that a manifest may name. Nothing of a manifest is used before.

    data = parse(text)                ->  the JSON object
    check(data)                       ->  types of all fields

A fault is a ValueError, whose message is a clause without the folder: manifest.py makes a `DamagedCheckpoint` of it.
"""

import json
import pathlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jaxfp8.checkpoint.readers.fields import FLAG, OBJECT, TEXTS, Kind
from jaxfp8.checkpoint.readers.json_file import first_twice
from jaxfp8.errors import shown
from jaxfp8.recipe import Granularity

_MAX_DEPTH = 100  # of provenance, which is free JSON: commands print it
_MAX_SIZE = 1 << 62
_HEX = re.compile(r"[0-9a-f]+")
_STATIC = re.compile(r"model\.layers\.(\d{1,6})\.(self_attn\.[kv]_scale|(self_attn|mlp)\.[a-z]+_proj\.input_scale)")


def _is_map(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
  return lambda value: isinstance(value, Mapping) and all(map(holds, value.values()))


def _is_size(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_SIZE


def _is_sha256(value: Any) -> bool:
  return isinstance(value, str) and len(value) == 64 and _HEX.fullmatch(value) is not None


def _is_blocks(value: Any) -> bool:
  match value:
    case {"shape": list(shape), "xxh3_64": str(digests)}:
      return all(_is_size(size) and size > 0 for size in shape) and (not digests or _HEX.fullmatch(digests) is not None)
  return False


SUMS = Kind("an object of SHA-256 digests", _is_map(_is_sha256))
BLOCKS = Kind("an object of blocks with shape and digests", _is_map(_is_blocks))
_KINDS = {
  "format_version": Kind("a positive whole number", lambda value: _is_size(value) and value > 0),
  "sha256": Kind("a SHA-256 digest", _is_sha256),
  "config": OBJECT,
  "recipe": OBJECT,
  "formats": Kind("a list of objects", lambda value: isinstance(value, list) and all(map(OBJECT.holds, value))),
  "tokenizer": OBJECT,
  "exceptions": Kind("an object of channel and block128", _is_map(lambda v: v in (Granularity.CHANNEL, Granularity.BLOCK128))),
  "static_scales": TEXTS,
  "provenance": OBJECT,
  "files": Kind("an object of sizes in bytes", _is_map(_is_size)),
  "checksums": SUMS,
  "blocks": BLOCKS,
}
_TOKENIZER_KINDS = {
  "special_tokens": Kind("an object of texts", _is_map(lambda value: isinstance(value, str))),
  "add_bos": FLAG,
  "special_in_chats": FLAG,
}


def parse(text: str) -> Any:
  """The JSON value. Raises ValueError for text that is no JSON, and for a key that stands twice in an object."""

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
      raise ValueError(f"the key {shown(first_twice(pairs))} stands twice in an object")
    return fields

  return json.loads(text, object_pairs_hook=unique)


def check(data: Mapping[str, Any]) -> None:
  """Raises ValueError, naming the field, for a value of another type; null passes for a tokenizer alone."""
  for name, kind in _KINDS.items():
    if name in data and not kind.holds(data[name]) and not (name == "tokenizer" and data[name] is None):
      raise ValueError(f"{name} must be {kind.words}; got {shown(data[name])}")
  for field in ("files", "checksums", "blocks"):
    for name in data.get(field, {}):
      require_name(name)
  tokenizer = data.get("tokenizer") or {}
  for name, kind in _TOKENIZER_KINDS.items():
    if name in tokenizer and not kind.holds(tokenizer[name]):
      raise ValueError(f"tokenizer.{name} must be {kind.words}; got {shown(tokenizer[name])}")
  level = [data.get("provenance")]
  for _ in range(_MAX_DEPTH):
    level = [part for v in level for part in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
  if level:
    raise ValueError(f"provenance must be nested less than {_MAX_DEPTH} deep")


def check_layers(num_layers: int, formats: Collection[Any], static_scales: Collection[str]) -> None:
  """Raises ValueError unless there is a format for each layer, and every static scale is that of a layer."""
  if len(formats) != num_layers:
    raise ValueError(f"formats must have an entry for each of {num_layers} layers; got {len(formats)}")
  for name in static_scales:
    match = _STATIC.fullmatch(name)
    if not match or int(match[1]) >= num_layers:
      raise ValueError(f"static_scales must name scales of the {num_layers} layers; got {shown(name)}")


def require_name(name: str) -> None:
  """Raises ValueError for a name that leads out of a folder, or that no file can have."""
  pure = pathlib.PurePosixPath(name)
  if not pure.parts or "\0" in name or pure.is_absolute() or ".." in pure.parts or str(pure) != name:
    raise ValueError(f"files and arrays must be named by their paths in the folder; got {shown(name)}")
