"""The tokenizer of a Hugging Face folder: tokenizer.json, its special tokens and its chat template, as `TokenizerFiles`."""

import functools
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from jaxfp8 import regular_files
from jaxfp8.checkpoint.readers.json_file import as_list, parse_json, read_json
from jaxfp8.checkpoint.readers.source import read_text
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.errors import InputError, shown

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_TOKENIZER, _SETTINGS, _SPECIAL_MAP, _TEMPLATE = (
  "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
_OTHER_FORMS = ("tokenizer.model", "tekken.json", "vocab.json")  # from which transformers makes tokenizer.json
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
    changed = self._as_transformers_reads(text, document, special)
    text = text if changed is document else json.dumps(changed, ensure_ascii=False)
    return TokenizerFiles(text, self._chat_template(), special, document=changed)

  def _as_transformers_reads(self, text: str, document: dict[str, Any], special: Mapping[str, str]) -> dict[str, Any]:
    """tokenizer.json as transformers 5.24 uses it (its post-processor alone decides on BOS, whatever add_bos_token says).

    The special tokens that the other files name are special tokens. The classes LlamaTokenizer and CodeLlamaTokenizer take
    vocabulary, merges, special tokens and post-processor from the file, and the rest from their own code, unless the file is
    for byte-level BPE. (GPT2Tokenizer does the same, and so loses the cuts that SmolLM's file has; there the file is followed.)
    """
    document = _with_special(document, special.values())
    is_bpe = isinstance(model := document.get("model"), Mapping) and model.get("type") == "BPE"
    name = str(self._settings.get("tokenizer_class") or self._config_class).removesuffix("Fast")
    if name in ("LlamaTokenizer", "CodeLlamaTokenizer") and is_bpe and '"ByteLevel"' not in text:
      return _as_llama_tokenizer(document, self._settings, is_code=name != "LlamaTokenizer")
    return document

  @property
  def _config_class(self) -> Any:
    path = self.folder / "config.json"
    return read_json(path).get("tokenizer_class") if path.exists() else None

  def end_ids(self) -> tuple[int, ...]:
    """The ids of the EOS tokens that tokenizer_config.json and special_tokens_map.json name.

    Raises InputError as `files` does.
    """
    texts = (_special_token(fields, "eos_token", self.folder / name) for name, fields in self._named.items())
    ids = _ids(self._document[1])
    return tuple(dict.fromkeys(ids[text] for text in texts if text is not None and isinstance(ids.get(text), int)))

  @functools.cached_property
  def _document(self) -> tuple[str, dict[str, Any]]:
    """The text of tokenizer.json, and its content."""
    path = self.folder / _TOKENIZER
    if not path.exists():
      raise InputError(f"readers: text needs a tokenizer, and {self.folder} has {self._what_is_there()}, or pass token ids.")
    text = read_text(path, regular_files.TOKENIZER_BYTES)
    return text, parse_json(text, path)

  def _what_is_there(self) -> str:
    """What the folder has in the place of tokenizer.json, and what to do about it."""
    others = [name for name in _OTHER_FORMS if (self.folder / name).exists()]
    if not others:
      return "no tokenizer.json. Fetch it with the checkpoint"
    save = f"AutoTokenizer.from_pretrained({str(self.folder)!r}).save_pretrained({str(self.folder)!r})"
    return (
      f"{others[0]}, which is not read, and no tokenizer.json. Make it from that file with transformers and sentencepiece: "
      f'python -c "from transformers import AutoTokenizer; {save}"'
    )

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
      f'readers: {name} in {path} must be a text or an object with the text as "content"; got {shown(value)}. '
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


def _with_special(document: dict[str, Any], texts: Iterable[str]) -> dict[str, Any]:
  """The document with these texts among its special tokens, if its vocabulary has them."""
  added = as_list(document.get("added_tokens"))
  known, ids = [token.get("content") for token in added if isinstance(token, Mapping)], _ids(document)
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  more = [text for text in dict.fromkeys(texts) if isinstance(ids.get(text), int) and text not in known]
  tokens = [{"id": ids[text], "content": text, "special": True, **flags} for text in more]
  return {**document, "added_tokens": [*added, *tokens]} if more else document


def _as_llama_tokenizer(document: dict[str, Any], settings: Mapping[str, Any], is_code: bool) -> dict[str, Any]:
  """The document with the normalizer, the pre-tokenizer and the decoder of LlamaTokenizer or CodeLlamaTokenizer."""
  prefix = settings.get("add_prefix_space") is not False
  scheme = "never" if not prefix else "always" if settings.get("legacy") and not is_code else "first"
  back = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
  if prefix or is_code:
    back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
  model = {**document["model"], "dropout": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
  if not is_code:
    model["unk_token"] = None
  return {
    **document,
    "normalizer": None,
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
    "decoder": {"type": "Sequence", "decoders": back},
    "model": model,
  }
