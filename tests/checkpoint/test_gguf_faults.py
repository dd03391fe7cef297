"""Faults of GGUF files, each named: the key or tensor, the fault, and the way out that helps."""

import dataclasses
import struct

import gguf
import numpy as np
import pytest

from jaxfp8.checkpoint import readers
from jaxfp8.checkpoint.readers.gguf_header import read_header
from jaxfp8.errors import InputError
from tests.helpers import tiny_models
from tests.helpers.gguf_files import write_gguf

Type = gguf.GGMLQuantizationType
UINT8, UINT32, STRING, ARRAY = 0, 4, 8, 9


def _text(value):
  data = value.encode() if isinstance(value, str) else value
  return struct.pack("<Q", len(data)) + data


def _key(name, kind, payload):
  return _text(name) + struct.pack("<I", kind) + payload


def _tensor(name, *dimensions, kind=0, offset=0):
  return _text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


def _file(keys=(), tensors=(), data=bytes(256), *, version=3, num_keys=None, num_tensors=None):
  num_keys = len(keys) if num_keys is None else num_keys
  num_tensors = len(tensors) if num_tensors is None else num_tensors
  header = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + b"".join(keys) + b"".join(tensors)
  return header + bytes(-len(header) % 32) + data


A, B = _tensor("a", 8), _tensor("b", 8, offset=32)
LONG = _key("general.name", STRING, struct.pack("<Q", 2**40))
AGAIN, NEW = "Fetch the file again.", "Convert the model again with a current llama.cpp."
FAULTS = {
  "tensor count": (_file(num_tensors=2**63), "the header counts 9223372036854775808 tensors, more than 288 bytes", AGAIN),
  "key count": (_file(num_keys=2**63), "the header counts 9223372036854775808 metadata keys, more than 288 bytes", AGAIN),
  "version": (_file(version=99), "the file has version 99", NEW),
  "big-endian": (_file(version=3 << 24), "the file is big-endian", "Convert the model on, or for, a little-endian machine."),
  "long text": (_file([LONG]), "the metadata key 'general.name' needs 1099511627776 bytes at byte", AGAIN),
  "long key": (_file([struct.pack("<Q", 2**50)]), "metadata key 1 of 1 needs", AGAIN),
  "type of a key": (_file([_key("k", 77, b"")]), "the metadata key 'k' has the unknown type 77", AGAIN),
  "list": (_file([_key("k", ARRAY, struct.pack("<IQ", UINT8, 2**59))]), "'k' needs 576460752303423488 bytes", AGAIN),
  "list of texts": (_file([_key("k", ARRAY, struct.pack("<IQ", STRING, 2**59))]), "'k' counts 576460752303423488 texts", AGAIN),
  "list of lists": (_file([_key("k", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "'k' is a list of the type 9, which", AGAIN),
  "not UTF-8": (_file([_key("k", STRING, _text(b"\xff"))]), "the metadata key 'k' is no UTF-8 text", AGAIN),
  "key twice": (_file([_key("k", UINT8, b"1"), _key("k", UINT8, b"2")]), "the metadata key 'k' stands there twice", NEW),
  "alignment": (_file([_key("general.alignment", UINT32, struct.pack("<I", 3))]), "must be a power of two; got 3", AGAIN),
  "long name": (_file((), [struct.pack("<Q", 2**50)]), "the table's tensor 1 of 1 needs", AGAIN),
  "cut table": (_file((), [A[:-4]], b"")[:48], "tensor 'a' needs 4 bytes at byte", AGAIN),
  "dimensions": (_file((), [_text("a") + struct.pack("<I", 2**31)]), "tensor 'a' has 2147483648 dimensions", AGAIN),
  "rows": (_file((), [_tensor("a", 8, 2**59)]), "tensor 'a' of shape [576460752303423488, 8] ends at byte", AGAIN),
  "type 250": (_file((), [_tensor("a", 8, kind=250)]), "tensor 'a' has the unknown type 250", "or fetch the file again."),
  "beyond": (_file((), [_tensor("a", 8, offset=2**40)]), "tensor 'a' of shape [8] ends at byte 10995116", AGAIN),
  "misaligned": (_file((), [_tensor("a", 8, offset=4)]), "tensor 'a' begins at offset 4, no multiple of the file's", AGAIN),
  "part of a block": (_file((), [_tensor("a", 40, kind=8)]), "rows of tensor 'a' have 40 numbers, no multiple of Q8", AGAIN),
  "overlap": (_file((), [_tensor("a", 9), B]), "tensors 'a' and 'b' share the bytes from", AGAIN),
  "same bytes": (_file((), [A, _tensor("b", 8)]), "tensors 'a' and 'b' share the bytes from", AGAIN),
  "tensor twice": (_file((), [A, _tensor("a", 8, offset=32)]), "tensor 'a' stands in the table twice", NEW),
  "empty": (b"", "it is empty (0 bytes)", AGAIN),
  "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "it is a Git LFS pointer", "Run `git lfs pull`"),
  "page": (b"<!DOCTYPE html><html>", "it is a web page, which a server sent", "Log in if the model asks for it"),
  "older ggml": (b"tjgg" + bytes(60), "it is a ggml file from before GGUF", NEW),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_of_a_gguf_file_is_named(tmp_path, what):
  data, fault, way_out = FAULTS[what]
  path = tmp_path / "m.gguf"
  path.write_bytes(data)
  with pytest.raises(InputError) as error:
    readers.open_source(path)
  text = str(error.value)
  assert text.startswith(f"readers: {path} is not a whole GGUF file") and fault in text and way_out in text, text
  assert "\n" not in text and len(text) < 400


def test_a_file_without_a_fault_is_read(tmp_path):
  """Else the files above might be refused for another reason."""
  (tmp_path / "m.gguf").write_bytes(_file([_key("k", UINT8, b"\x07")], [A, B]))
  header = read_header(tmp_path / "m.gguf")
  assert header.metadata == {"k": 7} and [t.stop - t.start for t in header.tensors.values()] == [32, 32]


NOT_MODELS = {
  "vocabulary": ({"general.architecture": "llama", "tokenizer.ggml.tokens": ["a"]}, "holds a vocabulary and no weights"),
  "mmproj": ({"general.architecture": "clip"}, "is the image encoder (mmproj) of a model"),
  "adapter": ({"general.architecture": "llama", "general.type": "adapter"}, "is a LoRA adapter"),
  "imatrix": ({"general.type": "imatrix"}, "is an importance matrix"),
}


@pytest.mark.parametrize("what", NOT_MODELS)
def test_a_gguf_file_that_is_no_language_model_is_named(tmp_path, what):
  fields, says = NOT_MODELS[what]
  keys = [
    _key(k, STRING, _text(v)) if isinstance(v, str) else _key(k, ARRAY, struct.pack("<IQ", STRING, len(v)) + _text(v[0]))
    for k, v in fields.items()
  ]
  (tmp_path / "m.gguf").write_bytes(_file(keys, () if what == "vocabulary" else [A]))
  for read in (readers.open_source, readers.read_config):
    with pytest.raises(InputError) as error:
      read(tmp_path / "m.gguf")
    assert says in str(error.value)


def test_a_tensor_under_two_names_is_refused(tmp_path):
  config = tiny_models.make_config("one_layer_head_10")
  extra = {"model.layers.0.mlp.up_proj.weight": np.zeros((config.d_ff, config.d_model), np.float32)}
  path = write_gguf(tmp_path / "m.gguf", config, tiny_models.make_weights(config), Type.F32, extra=extra)
  with pytest.raises(InputError, match=r"once; blk\.0\.ffn_up\.weight .*model\.layers\.0\.mlp\.up_proj\.weight .* are both"):
    readers.open_source(path)


# --- Models in parts ---


def _parts(folder, count=3, total=None, **change):
  """A model in parts, as llama-gguf-split writes them; `change`: per part number, other metadata."""
  config = tiny_models.make_config("one_layer_head_10")
  weights = tiny_models.make_weights(config)
  names = list(weights)
  for index in range(count):
    held = {name: weights[name] for name in names[index::count]}
    fields = {
      "split.count": count,
      "split.no": index,
      "split.tensors.count": total or len(names),
      **change.get(f"part{index}", {}),
    }
    write_gguf(folder / f"m-{index + 1:05}-of-{count:05}.gguf", config, held, Type.F32, metadata=fields)
  return config, weights


@pytest.mark.parametrize("given", ["m-00001-of-00003.gguf", "m-00003-of-00003.gguf", ""])
def test_a_model_in_parts_is_read_from_any_part_or_the_folder(tmp_path, given):
  config, weights = _parts(tmp_path)
  source = readers.open_source(tmp_path / given)
  assert source.config == dataclasses.replace(config, name=source.config.name) == readers.read_config(tmp_path / given)
  assert source.files() == readers.source_files(tmp_path / given) == sorted(tmp_path.iterdir())
  for name, weight in weights.items():
    np.testing.assert_array_equal(source.read(name), weight)


def test_parts_that_are_missing_or_do_not_belong_together_are_named(tmp_path):
  _parts(tmp_path)
  second = tmp_path / "m-00002-of-00003.gguf"
  moved = second.rename(tmp_path / "m-00002-of-00003.gguf.part")
  for given in (tmp_path, tmp_path / "m-00001-of-00003.gguf"):
    with pytest.raises(InputError, match=r"part 2 of 3, \S+, is missing; m-00002-of-00003.gguf.part is an unfinished download"):
      readers.open_source(given)
  moved.rename(second)
  data = (tmp_path / "m-00001-of-00003.gguf").read_bytes()
  second.write_bytes(data)
  with pytest.raises(InputError, match=r"must be part 1 \(from 0\) of 3 .* got part 0 of 3"):
    readers.open_source(tmp_path)
  (tmp_path / "alone").mkdir()
  (tmp_path / "alone" / "m.gguf").write_bytes(data)
  with pytest.raises(InputError, match=r"is part 0 \(from 0\) of 3 by its metadata, and its name does not say so"):
    readers.open_source(tmp_path / "alone")


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"part1": {"general.type": "model", "split.tensors.count": 50}}, r"split\.tensors\.count is 12 in .* and 50 in m-00002"),
    ({"total": 13}, r"says that its 3 parts hold 13 tensors; they hold 12"),
  ],
)
def test_parts_of_different_models_are_refused(tmp_path, change, says):
  _parts(tmp_path, **change)
  with pytest.raises(InputError, match=says):
    readers.open_source(tmp_path)


def test_two_models_in_parts_are_two_models(tmp_path):
  _parts(tmp_path, 2)
  for path in sorted(tmp_path.iterdir()):
    (tmp_path / path.name.replace("m-", "n-")).write_bytes(path.read_bytes())
  with pytest.raises(InputError, match=r"holds 2 GGUF files. Pass one of them: m-00001-of-00002.gguf, n-00001-of-00002.gguf"):
    readers.open_source(tmp_path)
