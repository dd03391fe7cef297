"""Reads the JSON files of a checkpoint, and the token ids in them. Refuses to know what other fields mean."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxfp8.checkpoint.readers.source import read_text
from jaxfp8.errors import InputError


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Raises InputError unless the file is a JSON object."""
  return parse_json(read_text(path), path)


def parse_json(text: str, path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise InputError(f"readers: {path} is not valid JSON: {error}. Fetch the file again.") from error
  if not isinstance(value, dict):
    raise InputError(f"readers: {path} must hold a JSON object; got {type(value).__name__}. Fetch the file again.")
  return value


def token_ids(fields: Mapping[str, Any], name: str, path: pathlib.Path) -> tuple[int, ...]:
  """The ids in `fields[name]`, each once: none for null or an absent field, one for a number, or those of a list of numbers.

  Raises InputError, naming field and file, for any other value.
  """
  ids = as_list(fields.get(name))
  for token in ids:
    if not isinstance(token, int) or isinstance(token, bool) or token < 0:
      raise InputError(
        f"config: {name} in {path} must be a token id, a whole number, or a list of ids; got {fields[name]!r}. "
        "Compare the file with the published one."
      )
  return tuple(dict.fromkeys(ids))


def as_list(value: Any) -> list[Any]:
  """A list as it is, nothing for None, and one entry for any other value."""
  return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
