"""Float8 inputs of linear layers in every dialect: the logits of the dialect's own library with float8 weights and inputs.

tests/goldens/README.md says how the goldens were made.
"""

import json

import numpy as np
import pytest

from jaxfp8.checkpoint import convert, export, load, readers
from jaxfp8.checkpoint.open import Checkpoint
from jaxfp8.checkpoint.quantized_source import source_granularity
from jaxfp8.errors import InputError
from jaxfp8.recipe import Recipe
from tests.helpers import tiny_llamas, w8a8_files
from tests.helpers.numpy_recipes import divergence

LIMITS = {"block": 1e-3, "channel": 3e-3, "tensor": 3e-3}  # of the mean KL divergence, nats


def golden(dialect):
  return np.load(w8a8_files.GOLDENS / f"{dialect.replace(' ', '_')}.npz")


def logits_of(model):
  logits, _ = tiny_llamas.run_pieces(model, w8a8_files.make_tokens(), [w8a8_files.NUM_TOKENS])
  return logits


def recipe_of(source, dialect):
  return Recipe("fp8", source_granularity(source), "fp8_static" if w8a8_files.DIALECTS[dialect][2] else "fp8")


@pytest.mark.parametrize("dialect", w8a8_files.DIALECTS)
def test_logits_are_those_of_the_library(dialect, tmp_path):
  source = readers.open_source(w8a8_files.write(tmp_path / "model", dialect))
  assert source.notes == ()
  model = load.load_source(source, recipe_of(source, dialect))
  kl = divergence(golden(dialect)["logits"], logits_of(model)).mean()
  assert kl < LIMITS[w8a8_files.DIALECTS[dialect][0]], kl


@pytest.mark.parametrize("dialect", w8a8_files.DIALECTS)
def test_another_rounding_of_the_inputs_exceeds_the_limit(dialect):
  """The comparison above can fail: scales per token where groups have their own, the other way round, and scales unbounded."""
  stored = golden(dialect)
  assert divergence(stored["logits"], stored["other"]).mean() > LIMITS[w8a8_files.DIALECTS[dialect][0]]


class TestFbgemmsBound:
  """`activation_scale_ub`: a token's scale is min(amax, bound) / 448, and larger values saturate."""

  @pytest.fixture
  def folder(self, tmp_path):
    return w8a8_files.write(tmp_path / "model", "fbgemm")

  def test_another_implementation_applies_it_too(self, folder):
    model = load.load_source(readers.open_source(folder), Recipe("fp8", "channel", "fp8"), implementation="xla")
    assert divergence(golden("fbgemm")["logits"], logits_of(model)).mean() < LIMITS["channel"]

  def test_a_checkpoint_keeps_it(self, folder, tmp_path):
    convert.convert_checkpoint(folder, tmp_path / "ours", Recipe("fp8", "channel", "fp8"))
    assert Checkpoint(tmp_path / "ours").config.activation_scale_ub == w8a8_files.BOUND
    assert divergence(golden("fbgemm")["logits"], logits_of(load.load(tmp_path / "ours"))).mean() < LIMITS["channel"]

  def test_an_export_that_cannot_say_it_is_refused(self, folder, tmp_path):
    convert.convert_checkpoint(folder, tmp_path / "ours", activations="dynamic")
    with pytest.raises(InputError, match=r"activation_scale_ub 1\.25.*--activations=none"):
      export.export_checkpoint(tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert.convert_checkpoint(folder, tmp_path / "weights")
    scheme = export.export_checkpoint(tmp_path / "weights", tmp_path / "out")["quantization_config"]
    assert scheme["config_groups"]["group_0"]["input_activations"] is None

  @pytest.mark.parametrize(
    ("scheme", "bound"),
    [
      ({"quant_method": "fbgemm_fp8"}, 1200.0),
      ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200}, 1200),
      ({"quant_method": "fbgemm_fp8", "activation_scale_ub": None}, None),
    ],
  )
  def test_the_config_says_it(self, folder, scheme, bound):
    assert self._config(folder, scheme).activation_scale_ub == bound

  def test_a_bound_of_another_dialect_is_refused_by_name(self, folder):
    with pytest.raises(InputError, match="activation_scale_ub"):
      self._config(folder, {"quant_method": "fp8", "activation_scheme": "dynamic", "activation_scale_ub": 2.0})

  @pytest.mark.parametrize("bound", [0, -1.0, "1200", float("nan"), True])
  def test_no_bound_is_refused_by_name(self, folder, bound):
    with pytest.raises(InputError, match="activation_scale_ub must be a positive number; got"):
      self._config(folder, {"quant_method": "fbgemm_fp8", "activation_scale_ub": bound})

  def _config(self, folder, scheme):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": scheme}))
    return readers.open_source(folder).config
