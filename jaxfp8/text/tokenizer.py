"""Text to token ids and back, for one model: plain prompts, chats, and a stream that decodes token by token.

    TokenizerFiles -> Tokenizer.encode, chat -> ids -> Tokenizer.stream().push, decode -> text

Refuses to know the model, the engine and stop strings, which the engine handles.
"""

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxfp8.checkpoint.open import open_checkpoint
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.errors import InputError, shown
from jaxfp8.text.bounded_tokenizer import BoundedTokenizer
from jaxfp8.text.chat_template import ChatTemplate, not_plain
from jaxfp8.text.message_text import MessageText

_HALF = "�"  # the text of bytes that are not (yet) UTF-8
_MAX_HELD = 64  # tokens; a character takes at most four, so text that is undecodable after these stays undecodable


class Tokenizer:
  """The tokenizer of one model. Raises InputError as `BoundedTokenizer` does."""

  def __init__(self, files: TokenizerFiles):
    self._files = files
    self._tokenizer = BoundedTokenizer(files.tokenizer_json, files.document)
    self.bos_id = self._named_id("bos_token")
    self.eos_id = self._named_id("eos_token")
    self._special_ids = {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
    self._template = ChatTemplate(files.chat_template, files.special_tokens) if files.chat_template else None

  @classmethod
  def load(cls, path: str | os.PathLike | None = None) -> "Tokenizer":
    """The tokenizer of a checkpoint, Hugging Face folder or GGUF file; None is the default model.

    Raises InputError if the checkpoint has no tokenizer.
    """
    return cls(open_checkpoint(path).tokenizer)

  @property
  def vocab_size(self) -> int:
    """The number of ids that have a text. A model's V may be larger."""
    return self._tokenizer.get_vocab_size()

  @property
  def has_chat_template(self) -> bool:
    return self._template is not None

  @property
  def end_ids(self) -> tuple[int, ...]:
    """The ids that end a text: EOS, if the tokenizer names one."""
    return () if self.eos_id is None else (self.eos_id,)

  def special_id(self, text: str) -> int | None:
    """The id of the special token that is written exactly so, or None."""
    return self._special_ids.get(text)

  def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
    """The ids of a raw prompt, with the BOS or EOS that the tokenizer writes. Special tokens written in the text are tokens:
    whoever writes a raw prompt writes all of it.

    A text that begins with BOS's own text gets a second BOS, as in transformers and llama.cpp (`has_two_bos`). Raises
    InputError for text with lone surrogates, for text that cannot be encoded in bounded time and memory, and early for text
    that must have more than `max_tokens`; where that is not certain the caller counts the ids.
    """
    ids = self._encode(text, True, max_tokens)
    if self._files.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
      ids.insert(0, self.bos_id)
    return ids

  def has_two_bos(self, ids: Sequence[int]) -> bool:
    """Whether ids begin with BOS twice: then the prompt's text had one that the tokenizer writes already."""
    return self.bos_id is not None and list(ids[:2]) == [self.bos_id] * 2

  def chat(
    self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, max_tokens: int | None = None
  ) -> list[int]:
    """The ids of a conversation, [{"role": "user", "content": "..."}, ...], by the model's own template.

    BOS is present if the template writes it, as in transformers; of a GGUF file also if the file says so, as in llama.cpp.
    It is there once. Special tokens are those that the template writes: their text in a message is text (in transformers and
    llama.cpp it becomes tokens, with which a stranger's text could end a message and begin one in another's name).

    Raises InputError as `chat_text` does, as `encode` does, and for a template that computes with the text of a special token
    in a message. max_tokens: as for `encode`.
    """
    add_special = self._files.special_in_chats
    try:
      variants = self._messages.marked(messages)
    except RecursionError as error:
      raise not_plain(error) from error
    text, *rendered = self._require_template().render_all([messages, *variants], add_generation_prompt)
    ids = self._encode(text, add_special, max_tokens)
    if variants:
      ids = self._messages.encode(text, rendered, messages, add_special=add_special)
    while self.has_two_bos(ids):
      del ids[0]
    if self._files.special_in_chats and self.eos_id is not None and ids[-2:] == [self.eos_id] * 2:
      ids.pop()
    return ids

  def chat_text(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
    """The text that `chat` encodes. Raises InputError if the model has no template or the template fails.

    Encoded as a raw prompt it has other ids than `chat` where a message holds the text of a special token.
    """
    return self._require_template().render(messages, add_generation_prompt)

  @functools.cached_property
  def _messages(self) -> MessageText:
    """Made for the first chat: a raw prompt needs none of its tables."""
    return MessageText(self._tokenizer, self._files)

  def _require_template(self) -> ChatTemplate:
    if self._template is None:
      raise InputError("tokenizer: this model carries no chat template. Pass --raw, or a model tuned for chats.")
    return self._template

  def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
    """The text of ids. Omits special tokens unless `keep_special`, and always omits ids beyond the vocabulary."""
    return self._tokenizer.decode(list(ids), skip_special_tokens=not keep_special)

  def token_text(self, token_id: int) -> str:
    """The text of one token, special or not, for lists of log-probabilities. Part of a character shows as U+FFFD."""
    return self.decode([token_id], keep_special=True)

  def stream(self) -> "TextStream":
    return TextStream(self)

  def _encode(self, text: str, add_special: bool, max_tokens: int | None) -> list[int]:
    covers = self._tokenizer.chars_per_token
    if max_tokens is not None and covers is not None and len(text) > max_tokens * covers:
      raise InputError(
        f"tokenizer: the prompt has {len(text)} characters; the context holds {max_tokens} tokens, and a token of this model "
        f"has at most {covers} characters. Shorten it."
      )
    return self._tokenizer.encode(text, add_special_tokens=add_special).ids

  def _named_id(self, name: str) -> int | None:
    text = self._files.special_tokens.get(name)
    try:
      return None if text is None else self._tokenizer.token_to_id(text)
    except UnicodeEncodeError as error:
      raise InputError(f"tokenizer: {name} must be Unicode; got {shown(text)}. Fetch tokenizer_config.json again.") from error


class TextStream:
  """Token ids in, whole characters out: the joined results of `push` and `finish` equal `decode` of all ids.

  (Bytes that are not UTF-8 at all are an exception: a decoder may show them as more or fewer U+FFFD.)
  Each push decodes a window of the last tokens, because a token's text depends on its neighbours: the decoder drops a leading
  space at the start of a text, and one character may take four tokens. The window starts with a token whose text was returned.
  """

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._window: list[int] = []  # the ids of the last returned text, which are the context, and all later ids
    self._num_out = 0  # number of ids of the window whose text was returned in full
    self._text_out = 0  # number of characters of the window's text that were returned

  def push(self, token_id: int) -> str:
    """Adds a token and returns the characters that it completes: often a word, sometimes ""."""
    self._window.append(token_id)
    text = self._tokenizer.decode(self._window)
    held_too_long = len(self._window) - self._num_out > _MAX_HELD
    whole = text if held_too_long else text.rstrip(_HALF)
    new = whole[self._text_out :]
    if new:
      self._text_out += len(new)
      if whole == text:
        # The tokens of this text become the context of the next tokens. The previous context is no longer needed.
        self._window = self._window[self._num_out :]
        self._num_out = len(self._window)
        self._text_out = len(self._tokenizer.decode(self._window))
    elif held_too_long:
      del self._window[self._num_out :]  # special tokens, which have no text
    return new

  def finish(self) -> str:
    """Returns the text that was held back, which is characters that never became whole, and resets the stream."""
    new = self._tokenizer.decode(self._window)[self._text_out :]
    self._window, self._num_out, self._text_out = [], 0, 0
    return new
