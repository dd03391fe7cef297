"""The tokens that end an answer: of both formats, against llama.cpp's own list, and of stop strings that are special tokens."""

import json
import pathlib
from typing import Any

import pytest

from jaxfp8.checkpoint import readers
from jaxfp8.checkpoint.readers.gguf_special import CONTROL, USER_DEFINED, end_ids, token_types
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.errors import InputError
from jaxfp8.model.sampling import SamplingParams
from jaxfp8.serving.request_output import OutputCollector
from jaxfp8.text.tokenizer import Tokenizer
from tests.helpers import tiny_models

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
ENDS = json.loads((GOLDENS / "llama_cpp.json").read_text(encoding="utf-8"))["ends"]
NONE: Any = None


def _metadata(keys):
  return {key if "." in key else f"tokenizer.ggml.{key}": value for key, value in keys.items()}


@pytest.mark.parametrize("case", ENDS, ids=range(len(ENDS)))
def test_end_tokens_of_a_gguf_file_are_those_of_llama_cpp(case):
  metadata = _metadata(case["keys"])
  assert sorted(end_ids(metadata)) == case["ends"]
  types = token_types(metadata)
  assert [i for i, kind in enumerate(types) if kind == CONTROL] == case["hidden"]
  assert [i for i, kind in enumerate(types) if kind == USER_DEFINED] == case["shown"]


def test_sentencepiece_vocabularies_that_name_no_eos_have_token_2():
  keys: dict[str, Any] = {"model": "llama", "tokens": ["<unk>", "<s>", "</s>", "a"], "token_type": [2, 3, 3, 1]}
  assert end_ids(_metadata(keys)) == (2,)
  assert end_ids(_metadata(keys | {"tokens": ["<unk>", "<s>", "x", "a"], "eos_token_id": 3})) == (3,)
  assert end_ids({}) == ()


# --- folders ---


@pytest.fixture
def folder(tmp_path):
  config = tiny_models.make_config("one_layer_head_10")
  return tiny_models.write_hf_folder(tmp_path / "model", config, tiny_models.make_weights(config))


def _write(folder, name, **fields):
  (folder / name).write_text(json.dumps(fields))


def _end_ids(folder):
  return readers.open_source(folder).config.eos_ids


@pytest.mark.parametrize("token", ["a", {"content": "a", "lstrip": False}], ids=["text", "object"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_the_tokenizers_eos_is_an_end_token_beside_the_configs(folder, file, token):
  _write(folder, "tokenizer_config.json")
  assert _end_ids(folder) == (2,)
  _write(folder, file, eos_token=token)
  letter = tiny_models.tiny_tokenizer(103)["model"]["vocab"]["a"]
  assert _end_ids(folder) == (2, letter)
  _write(folder, "generation_config.json", eos_token_id=[5, 2])
  assert _end_ids(folder) == (2, 5, letter)


def test_an_eos_that_the_model_cannot_write_is_no_end_token(folder):
  document = tiny_models.tiny_tokenizer(103)
  document["added_tokens"].append({**document["added_tokens"][0], "id": 103, "content": "<|beyond|>"})
  _write(folder, "tokenizer.json", **document)
  _write(folder, "tokenizer_config.json", eos_token="<|beyond|>")
  assert _end_ids(folder) == (2,)
  _write(folder, "tokenizer_config.json", eos_token="<|unknown|>")
  assert _end_ids(folder) == (2,)


def test_weights_can_be_opened_whatever_is_wrong_with_the_tokenizer(folder):
  (folder / "tokenizer.json").write_text("{")
  assert _end_ids(folder) == (2,)
  (folder / "tokenizer.json").unlink()
  assert _end_ids(folder) == (2,)


@pytest.mark.parametrize("value", ["258", [[2]], 258.5, True, {"id": 2}, -1, [2, None]], ids=str)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_eos_id_that_is_no_id_is_named_with_its_file(folder, file, value):
  path = folder / file
  fields = json.loads(path.read_text()) if path.exists() else {}
  _write(folder, file, **{**fields, "eos_token_id": value})
  with pytest.raises(InputError, match=rf"eos_token_id in .*/{file} must be a token id.*; got "):
    readers.open_source(folder)


@pytest.mark.parametrize("value", [["</s>"], 2, {"content": ["</s>"]}, {"text": "</s>"}, True], ids=str)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("name", ["eos_token", "bos_token"])
def test_a_special_token_that_is_no_text_is_named_with_its_file(folder, file, name, value):
  _write(folder, file, **{name: value})
  with pytest.raises(InputError, match=rf"{name} in .*/{file} must be a text or an object.*; got "):
    readers.open_source(folder).tokenizer  # noqa: B018 - read at the first access


# --- requests ---


def _tokenizer(eos="</s>"):
  return Tokenizer(TokenizerFiles(json.dumps(tiny_models.tiny_tokenizer(103)), None, {"eos_token": eos}))


@pytest.mark.parametrize("stop", ["</s>", "<s>"])
def test_a_stop_string_that_is_one_special_token_stops_at_its_id(stop):
  tokenizer = _tokenizer()
  collector = OutputCollector(0, 1, SamplingParams(stop=("never", stop)), (), tokenizer)
  (letter,), special = tokenizer.encode("a")[-1:], tokenizer.special_id(stop)
  assert collector.push(letter, NONE, 0, last=False).text == "a"
  completion = collector.push(special or -1, NONE, 0, last=False).completion
  assert completion and (completion.text, completion.finish_reason) == ("a", "stop")


def test_other_special_tokens_do_not_stop():
  collector = OutputCollector(0, 1, SamplingParams(stop=("</s>",)), (), _tokenizer())
  assert collector.push(1, NONE, 0, last=False).completion is None


def test_the_tokenizers_end_ids_are_its_eos():
  assert _tokenizer().end_ids == (2,) and _tokenizer("<none>").end_ids == ()
  assert _tokenizer().special_id("a") is None


@pytest.mark.parametrize("ids", [("2",), (2.0,), (True,), (-1,), 2, "2"], ids=str)
def test_stop_token_ids_are_ids(ids):
  with pytest.raises(InputError, match="stop_token_ids must be token ids, in a tuple; got"):
    SamplingParams(stop_token_ids=ids)


@pytest.mark.parametrize("stop", ["</s>", ("",), (2,)], ids=str)
def test_stop_strings_are_strings(stop):
  with pytest.raises(InputError, match="stop must be strings that are not empty, of at most 4096 characters, in a tuple; got"):
    SamplingParams(stop=stop)
