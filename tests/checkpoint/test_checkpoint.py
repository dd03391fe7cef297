"""Checkpoints: what is written comes back bit for bit, for any mesh; what is not whole is refused, or never appears."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jaxfp8.checkpoint import convert, layout
from jaxfp8.checkpoint import device_arrays as filling
from jaxfp8.checkpoint import load as checkpoint
from jaxfp8.checkpoint.manifest import Manifest, orbax, orbax_context, read_manifest
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.checkpoint.writer import CheckpointWriter
from jaxfp8.errors import InputError
from jaxfp8.model.llama import Llama
from jaxfp8.recipe import LayerFormat, Recipe
from jaxfp8.sharding import make_mesh
from tests.helpers import tiny_llamas, tiny_models

RECIPES = {
  "channel": Recipe("fp8", "channel"),
  "tensor": Recipe("fp8", "tensor", "f32"),
  "block128": Recipe("fp8", "block128", kv="fp8"),
  "bf16": Recipe("bf16"),
  "f32": Recipe("f32", kv="f32"),
}
# H = 96 and F = 300: heads and columns that are no whole blocks; D = 200 in one block and a part.
BLOCKS = dataclasses.replace(
  tiny_models.make_config("gqa_6_2_linear"), d_model=200, d_ff=300, num_heads=4, num_kv_heads=2, head_dim=96, name="blocks"
)
CONFIGS = {
  "odd_tied": tiny_models.make_config("mha_tied"),
  "untied": tiny_models.make_config("gqa_9_3_untied"),
  "blocks": BLOCKS,
  "whole_blocks": dataclasses.replace(BLOCKS, head_dim=128),
}


def leaves(model):
  return jax.tree.leaves(nnx.state(model))


def assert_same(a: Llama, b: Llama):
  assert (a.config, a.recipe, tuple(a.formats)) == (b.config, b.recipe, tuple(b.formats))
  for x, y in zip(leaves(a), leaves(b), strict=True):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@functools.cache
def model_of(config, recipe):
  return tiny_llamas.load(CONFIGS[config], RECIPES[recipe])


class TestRoundTrip:
  @pytest.mark.parametrize(
    ("config", "recipe"), [("odd_tied", "channel"), ("blocks", "block128"), ("untied", "bf16"), ("odd_tied", "f32")]
  )
  def test_save_and_load(self, tmp_path, config, recipe):
    model = model_of(config, recipe)
    checkpoint.save(model, tmp_path / "a")
    assert_same(checkpoint.load_checkpoint(tmp_path / "a"), model)

  def test_convert_and_load(self, tmp_path):
    """A conversion gives the arrays that loading the source directly gives, and keeps tokenizer and provenance."""
    text = TokenizerFiles("{}", "{{ x }}", {"bos_token": "<s>"}, True)
    source = tiny_llamas.source("gqa_9_3_untied")
    type(source).tokenizer, before = property(lambda self: text), type(source).tokenizer
    steps = []
    try:
      convert.convert_checkpoint(
        source, tmp_path / "a", RECIPES["tensor"], provenance={"why": "ü"}, progress=lambda *done: steps.append(done)
      )
    finally:
      type(source).tokenizer = before
    assert_same(checkpoint.load_checkpoint(tmp_path / "a"), model_of("untied", "tensor"))
    manifest = read_manifest(tmp_path / "a")
    assert manifest.tokenizer == text
    assert {"source": "arrays", "why": "ü", "dialect": "plain"}.items() <= manifest.provenance.items()
    assert steps[-1][0] == steps[-1][1] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]

  def test_mixed_formats(self, tmp_path):
    formats = (LayerFormat.uniform("bf16"), LayerFormat("fp8", "bf16", "fp8", "f32"), LayerFormat.uniform("fp8"))
    config, recipe = CONFIGS["untied"], Recipe("fp8", "channel")
    rng = np.random.default_rng(0)
    arrays = {
      key: (np.abs(rng.standard_normal(shape)) + 0.1).astype(np.float32).astype(dtype)
      for group in layout.checkpoint_arrays(config, recipe, formats)
      for key, (shape, dtype) in group.items()
    }
    read = filling.whole_arrays(lambda keys: {key: arrays[key] for key in keys})
    model = filling.fill(checkpoint.abstract_model(config, recipe, formats, None), read, None)
    checkpoint.save(model, tmp_path / "a")
    assert_same(checkpoint.load_checkpoint(tmp_path / "a"), model)

  def test_activations_and_pages_are_the_users_choice(self, tmp_path):
    checkpoint.save(model_of("odd_tied", "channel"), tmp_path / "a")
    model = checkpoint.load_checkpoint(tmp_path / "a", activations="fp8", kv="fp8")
    assert model.recipe == Recipe("fp8", "channel", "fp8", "fp8")
    with pytest.raises(InputError, match="activations must be one of"):
      checkpoint.load_checkpoint(tmp_path / "a", activations="int4")

  def test_load_takes_any_kind(self, tmp_path):
    """One `load` for our checkpoints and for others'; weights are never quantized twice."""
    weights = tiny_models.make_weights(CONFIGS["odd_tied"])
    tiny_models.write_hf_folder(tmp_path / "hf", CONFIGS["odd_tied"], weights)
    direct = convert.load(tmp_path / "hf", RECIPES["channel"])
    checkpoint.save(direct, tmp_path / "ours")
    assert_same(convert.load(tmp_path / "ours"), direct)
    with pytest.raises(InputError, match="never requantized"):
      convert.load(tmp_path / "ours", RECIPES["block128"])


class TestMeshes:
  def test_a_cut_model_is_not_saved(self, tmp_path):
    mesh = make_mesh(CONFIGS["untied"], 3)
    model = tiny_llamas.load("gqa_9_3_untied", RECIPES["f32"], mesh=mesh)
    with pytest.raises(InputError, match="loaded with tensor=1; got tensor=3"):
      checkpoint.save(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())

  def test_impossible_meshes(self):
    with pytest.raises(InputError, match="9 devices; 8 are here"):
      make_mesh(CONFIGS["untied"], 9)
    with pytest.raises(InputError, match="possible are 1, 3, 9"):
      make_mesh(CONFIGS["untied"], 2)


def manifest_of(config, recipe) -> Manifest:
  formats = (LayerFormat.uniform(recipe.weights),) * config.num_layers
  return Manifest(config, recipe, formats, None, {})


class TestWriting:
  """A checkpoint is whole, or it does not exist, and nothing else is left behind."""

  def test_an_exception_leaves_nothing(self, tmp_path):
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path / "a", manifest_of(CONFIGS["untied"], Recipe())) as writer:
      writer.write({"x": np.ones(3, np.float32)})
      raise ZeroDivisionError
    assert not list(tmp_path.iterdir())

  def test_bad_weights_leave_nothing(self, tmp_path):
    class Broken(tiny_llamas.ArraySource):
      def read(self, name):
        if "layers.2" in name:
          raise InputError("weights must be finite")
        return super().read(name)

    source = Broken(CONFIGS["untied"], tiny_models.make_weights(CONFIGS["untied"]))
    with pytest.raises(InputError, match="finite"):
      convert.convert_checkpoint(source, tmp_path / "deep" / "a", Recipe())
    assert not list((tmp_path / "deep").iterdir())

  def test_an_existing_folder_is_kept(self, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "precious").write_text("x")
    with pytest.raises(InputError, match="exists already"):
      checkpoint.save(model_of("odd_tied", "f32"), tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a" / "precious").exists()

  def test_a_folder_that_cannot_be_written(self, tmp_path):
    """A file stands where a folder would have to be made (permissions do not stop root)."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write .*pass another folder or free space"):
      checkpoint.save(model_of("odd_tied", "f32"), tmp_path / "file" / "a")

  def test_a_full_disk(self, tmp_path, monkeypatch):
    """The system refuses while the last files are written."""

    def full(*args, **kwargs):
      raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"No space left on device\. Nothing was left behind"):
      checkpoint.save(model_of("odd_tied", "f32"), tmp_path / "a")
    assert not list(tmp_path.iterdir())

  def test_a_killed_process_leaves_no_checkpoint(self, tmp_path):
    """SIGKILL between two groups: what is left is not called by the checkpoint's name, and does not stop the next one."""
    script = f"""
      import os, signal, sys
      sys.path.insert(0, {str(pathlib.Path(__file__).parents[2])!r})
      import numpy as np
      from tests.checkpoint import test_checkpoint as t
      writer = t.CheckpointWriter({str(tmp_path / "a")!r}, t.manifest_of(t.CONFIGS["odd_tied"], t.Recipe()))
      writer.__enter__().write({{"x": np.ones(1000, np.float32)}})
      os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, timeout=120)
    assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()[-2000:]
    assert not (tmp_path / "a").exists() and list(tmp_path.iterdir())
    checkpoint.save(model_of("odd_tied", "f32"), tmp_path / "a")
    assert_same(checkpoint.load_checkpoint(tmp_path / "a"), model_of("odd_tied", "f32"))


class TestDamage:
  """Each damage is one InputError of one sentence or two that names the folder."""

  @pytest.fixture(scope="class")
  @classmethod
  def whole(cls, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "whole"
    checkpoint.save(model_of("odd_tied", "channel"), folder)
    return folder

  @pytest.fixture
  def folder(self, whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")

  @staticmethod
  def refused(folder, *words):
    with pytest.raises(InputError) as caught:
      checkpoint.load_checkpoint(folder)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message and len(message) < 700
    assert all(word in message for word in words), message

  @staticmethod
  def edit(folder, change):
    path = folder / "jaxfp8.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))

  def test_the_copy_itself_is_fine(self, folder):
    assert_same(checkpoint.load_checkpoint(folder), model_of("odd_tied", "channel"))

  def test_no_checkpoint(self, tmp_path):
    self.refused(tmp_path, "no whole checkpoint")

  def test_a_newer_format(self, folder):
    self.edit(folder, lambda data: data.update(format_version=99))
    self.refused(folder, "format version 99", "Install a newer jaxfp8")

  @pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1}', '{"format_version": "x"}', "\udcff"])
  def test_a_broken_manifest(self, folder, text):
    (folder / "jaxfp8.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    self.refused(folder, "no whole checkpoint")

  def test_an_unknown_field(self, folder):
    self.edit(folder, lambda data: data["config"].update(experts=8))
    with pytest.raises(InputError, match="experts"):
      checkpoint.load_checkpoint(folder)

  def test_another_shape(self, folder):
    self.edit(folder, lambda data: data["config"].update(d_ff=90))
    self.refused(folder, "is damaged", "(90, 52)", "(91, 52)")

  def test_another_dtype(self, folder):
    """Orbax alone would cast float8 to bf16 without a word."""

    def change(data):
      data["recipe"]["weights"] = "bf16"
      data["formats"] = [dict.fromkeys(("qkv", "o", "gate_up", "down"), "bf16")] * 2

    self.edit(folder, change)
    self.refused(folder, "is damaged", "bfloat16", "float8_e4m3fn")

  def test_a_missing_array(self, folder):
    self.edit(folder, lambda data: data["config"].update(tied_embeddings=False))
    self.refused(folder, "lm_head.weight[V,D]", "nothing")

  @pytest.mark.parametrize("damage", ["remove", "truncate", "empty"])
  def test_a_damaged_file(self, folder, damage):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "jaxfp8.json"]
    largest = max(files, key=lambda path: path.stat().st_size)
    if damage == "remove":
      largest.unlink()
    else:
      largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2] if damage == "truncate" else b"")
    self.refused(folder, "is damaged", "Remove the folder and convert again")

  def test_orbax_does_cast(self, tmp_path):
    """The trap that dtypes are compared for. If this fails, Orbax has learnt to refuse, and the comparison may go."""
    ocp = orbax()
    with orbax_context(ocp):
      ocp.partial.save(tmp_path / "x", {"w": np.ones((4, 4), ml_dtypes.float8_e4m3fn)})
      ocp.partial.finalize(tmp_path / "x")
      loaded = ocp.load(tmp_path / "x", {"w": np.zeros((4, 4), ml_dtypes.bfloat16)})
    assert loaded["w"].dtype == ml_dtypes.bfloat16
