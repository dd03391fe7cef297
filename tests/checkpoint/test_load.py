"""Models come back from a checkpoint bit for bit, by every way in, for any mesh."""

import dataclasses

import numpy as np
import pytest

from jaxfp8.checkpoint import convert, load, stored_arrays
from jaxfp8.checkpoint.device_arrays import load_arrays, whole_arrays
from jaxfp8.checkpoint.manifest import read_manifest
from jaxfp8.checkpoint.save import save
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.errors import InputError
from jaxfp8.recipe import LayerFormat, Recipe
from jaxfp8.sharding import make_mesh
from tests.helpers import tiny_llamas, tiny_models
from tests.helpers.checkpoint_cases import CONFIGS, RECIPES, assert_same, model_of


class TestRoundTrip:
  @pytest.mark.parametrize(
    ("config", "recipe"), [("odd_tied", "channel"), ("blocks", "block128"), ("untied", "bf16"), ("odd_tied", "f32")]
  )
  def test_save_and_load(self, tmp_path, config, recipe):
    model = model_of(config, recipe)
    save(model, tmp_path / "a")
    assert_same(load.load(tmp_path / "a"), model)

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
    assert_same(load.load(tmp_path / "a"), model_of("untied", "tensor"))
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
      for group in stored_arrays.checkpoint_arrays(config, recipe, formats)
      for key, (shape, dtype) in group.items()
    }
    read = whole_arrays(lambda keys: {key: arrays[key] for key in keys})
    model = load_arrays(load.abstract_model(config, recipe, formats, None), read, None)
    save(model, tmp_path / "a")
    assert_same(load.load(tmp_path / "a"), model)

  def test_activations_and_pages_are_the_users_choice(self, tmp_path):
    save(model_of("odd_tied", "channel"), tmp_path / "a")
    model = load.load(tmp_path / "a", dataclasses.replace(RECIPES["channel"], activations="fp8", kv="fp8"))
    assert model.recipe == Recipe("fp8", "channel", "fp8", "fp8")
    with pytest.raises(InputError, match="activations must be one of"):
      load.load(tmp_path / "a", dataclasses.replace(RECIPES["channel"], activations="int4"))

  def test_load_takes_any_kind(self, tmp_path):
    """One `load` for our checkpoints and for others'; weights are never quantized twice."""
    weights = tiny_models.make_weights(CONFIGS["odd_tied"])
    tiny_models.write_hf_folder(tmp_path / "hf", CONFIGS["odd_tied"], weights)
    direct = load.load(tmp_path / "hf", RECIPES["channel"])
    save(direct, tmp_path / "ours")
    assert_same(load.load(tmp_path / "ours"), direct)
    with pytest.raises(InputError, match="never requantized"):
      load.load(tmp_path / "ours", RECIPES["block128"])


class TestMeshes:
  def test_a_cut_model_is_not_saved(self, tmp_path):
    mesh = make_mesh(CONFIGS["untied"], 3)
    model = tiny_llamas.load("gqa_9_3_untied", RECIPES["f32"], mesh=mesh)
    with pytest.raises(InputError, match="loaded with tensor=1; got tensor=3"):
      save(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())

  def test_impossible_meshes(self):
    with pytest.raises(InputError, match="9 devices; 8 are here"):
      make_mesh(CONFIGS["untied"], 9)
    with pytest.raises(InputError, match="possible are 1, 3, 9"):
      make_mesh(CONFIGS["untied"], 2)
