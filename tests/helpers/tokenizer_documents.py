"""Tokenizers of the tests: a tokenizer.json in Llama 2's form, and GGUF keys. Their goldens are made with them, without jax."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxfp8.checkpoint.readers.gguf_tokenizer import merges_from_scores

SPM = json.loads((pathlib.Path(__file__).parents[1] / "goldens" / "spm.json").read_text(encoding="utf-8"))
CHAT_WITH_BOS = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
CHAT_WITHOUT_BOS = "{% for m in messages %}{{ m.content }}{% endfor %}"


def sentence_piece_keys(control: Sequence[str] = (), **change: Any) -> dict[str, Any]:
  """The keys below `tokenizer.ggml.` of the small SentencePiece vocabulary, with more control tokens."""
  tokens, types = [*SPM["tokens"], *control], SPM["types"] + [3] * len(control)
  scores = SPM["scores"] + [0.0] * len(control)
  keys = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types, "bos_token_id": 1}
  return {**keys, "eos_token_id": 2, **change}


def post_processor(before: str = "", after: str = "") -> dict[str, Any] | None:
  """A TemplateProcessing with one special token before and one after the text; None for neither."""
  if not before and not after:
    return None
  tokens, text = SPM["tokens"], [{"Sequence": {"id": "A", "type_id": 0}}]
  first, last = ([{"SpecialToken": {"id": token, "type_id": 0}}] if token else [] for token in (before, after))
  return {
    "type": "TemplateProcessing",
    "single": [*first, *text, *last],
    "pair": [*text, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {t: {"id": t, "ids": [tokens.index(t)], "tokens": [t]} for t in (before, after) if t},
  }


def llama2_document(before: str = "<s>", after: str = "") -> dict[str, Any]:
  """The small SentencePiece vocabulary as a tokenizer.json like that of Llama 2."""
  tokens, flags = SPM["tokens"], dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  space, underline = {"String": " "}, {"String": "▁"}
  back = [{"type": "Replace", "pattern": underline, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
  back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
  steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": space, "content": "▁"}]
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [{"id": i, "content": tokens[i], "special": True, **flags} for i in range(3)],
    "normalizer": {"type": "Sequence", "normalizers": steps},
    "pre_tokenizer": None,
    "post_processor": post_processor(before, after),
    "decoder": {"type": "Sequence", "decoders": back},
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": "<unk>",
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": True,
      "byte_fallback": True,
      "ignore_merges": False,
      "vocab": {token: i for i, token in enumerate(tokens)},
      "merges": merges_from_scores(tokens, SPM["types"], SPM["scores"]),
    },
  }


def write_folder(folder: pathlib.Path, case: dict[str, Any]) -> pathlib.Path:
  """The text files of a Llama with that tokenizer, as a case of the goldens says, and no weights."""
  folder.mkdir(parents=True, exist_ok=True)
  config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(SPM["tokens"])}
  config |= {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
  files = {"config.json": config, "tokenizer.json": llama2_document(*case["post_processor"]), **case["files"]}
  for name, content in files.items():
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
  return folder
