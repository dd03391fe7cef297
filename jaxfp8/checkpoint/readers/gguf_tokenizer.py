"""The tokenizer inside GGUF metadata, as the text of a Hugging Face `tokenizer.json`.

    tokenizer.ggml.model "gpt2"   byte-level BPE; `tokenizer.ggml.pre` names how text is cut before merging (gguf_cuts)
    tokenizer.ggml.model "llama"  SentencePiece BPE with byte fallback; merges follow from the scores

A model or a `pre` that is not known is refused: with other cuts, text gets other ids and the answers silently get worse. The
ids are those of llama.cpp (src/llama-vocab.cpp as of commit 0c1e57098), BOS and EOS around the text included.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxfp8.checkpoint.readers.gguf_cuts import ADD_BOS, CUTS, IGNORE_MERGES
from jaxfp8.checkpoint.readers.gguf_special import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, token_types
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.errors import InputError, shown

_NO_VOCABULARY = ("none", "no_vocab")
_MODELS = ("gpt2", "llama")
_SPECIAL = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
_SENTENCE_PIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}  # of a file that does not name them


def tokenizer_files(metadata: Mapping[str, Any], path: pathlib.Path) -> TokenizerFiles:
  """From GGUF metadata. Raises InputError, naming `path`, for an absent or unsupported tokenizer."""
  model = metadata.get("tokenizer.ggml.model")
  if model is None or model in _NO_VOCABULARY or not metadata.get("tokenizer.ggml.tokens"):
    raise InputError(f"readers: text needs a tokenizer, and {path} holds none. Convert the model with its tokenizer.")
  if model not in _MODELS:
    raise _unknown("model", model, _MODELS)
  _check_lists(metadata, path)
  try:
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {name: tokens[i] for name, i in _special_ids(metadata).items()}
    document = _byte_level(metadata, path) if model == "gpt2" else _sentence_piece(metadata)
    document["post_processor"] = _post_processor(metadata, special)
  except (KeyError, IndexError, TypeError, ValueError) as error:
    if isinstance(error, InputError):
      raise
    raise InputError(f"readers: the tokenizer in {path} is broken: {error!r}. Convert the model again.") from error
  return TokenizerFiles(
    tokenizer_json=json.dumps(document, ensure_ascii=False),
    chat_template=metadata.get("tokenizer.chat_template"),
    special_tokens={f"{name}_token": token for name, token in special.items()},
    special_in_chats=True,
    document=document,
  )


def _unknown(key: str, value: Any, supported: Sequence[str]) -> InputError:
  return InputError(
    f"readers: tokenizer.ggml.{key} must be one of {', '.join(supported)}; got {shown(value)}. "
    "Pass the model as a Hugging Face folder with its tokenizer.json."
  )


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
  """The ids that the file names, or those of every SentencePiece vocabulary.

  One departure: llama.cpp takes id 11 as the BOS of a "gpt2" vocabulary that names none, which is right for Falcon alone.
  """
  defaults = _SENTENCE_PIECE_IDS if metadata["tokenizer.ggml.model"] == "llama" else {}
  ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id", defaults.get(name)) for name, key in _SPECIAL}
  return {name: i for name, i in ids.items() if i is not None}


def _post_processor(metadata: Mapping[str, Any], special: Mapping[str, str]) -> dict[str, Any] | None:
  """BOS before a text and EOS after it, as the file says; or as its kind of vocabulary does if the file says nothing."""
  by_default = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in ADD_BOS
  added = {"bos": metadata.get("tokenizer.ggml.add_bos_token", by_default), "eos": metadata.get("tokenizer.ggml.add_eos_token")}
  texts = {name: special[name] for name, adds in added.items() if adds and name in special}
  if not texts:
    return None
  pieces = {name: [{"SpecialToken": {"id": text, "type_id": 0}}] for name, text in texts.items()}
  single = [*pieces.get("bos", ()), {"Sequence": {"id": "A", "type_id": 0}}, *pieces.get("eos", ())]
  ids = _special_ids(metadata)
  return {
    "type": "TemplateProcessing",
    "single": single,
    "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {text: {"id": text, "ids": [ids[name]], "tokens": [text]} for name, text in texts.items()},
  }


def _check_lists(metadata: Mapping[str, Any], path: pathlib.Path) -> None:
  """Raises InputError unless the lists that the vocabulary needs are there, with an entry for each token."""
  needed = "merges" if metadata["tokenizer.ggml.model"] == "gpt2" else "scores"
  if metadata.get(f"tokenizer.ggml.{needed}") is None:
    raise InputError(
      f"readers: a {metadata['tokenizer.ggml.model']!r} vocabulary needs tokenizer.ggml.{needed}; {path} lacks it. "
      "Convert the model again with a current llama.cpp."
    )
  count = len(metadata["tokenizer.ggml.tokens"])
  for name in ("scores", "token_type"):
    entries = metadata.get(f"tokenizer.ggml.{name}")
    if entries is not None and len(entries) < count:
      raise InputError(
        f"readers: tokenizer.ggml.{name} in {path} must have an entry for each of {count} tokens; got {len(entries)}. "
        "Convert the model again with a current llama.cpp."
      )


def _merges(metadata: Mapping[str, Any], path: pathlib.Path) -> list[list[str]]:
  """The pairs of tokens that are merged, in order. Raises InputError for one that does not give a token."""
  tokens = set(metadata["tokenizer.ggml.tokens"])
  merges = [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]]
  for merge in merges:
    if len(merge) != 2 or "".join(merge) not in tokens or merge[0] not in tokens or merge[1] not in tokens:
      raise InputError(
        f"readers: tokenizer.ggml.merges in {path} must join two tokens to a third; got {shown(' '.join(merge))}. "
        "Convert the model again with a current llama.cpp."
      )
  return merges


def _byte_level(metadata: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
  """GPT-2's BPE over bytes written as letters."""
  pre = metadata.get("tokenizer.ggml.pre") or "default"
  if pre not in CUTS:
    raise _unknown("pre", pre, tuple(CUTS))
  cuts = [{"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False} for cut in CUTS[pre]]
  byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
  model = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": pre in IGNORE_MERGES,
    "vocab": _vocab(metadata["tokenizer.ggml.tokens"]),
    "merges": _merges(metadata, path),
  }
  document = _document(metadata, token_types(metadata), model, decoder=byte_level)
  document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*cuts, byte_level]}
  return document


def _sentence_piece(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """Llama 2's tokenizer as Hugging Face converts it: spaces are written U+2581, and unknown characters fall back to bytes."""
  tokens = metadata["tokenizer.ggml.tokens"]
  types = token_types(metadata)
  prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
  unknown = [token for token, kind in zip(tokens, types, strict=False) if kind == UNKNOWN]
  model = {
    "type": "BPE",
    "dropout": None,
    "unk_token": unknown[0] if unknown else None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": True,
    "byte_fallback": "<0x0A>" in tokens,
    "ignore_merges": False,
    "vocab": _vocab(tokens),
    "merges": merges_from_scores(tokens, types, metadata["tokenizer.ggml.scores"]),
  }
  spaces = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
  back = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
  if prefix:
    spaces.insert(0, {"type": "Prepend", "prepend": "▁"})
    back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
  document = _document(metadata, types, model, decoder={"type": "Sequence", "decoders": back})
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


def _document(
  metadata: Mapping[str, Any], types: Sequence[int], model: dict[str, Any], decoder: dict[str, Any]
) -> dict[str, Any]:
  """A tokenizer.json without its normalizer, its pre-tokenizer and its post-processor."""
  tokens = metadata["tokenizer.ggml.tokens"]
  strips = any(name in str(metadata.get("general.name", "")).lower() for name in ("phi-3", "phi3"))
  added = [
    {
      "id": i,
      "content": token,
      "single_word": False,
      "lstrip": False,
      "rstrip": strips and token not in ("<unk>", "<s>", "<|endoftext|>"),
      "normalized": False,
      "special": kind != USER_DEFINED,
    }
    for i, (token, kind) in enumerate(zip(tokens, types, strict=False))
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
