"""Files and texts of strangers end in bounded time and memory, with one sentence, and ordinary ones stay in this process."""

import io
import json
import pathlib
import sys
import time

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from jaxfp8.checkpoint.readers.gguf_cuts import CUTS
from jaxfp8.checkpoint.readers.json_file import parse_json
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.commands import answers
from jaxfp8.errors import InputError, shown
from jaxfp8.text import bounded_tokenizer, tokenizer_outline
from jaxfp8.text.bounded_tokenizer import BoundedTokenizer
from jaxfp8.text.tokenizer import Tokenizer
from tests.helpers import tiny_models
from tests.helpers.tokenizer_documents import llama2_document, post_processor

FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
TEN = {"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 10}
QUADRATIC = r"(?=([0-9]{3})+(?![0-9]))"  # superbpe's
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _sequence(key, steps):
  return {"type": "Sequence", key: steps}


def _split(regex):
  return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _load(**change):
  return BoundedTokenizer(json.dumps({**llama2_document(), **change}))


@pytest.fixture
def short_limits(monkeypatch):
  """A second instead of ten, and 1 GB."""
  monkeypatch.setattr(bounded_tokenizer, "_SECONDS", 1.0)
  monkeypatch.setattr(bounded_tokenizer, "_BYTES", 1 << 30)


def _refusal(function, *arguments):
  start = time.monotonic()
  with pytest.raises(InputError) as error:
    function(*arguments)
  message = str(error.value)
  assert message.startswith("tokenizer: ") and "\n" not in message and len(message) < 500 and message.endswith(".")
  assert time.monotonic() - start < 20
  return message


HOSTILE = {
  "ten replacements": ({"normalizer": _sequence("normalizers", [TEN] * 10)}, "x"),
  "letters of letters": ({"pre_tokenizer": _sequence("pretokenizers", [BYTES] * 30)}, "é"),
  "long prefixes": ({"normalizer": _sequence("normalizers", [{"type": "Prepend", "prepend": "x" * 400000}] * 40)}, "x"),
  "backtracking": ({"pre_tokenizer": _split(r"(a+)+$")}, "a" * 40 + "b"),
  "a quadratic pattern": ({"pre_tokenizer": _split(QUADRATIC)}, "1" * 90000),
  "a panic": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "hello"),
  "a charsmap that is none": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "hello"),
  "a million tokens around": (
    {
      "post_processor": post_processor("<s>")
      | {"single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 90000}
      | {"special_tokens": {"<s>": {"id": "<s>", "ids": [1] * 500, "tokens": ["<s>"] * 500}}}
    },
    "hello",
  ),
  "the text many times": (
    {"post_processor": post_processor("<s>") | {"single": [{"Sequence": {"id": "A", "type_id": 0}}] * 20000}},
    "a" * 5000,
  ),
  "long words": (
    {
      "model": {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "#", "max_input_chars_per_word": 10**9}
      | {"vocab": {"a": 0, "#a": 1}},
      "normalizer": None,
      "added_tokens": [],
    },
    "a" * 40000,
  ),
  "long pieces": (
    {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a" * n, -1.0] for n in range(1, 1500)]}, "added_tokens": []},
    "a" * 60000,
  ),
  "a prefix that merges lack": ({"model": {**llama2_document()["model"], "continuing_subword_prefix": "#" * 1000}}, "hello"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_sentence(name, short_limits, capfd):
  change, text = HOSTILE[name]
  _refusal(lambda: _load(**change).encode(text))
  assert "panicked" not in capfd.readouterr().err


def test_growth_of_added_tokens_is_met_before_the_library_loads(short_limits):
  """The library normalizes them while it loads, so a process of its own loads first."""
  token = {"id": 900, "content": "x", **FLAGS, "normalized": True}
  change = {"normalizer": _sequence("normalizers", [TEN] * 10), "added_tokens": [*llama2_document()["added_tokens"], token]}
  assert "GB" in _refusal(lambda: _load(**change))


@pytest.mark.parametrize(
  "decoder",
  [
    _sequence("decoders", [TEN] * 8),
    {"type": "Replace", "pattern": {"Regex": "(x+)+$"}, "content": "x"},
    {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
    _sequence("decoders", [{"type": "Fuse"}] * 17),
    {"type": "Unheard"},
  ],
)
def test_a_decoder_has_a_bound(decoder):
  assert "decoder" in _refusal(lambda: _load(decoder=decoder))


@pytest.mark.parametrize("place", ["vocab", "added", "pieces"])
def test_the_longest_token(place):
  long, document = "x" * (tokenizer_outline.LONGEST_TOKEN + 1), llama2_document()
  if place == "vocab":
    document["model"]["vocab"][long] = 900
  elif place == "added":
    document["added_tokens"].append({"id": 900, "content": long, **FLAGS})
  else:
    document["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], [long, 0.0]]}
  assert "a token may have at most 16384 characters" in _refusal(lambda: BoundedTokenizer(json.dumps(document)))


def test_a_file_has_a_size(monkeypatch):
  monkeypatch.setattr(bounded_tokenizer, "TOKENIZER_BYTES", 1 << 20)
  assert "may have 1 MB" in _refusal(lambda: BoundedTokenizer(" " * (2 << 20)))
  assert "cannot be read" in _refusal(lambda: BoundedTokenizer("[" * 100000))


def test_a_panic_while_decoding_is_one_sentence(monkeypatch):
  class PanicException(BaseException):  # pyo3's has this name, and no place to import it from
    pass

  class Library:
    def decode(self, ids, **_):
      raise PanicException("index out of bounds\n at somewhere")

    encode = decode

  tokenizer = _load()
  tokenizer._tokenizer = Library()
  assert "index out of bounds at somewhere" in _refusal(tokenizer.decode, [1])
  tokenizer.encode = lambda text, **_: Library().decode(text)
  tokenizer._tokenizer.decode = lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
  with pytest.raises(KeyboardInterrupt):
    tokenizer.decode([1])


def test_a_child_that_was_ended_is_started_again(short_limits):
  tokenizer = _load(pre_tokenizer=_split(QUADRATIC))
  _refusal(tokenizer.encode, "1" * 90000)
  assert tokenizer.encode("hello 12").ids == _load().encode("hello 12").ids


def test_long_texts_have_the_same_ids_and_offsets(monkeypatch):
  text = "héllo wörld\n 12 " * 40
  here = _load().encode(text)
  assert not isinstance(here, bounded_tokenizer.Encoding)
  monkeypatch.setattr(bounded_tokenizer, "_AT_ONCE", 100)
  there = _load().encode(text, with_offsets=True)
  assert isinstance(there, bounded_tokenizer.Encoding)
  assert (there.ids, there.offsets) == (here.ids, here.offsets)


def test_ordinary_files_start_no_process(monkeypatch):
  """A child costs a second load of the vocabulary."""
  monkeypatch.setattr(bounded_tokenizer, "Confined", lambda *_, **__: None)
  assert _load().encode("hello").ids
  assert Tokenizer.load().encode("hello")
  byte_level = tiny_models.tiny_tokenizer(103)
  assert BoundedTokenizer(json.dumps(byte_level)).encode("abc").ids


# --- prompts that cannot fit ---


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_encoded(monkeypatch):
  tokenizer = Tokenizer(TokenizerFiles(json.dumps(llama2_document()), "{{ messages[0].content * 3000 }}"))
  covers = tokenizer._tokenizer.chars_per_token
  assert covers == max(map(len, llama2_document()["model"]["vocab"]))
  assert tokenizer.encode("a" * (covers * 50), max_tokens=50)  # whether it fits, its ids say
  monkeypatch.setattr(BoundedTokenizer, "encode", None)
  assert f"the context holds 50 tokens, and a token of this model has at most {covers} characters" in _refusal(
    tokenizer.encode, "a" * (covers * 50 + 1), 50
  )
  message = [{"role": "user", "content": "hello"}]
  assert "Shorten" in _refusal(lambda: tokenizer.chat(message, max_tokens=50))


@pytest.mark.parametrize(
  "change",
  [
    {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
    {"normalizer": {"type": "Replace", "pattern": {"String": "  "}, "content": " "}},
    {"pre_tokenizer": {"type": "WhitespaceSplit"}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"String": "x"}, "behavior": "Removed", "invert": False}},
    {"added_tokens": [{"id": 0, "content": "<unk>", **FLAGS, "rstrip": True}]},
    {"model": {**llama2_document()["model"], "byte_fallback": False}},
  ],
)
def test_a_file_that_drops_characters_bounds_no_prompt(change):
  assert tokenizer_outline.outline(llama2_document()).chars_per_token
  assert tokenizer_outline.outline({**llama2_document(), **change}).chars_per_token is None


@pytest.mark.parametrize("pre", sorted(CUTS))
def test_cuts_of_gguf_files_are_known(pre):
  """All but the few whose time is quadratic are cut in this process."""
  cuts = _sequence("pretokenizers", [*map(_split, CUTS[pre]), BYTES])
  growth = tokenizer_outline.outline({**llama2_document(), "pre_tokenizer": cuts}).growth
  assert (growth is None) == (pre in ("superbpe", "afmoe", "tiny_aya", "cohere2moe", "deepseek-llm"))


@pytest.mark.parametrize(
  "text", ["1" * 20000, "x" * 20000, "X" * 20000, " " * 20000 + "x", "\n" * 20000 + "x"], ids=lambda t: repr(t[0])
)
def test_the_list_of_linear_patterns(text):
  """A linear one takes 25 ms, a quadratic one more than a second."""
  for pattern in tokenizer_outline.LINEAR_CUTS:
    split, start = Split(Regex(pattern), "isolated"), time.process_time()
    split.pre_tokenize_str(text)
    assert time.process_time() - start < 0.5, pattern


# --- what is linear in the text of strangers ---


def test_many_special_tokens_in_a_message_cost_linear_time():
  def make(count):
    document = llama2_document()
    document["added_tokens"] += [{"id": 900 + i, "content": "e" * i + "x", **FLAGS, "special": True} for i in range(count)]
    return Tokenizer(TokenizerFiles(json.dumps(document), "{{ messages[0].content }}"))

  start = time.process_time()
  ids = make(500).chat([{"role": "user", "content": "</s>" * 2000 + "e" * 2000}])
  assert 2 not in ids and len(ids) >= 6000
  with pytest.raises(InputError, match="a special token has 600 characters, and 512 are the most"):
    make(600).chat([{"role": "user", "content": "</s>"}])
  assert time.process_time() - start < 10


def test_a_key_that_stands_twice_is_found_in_linear_time():
  keys = [f'"k{i}": 1' for i in range(200_000)]
  with pytest.raises(InputError, match="has 'k199999' twice"):
    parse_json("{" + ", ".join([*keys, keys[-1]]) + "}", pathlib.Path("config.json"))


@pytest.mark.parametrize(
  "value", ["x" * 3_000_000, ["x" * 3_000_000] * 9, 10**4000, {"a": ["b" * 1000] * 1000}, [[[[[["x" * 10**6]]]]]]]
)
def test_a_message_shows_the_beginning_of_a_value(value):
  assert len(shown(value)) <= 160 and repr(value)[:6] == shown(value)[:6]


def test_a_line_of_a_chat_has_a_length(monkeypatch, capsys):
  monkeypatch.setattr(answers, "_MAX_LINE", 20)
  monkeypatch.setattr(sys, "stdin", io.StringIO("y" * 3000 + "\n" + "\n"))
  assert answers.converse(None, None, None, chat=False, system=()) == []
  assert capsys.readouterr().err.count("this line has more. Write a shorter one.") == 1
