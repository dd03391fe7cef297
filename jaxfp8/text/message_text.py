"""Keeps the text of messages apart from the special tokens that a chat template writes around it.

    variants = guard.marked(messages)           the messages with marks around whatever could pass for a special token
    guard.encode(text, rendered, ...)           ids: special tokens are those of the template, and messages are plain text

A template computes with messages (trims, compares, splits), so marks can change what it writes. The text without marks is
rendered too, therefore: marks count only if the text with them is the same text. They say which places came from a message.
Special tokens of the template then get secret names, and a second tokenizer knows special tokens by these names alone: to it,
"<|eot_id|>" in a message is text like any other, cut and merged as if it were no token. Refuses to know templates and models.
"""

import bisect
import functools
import itertools
import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.errors import InputError
from jaxfp8.text.bounded_tokenizer import BoundedTokenizer

Messages = Sequence[Mapping[str, Any]]

# Characters of which a text has none, as a rule: noncharacters, then private ones.
_MARKS = (*range(0xFDD0, 0xFDF0), *range(0x100000, 0x10FFFE))
_MAX_SPECIAL = 512  # characters; a message is searched for each special token at each place
_TAG = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")


class MessageText:
  """Encodes chats of one tokenizer and one template.

  Tokens that no message can make: those that tokenizer.json calls special, those that tokenizer_config.json names (eos_token
  among them), and other added tokens in the form of a tag (`<...>`, `[...]`) that the template's source holds, since some
  models' roles are such tokens.
  """

  def __init__(self, tokenizer: BoundedTokenizer, files: TokenizerFiles):
    self._tokenizer, self._json, self._template = tokenizer, files.tokenizer_json, files.chat_template or ""
    added, named = tokenizer.get_added_tokens_decoder(), set(files.special_tokens.values())

    def is_own(token) -> bool:
      text = token.content
      return token.special or text in named or bool(_TAG.fullmatch(text) and text in self._template)

    self._ids = {token.content: i for i, token in added.items() if token.content and is_own(token)}
    normalized = [token.content for token in added.values() if token.normalized and token.content in self._ids]
    self._normalized = [tokenizer.normalized(text) or text for text in normalized]
    folded = [text.casefold() for text in self._ids]
    self._folded = frozenset(folded)
    self._sizes = sorted({len(text) for text in folded}, reverse=True)
    self._first = re.compile(f"[{re.escape(''.join({text[0] for text in folded}))}]" if folded else "(?!)")
    self._longest = max(self._sizes, default=0)
    self._starts, self._ends = sorted(folded), sorted(text[::-1] for text in folded)
    self._names = {text: f"{chr(_MARKS[0])}{secrets.token_hex(8)}{text}" for text in self._ids}

  def marked(self, messages: Messages) -> list[Any]:
    """The messages with marks, the most marks first; empty if no text of theirs could be, or be part of, a special token."""
    texts: list[tuple[str, str]] = []
    _map(messages, lambda text, key: texts.append((text, key)) or text)
    if not any(self._holds(text) or self._may_join(text, key) for text, key in texts):
      return []
    if self._longest > _MAX_SPECIAL:
      raise _unusable(f"a special token has {self._longest:,} characters, and {_MAX_SPECIAL} are the most")
    start, stop = _marks([self._template, *(text for text, _ in texts)])

    def mark_whole(text: str, _: str) -> str:
      spans = list(self._spans(text))
      if not spans and self._holds(text):  # normalized, it has one
        spans = [(len(text) - len(text.lstrip()), len(text.rstrip()))]
      ends = [0, *(last for _, last in spans)]
      marked = (f"{text[end:first]}{start}{text[first:last]}{stop}" for end, (first, last) in zip(ends, spans, strict=False))
      return "".join(marked) + text[ends[-1] :]

    def mark_ends(text: str, key: str) -> str:
      inner = text.strip()
      if not inner or not (self._holds(text) or self._may_join(text, key)):
        return text
      before, after = text[: text.index(inner)], text[text.index(inner) + len(inner) :]
      return f"{before}{start}{mark_whole(inner, key)}{stop}{after}"

    return [_map(messages, mark_ends), _map(messages, mark_whole)]

  def encode(self, text: str, rendered: Sequence[str | None], messages: Messages, *, add_special: bool) -> list[int]:
    """The ids of a chat whose messages had something to mark.

    Args:
      text: the template's text of the messages as they are.
      rendered: that of each variant of `marked`; None if the template raised.
      add_special: whether the post-processor of tokenizer.json adds its tokens.

    Raises InputError if the template computes with the text of a special token itself, so that no marks are possible.
    """
    texts: list[str] = []
    _map(messages, lambda part, _: texts.append(part) or part)
    start, stop = _marks([self._template, *texts])
    for variant in rendered:
      if variant is not None and (marks := _places(variant, start, stop, text)) is not None:
        return self._renamed.encode(self._with_names(text, marks), add_special_tokens=add_special).ids
    found = next((part[first:last] for part in texts for first, last in self._spans(part)), "")
    raise InputError(
      f"chat: a message holds {found!r}, the text of a special token, and the model's chat template computes with that text, "
      "so the message cannot be told from the template's own tokens. Leave that text out of the message, or pass --raw."
    )

  def _holds(self, text: str) -> bool:
    if next(self._spans(text), None):
      return True
    normalized = self._tokenizer.normalized(text) if self._normalized else ""
    return normalized is None or any(token in normalized for token in self._normalized)

  def _spans(self, text: str) -> Iterator[tuple[int, int]]:
    """(first, last) of the special tokens in a text, the longest at each place, in any case: a template may change the case."""
    folded = text.casefold()
    origins = range(len(text)) if len(folded) == len(text) else [i for i, letter in enumerate(text) for _ in letter.casefold()]
    end = 0
    for match in self._first.finditer(folded):
      if (place := match.start()) >= end:
        found = next((part for size in self._sizes if (part := folded[place : place + size]) in self._folded), "")
        if found:
          yield origins[place], origins[(end := place + len(found)) - 1] + 1

  def _may_join(self, text: str, key: str) -> bool:
    """Whether the text could become a special token together with its neighbours, which a role may: `<|user|>`."""
    inner = text.strip().casefold()
    if key == "role" or not inner:
      return False
    sizes = range(1, min(len(inner), self._longest) + 1)
    return any(_begins_one(self._starts, inner[-size:]) or _begins_one(self._ends, inner[:size][::-1]) for size in sizes) or (
      len(inner) < self._longest and any(inner in token for token in self._folded)
    )

  def _with_names(self, text: str, marks: Sequence[tuple[int, bool]]) -> str:
    """The text with the secret names of the special tokens that the template wrote: no mark is in them or around them."""
    of_messages = [(i, j) for (i, opens), (j, also) in itertools.pairwise(marks) if opens and not also]
    names = {self._ids[token]: name for token, name in self._names.items()}
    plain = self._tokenizer.encode(text, add_special_tokens=False, with_offsets=True)
    places = [place for place, _ in marks]  # in order, and so are the texts of messages, which do not overlap
    starts = [start for start, _ in of_messages]
    pieces, end = [], 0
    for token_id, (first, last) in zip(plain.ids, plain.offsets, strict=True):
      if token_id not in names or first < end:
        continue
      inner = text[first:last].strip() or text[first:last]
      first += text[first:last].index(inner)
      last = first + len(inner)
      is_cut = bisect.bisect_right(places, first) < bisect.bisect_left(places, last)
      message = bisect.bisect_left(starts, last) - 1
      if not is_cut and not (message >= 0 and first < of_messages[message][1]):
        pieces += [text[end:first], names[token_id]]
        end = last
    return "".join([*pieces, text[end:]])

  @functools.cached_property
  def _renamed(self) -> BoundedTokenizer:
    """The tokenizer with the special tokens under their secret names, and with the same ids."""
    document = json.loads(self._json)
    for token in document["added_tokens"]:
      token["content"] = self._names.get(token["content"], token["content"])
    _rename_in_model(document["model"], self._ids, self._names)
    try:
      renamed = BoundedTokenizer(json.dumps(document), document)
    except InputError as error:
      raise _unusable(str(error).removesuffix(".")) from error
    for i, token in self._tokenizer.get_added_tokens_decoder().items():
      if renamed.token_to_id(self._names.get(token.content, token.content)) != i:
        raise _unusable(f"the token {token.content!r} has no place of its own")
    return renamed


def _begins_one(texts: Sequence[str], start: str) -> bool:
  """Whether one of these sorted texts is longer and begins so."""
  place = bisect.bisect_right(texts, start)
  return place < len(texts) and texts[place].startswith(start)


def _rename_in_model(model: dict[str, Any], ids: Mapping[str, int], names: Mapping[str, str]) -> None:
  """Renames the tokens in a model's vocabulary too, which finds whole words there. Those that merges make keep both names."""
  if model.get("unk_token") in names:
    model["unk_token"] = names[model["unk_token"]]
  vocab = model.get("vocab")
  if isinstance(vocab, dict):
    merges = (merge if isinstance(merge, list) else merge.split(" ") for merge in model.get("merges") or ())
    merged = {part for merge in merges for part in (*merge, "".join(merge))} & ids.keys()
    for token, i in ids.items():
      if token not in merged:
        vocab.pop(token, None)
      vocab[names[token]] = i
  elif isinstance(vocab, list):
    for entry in vocab:
      entry[0] = names.get(entry[0], entry[0])


def _map(value: Any, change: Callable[[str, str], str], key: str = "") -> Any:
  """The value with every text in it changed; `change` gets a text and the key that it stands under.

  Keys are texts too, of arguments of tools say, unless they are names, by which templates find values.
  """
  if isinstance(value, str):
    return change(value, key)
  if isinstance(value, Mapping):
    is_name = {key: not isinstance(key, str) or key.isidentifier() for key in value}
    return {k if is_name[k] else change(k, ""): _map(part, change, str(k)) for k, part in value.items()}
  if isinstance(value, (list, tuple)):
    return [_map(part, change, key) for part in value]
  return value


def _marks(texts: Sequence[str]) -> tuple[str, str]:
  """Two characters that are in none of the texts, to begin and to end a mark."""
  text = "".join(texts)
  used = set(text)
  free = (chr(code) for code in _MARKS if chr(code) not in used and f"\\u{code:04x}" not in text)
  try:
    return next(free), next(free)
  except StopIteration:
    raise InputError("chat: the messages use every private character of Unicode. Leave some out.") from None


def _places(variant: str, start: str, stop: str, text: str) -> list[tuple[int, bool]] | None:
  """(place in `text`, whether it begins) of every mark; None if the text without the marks is another one."""
  for mark in (start, stop):
    variant = variant.replace(json.dumps(mark)[1:-1], mark)  # of a filter that writes JSON in ASCII
  marks, place = [], 0
  for piece in re.split(f"([{start}{stop}])", variant):
    if piece in (start, stop):
      marks.append((place, piece == start))
    else:
      place += len(piece)
  return marks if variant.replace(start, "").replace(stop, "") == text else None


def _unusable(reason: str) -> InputError:
  return InputError(
    f"chat: a message holds the text of a special token, and this tokenizer.json cannot keep it as text: {reason}. "
    "Leave that text out of the message."
  )
