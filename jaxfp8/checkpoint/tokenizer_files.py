"""What a checkpoint carries about text: one record, written by readers, stored by checkpoints, used by the tokenizer."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
  """A tokenizer in the `tokenizer.json` format of Hugging Face tokenizers, and what stands beside it.

  tokenizer_json: the file's text.
  chat_template: a Jinja template over `messages`, or None for a model without one.
  special_tokens: texts that templates refer to by name, such as {"bos_token": "<s>"}.
  add_bos: whether encoding a raw prompt puts the BOS token first.
  """

  tokenizer_json: str
  chat_template: str | None = None
  special_tokens: dict[str, str] = dataclasses.field(default_factory=dict)
  add_bos: bool = False
