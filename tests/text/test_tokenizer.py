"""Ids against transformers' and sentencepiece's own, streams that never break a character, templates that misbehave."""

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxfp8.checkpoint import readers
from jaxfp8.checkpoint.readers.gguf_tokenizer import merges_from_scores, tokenizer_files
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.errors import InputError
from jaxfp8.text.chat_template import ChatTemplate
from jaxfp8.text.tokenizer import Tokenizer
from tests.helpers import tiny_models

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
TEXT = json.loads((GOLDENS / "text.json").read_text())
SPM = json.loads((GOLDENS / "spm.json").read_text())
SOME = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def smollm():
  return Tokenizer(readers.open_source(readers.default_model()).tokenizer)


@pytest.fixture(scope="module")
def spm():
  return Tokenizer(tokenizer_files(_spm_metadata(), pathlib.Path("small.gguf")))


def _spm_metadata(**change):
  keys = {"model": "llama", "tokens": SPM["tokens"], "scores": SPM["scores"], "token_type": SPM["types"], "bos_token_id": 1}
  return {f"tokenizer.ggml.{key}": value for key, value in {**keys, "add_bos_token": False, **change}.items()}


def _tiny(**change):
  special = {"bos_token": "<s>", "eos_token": "</s>"}
  files = {"tokenizer_json": json.dumps(tiny_models.tiny_tokenizer(103)), "special_tokens": special}
  return Tokenizer(TokenizerFiles(**{**files, **change}))


# --- ids ---


@pytest.mark.parametrize("golden", TEXT["strings"], ids=lambda g: ascii(g["text"][:20]))
def test_ids_are_transformers_own(smollm, golden):
  assert smollm.encode(golden["text"]) == golden["ids"]
  assert smollm.decode(golden["ids"], keep_special=True) == golden["text"]


def test_prompts_of_the_goldens(smollm):
  real = np.load(GOLDENS / "real.npz")
  for i, prompt in enumerate(TEXT["prompts"]):
    ids = smollm.encode(prompt) if prompt is not None else smollm.chat(TEXT["chats"][0]["messages"])
    assert ids == real[f"ids_{i}"].tolist()


@pytest.mark.parametrize("golden", SPM["strings"], ids=lambda g: ascii(g["text"][:20]))
def test_ids_are_sentencepieces_own(spm, golden):
  assert spm.encode(golden["text"]) == golden["ids"]
  assert spm.decode(golden["ids"]) == golden["text"]


def test_merges_of_a_worked_example():
  tokens, types = ["<unk>", "a", "b", "ab", "aba", "ba"], [2, 1, 1, 1, 1, 1]
  merges = merges_from_scores(tokens, types, [0, -9, -9, -1, -3, -2])
  assert merges == [["a", "b"], ["b", "a"], ["a", "ba"], ["ab", "a"]]


def _byte_level_metadata(pre, **change):
  keys = {"model": "gpt2", "pre": pre, "tokens": ["<s>", "a", "b", "ab", "abc", "c"], "merges": ["a b"]}
  keys |= {"token_type": [3, 1, 1, 1, 1, 1], "bos_token_id": 0, **change}
  return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def test_llama3_takes_whole_words_and_bos():
  llama3 = Tokenizer(tokenizer_files(_byte_level_metadata("llama-bpe"), pathlib.Path("x")))
  assert llama3.encode("abc") == [0, 4]  # no merge makes "abc": only ignore_merges finds it
  gpt2 = Tokenizer(tokenizer_files(_byte_level_metadata("gpt-2"), pathlib.Path("x")))
  assert gpt2.encode("abc") == [3, 5]


@pytest.mark.parametrize(
  ("metadata", "says"),
  [
    (_byte_level_metadata("gemma4"), "pre must be one of .*tekken.* got 'gemma4'"),
    (_byte_level_metadata("gpt-2", model="bert"), "model must be one of gpt2, llama; got 'bert'"),
    (_byte_level_metadata("gpt-2", model="none"), "x holds none"),
    (_byte_level_metadata("gpt-2", tokens=["a"] * 6), "broken.*5 tokens occur twice"),
    (_byte_level_metadata("gpt-2", bos_token_id=99), "broken: IndexError"),
    ({}, "needs a tokenizer"),
  ],
)
def test_gguf_tokenizers_that_are_refused(metadata, says):
  with pytest.raises(InputError, match=says):
    tokenizer_files(metadata, pathlib.Path("x"))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_json(text):
  with pytest.raises(InputError, match=r"tokenizer\.json cannot be read"):
    _tiny(tokenizer_json=text)


def test_checkpoints_of_older_versions_have_bos_once():
  """They keep it in `add_bos`, not in tokenizer.json."""
  document = json.dumps({**tiny_models.tiny_tokenizer(103), "post_processor": None})
  old, none = _tiny(add_bos=True, tokenizer_json=document), _tiny(tokenizer_json=document)
  assert old.encode("a") == [1, *none.encode("a")] and old.encode("") == [1]
  assert old.encode("<s>a") == old.encode("a")
  assert _tiny(add_bos=True, tokenizer_json=document, special_tokens={}).encode("") == []


def test_text_that_is_not_unicode():
  with pytest.raises(InputError, match="must be Unicode"):
    _tiny().encode("a\ud800b")


def test_decoding_leaves_out_special_tokens_and_unknown_ids(smollm):
  ids = smollm.encode("<|im_start|>user")
  assert smollm.decode(ids) == "user" and smollm.decode(ids, keep_special=True) == "<|im_start|>user"
  assert smollm.decode([*ids, 10**6]) == "user"
  assert smollm.token_text(ids[0]) == "<|im_start|>"


# --- streams ---


def _stream(tokenizer, ids):
  stream = tokenizer.stream()
  pieces = [stream.push(token) for token in ids]
  return pieces, stream.finish()


@pytest.mark.parametrize("which", ["smollm", "spm"])
def test_a_stream_is_decode_in_pieces(which, request):
  tokenizer = request.getfixturevalue(which)
  text = "Leading space, naïve 😀👩‍👩‍👧‍👦 日本語\n\n\tend.  " * 20
  ids = tokenizer.encode(text)
  pieces, rest = _stream(tokenizer, ids)
  assert "".join(pieces) + rest == tokenizer.decode(ids) == text
  assert not any("�" in piece for piece in pieces) and rest == ""
  assert max(map(len, pieces)) < 30  # it streams: nothing waits for the end


@pytest.mark.parametrize("which", ["smollm", "spm"])
def test_any_ids_stream_like_decode(which, request):
  """Special tokens, half characters and words in any order. (sentencepiece's bytes left out: see TextStream.)"""
  tokenizer = request.getfixturevalue(which)
  rng = np.random.default_rng(0)
  allowed = [i for i in range(tokenizer.vocab_size) if which == "smollm" or SPM["types"][i] != 6]
  for _ in range(60):
    ids = rng.choice(allowed, 50).tolist()
    pieces, rest = _stream(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids)


def test_half_a_character_waits_for_the_end(smollm):
  ids = smollm.encode("ok 👩")
  for cut in range(1, len(ids)):
    pieces, rest = _stream(smollm, ids[:cut])
    assert "�" not in "".join(pieces)
    assert "".join(pieces) + rest == smollm.decode(ids[:cut])


def test_a_long_stream_costs_the_same_per_token(smollm):
  half = smollm.encode("👩")[:1]
  for ids in (smollm.encode("All work and no play. ") * 100, half * 500, [1] * 500):
    stream = smollm.stream()
    for token in ids:
      stream.push(token)
      assert len(stream._window) < 140  # what is decoded per token: the context and what is held back


# --- chats ---


@pytest.mark.parametrize("golden", TEXT["chats"], ids=range(len(TEXT["chats"])))
def test_chats_are_transformers_own(smollm, golden):
  assert smollm.chat_text(golden["messages"], golden["add_generation_prompt"]) == golden["text"]
  assert smollm.chat(golden["messages"], golden["add_generation_prompt"]) == golden["ids"]


def test_bos_comes_from_the_template_alone():
  tokenizer = _tiny(add_bos=True, chat_template=tiny_models.CHAT_TEMPLATE)
  ids = tokenizer.chat(SOME)
  assert ids.count(1) == 1 and ids[0] == 1 and ids.count(2) == 1
  assert tokenizer.decode(ids, keep_special=True) == "<s>[user]hi</s>[assistant]"


def test_no_template():
  with pytest.raises(InputError, match=r"carries no chat template\. Pass --raw"):
    _tiny().chat(SOME)


def _render(template, messages=SOME, **options):
  return ChatTemplate(template, {"bos_token": "<s>"}, **options).render(messages)


def test_the_environment_is_that_of_transformers():
  assert _render("  {% if true %}\nx\n  {% endif %}\n{{ bos_token }}") == "x\n<s>"
  assert _render("{{ {'b': 'é<', 'a': 1} | tojson }}") == '{"b": "é<", "a": 1}'
  assert _render("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}") == "1"
  assert _render("a{% generation %}b{{ messages[0].role }}{% endgeneration %}c") == "abuserc"
  assert _render("{{ strftime_now('%Y') }}") == time.strftime("%Y")
  assert _render("{{ tools is none }} {{ documents }}") == "True None"


@pytest.mark.parametrize(
  ("template", "says"),
  [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% if %}", "TemplateSyntaxError"),
    ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{{ 'a' * 10 ** 11 }}", "MemoryError"),
    ("{% include 'secret' %}", "TypeError|Error"),
  ],
)
def test_a_template_that_fails_is_one_sentence(template, says):
  with pytest.raises(InputError, match=says) as error:
    _render(template)
  assert str(error.value).startswith("chat: ") and "--raw" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  "template",
  [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 9 ** (9 ** 9) }}",
  ],
)
def test_a_template_without_end_is_ended(template):
  chat = ChatTemplate(template + "{{ messages[0].content }}", {}, seconds=0.3)
  start = time.perf_counter()
  with pytest.raises(InputError, match=r"did not end within 0\.3 s"):
    chat.render(SOME)
  assert time.perf_counter() - start < 5
  chat._template = "{{ messages[0].content }}"
  assert chat.render(SOME) == "hi"  # a new child


def test_messages_that_are_no_text():
  with pytest.raises(InputError, match="messages must hold text"):
    _render("x", [{"role": "user", "content": b"bytes"}])


def test_the_child_ends_with_its_template():
  chat = ChatTemplate("x", {})
  chat.render(SOME)
  child = chat._child.process
  del chat
  assert child.poll() is not None


def test_readers_and_config_load_no_jax_and_no_parser():
  """(jaxfp8 itself may load jax, so a bare package stands in for it.)"""
  code = """
import sys, types
package = types.ModuleType("jaxfp8"); package.__path__ = ["jaxfp8"]; sys.modules["jaxfp8"] = package
import jaxfp8.checkpoint.readers
early = {"jax", "gguf", "safetensors", "tokenizers", "jinja2"} & set(sys.modules)
import jaxfp8.checkpoint.readers.huggingface, jaxfp8.checkpoint.readers.gguf_file, jaxfp8.text.tokenizer
print(sorted(early), sorted({"jax", "jinja2"} & set(sys.modules)))
"""
  root = pathlib.Path(__file__).parents[2]
  out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
  assert out.stdout == "[] []\n", out.stderr
