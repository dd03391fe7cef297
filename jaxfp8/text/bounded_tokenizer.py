"""A `tokenizers.Tokenizer` that fails with one sentence, in bounded time and memory, whatever its file and its texts are.

    BoundedTokenizer(text of tokenizer.json).encode(text).ids, .decode(ids)

A short text is encoded in this process by a file whose parts are all known to be linear (tokenizer_outline.py). A long text,
and any text of another file, is encoded by a child process (tokenizer_child.py), which time and memory can end. Decoding is
linear by the rules of the outline, and happens here. A panic of Rust is an InputError everywhere.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from jaxfp8.child_process import Child
from jaxfp8.errors import InputError
from jaxfp8.regular_files import TOKENIZER_BYTES
from jaxfp8.text import tokenizer_outline
from jaxfp8.text.confined import Confined, Ended

_AT_ONCE = 1 << 19  # letters that are encoded in this process; they take 0.2 to 1 s
_SECONDS, _SECONDS_PER_MB = 10.0, 4.0  # of a child; ordinary text takes 1 to 2.5 s per MB on a slow core
_BYTES, _BYTES_PER_CHARACTER = 2 << 30, 512  # of a child; ordinary text takes 100 to 300 per character
_WAY_OUT = "Compare tokenizer.json with the published one."


@dataclasses.dataclass(frozen=True)
class Encoding:
  """What a child returns of a `tokenizers.Encoding`. offsets: empty unless asked for."""

  ids: list[int]
  offsets: list[tuple[int, int]]


class BoundedTokenizer:
  """One tokenizer.json. Thread safe, as the library is.

  document: the parsed text, where the caller has it. Raises InputError for a file that the library cannot read, and for one
  whose tokens or decoder have no bound.
  """

  def __init__(self, tokenizer_json: str, document: Mapping[str, Any] | None = None):
    if len(tokenizer_json) > TOKENIZER_BYTES:
      raise InputError(
        f"tokenizer: tokenizer.json may have {TOKENIZER_BYTES >> 20} MB; it has {len(tokenizer_json) >> 20}. {_WAY_OUT}"
      )
    if document is None:
      try:
        document = json.loads(tokenizer_json)
      except (ValueError, RecursionError) as error:
        raise InputError(f"tokenizer: tokenizer.json cannot be read: {error}. Fetch it again with the checkpoint.") from error
    outline = tokenizer_outline.outline(document if isinstance(document, Mapping) else {})
    self.chars_per_token = outline.chars_per_token
    self._json = tokenizer_json
    self._at_once = 0 if outline.growth is None else int(_AT_ONCE / outline.growth)
    self._child = Confined(Child.TOKENIZER, "tokenizer", first=lambda: {"tokenizer": self._json, **_limits(self._json)})
    if outline.added > self._at_once:  # the library normalizes added tokens while it loads
      self._ask("", {"text": "", "add_special_tokens": False, "with_offsets": False})
    with _LOADING:
      self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()

  def encode(self, text: str, add_special_tokens: bool = True, with_offsets: bool = False) -> "Encoding | tokenizers.Encoding":
    """As the library's. Raises InputError for lone surrogates, and if the library fails or exceeds its time or memory."""
    try:
      text.encode("utf-8")  # for a lone surrogate the library itself raises TypeError
    except UnicodeEncodeError as error:
      raise InputError(f"tokenizer: text must be Unicode; got {error.object[error.start]!r}. Decode it as UTF-8.") from error
    if len(text) <= self._at_once:
      with _ENCODING:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
    answer = self._ask(text, {"text": text, "add_special_tokens": add_special_tokens, "with_offsets": with_offsets})
    return Encoding(answer["ids"], [(first, last) for first, last in answer.get("offsets", ())])

  def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """As the library's, and at most `tokenizer_outline.LONGEST_TOKEN` times DECODER_GROWTH characters for a token."""
    with _DECODING:
      return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

  def normalized(self, text: str) -> str | None:
    """What the normalizer makes of a text; None for a text that this process does not encode."""
    if len(text) > self._at_once:
      return None
    with _ENCODING:
      normalizer = self._tokenizer.normalizer
      return text if normalizer is None else normalizer.normalize_str(text)

  def token_to_id(self, token: str) -> int | None:
    return self._tokenizer.token_to_id(token)

  def get_vocab_size(self) -> int:
    """With added tokens."""
    return self._tokenizer.get_vocab_size(with_added_tokens=True)

  def get_added_tokens_decoder(self) -> dict[int, tokenizers.AddedToken]:
    return self._tokenizer.get_added_tokens_decoder()

  def _ask(self, text: str, request: Mapping[str, Any]) -> dict[str, Any]:
    limits = _limits(text)
    try:
      answer = self._child.ask({**request, **limits})
    except Ended:
      raise InputError(
        f"tokenizer: a text of {len(text)} characters was not encoded within {limits['seconds']:.3g} s and "
        f"{limits['bytes'] / 1e9:.2g} GB. Shorten it, or compare tokenizer.json with the published one."
      ) from None
    if "error" in answer:
      raise InputError(f"tokenizer: tokenizer.json cannot be used: {_short(answer['error'])}. {_WAY_OUT}")
    return answer


def _limits(text: str) -> dict[str, float]:
  """Of a child's request about this text."""
  size = len(text)
  return {"seconds": _SECONDS + _SECONDS_PER_MB * size / 1e6, "bytes": _BYTES + _BYTES_PER_CHARACTER * size}


class _OneSentence:
  """The one place that knows how the library fails: with bare Exception, or with a panic, which is no Exception."""

  def __init__(self, what: str, way_out: str):
    self._what, self._way_out = what, way_out

  def __enter__(self) -> None:
    pass

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
    if kind is not None and (issubclass(kind, Exception) or kind.__name__ == "PanicException"):
      raise InputError(f"tokenizer: {self._what}: {_short(str(error))}. {self._way_out}") from error


_LOADING = _OneSentence("tokenizer.json cannot be read", "Fetch it again with the checkpoint.")
_ENCODING = _OneSentence("a text cannot be encoded", _WAY_OUT)
_DECODING = _OneSentence("tokens cannot be decoded", _WAY_OUT)


def _short(reason: str) -> str:
  return (" ".join(reason.split())[:200] or "no reason given").rstrip(".")
