"""Reads the JSON files of a checkpoint. Refuses to know what their fields mean."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

from jaxfp8.checkpoint.readers.file_kinds import describe
from jaxfp8.checkpoint.readers.source import read_text
from jaxfp8.errors import InputError, shown


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Raises InputError unless the file is a JSON object."""
  return parse_json(read_text(path), path)


def parse_json(text: str, path: pathlib.Path) -> dict[str, Any]:
  """Raises InputError unless the text is a JSON object, and for a key that stands twice in one object."""

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
      twice = first_twice(pairs)
      raise InputError(
        f"readers: a key may stand once in a JSON object; {path} has {shown(twice)} twice. Remove the wrong one."
      )
    return fields

  try:
    value = json.loads(text, object_pairs_hook=unique)
  except (ValueError, RecursionError) as error:
    kind = describe(path)
    reason = kind.sentence if kind.name in ("empty", "page") else f"{error}. Fetch the file again."
    raise InputError(f"readers: {path} is not valid JSON: {reason}") from error
  if not isinstance(value, dict):
    raise InputError(f"readers: {path} must hold a JSON object; got {type(value).__name__}. Fetch the file again.")
  return value


def first_twice(pairs: Iterable[tuple[str, Any]]) -> str:
  """The first key that stands there a second time."""
  seen: set[str] = set()
  return next(key for key, _ in pairs if key in seen or seen.add(key))


def as_list(value: Any) -> list[Any]:
  """A list as it is, nothing for None, and one entry for any other value."""
  return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
