"""The record of a checkpoint's tokenizer: readers make it, checkpoints store it, `Tokenizer` uses it."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
  """A tokenizer in the `tokenizer.json` format of Hugging Face tokenizers, with its chat template and special tokens.

  tokenizer_json: the file's text.
  chat_template: a Jinja template over `messages`, or None for a model without one.
  special_tokens: texts that templates refer to by name, such as {"bos_token": "<s>"}.
  add_bos: whether a raw prompt gets a BOS token that tokenizer.json does not write; of checkpoints that an older jaxfp8 wrote.
  special_in_chats: whether tokenizer.json's post-processor acts on chats too, as llama.cpp does with a GGUF file. If not, a
    chat has the special tokens that its template writes, as in transformers.
  document: tokenizer_json, parsed, of a reader that has parsed it. Nothing stores it.
  """

  tokenizer_json: str
  chat_template: str | None = None
  special_tokens: dict[str, str] = dataclasses.field(default_factory=dict)
  add_bos: bool = False
  special_in_chats: bool = False
  document: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False, repr=False)
