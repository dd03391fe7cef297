"""A manifest, a journal or metadata that lies is refused in one sentence, without leaving the folder or filling memory."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorstore

from jaxfp8.checkpoint import manifest_fields, weights_cache
from jaxfp8.checkpoint.journal import Journal
from jaxfp8.checkpoint.manifest import DamagedCheckpoint, digest_of
from jaxfp8.checkpoint.open import Checkpoint
from jaxfp8.checkpoint.readers import safetensors_file
from jaxfp8.checkpoint.save import save
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from tests.helpers import tiny_models
from tests.helpers.checkpoint_cases import model_of

NORM = "model.norm.weight[D]"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("checkpoint") / "whole"
  save(model_of("odd_tied", "channel"), folder)
  return folder


@pytest.fixture
def folder(whole, tmp_path):
  return shutil.copytree(whole, tmp_path / "copy")


def edit(folder, change):
  data = json.loads((folder / "jaxfp8.json").read_text())
  change(data)
  (folder / "jaxfp8.json").write_text(json.dumps(data | {"sha256": digest_of(data)}))


@pytest.mark.process
def test_every_field_with_every_kind_of_wrong_value(whole, tmp_path):
  """Some 900 manifests, in one process whose memory is bounded."""
  data = json.loads((whole / "jaxfp8.json").read_text())
  (whole / "tokenizer.json").write_text(json.dumps(tiny_models.tiny_tokenizer(50)))
  edit(whole, lambda data: data.update(tokenizer={"special_tokens": {"bos_token": "<s>"}, "add_bos": False}))
  command = [sys.executable, "-m", "tests.helpers.manifest_worker", str(whole), str(tmp_path / "scratch" / "copy")]
  ran = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=pathlib.Path(__file__).parents[2])
  (whole / "jaxfp8.json").write_text(json.dumps(data))
  (whole / "tokenizer.json").unlink()
  lines = ran.stdout.splitlines()
  assert lines[-1:] == ["end"] and not [line for line in lines if line.startswith("bad")], (
    ran.stdout[-3000:],
    ran.stderr[-1000:],
  )
  assert int(lines[-2].split()[0]) > 500


@pytest.mark.parametrize(("field", "value"), [("vocab_size", 2**31 - 1), ("d_ff", 2**30), ("d_model", 2**30)])
def test_a_small_folder_that_claims_a_large_model(folder, field, value):
  edit(folder, lambda data: data["config"].update({field: value}))
  with pytest.raises(
    DamagedCheckpoint, match=r"its manifest says that the arrays have [\d,]+ bytes, and the files have [\d,]+\."
  ):
    Checkpoint(folder)


def test_chunks_that_are_larger_than_their_array(folder):
  """They would be memory of any size, for an array that the manifest allows."""
  base = next(folder.glob("*/manifest.ocdbt")).parent
  store = {"driver": "ocdbt", "base": f"file://{base}/", "path": f"{NORM}/"}
  size = Checkpoint(folder).expected[NORM].shape[0]
  grid = {"name": "regular", "configuration": {"chunk_shape": [1 << 28]}}
  metadata = {"shape": [size], "data_type": "float32", "chunk_grid": grid, "fill_value": 1.0}
  spec = {"driver": "zarr3", "kvstore": store, "metadata": metadata}
  tensorstore.open(spec, create=True, delete_existing=True).result()
  edit(folder, lambda data: [data.pop(name) for name in ("files", "checksums", "blocks")])
  with pytest.raises(
    DamagedCheckpoint, match=r"model\.norm\.weight\[D\] of shape \(\d+,\) is stored in chunks that are larger"
  ):
    Checkpoint(folder).read_array(NORM)


# --- other records ---


@pytest.mark.parametrize(
  "entry",
  [
    {"group": ["x"], "sums": {}, "blocks": {}},
    {"group": "../outside", "sums": {}, "blocks": {}},
    {"group": "g", "sums": [], "blocks": {}},
    {"group": "g", "sums": {"a": 1}, "blocks": {}},
    {"group": "g", "sums": {}, "blocks": {"a": {"shape": "x", "xxh3_64": ""}}},
    {"group": "g"},
    ["group"],
    "9" * 5000,
    "[" * 100000,
  ],
)
def test_a_line_of_a_journal_that_no_writer_wrote_ends_it(tmp_path, entry):
  journal = Journal.create(tmp_path / "x.journal", "work")
  assert journal is not None
  journal.note_group("good", {"a": "0" * 64}, {"a": {"shape": [1], "xxh3_64": "0" * 16}})
  journal.close()
  line = (
    entry if isinstance(entry, str) else json.dumps(entry | {"sha256": digest_of(entry)} if isinstance(entry, dict) else entry)
  )
  with open(tmp_path / "x.journal", "a") as file:
    file.write(line + "\n")
  taken = Journal.take(tmp_path / "x.journal")
  assert taken is not None and taken.work == "work" and list(taken.groups) == ["good"]
  taken.close()


@pytest.mark.parametrize("content", ["[]", '{"x": 5}', '{"x": "../y"}', "[" * 100000, "9" * 5000, "{"])
def test_an_index_of_the_cache_that_is_none_is_empty(monkeypatch, content):
  monkeypatch.setattr(weights_cache.stored_files, "read", lambda *_: content.encode())
  assert weights_cache._read_index(pathlib.Path("x")) == {}


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"num_layers": 10**18}, r"num_layers must be at most 65,536; got 1,000,000"),
    ({"vocab_size": 2**33}, r"vocab_size must be at most 2,147,483,648"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number"),
    ({"name": 5}, "name must be a str; got 5"),
    ({"tied_embeddings": "no"}, "tied_embeddings must be a bool"),
    ({"eos_ids": ("1",)}, "special tokens must be whole numbers; got '1'"),
  ],
)
def test_sizes_of_a_config(change, says):
  fields = LlamaConfig.from_name("tiny").to_dict() | change
  with pytest.raises(InputError, match=says):
    LlamaConfig.from_dict(fields)


@pytest.mark.parametrize("shape", [[1] * 65, [1 << 63], [1 << 62] * 1000])
def test_shapes_of_a_safetensors_header(tmp_path, shape):
  header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
  (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + np.zeros(1, np.float32).tobytes())
  with pytest.raises(InputError, match="must hold dtype, shape and data_offsets of x"):
    safetensors_file.read_headers(tmp_path / "m.safetensors")


def test_names_that_lead_elsewhere():
  for name in ("a/b", "model.layers.0.mlp.up_proj.scale[F/128,D/128]"):
    manifest_fields.require_name(name)
  for name in ("", ".", "..", "/a/b", "a/../a/b", "./a/b", "a//b", "a/b/", "a\0b"):
    with pytest.raises(ValueError, match="must be named by their paths"):
      manifest_fields.require_name(name)


def test_formats_and_scales_are_those_of_the_layers():
  scale = "model.layers.1.mlp.up_proj.input_scale"
  manifest_fields.check_layers(2, [{}, {}], [scale])
  for formats, name in (([{}], scale), ([{}, {}], "model.layers.2.mlp.up_proj.input_scale"), ([{}, {}], "x")):
    with pytest.raises(ValueError, match="must"):
      manifest_fields.check_layers(2, formats, [name])
