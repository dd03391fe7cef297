# ruff: noqa: RUF001, SIM905 - DeepSeek's names have full-width bars; a table of names reads best as words
"""The special tokens of a GGUF file: their types, and the tokens that end an answer.

Both follow llama.cpp's src/llama-vocab.cpp (`llama_vocab::impl::load`) as of commit 0c1e57098: many files give an end token
another type than "control", or leave its id out of the metadata, so llama.cpp also knows these tokens by their names.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Values of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

# Names of tokens that end the generation, whatever type the file gives them.
END_NAMES = frozenset(
  """<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT>
  _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[""".split()
)

# Names of the tokens around code to fill in, by the key that can give such a token's id instead of a name.
_FILL_IN_NAMES = {
  "fim_pre": "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>".split(),
  "fim_suf": "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>".split(),
  "fim_mid": "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>".split(),
  "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]".split(),
  "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>".split(),
  "fim_sep": "<|file_sep|>".split(),
}
_FILL_IN_ENDS = ("fim_pad", "fim_rep", "fim_sep")  # these end the generation too
_OLD_KEYS = {"fim_pre": "prefix", "fim_suf": "suffix", "fim_mid": "middle"}
_SHOWN_NAMES = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # gpt-oss's words around its messages


def end_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
  """The ids that end an answer: eos, eot and eom of the metadata, then the tokens whose names are in llama.cpp's list.

  One departure: llama.cpp takes id 11 as the EOS of a "gpt2" vocabulary that names none, which is right for Falcon alone.
  """
  tokens, ids = _tokens(metadata), _named_ends(metadata)
  spared = _spared(tokens[i] for i in ids if i < len(tokens))
  return tuple(i for i in ids if i >= len(tokens) or tokens[i] not in spared)


def token_types(metadata: Mapping[str, Any]) -> list[int]:
  """The type of each token: the file's own, unless the token's name says more.

  Raises ValueError if the file has fewer types than tokens.
  """
  tokens = _tokens(metadata)
  types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
  if len(types) < len(tokens):
    raise ValueError(f"{len(tokens)} tokens have {len(types)} types")
  kinds = dict.fromkeys((*END_NAMES, *(name for key in _FILL_IN_NAMES for name in _fill_in(metadata, key))), CONTROL)
  kinds |= dict.fromkeys(_SHOWN_NAMES, USER_DEFINED)
  kinds |= _spared(tokens[i] for i in _named_ends(metadata) if i < len(tokens))
  return [kinds.get(token, kind) for token, kind in zip(tokens, types, strict=False)]


def _tokens(metadata: Mapping[str, Any]) -> Sequence[str]:
  return metadata.get("tokenizer.ggml.tokens") or ()


def _named_ends(metadata: Mapping[str, Any]) -> list[int]:
  """The ids of the keys and of the names, before the exceptions; each id once."""
  defaults = {"eos": 2} if metadata.get("tokenizer.ggml.model") == "llama" and len(_tokens(metadata)) > 2 else {}
  ids = [metadata.get(f"tokenizer.ggml.{key}_token_id", defaults.get(key)) for key in ("eos", "eot", "eom", *_FILL_IN_ENDS)]
  names = END_NAMES.union(*(_fill_in(metadata, key) for key in _FILL_IN_ENDS))
  ids += [i for i, token in enumerate(_tokens(metadata)) if token in names]
  return list(dict.fromkeys(i for i in ids if i is not None))


def _fill_in(metadata: Mapping[str, Any], key: str) -> Sequence[str]:
  """The names that count as `key`: none if the metadata gives its id."""
  given = (f"tokenizer.ggml.{name}_token_id" for name in (key, _OLD_KEYS.get(key)))
  return () if any(name in metadata for name in given) else _FILL_IN_NAMES[key]


def _spared(ends: Iterable[str]) -> dict[str, int]:
  """Names among the end tokens that end nothing beside certain other names, and their types."""
  names, spared = set(ends), {}
  if {"<|call|>", "<|calls|>"} & names and {"<|return|>", "<|flush|>"} & names:
    spared["<|end|>"] = USER_DEFINED  # gpt-oss and solar-open: the end of one message of several
  if {"<|tool_response>", "<|plamo:eos|>"} & names:
    spared["</s>"] = NORMAL  # gemma 4 and plamo: a tag of HTML
  return {name: kind for name, kind in spared.items() if name in names}
