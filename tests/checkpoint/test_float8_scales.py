"""Scales that cannot be right are refused by name, in every granularity; scales that were never set are left out."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxfp8.checkpoint import convert, readers
from jaxfp8.checkpoint.open import Checkpoint
from jaxfp8.checkpoint.readers.safetensors_file import read_headers, read_tensor
from jaxfp8.errors import InputError
from tests.helpers import dialect_files, tiny_models

CONFIG = dataclasses.replace(tiny_models.make_config("gqa_9_3_untied"), d_model=144, d_ff=130, num_layers=1, head_dim=32)
DOWN = "model.layers.0.mlp.down_proj"  # [144, 130]: two blocks of 128 along each axis, the second ragged
# kind of scales: (arguments of dialect_files.write, the scale's entry that is spoiled, the weight at which it is seen)
KINDS = {
  "tensor": ({"kind": "tensor"}, (), [0, 0]),
  "channel": ({"shape": lambda s, x: x.reshape(-1, 1)}, (143, 0), [143, 0]),
  "channel, one axis": ({}, (143,), [143, 0]),
  "block": ({"kind": "block"}, (1, 1), [128, 128]),
  "block, DeepSeek's name": ({"kind": "block", "suffix": "weight_scale_inv"}, (0, 1), [0, 128]),
  "block, four axes": ({"kind": "block", "shape": lambda s, x: x[:, None, :, None]}, (1, 0, 0, 0), [128, 0]),
}


def spoil(folder, change):
  path = folder / "model.safetensors"
  tensors = {name: read_tensor(name, header) for name, header in read_headers(path).items()}
  change(tensors)
  save_file(tensors, path)
  return readers.open_source(folder)


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
  how, entry, at = KINDS[request.param]
  folder, _, _ = dialect_files.write(tmp_path / "model", CONFIG, **how)
  return folder, f"{DOWN}.{how.get('suffix', 'weight_scale')}", entry, at


def test_a_zero_scale_of_weights_that_are_not_zero_is_refused(kind):
  folder, scale, entry, at = kind

  def change(tensors):
    tensors[scale][entry] = 0
    tensors[DOWN + ".weight"][tuple(at)] = 3

  source = spoil(folder, change)
  with pytest.raises(InputError, match=rf"{DOWN}\.weight in .* is 3.0 at \[{at[0]}, {at[1]}\], and its scale at .* is 0\."):
    source.read_scale(DOWN + ".weight")


def test_a_zero_scale_of_zeros_is_harmless(kind, tmp_path):
  folder, scale, entry, at = kind

  def change(tensors):
    tensors[scale][entry] = 0
    tensors[DOWN + ".weight"][at[0] :, at[1] :] = 0

  source = spoil(folder, change)
  assert (source.read_scale(DOWN + ".weight") == 0).any()
  convert.convert_checkpoint(source, tmp_path / "ours")
  assert np.isfinite(Checkpoint(tmp_path / "ours").read_scale(DOWN + ".weight")).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e-9, 1e37])
def test_scales_that_are_no_factors_are_refused(kind, value):
  folder, scale, entry, _ = kind
  source = spoil(folder, lambda tensors: tensors[scale].__setitem__(entry, value))
  with pytest.raises(InputError, match=rf"finite and not negative.*{DOWN}\.weight") as error:
    source.read_scale(DOWN + ".weight")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (130,), (2, 2, 1), (3, 2), (2, 1, 2)])
def test_block_scales_of_another_shape_are_refused(shape, tmp_path):
  folder, tensors, _ = dialect_files.write(tmp_path / "model", CONFIG, kind="block")
  assert tensors[DOWN + ".weight"].shape == (144, 130)
  with pytest.raises(InputError, match=rf"one a block of 128 x 128; {DOWN}\.weight_scale .*\[{', '.join(map(str, shape))}\]"):
    spoil(folder, lambda tensors: tensors.update({DOWN + ".weight_scale": np.ones(shape, np.float32)}))


class TestNeverSet:
  """k_scale and v_scale of 0 or -1: AutoFP8 and vLLM write these for scales that were never set."""

  @pytest.mark.parametrize("value", [0.0, -1.0])
  @pytest.mark.parametrize("names", [("k_scale", "v_scale"), ("k_proj.output_scale", "v_proj.output_scale"), ("kv_scale",)])
  def test_ignored_with_a_note(self, names, value, tmp_path):
    scales = {f"model.layers.0.self_attn.{name}": np.array([value], np.float32) for name in names}
    folder, _, _ = dialect_files.write(tmp_path / "model", CONFIG, extra=lambda _: scales)
    source = readers.open_source(folder)
    assert source.static_scales() == ()
    assert sum("never set" in note and f"self_attn.{names[0]}" in note for note in source.notes) == 1

  def test_a_layer_with_one_of_them_has_neither(self, tmp_path):
    scales = {f"model.layers.0.self_attn.{name}": np.float32(v).reshape(1) for name, v in (("k_scale", 0.5), ("v_scale", -1))}
    folder, _, _ = dialect_files.write(tmp_path / "model", CONFIG, extra=lambda _: scales)
    source = readers.open_source(folder)
    assert source.static_scales() == () and any("v_scale" in note for note in source.notes)

  @pytest.mark.parametrize("values", [[0.5, 0.0, 0.5], [-0.5] * 3, [np.nan] * 3])
  def test_other_scales_are_still_refused(self, values, tmp_path):
    scales = {"model.layers.0.self_attn.k_scale": np.array(values, np.float32)}
    folder, _, _ = dialect_files.write(tmp_path / "model", CONFIG, extra=lambda _: scales)
    with pytest.raises(InputError, match=r"self_attn\.k_scale .*positive numbers"):
      readers.open_source(folder).read_static("model.layers.0.self_attn.k_scale")
