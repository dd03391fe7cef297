"""The tokenizer inside GGUF metadata, as the text of a Hugging Face `tokenizer.json`.

    tokenizer.ggml.model "gpt2"   byte-level BPE; `tokenizer.ggml.pre` names how text is cut before merging
    tokenizer.ggml.model "llama"  SentencePiece BPE with byte fallback; merges follow from the scores

A model or a `pre` that is not in the tables below is refused: with other cuts, text gets other ids and the answers silently
get worse. The cuts are those of llama.cpp's src/llama-vocab.cpp and of the tokenizer.json from which each name was made.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxfp8.checkpoint.readers.gguf_special import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, token_types
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.errors import InputError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS = r"\p{N}"
# The cuts of llama.cpp for a file that names none, or "default".
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

# Each cut splits the pieces of the cut before it, into its matches and the text between them.
_CUTS = {
  "default": _DEFAULT,
  "gpt-2": (_GPT2,),
  "smollm": (_DIGITS, _GPT2),
  "starcoder": (_DIGITS, _GPT2),
  "refact": (_DIGITS, _GPT2),
  "command-r": (_DIGITS, _GPT2),
  "llama-bpe": (_LLAMA3,),
  "llama3": (_LLAMA3,),
  "llama-v3": (_LLAMA3,),
  "dbrx": (_LLAMA3,),
  "smaug-bpe": (_LLAMA3,),
}
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")  # whole words of the vocabulary skip the merges; BOS is on by default


def tokenizer_files(metadata: Mapping[str, Any], path: pathlib.Path) -> TokenizerFiles:
  """From GGUF metadata. Raises InputError, naming `path`, for an absent or unsupported tokenizer."""
  model = metadata.get("tokenizer.ggml.model")
  if model is None or not metadata.get("tokenizer.ggml.tokens"):
    raise InputError(f"readers: text needs a tokenizer, and {path} holds none. Convert the model with its tokenizer.")
  try:
    if model == "gpt2":
      document, add_bos = _byte_level(metadata)
    elif model == "llama":
      document, add_bos = _sentence_piece(metadata), True
    else:
      raise _unknown("model", model, ("gpt2", "llama"))
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
      token = metadata.get(f"tokenizer.ggml.{key}_token_id")
      if token is not None:
        special[f"{name}_token"] = tokens[token]
  except (KeyError, IndexError, TypeError, ValueError) as error:
    if isinstance(error, InputError):
      raise
    raise InputError(f"readers: the tokenizer in {path} is broken: {error!r}. Convert the model again.") from error
  return TokenizerFiles(
    tokenizer_json=json.dumps(document, ensure_ascii=False),
    chat_template=metadata.get("tokenizer.chat_template"),
    special_tokens=special,
    add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)),
  )


def _unknown(key: str, value: Any, supported: Sequence[str]) -> InputError:
  return InputError(
    f"readers: tokenizer.ggml.{key} must be one of {', '.join(supported)}; got {value!r}. "
    "Pass the model as a Hugging Face folder with its tokenizer.json."
  )


def _byte_level(metadata: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
  """(document, default of add_bos) of GPT-2's BPE over bytes written as letters."""
  pre = metadata.get("tokenizer.ggml.pre", "default")
  if pre not in _CUTS:
    raise _unknown("pre", pre, tuple(_CUTS))
  cuts = [{"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False} for cut in _CUTS[pre]]
  byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
  model = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": pre in _LLAMA3_NAMES,
    "vocab": _vocab(metadata["tokenizer.ggml.tokens"]),
    "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
  }
  document = _document(metadata, model, decoder=byte_level)
  document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*cuts, byte_level]}
  return document, pre in _LLAMA3_NAMES


def _sentence_piece(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """Llama 2's tokenizer as Hugging Face converts it: spaces are written U+2581, and unknown characters fall back to bytes."""
  tokens = metadata["tokenizer.ggml.tokens"]
  types = token_types(metadata)
  prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
  unknown = [token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN]
  model = {
    "type": "BPE",
    "dropout": None,
    "unk_token": unknown[0] if unknown else None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": True,
    "byte_fallback": BYTE in types,
    "ignore_merges": False,
    "vocab": _vocab(tokens),
    "merges": merges_from_scores(tokens, types, metadata["tokenizer.ggml.scores"]),
  }
  spaces = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
  back = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
  if prefix:
    spaces.insert(0, {"type": "Prepend", "prepend": "▁"})
    back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
  document = _document(metadata, model, decoder={"type": "Sequence", "decoders": back})
  document["normalizer"] = {"type": "Sequence", "normalizers": spaces}
  return document


def merges_from_scores(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[list[str]]:
  """SentencePiece joins the neighbours whose union has the best score; as ranked pairs, best first.

  Every way to cut a piece in two pieces is a merge; equal scores go by length and by id, as in Hugging Face's converter.
  """
  pieces = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}
  merges = []
  for piece, i in pieces.items():
    for cut in range(1, len(piece)):
      left, right = piece[:cut], piece[cut:]
      if left in pieces and right in pieces:
        merges.append((-scores[i], i, pieces[left], pieces[right], left, right))
  return [[left, right] for *_, left, right in sorted(merges)]


def _vocab(tokens: Sequence[str]) -> dict[str, int]:
  vocab = {token: i for i, token in enumerate(tokens)}
  if len(vocab) != len(tokens):
    raise ValueError(f"{len(tokens) - len(vocab)} tokens occur twice")
  return vocab


def _document(metadata: Mapping[str, Any], model: dict[str, Any], decoder: dict[str, Any]) -> dict[str, Any]:
  """No post-processor: BOS is the Tokenizer's business (TokenizerFiles.add_bos)."""
  tokens = metadata["tokenizer.ggml.tokens"]
  types = token_types(metadata)
  added = [
    {
      "id": i,
      "content": token,
      "single_word": False,
      "lstrip": False,
      "rstrip": False,
      "normalized": False,
      "special": kind != USER_DEFINED,
    }
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
    if kind in (CONTROL, USER_DEFINED, UNKNOWN)
  ]
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": added,
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": decoder,
    "model": model,
  }
