"""What people pass as a checkpoint: it is read, or one sentence says what it is and which way leads out."""

import json
import os
import pathlib
import pickle
import struct

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxfp8.checkpoint import readers
from jaxfp8.checkpoint.manifest import MANIFEST, is_checkpoint
from jaxfp8.errors import InputError
from tests.helpers import tiny_models
from tests.helpers.gguf_files import write_gguf

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path):
  config = tiny_models.make_config("one_layer_head_10")
  return tiny_models.write_hf_folder(tmp_path / "model", config, tiny_models.make_weights(config))


def _gguf(path):
  config = tiny_models.make_config("one_layer_head_10")
  return write_gguf(path, config, tiny_models.make_weights(config), gguf.GGMLQuantizationType.F32)


def _refused(path):
  with pytest.raises(InputError) as error:
    readers.open_source(path)
  text = str(error.value)
  assert "\n" not in text and len(text) < 500, text
  return text


def _files(**content):
  """Writes files under a folder; `__` in a name stands for `/`."""

  def write(root: pathlib.Path):
    for name, data in content.items():
      path = root / name.replace("__", "/")
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return root

  return write


def _named(**files):
  return _files(**{name.replace("_dot_", "."): data for name, data in files.items()})


FOLDERS = {
  "empty": (_files(), "it is empty"),
  "adapter": (_named(adapter_config_dot_json="{}", adapter_model_dot_safetensors=b"x"), "a LoRA adapter. Merge it into"),
  "meta": (_named(consolidated_dot_00_dot_pth=b"PK\3\4", params_dot_json="{}"), "Meta's own format (consolidated.*.pth"),
  "meta in original": (_named(original__consolidated_dot_00_dot_pth=b"PK\3\4"), "Meta's own format in original/"),
  "mistral": (_named(consolidated_dot_safetensors=b"x", params_dot_json="{}"), "Mistral's own format"),
  "pytorch": (_named(pytorch_model_dot_bin=b"PK\3\4"), "PyTorch weights (*.bin). Save the model again as safetensors"),
  "onnx": (_named(onnx__model_dot_onnx=b"x"), "an ONNX model"),
  "tensorflow": (_named(tf_model_dot_h5=b"x"), "TensorFlow weights"),
  "flax": (_named(flax_model_dot_msgpack=b"x"), "Flax weights"),
  "no config": (_named(model_dot_safetensors=b"x"), "safetensors files. Fetch config.json too"),
  "unfinished": (_named(m_dot_gguf_dot_crdownload=b"x"), "m.gguf.crdownload is an unfinished download"),
  "folders": (_named(b__config_dot_json="{}", a__m_dot_gguf=b"GGUF", c__readme="x"), "its folders a, b look like checkpoints"),
  "hub": (_named(**{"models--o--m__refs__main": "x"}), "its folders models--o--m look like checkpoints"),
  "text": (_named(readme="x"), "neither config.json nor a .gguf file. Pass a Hugging Face folder or a GGUF file"),
  "config alone": (_named(config_dot_json="{}"), "holds no safetensors file of a model"),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_that_is_no_checkpoint_is_named_for_what_it_is(tmp_path, what):
  write, says = FOLDERS[what]
  assert says in _refused(write(tmp_path))


FILES = {
  "weights.pt": (pickle.dumps({}), "it holds PyTorch weights (pickle). Save them again"),
  "model.bin": (b"PK\x03\x04" + bytes(50), "it holds PyTorch weights"),
  "model.safetensors": (
    struct.pack("<Q", 2) + b"{}",
    "it is a safetensors file. Pass the folder that holds it and config.json",
  ),
  "config.json": (b"{}", "a checkpoint is a folder or a .gguf. Pass /"),
  "model.safetensors.index.json": (b"{}", "a checkpoint is a folder or a .gguf. Pass /"),
  "readme.md": (b"# A model", "it is a text file"),
  "empty.bin": (b"", "it is empty (0 bytes)"),
  "m.gguf.part": (b"GGUF", "it is an unfinished download. Finish or repeat"),
  "5f3a": (LFS.encode(), "it is a Git LFS pointer, not the file itself. Run `git lfs pull`"),
  "m.tar.gz": (b"\x1f\x8b\x08\x00", "it is compressed (gzip). Unpack it"),
  "m.onnx": (b"\x08\x07\x12\x07pytorch", "it is an ONNX file"),
  "error": (b"<!DOCTYPE html>", "it is a web page"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_checkpoint_is_named_by_its_content(tmp_path, name):
  data, says = FILES[name]
  (tmp_path / name).write_bytes(data)
  assert says in _refused(tmp_path / name)


@pytest.mark.parametrize("name", ["pipe", "pipe.gguf"])
def test_pipes_and_devices_are_refused_without_being_opened(tmp_path, name):
  os.mkfifo(tmp_path / name)  # opening it would wait for a writer
  assert "it is a named pipe. Pass a regular file" in _refused(tmp_path / name)
  assert "it is a device" in _refused("/dev/zero")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "model.safetensors.index.json"])
def test_a_git_lfs_pointer_is_named_anywhere_in_a_folder(folder, name):
  (folder / name).write_text(LFS)
  with pytest.raises(InputError, match=r"Git LFS pointer, not the file itself. Run `git lfs pull`"):
    _ = readers.open_source(folder).tokenizer


def test_a_pipe_in_the_place_of_the_weights_is_refused(folder):
  (folder / "model.safetensors").unlink()
  os.mkfifo(folder / "model.safetensors")
  assert "it is a named pipe" in _refused(folder)


def test_a_folder_of_the_hubs_cache_is_read_at_refs_main(folder, tmp_path):
  """Snapshots hold links to blobs, whose names are digests."""
  cache = tmp_path / "models--org--m"
  for revision in ("aaaa", "bbbb"):
    (cache / "snapshots" / revision).mkdir(parents=True)
  (cache / "blobs").mkdir()
  for path in folder.iterdir():
    path.rename(cache / "blobs" / f"b{path.name.replace('.', '')}")
    (cache / "snapshots" / "bbbb" / path.name).symlink_to(cache / "blobs" / f"b{path.name.replace('.', '')}")
  assert "refs/main names none. Pass one: " in _refused(cache)
  (cache / "refs").mkdir()
  (cache / "refs" / "main").write_text("bbbb\n")
  source = readers.open_source(cache)
  assert source.path == cache / "snapshots" / "bbbb" and source.files() == readers.source_files(cache)
  assert source.read(Q).shape == source.shape(Q)


def test_a_gguf_blob_without_an_ending_is_read(tmp_path):
  path = _gguf(tmp_path / "m.gguf").rename(tmp_path / "sha256-77")
  assert readers.open_source(path).config == readers.read_config(path)
  (tmp_path / "link.bin").symlink_to(path)
  readers.open_source(tmp_path / "link.bin").read(Q)


def test_gguf_files_beside_a_config_or_an_image_encoder_are_read(tmp_path):
  _gguf(tmp_path / "m.gguf")
  (tmp_path / "config.json").write_text('{"model_type": "llama"}')
  (tmp_path / "mmproj-m.gguf").write_bytes(b"GGUF")
  assert readers.open_source(tmp_path).path == tmp_path / "m.gguf"


def test_a_path_may_begin_with_the_home_folder(folder, monkeypatch):
  monkeypatch.setenv("HOME", str(folder.parent))
  assert readers.open_source("~/model").path == folder
  assert readers.read_config("~/model").d_model == readers.read_config(folder).d_model
  assert "there is no checkpoint at" in _refused("~no_such_user/model")
  (folder / MANIFEST).write_text("{}")
  assert is_checkpoint("~/model") and not is_checkpoint("~")


def test_a_copy_in_mistrals_format_beside_the_model_is_not_read(folder):
  path = (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
  (folder / "consolidated.safetensors").write_bytes(path.read_bytes())
  assert readers.open_source(folder).files()[-1] == path


def test_an_adapter_beside_the_model_is_refused(folder):
  (folder / "adapter_config.json").write_text("{}")
  assert "holds a LoRA adapter (adapter_config.json), which changes the weights" in _refused(folder)


def test_an_unfinished_download_of_a_shard_is_named(folder):
  shard = folder / "model-00001-of-00001.safetensors"
  (folder / "model.safetensors").rename(folder / (shard.name + ".incomplete"))
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q: shard.name}}))
  assert f"it is missing; {shard.name}.incomplete is an unfinished download of it" in _refused(folder)


# --- Names of tensors ---


def _rename(folder, rename):
  path = folder / "model.safetensors"
  tensors = {rename(name): value for name, value in load_file(path).items()}
  save_file(tensors, path)
  return tensors


PREFIXES = {
  "_orig_mod": lambda name: f"_orig_mod.{name}",
  "module": lambda name: f"module.{name}",
  "both": lambda name: f"module._orig_mod.{name}",
  "PEFT": lambda name: f"base_model.model.{name}",
  "language_model": lambda name: f"language_model.{name}",
  "model.language_model": lambda name: name.replace("model.", "model.language_model.", 1),
  "LlamaModel": lambda name: name.removeprefix("model."),
  "any other": lambda name: f"policy.llm.{name}",
  "LlamaModel in another": lambda name: f"llm.{name.removeprefix('model.')}",
  "compiled layers": lambda name: name.replace("layers.0.", "layers.0._orig_mod._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("what", PREFIXES)
def test_tensors_of_a_wrapped_model_are_read_with_a_note(folder, what):
  true = {name: readers.open_source(folder).read(name) for name in readers.open_source(folder).names()}
  renamed = _rename(folder, PREFIXES[what])
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(renamed, "model.safetensors")}))
  source = readers.open_source(folder)
  assert len(source.notes) == 1 and "read under the names of a LlamaForCausalLM, such as " in source.notes[0]
  for name, weight in true.items():
    np.testing.assert_array_equal(source.read(name), weight)


def test_a_llama_beside_tensors_of_another_module_is_named(folder):
  tensors = _rename(folder, lambda name: f"policy.{name}")
  save_file({**tensors, "value_head.weight": np.ones(3, np.float32)}, folder / "model.safetensors")
  assert "must hold model.embed_tokens.weight; got policy.model.embed_tokens.weight" in _refused(folder)


@pytest.mark.parametrize(("text", "reason"), [("", "it is empty"), ("<!DOCTYPE html><html>", "it is a web page")])
def test_what_stands_in_the_place_of_json_is_named(folder, text, reason):
  (folder / "config.json").write_text(text)
  assert f"config.json is not valid JSON: {reason}" in _refused(folder)


def test_a_header_that_is_cut_is_no_pickle(folder):
  header = b'{"' + b"x" * 1150
  (folder / "model.safetensors").write_bytes((1152).to_bytes(8, "little") + header[:92])  # the length begins like a pickle
  assert "pickle" not in _refused(folder)


def test_two_spellings_of_the_names_are_refused(folder):
  _rename(folder, lambda name: f"module.{name}" if "mlp" in name else name)
  assert "must have names of one spelling; got " in _refused(folder)


def test_a_tensor_in_two_spellings_is_refused(folder):
  tensors = _rename(folder, lambda name: f"_orig_mod.{name}")
  save_file({**tensors, Q: tensors[f"_orig_mod.{Q}"] * 2}, folder / "model.safetensors")
  assert f"of one spelling; got _orig_mod.{Q} and {Q}" in _refused(folder) or f"got {Q} and _orig_mod.{Q}" in _refused(folder)


def test_tensors_that_cannot_change_a_result_are_left_out_with_a_note(folder):
  tensors = load_file(folder / "model.safetensors")
  extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32), "model.position_ids": np.arange(4)}
  save_file({**tensors, **extra}, folder / "model.safetensors")
  (note,) = readers.open_source(folder).notes
  assert all(name in note for name in extra) and "not used" in note


FOREIGN = {
  "model.layers.0.self_attn.q_proj.lora_A.weight": "a LoRA adapter that is not merged",
  "model.layers.0.self_attn.q_proj.base_layer.weight": "a LoRA adapter that is not merged",
  "model.layers.0.self_attn.q_proj.qweight": "GPTQ or AWQ weights",
  "model.layers.0.self_attn.q_proj.weight.absmax": "bitsandbytes weights",
  "model.layers.0.self_attn.q_proj.scales": "quantized MLX weights",
  "layers.0.attention.wq.weight": "the names of Meta's or Mistral's own format",
  "vision_tower.patch.weight": "the parts of a model that sees images",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_names_of_another_format_are_named(folder, name):
  save_file({**load_file(folder / "model.safetensors"), name: np.zeros(3, np.float32)}, folder / "model.safetensors")
  assert f"holds {FOREIGN[name]}: {name}. " in _refused(folder)


# --- Faults of safetensors files ---


def _header(entries, data=bytes(64), length=None):
  text = entries.encode() if isinstance(entries, str) else json.dumps(entries).encode()
  return struct.pack("<Q", len(text) if length is None else length) + text + data


def _f32(start, stop, shape=None):
  return {"dtype": "F32", "shape": shape or [(stop - start) // 4], "data_offsets": [start, stop]}


FAULTS = {
  "overlap": (_header({"a": _f32(0, 40), "b": _f32(32, 64)}), "a and b share bytes from 32 to 40"),
  "twice": (_header('{"a": %s, "a": %s}' % ((json.dumps(_f32(0, 64)),) * 2)), "its header holds 'a' twice"),
  "past the end": (_header({"a": _f32(0, 32), "b": _f32(32, 128)}), "b has the bytes 32 to 128, and the data ends at byte 64"),
  "shape": (_header({"a": _f32(0, 64, [17])}), "a of dtype F32 and shape [17] needs 68 bytes; it has 64"),
  "shape of an unread dtype": (
    _header({"a": {"dtype": "I64", "shape": [7], "data_offsets": [0, 64]}}), "a of dtype I64 and shape [7] needs 56 bytes",
  ),
  "hole": (_header({"a": _f32(0, 16), "b": _f32(32, 64)}), "the bytes 16 to 32, between a and b, belong to no tensor"),
  "rest": (_header({"a": _f32(0, 16)}), "the last 48 bytes belong to no tensor"),
  "long header": (_header({}, length=2**40), "the header says that it is 1099511627776 bytes long, and the file has"),
  "no JSON": (_header('{"a": '), "its header is no JSON"),
  "no offsets": (_header({"a": {"dtype": "F32", "shape": [16]}}), "must hold dtype, shape and data_offsets of a; got"),
  "dtype": (_header({"a": {"dtype": "F31", "shape": [16], "data_offsets": [0, 64]}}), "F31"),
  "short": (b"\1\2\3", "and the file has 3"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_of_a_safetensors_file_names_the_tensor(folder, what):
  data, says = FAULTS[what]
  (folder / "model.safetensors").write_bytes(data)
  text = _refused(folder)
  assert text.startswith(f"readers: {folder / 'model.safetensors'} is not a whole safetensors file: ") and says in text, text
