"""The tokenizer of a Hugging Face folder: tokenizer.json, its special tokens and its chat template, as `TokenizerFiles`."""

import pathlib
from collections.abc import Mapping
from typing import Any

from jaxfp8.checkpoint.readers.json_file import as_list, parse_json, read_json
from jaxfp8.checkpoint.readers.source import read_text
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.errors import InputError

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def read_tokenizer(folder: pathlib.Path) -> TokenizerFiles:
  """Reads every file of the tokenizer once. Raises InputError if tokenizer.json is absent or not JSON."""
  path = folder / "tokenizer.json"
  if not path.exists():
    raise InputError(
      f"readers: text needs a tokenizer, and {folder} has no tokenizer.json. Fetch it with the checkpoint, or pass token ids."
    )
  settings = {}
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    if (folder / name).exists():
      settings |= read_json(folder / name)
  special = {}
  for name in _SPECIAL:
    token = settings.get(name)
    token = token.get("content") if isinstance(token, Mapping) else token
    if isinstance(token, str):
      special[name] = token
  text, add_bos = read_text(path), settings.get("add_bos_token")
  if not isinstance(add_bos, bool):
    add_bos = _post_processor_adds(parse_json(text, path).get("post_processor"), special.get("bos_token"))
  return TokenizerFiles(text, _chat_template(folder, settings), special, add_bos)


def _chat_template(folder: pathlib.Path, settings: Mapping[str, Any]) -> str | None:
  """chat_template.jinja, or else the text or the list of named texts in tokenizer_config.json."""
  if (folder / "chat_template.jinja").exists():
    return read_text(folder / "chat_template.jinja")
  template = settings.get("chat_template")
  if isinstance(template, list):
    named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
    template = named.get("default")
  return template if isinstance(template, str) else None


def _post_processor_adds(processor: Any, bos: str | None) -> bool:
  """Whether a tokenizer.json puts `bos` before the text: the first piece of a TemplateProcessing, perhaps in a Sequence."""
  if not isinstance(processor, Mapping) or bos is None:
    return False
  if processor.get("type") == "Sequence":
    return any(_post_processor_adds(inner, bos) for inner in as_list(processor.get("processors")))
  first = next(iter(as_list(processor.get("single"))), None)
  special = first.get("SpecialToken") if isinstance(first, Mapping) else None
  return isinstance(special, Mapping) and special.get("id") == bos
