"""The ids of prompts and chats are those of the format's own library: llama.cpp for GGUF, transformers 5.24 for folders."""

import functools
import json
import pathlib
import re

import pytest

from jaxfp8.checkpoint.readers.gguf_tokenizer import tokenizer_files
from jaxfp8.checkpoint.readers.huggingface_tokenizer import FolderTokenizer
from jaxfp8.commands import answers
from jaxfp8.errors import InputError
from jaxfp8.text.chat_template import ChatTemplate
from jaxfp8.text.tokenizer import Tokenizer
from tests.helpers import tokenizer_documents as documents

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
LLAMA_CPP = json.loads((GOLDENS / "llama_cpp.json").read_text(encoding="utf-8"))
TRANSFORMERS = json.loads((GOLDENS / "transformers_tokens.json").read_text(encoding="utf-8"))
TEMPLATES = (documents.CHAT_WITH_BOS, documents.CHAT_WITHOUT_BOS)
BOS, EOS = 1, 2


def _gguf_files(keys):
  metadata = {key if "." in key else f"tokenizer.ggml.{key}": value for key, value in keys.items()}
  return tokenizer_files(metadata, pathlib.Path("x.gguf"))


def _gguf(keys):
  return Tokenizer(_gguf_files(keys))


@functools.cache
def _template(text, special):
  """Shared, since each starts a process."""
  return ChatTemplate(text, dict(special))


def _with_template(files, text):
  tokenizer = Tokenizer(files)
  tokenizer._template = _template(text, tuple(sorted(files.special_tokens.items())))
  return tokenizer


def _chat(tokenizer, prompt):
  return tokenizer.chat([{"role": "user", "content": prompt}])


def _check_chat(tokenizer, prompt, ids):
  """The library's ids; of a prompt that holds the text of special tokens, only the special tokens of any other prompt."""
  special = set(tokenizer._special_ids.values())
  if not any(text in prompt for text in tokenizer._special_ids):
    assert _chat(tokenizer, prompt) == ids, prompt
  else:
    assert [i for i in _chat(tokenizer, prompt) if i in special] == [i for i in _chat(tokenizer, "x") if i in special], prompt


def _with_one_bos(ids):
  """The libraries give two BOS tokens to a chat whose text begins with two, or with one more than they take away."""
  while ids[:2] == [BOS, BOS]:
    ids = ids[1:]
  return ids


# --- llama.cpp ---


@pytest.mark.parametrize("pre", LLAMA_CPP["cuts"]["by_pre"])
def test_every_pre_tokenizer_of_a_gguf_file_gives_llama_cpps_ids(pre):
  cuts = LLAMA_CPP["cuts"]
  tokenizer = _gguf({"model": "gpt2", "pre": pre, "tokens": cuts["tokens"], "merges": cuts["merges"], "add_bos_token": False})
  for text, results, which in zip(cuts["texts"], cuts["ids"], cuts["by_pre"][pre], strict=True):
    assert tokenizer.encode(text) == results[which], text


def test_the_texts_tell_pre_tokenizers_apart():
  """(falcon3 is llama-bpe and so on: the same cuts under several names.)"""
  assert len({tuple(which) for which in LLAMA_CPP["cuts"]["by_pre"].values()}) >= 28


@pytest.mark.parametrize("case", LLAMA_CPP["sentencepiece"], ids=lambda case: str(case["change"]))
def test_bos_and_eos_of_a_gguf_file_are_llama_cpps(case):
  keys = documents.sentence_piece_keys(**case["change"])
  tokenizer = _gguf(keys)
  for prompt, ids in zip(LLAMA_CPP["prompts"], case["ids"], strict=True):
    assert tokenizer.encode(prompt) == ids, prompt
  chats = iter(case["chats"])
  for template in TEMPLATES:
    tokenizer = _with_template(_gguf_files(keys), template)
    for prompt in LLAMA_CPP["prompts"]:
      ids = next(chats)
      _check_chat(tokenizer, prompt, _with_one_bos(ids))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", ["x", "<s>x", "<s><s>x"])
def test_a_gguf_file_that_adds_bos_gives_a_chat_exactly_one_at_its_beginning(template, prompt):
  files = _gguf_files(documents.sentence_piece_keys(add_bos_token=True))
  ids = _chat(_with_template(files, template), prompt)
  assert ids[0] == BOS and ids[1] != BOS


def test_byte_level_vocabularies_add_bos_by_their_name_alone():
  tokens = ["<s>", "</s>", "a", "b"]
  keys = {"model": "gpt2", "tokens": tokens, "token_type": [3, 3, 1, 1], "merges": [], "bos_token_id": 0, "eos_token_id": 1}
  assert _gguf({**keys, "pre": "gpt-2"}).encode("a") == [2]
  assert _gguf({**keys, "pre": "tekken"}).encode("a") == _gguf({**keys, "pre": "llama-bpe"}).encode("a") == [0, 2]
  assert _gguf({**keys, "pre": "llama-bpe", "add_bos_token": False}).encode("a") == [2]
  assert _gguf({**keys, "pre": "gpt-2", "add_bos_token": True, "add_eos_token": True}).encode("a") == [0, 2, 1]


# --- transformers ---


@pytest.mark.parametrize("case", TRANSFORMERS["cases"], ids=lambda case: str([case["post_processor"], case["files"]]))
def test_ids_of_a_folder_are_transformers_own(case, tmp_path):
  files = FolderTokenizer(documents.write_folder(tmp_path / "model", case)).files
  tokenizer = Tokenizer(files)
  for prompt, ids in zip(TRANSFORMERS["prompts"], case["ids"], strict=True):
    assert tokenizer.encode(prompt) == ids, prompt
  assert (tokenizer.bos_id, tokenizer.eos_id) == (case["special"]["bos_token"], case["special"]["eos_token"])
  chats = iter(case["chats"])
  for template in TEMPLATES:
    tokenizer = _with_template(files, template)
    for prompt in TRANSFORMERS["prompts"]:
      ids = next(chats)
      _check_chat(tokenizer, prompt, ids if tokenizer.bos_id != BOS else _with_one_bos(ids))


def test_two_bos_of_a_raw_prompt_are_noted(capsys, tmp_path):
  folder = documents.write_folder(
    tmp_path, {"post_processor": ["<s>", ""], "files": {"tokenizer_config.json": {"bos_token": "<s>"}}}
  )
  tokenizer = Tokenizer(FolderTokenizer(folder).files)
  assert answers.encode_raw(tokenizer, "<s>x")[:2] == [BOS, BOS]
  assert capsys.readouterr().err == (
    "generate: the prompt begins with two BOS tokens: this model's tokenizer writes one. Leave out '<s>'.\n"
  )
  answers.encode_raw(tokenizer, "x")
  assert capsys.readouterr().err == ""


# --- files ---


def test_byte_order_marks_and_other_line_ends_change_nothing(tmp_path):
  case = {"post_processor": ["<s>", ""], "files": {"tokenizer_config.json": {"bos_token": "<s>"}}}
  folder = documents.write_folder(tmp_path, case)
  (folder / "chat_template.jinja").write_text("{{ 1 }}\n")
  before = FolderTokenizer(folder).files
  for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
    text = (folder / name).read_text(encoding="utf-8")
    text = json.dumps(json.loads(text), indent=1) if name.endswith("json") else text
    (folder / name).write_bytes(("\ufeff" + text).replace("\n", "\r\n").encode())
  after = FolderTokenizer(folder).files
  assert Tokenizer(after).encode("Hello") == Tokenizer(before).encode("Hello")
  assert (after.chat_template, after.special_tokens) == (before.chat_template, before.special_tokens)


def test_a_special_token_that_tokenizer_json_takes_for_a_word_is_special(tmp_path):
  """As in transformers: its text in a prompt is one token, and an answer does not show it."""
  token = "▁the"
  files = {"tokenizer_config.json": {"eos_token": token, "tokenizer_class": "PreTrainedTokenizerFast"}}
  tokenizer = Tokenizer(FolderTokenizer(documents.write_folder(tmp_path, {"post_processor": ["", ""], "files": files})).files)
  assert tokenizer.eos_id is not None
  assert tokenizer.encode(token) == [tokenizer.eos_id] and tokenizer.decode([tokenizer.eos_id]) == ""


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "vocab.json"])
def test_a_folder_with_another_form_of_tokenizer_says_how_to_make_tokenizer_json(name, tmp_path):
  folder = documents.write_folder(tmp_path, {"post_processor": ["", ""], "files": {}})
  (folder / "tokenizer.json").unlink()
  with pytest.raises(InputError, match=r"has no tokenizer\.json\. Fetch it"):
    FolderTokenizer(folder).files  # noqa: B018 - read at the first access
  (folder / name).write_bytes(b"")
  with pytest.raises(InputError, match=rf"has {name}, which is not read, .* AutoTokenizer\.from_pretrained\('{folder}'\)"):
    FolderTokenizer(folder).files  # noqa: B018


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"merges": None}, "a 'gpt2' vocabulary needs tokenizer.ggml.merges; m.gguf lacks it"),
    ({"merges": ["a b"]}, "tokenizer.ggml.merges in m.gguf must join two tokens to a third; got 'a b'"),
    ({"token_type": [1]}, "tokenizer.ggml.token_type in m.gguf must have an entry for each of 2 tokens; got 1"),
    ({"model": "llama", "scores": [0.0]}, "tokenizer.ggml.scores in m.gguf must have an entry for each of 2 tokens; got 1"),
    ({"model": "llama"}, "a 'llama' vocabulary needs tokenizer.ggml.scores; m.gguf lacks it"),
  ],
)
def test_a_broken_vocabulary_is_named_by_its_key(change, says):
  keys = {"model": "gpt2", "tokens": ["a", "b"], "merges": [], **change}
  metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
  with pytest.raises(InputError, match=re.escape(says)):
    tokenizer_files(metadata, pathlib.Path("m.gguf"))
