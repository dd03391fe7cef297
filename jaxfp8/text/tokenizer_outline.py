"""What a tokenizer.json could do to time and memory, read from its parts before the library runs any of them.

    outline(document) -> Outline, or InputError for a file whose answers have no bound

A stranger's file can turn one character into gigabytes, and its patterns can take hours. Parts whose cost is known to be
linear are listed here. A file with other parts works too: another process runs it, with limits (bounded_tokenizer.py).
Refuses to know the library.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxfp8.checkpoint.readers.gguf_cuts import CUTS, QUADRATIC_CUTS
from jaxfp8.checkpoint.readers.json_file import as_list
from jaxfp8.errors import InputError

LONGEST_TOKEN = 1 << 14  # characters; the longest tokens of published vocabularies have 128 to 512
DECODER_GROWTH = 16  # characters of text per character of a token
_MAX_STEPS = 16  # parts of a sequence
_MAX_ADDED_IDS = 1024  # that a post-processor writes around a text
_MAX_COMPOSED = 4  # characters that NFC joins to one
_WAY_OUT = "Compare tokenizer.json with the published one."

_END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(short: str, digits: str) -> str:
  """The cut of o200k (GPT-4o, Llama 4) and of Tekken (Mistral Nemo), as their tokenizer.json has it."""
  sign = r"[^\r\n\p{L}\p{N}]?"
  words = f"{sign}{_UPPER}*{_LOWER}+{short}|{sign}{_UPPER}+{_LOWER}*{short}"
  return words + f"|{digits}" + r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _END


# Patterns whose time is linear in the text; a test measures them.
LINEAR_CUTS = frozenset(
  (
    *({cut for cuts in CUTS.values() for cut in cuts} - QUADRATIC_CUTS),
    *(
      _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _END  # of Llama 3 and of Qwen 2
      for digits in (r"\p{N}{1,3}", r"\p{N}")
    ),
    _cased(_SHORT + "?", r"\p{N}{1,3}"),
    _cased("", r"\p{N}"),
  )
)


@dataclasses.dataclass(frozen=True)
class Outline:
  """The bounds of one tokenizer.json.

  growth: letters that the model sees per character of a text, at most; None if a part is not known to be linear.
  chars_per_token: characters of a text that one token covers, at most; None if some characters cost no token.
  added: characters of all added tokens, which the library searches for together.
  """

  growth: float | None
  chars_per_token: int | None
  added: int


def outline(document: Mapping[str, Any]) -> Outline:
  """Lenient: the library judges what is no tokenizer.json. Raises InputError if tokens or decoder have no bound."""
  model = document.get("model")
  model = model if isinstance(model, Mapping) else {}
  added = [token for token in as_list(document.get("added_tokens")) if isinstance(token, Mapping)]
  contents = [content for token in added if isinstance(content := token.get("content"), str)]
  vocab = model.get("vocab")
  longest = max((token for token in (*_tokens(vocab), *contents)), key=len, default="")
  if len(longest) > LONGEST_TOKEN:
    raise InputError(
      f"tokenizer: a token may have at most {LONGEST_TOKEN} characters, because it becomes text that often; tokenizer.json has "
      f"one of {len(longest)}, {longest[:20]!r}... {_WAY_OUT}"
    )
  _check_decoder(document.get("decoder"))
  before = [*_steps(document.get("normalizer"), "normalizers"), *_steps(document.get("pre_tokenizer"), "pretokenizers")]
  growth: float | None = math.prod(map(_growth, before)) if len(before) <= _MAX_STEPS else math.inf
  if not (_is_plain_bpe(model) and _is_short(document.get("post_processor"))):
    growth = None
  covers = all(map(_keeps_all, before)) and not any(token.get("lstrip") or token.get("rstrip") for token in added)
  covers = covers and _has_all_bytes(vocab, before, bool(model.get("byte_fallback")))
  composed = _MAX_COMPOSED if any(step.get("type") in ("NFC", "NFKC") for step in before) else 1
  return Outline(
    growth=growth if growth is not None and math.isfinite(growth) else None,
    chars_per_token=len(longest) * composed if covers else None,
    added=sum(map(len, contents)),
  )


def _tokens(vocab: Any) -> Iterable[str]:
  """Those of BPE's dict, or of Unigram's list of pairs."""
  if isinstance(vocab, Mapping):
    return vocab
  return (entry[0] for entry in as_list(vocab) if isinstance(entry, list) and entry and isinstance(entry[0], str))


def _steps(part: Any, key: str) -> Iterator[Mapping[str, Any]]:
  """The parts of a part, one after the other; an unknown kind for anything that is none."""
  if part is None:
    return
  if not isinstance(part, Mapping):
    yield {}
  elif part.get("type") == "Sequence":
    for inner in as_list(part.get(key)):
      yield from _steps(inner, key)
  else:
    yield part


def _growth(step: Mapping[str, Any]) -> float:
  """Letters out per character in, at most; infinite for a step whose time or growth is not known."""
  match step.get("type"):
    case "NFC" | "NFD" | "Lowercase":
      return 4
    case "NFKC" | "NFKD":
      return 18  # of U+FDFA
    case "Replace":
      return _replaced(step)
    case "Prepend":
      return max(1, len(str(step.get("prepend"))))
    case "ByteLevel":
      return 8 if step.get("add_prefix_space") else 4
    case "Metaspace":
      return 2
    case "Split":
      pattern = step.get("pattern")
      pattern = pattern if isinstance(pattern, Mapping) else {}
      return 1 if pattern.get("String") or pattern.get("Regex") in LINEAR_CUTS else math.inf
    case "Strip" | "StripAccents" | "Digits" | "Punctuation" | "Whitespace" | "WhitespaceSplit":
      return 1
  return math.inf


def _replaced(step: Mapping[str, Any]) -> float:
  """The growth by a Replace of a text; infinite for one of a pattern or of nothing."""
  pattern, content = step.get("pattern"), step.get("content")
  text = pattern.get("String") if isinstance(pattern, Mapping) else None
  if not (isinstance(text, str) and text and isinstance(content, str)):
    return math.inf
  return max(1.0, len(content) / len(text))


def _keeps_all(step: Mapping[str, Any]) -> bool:
  """Whether each character is still there after the step, perhaps as another one."""
  match step.get("type"):
    case "Replace":
      pattern = step.get("pattern")
      text = pattern.get("String") if isinstance(pattern, Mapping) else None
      return isinstance(text, str) and len(text) <= len(str(step.get("content")))
    case "Split" | "Punctuation":
      return step.get("behavior") != "Removed"
    case "NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase" | "Prepend" | "ByteLevel" | "Metaspace" | "Digits":
      return True
  return False


def _has_all_bytes(vocab: Any, before: list[Mapping[str, Any]], has_fallback: bool) -> bool:
  """Whether a character that is no token costs tokens all the same: those of its bytes."""
  if not isinstance(vocab, Mapping):
    return False
  if any(step.get("type") == "ByteLevel" for step in before):
    return all(_byte_letter(byte) in vocab for byte in _TEXT_BYTES)
  return has_fallback and all(f"<0x{byte:02X}>" in vocab for byte in _TEXT_BYTES)


# The bytes of text in UTF-8, without control characters and unassigned planes, which SmolLM's vocabulary lacks.
_TEXT_BYTES = (0x09, 0x0A, 0x0D, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1), 0xF3, 0xF4)
_NO_LETTERS = (*range(0x21), *range(0x7F, 0xA1), 0xAD)


def _byte_letter(byte: int) -> str:
  """The letter of a byte in byte-level BPE: a printable one stands for itself, the others are U+0100 and what follows."""
  return chr(0x100 + _NO_LETTERS.index(byte) if byte in _NO_LETTERS else byte)


def _is_plain_bpe(model: Mapping[str, Any]) -> bool:
  """BPE's time is n log n. Unigram's and WordPiece's grow with the square of a token's or a word's length."""
  odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
  return model.get("type") == "BPE" and not any(model.get(name) for name in odd)


def _is_short(part: Any) -> bool:
  """Whether a post-processor writes the text once and few tokens around it."""
  kinds = list(_steps(part, "processors"))
  templates = [step for step in kinds if step.get("type") != "ByteLevel"]
  if len(templates) > 1 or len(kinds) > _MAX_STEPS:
    return False
  for step in templates:
    if step.get("type") in ("RobertaProcessing", "BertProcessing"):
      continue
    single, tokens = as_list(step.get("single")), step.get("special_tokens")
    if step.get("type") != "TemplateProcessing" or not isinstance(tokens, Mapping):
      return False
    texts = sum(isinstance(piece, Mapping) and "Sequence" in piece for piece in single)
    ids = sum(len(as_list(token.get("ids"))) for token in tokens.values() if isinstance(token, Mapping))
    if texts != 1 or len(single) * max(1, ids) > _MAX_ADDED_IDS:
      return False
  return True


def _check_decoder(decoder: Any) -> None:
  growth = math.prod(map(_decoded, steps := list(_steps(decoder, "decoders"))))
  if growth > DECODER_GROWTH or len(steps) > _MAX_STEPS:
    raise InputError(
      f"tokenizer: a decoder must have at most {_MAX_STEPS} known steps, write at most {DECODER_GROWTH} characters for one of "
      f"a token, and repeat nothing in its patterns; tokenizer.json's does not. {_WAY_OUT}"
    )


def _decoded(step: Mapping[str, Any]) -> float:
  """Characters of text per character of a token, at most; infinite for a step that is not known."""
  match step.get("type"):
    case "Replace":
      pattern = step.get("pattern")
      regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
      if isinstance(regex, str) and regex and not any(sign in regex for sign in r"*+?{(\|"):
        return max(1, len(str(step.get("content"))))  # letters and classes of letters
      return _replaced(step)
    case "ByteLevel" | "ByteFallback" | "Fuse" | "Strip" | "Metaspace":
      return 1
    case "WordPiece" | "BPEDecoder" | "CTC":
      return 4  # a space before or after each character
  return math.inf
