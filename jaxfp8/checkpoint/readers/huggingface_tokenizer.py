"""The tokenizer of a Hugging Face folder: tokenizer.json, its special tokens and its chat template, as `TokenizerFiles`."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxfp8.checkpoint.readers.json_file import as_list, parse_json, read_json
from jaxfp8.checkpoint.readers.source import read_text
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.errors import InputError

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_TOKENIZER, _SETTINGS, _SPECIAL_MAP, _TEMPLATE = (
  "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
TEXT_FILES = (_TOKENIZER, _SETTINGS, _SPECIAL_MAP, _TEMPLATE)


class FolderTokenizer:
  """The files of a folder's tokenizer, each read once, when it is needed."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder

  @functools.cached_property
  def files(self) -> TokenizerFiles:
    """Raises InputError if tokenizer.json is absent or not JSON, or if a special token is no text."""
    text, document = self._document
    special = self._special
    add_bos = self._settings.get("add_bos_token")
    if not isinstance(add_bos, bool):
      add_bos = _post_processor_adds(document.get("post_processor"), special.get("bos_token"))
    return TokenizerFiles(text, self._chat_template(), special, add_bos)

  def end_ids(self) -> tuple[int, ...]:
    """The ids of the EOS tokens that tokenizer_config.json and special_tokens_map.json name.

    Raises InputError as `files` does.
    """
    texts = (_special_token(fields, "eos_token", self.folder / name) for name, fields in self._named.items())
    ids = _ids(self._document[1])
    return tuple(dict.fromkeys(ids[text] for text in texts if text in ids))

  @functools.cached_property
  def _document(self) -> tuple[str, dict[str, Any]]:
    """The text of tokenizer.json, and its content."""
    path = self.folder / _TOKENIZER
    if not path.exists():
      raise InputError(
        f"readers: text needs a tokenizer, and {self.folder} has no tokenizer.json. Fetch it with the checkpoint, "
        "or pass token ids."
      )
    text = read_text(path)
    return text, parse_json(text, path)

  @functools.cached_property
  def _named(self) -> dict[str, dict[str, Any]]:
    """The content of the files that name special tokens, by the file's name; the last to name a token is right."""
    named = {name: read_json(self.folder / name) for name in (_SETTINGS, _SPECIAL_MAP) if (self.folder / name).exists()}
    if "added_tokens_decoder" in named.get(_SETTINGS, {}):  # then transformers ignores special_tokens_map.json
      named = dict(reversed(named.items()))
    return named

  @property
  def _settings(self) -> dict[str, Any]:
    return self._named.get(_SETTINGS, {})

  @property
  def _special(self) -> dict[str, str]:
    special = {}
    for name in _SPECIAL:
      for file, fields in self._named.items():
        if (text := _special_token(fields, name, self.folder / file)) is not None:
          special[name] = text
    return special

  def _chat_template(self) -> str | None:
    """chat_template.jinja, or else the text or the list of named texts in tokenizer_config.json."""
    if (self.folder / _TEMPLATE).exists():
      return read_text(self.folder / _TEMPLATE)
    template = self._settings.get("chat_template")
    if isinstance(template, list):
      named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
      template = named.get("default")
    return template if isinstance(template, str) else None


def _special_token(fields: Mapping[str, Any], name: str, path: pathlib.Path) -> str | None:
  """The text of a special token, written as a text or as an object with `content`; None for null or an absent field."""
  value = fields.get(name)
  text = value.get("content") if isinstance(value, Mapping) else value
  if not (isinstance(text, str) or value is None):
    raise InputError(
      f'readers: {name} in {path} must be a text or an object with the text as "content"; got {value!r}. '
      "Compare the file with the published one."
    )
  return text


def _ids(document: Mapping[str, Any]) -> dict[str, int]:
  """The id of each token of a tokenizer.json. Lenient: the tokenizers library judges the document."""
  model = document.get("model")
  vocab = model.get("vocab") if isinstance(model, Mapping) else None
  ids = dict(vocab) if isinstance(vocab, Mapping) else {}
  for token in as_list(document.get("added_tokens")):
    if isinstance(token, Mapping) and isinstance(token.get("content"), str) and isinstance(token.get("id"), int):
      ids[token["content"]] = token["id"]
  return ids


def _post_processor_adds(processor: Any, bos: str | None) -> bool:
  """Whether a tokenizer.json puts `bos` before the text: the first piece of a TemplateProcessing, perhaps in a Sequence."""
  if not isinstance(processor, Mapping) or bos is None:
    return False
  if processor.get("type") == "Sequence":
    return any(_post_processor_adds(inner, bos) for inner in as_list(processor.get("processors")))
  first = next(iter(as_list(processor.get("single"))), None)
  special = first.get("SpecialToken") if isinstance(first, Mapping) else None
  return isinstance(special, Mapping) and special.get("id") == bos
