"""Hugging Face folders: what the reader hands out, and what it refuses, each time in one clear sentence."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxfp8.checkpoint import readers
from jaxfp8.checkpoint.readers.source import expected_tensors
from jaxfp8.errors import InputError
from tests.helpers import tiny_models

INDEX = "model.safetensors.index.json"


def _bytes_of(array):
  return np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize(("case", "shards"), [("mha_tied", 1), ("gqa_9_3_untied", 3)])
def test_a_folder_gives_back_every_bit(tmp_path, case, shards, dtype):
  config = tiny_models.make_config(case)
  weights = tiny_models.make_weights(config)
  folder = tiny_models.write_hf_folder(tmp_path / case, config, weights, dtype=dtype, shards=shards)
  source = readers.open_source(folder)
  assert source.config == readers.read_config(folder) == readers.read_config(folder / "config.json") == config
  assert set(source.names()) == set(weights)
  for name, weight in weights.items():
    array = source.read(name)
    assert source.dtype(name) == array.dtype == np.dtype(dtype)
    assert source.shape(name) == array.shape == weight.shape
    assert _bytes_of(array) == _bytes_of(weight.astype(dtype)), name


@pytest.mark.parametrize("case", tiny_models.CASES)
def test_expected_tensors_are_transformers_own(case):
  config = tiny_models.make_config(case)
  weights = tiny_models.make_weights(config)  # whose names transformers accepted when the goldens were made
  assert expected_tensors(config) == {name: weight.shape for name, weight in weights.items()}


def test_files_are_what_determines_the_model(tmp_path):
  folder = _folder(tmp_path, shards=2)
  (folder / "README.md").write_text("not read")
  (folder / "generation_config.json").write_text("{}")
  files = readers.open_source(folder).files()
  assert files == readers.source_files(folder)
  assert {path.name for path in files} == {
    "config.json", "generation_config.json", INDEX, "tokenizer.json", "tokenizer_config.json",
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
  }  # fmt: skip


def test_generation_config_adds_eos_ids(tmp_path):
  folder = _folder(tmp_path)
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2, 7]}))
  assert readers.open_source(folder).config.eos_ids == (2, 5, 7)


def test_a_head_beside_tied_embeddings_is_not_used(tmp_path):
  folder = _folder(tmp_path)
  _edit_tensors(folder, lambda t: {**t, "lm_head.weight": np.zeros((1, 1), np.int8)})
  assert "lm_head.weight" not in readers.open_source(folder).names()


def test_rotary_buffers_of_old_exports_are_skipped(tmp_path):
  folder = _folder(tmp_path)
  _edit_tensors(folder, lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
  readers.open_source(folder)


def test_the_tokenizer_of_a_folder(tmp_path):
  folder = _folder(tmp_path)
  files = readers.open_source(folder).tokenizer
  assert files.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
  assert files.chat_template == tiny_models.CHAT_TEMPLATE
  assert not files.add_bos  # tokenizer.json itself writes BOS
  templates = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
  settings = {"add_bos_token": False, "chat_template": templates}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
  files = readers.open_source(folder).tokenizer
  assert (files.chat_template, files.add_bos, files.special_tokens) == ("D", False, {"bos_token": "<s>"})
  (folder / "chat_template.jinja").write_text("J")
  assert readers.open_source(folder).tokenizer.chat_template == "J"


# --- What is refused ---


def _folder(tmp_path, shards=1, **options):
  config = tiny_models.make_config("mha_tied")
  return tiny_models.write_hf_folder(tmp_path / "model", config, tiny_models.make_weights(config), shards=shards, **options)


def _edit_tensors(folder, edit):
  path = folder / "model.safetensors"
  save_file(edit(load_file(path)), path)


def _edit_json(path, **change):
  path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def _with(name, value):
  """Edits one element of one tensor."""

  def edit(tensors):
    tensors[name] = np.array(tensors[name])
    tensors[name].flat[77] = value
    return tensors

  return lambda folder: _edit_tensors(folder, edit)


def _cut(name, size):
  def cut(folder):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: size if size >= 0 else len(data) + size])

  return cut


def _index(**mapping):
  def write(folder):
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"] |= mapping
    (folder / INDEX).write_text(json.dumps(content))

  return write


Q = "model.layers.1.self_attn.q_proj.weight"
BAD_FOLDERS = {
  "no config": (1, lambda f: (f / "config.json").unlink(), "neither config.json nor a .gguf"),
  "config is no json": (1, lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
  "config is a list": (1, lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object; got list"),
  "config is bytes": (1, lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "cannot read .*config.json"),
  "no weights": (1, lambda f: (f / "model.safetensors").unlink(), "no safetensors file"),
  "pytorch weights": (1, lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "again as safetensors"),
  "index absent": (2, lambda f: (f / INDEX).unlink(), f"2 safetensors files and no {INDEX}"),
  "missing shard": (2, lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002.*missing"),
  "path outside": (2, _index(x="../other.safetensors"), "own folder; .* names '../other.safetensors'"),
  "absolute path": (2, _index(x="/etc/passwd"), "own folder; .* names '/etc/passwd'"),
  "shard is a number": (2, _index(x=3), "names 3"),
  "empty index": (2, lambda f: (f / INDEX).write_text("{}"), "must hold a weight_map"),
  "index lies": (2, _index(**{"model.extra.weight": "model-00001-of-00002.safetensors"}), "says that model.extra.weight"),
  "truncated data": (1, _cut("model.safetensors", -10), "not a whole safetensors file"),
  "truncated header": (1, _cut("model.safetensors", 100), "not a whole safetensors file"),
  "empty file": (1, _cut("model.safetensors", 0), "not a whole safetensors file"),
  "truncated shard": (2, _cut("model-00002-of-00002.safetensors", -1), "00002.safetensors is not a whole"),
  "wrong shape": (1, lambda f: _edit_tensors(f, lambda t: {**t, Q: t[Q].T.copy()}), rf"{Q}.* \[32, 52\] .* \[52, 32\]"),
  "other config": (1, lambda f: _edit_json(f / "config.json", intermediate_size=92), r"\[92, 52\] by .* got \[91, 52\]"),
  "missing tensor": (1, lambda f: _edit_tensors(f, lambda t: (t.pop(Q), t)[1]), f"must hold {Q}"),
  "untied, no head": (1, lambda f: _edit_json(f / "config.json", tie_word_embeddings=False), "not tied.*lm_head"),
  "bias": (
    1,
    lambda f: _edit_tensors(f, lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}),
    "model.layers.0.self_attn.q_proj.bias in .* holds 1.0 at",
  ),
  "int8": (1, lambda f: _edit_tensors(f, lambda t: {**t, Q: t[Q].astype(np.int8)}), f"{Q}.*got I8"),
  "float64": (1, lambda f: _edit_tensors(f, lambda t: {**t, Q: t[Q].astype(np.float64)}), f"{Q}.*got F64"),
  "float8": (1, lambda f: _edit_tensors(f, lambda t: {**t, Q: t[Q].astype(ml_dtypes.float8_e4m3fn)}), f"{Q} .*needs one scale"),
  "quantization_config": (1, lambda f: _edit_json(f / "config.json", quantization_config={"quant_method": "gptq"}), "'gptq'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_FOLDERS)
def test_a_bad_folder_is_one_clear_sentence(tmp_path, what):
  shards, spoil, says = BAD_FOLDERS[what]
  folder = _folder(tmp_path, shards)
  spoil(folder)
  with pytest.raises(InputError, match=says) as error:
    readers.open_source(folder)
  _is_clear(error)


def _is_clear(error):
  text = str(error.value)
  assert "\n" not in text and len(text) < 400 and text.split(":")[0] in ("readers", "config"), text


def test_a_tensor_in_two_shards(tmp_path):
  folder = _folder(tmp_path, shards=2)
  first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
  save_file({**load_file(second), "model.embed_tokens.weight": load_file(first)["model.embed_tokens.weight"]}, second)
  with pytest.raises(InputError, match=r"one shard only; model\.embed_tokens\.weight"):
    readers.open_source(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
def test_nan_and_inf_are_named(tmp_path, value, dtype):
  folder = _folder(tmp_path, dtype=dtype)
  _with(Q, value)(folder)
  source = readers.open_source(folder)
  source.read("model.norm.weight")
  with pytest.raises(InputError, match=rf"finite; {Q}.* is {value!s} at \[1, 25\]"):
    source.read(Q)


def test_large_finite_values_pass(tmp_path):
  folder = _folder(tmp_path, dtype=np.float16)
  _with(Q, np.finfo(np.float16).max)(folder)
  assert readers.open_source(folder).read(Q).max() == 65504


def test_no_tokenizer_is_an_error_only_for_text(tmp_path):
  source = readers.open_source(_folder(tmp_path, tokenizer=False))
  source.read(Q)
  with pytest.raises(InputError, match=r"no tokenizer\.json"):
    _ = source.tokenizer


def test_paths_that_are_no_checkpoint(tmp_path):
  with pytest.raises(InputError, match=r"no checkpoint at .*absent"):
    readers.open_source(tmp_path / "absent")
  with pytest.raises(InputError, match=r"neither config\.json nor a \.gguf"):
    readers.open_source(tmp_path)
  (tmp_path / "weights.bin").write_bytes(b"x")
  with pytest.raises(InputError, match=r"must be a \.gguf; got"):
    readers.open_source(tmp_path / "weights.bin")
  for name in ("a.gguf", "b.gguf"):
    (tmp_path / name).write_bytes(b"GGUF")
  with pytest.raises(InputError, match=r"2 GGUF files.*a\.gguf, b\.gguf"):
    readers.open_source(tmp_path)
  for absent in ("no-such-model", str(tmp_path / "x.gguf"), str(tmp_path / "config.json"), "some/folder"):
    with pytest.raises(InputError):
      readers.read_config(absent)


def test_default_model_absent(monkeypatch):
  monkeypatch.setattr(readers, "_DEFAULT_PACKAGE", "no_such_package")
  with pytest.raises(InputError, match="Pass --checkpoint"):
    readers.default_model()
