"""The quantization_config of an export says what the checkpoint's recipe computes; a killed export leaves nothing for ever."""

import dataclasses
import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxfp8 import unfinished
from jaxfp8.checkpoint import convert, export, readers
from jaxfp8.checkpoint.open import Checkpoint
from jaxfp8.recipe import Recipe
from tests.helpers import dialect_files, tiny_models

CONFIG = dataclasses.replace(tiny_models.make_config("gqa_9_3_untied"), d_model=144, d_ff=130, num_layers=2, head_dim=32)
TOKEN = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}


def exported(tmp_path, recipe, **how):
  """(quantization_config, the exported source, the tensors that came in)."""
  folder, tensors, _ = dialect_files.write(tmp_path / "source", CONFIG, **how)
  convert.convert_checkpoint(folder, tmp_path / "ours", recipe)
  scheme = export.export_checkpoint(tmp_path / "ours", tmp_path / "theirs")["quantization_config"]
  return scheme, readers.open_source(tmp_path / "theirs"), tensors


def mixed(module):
  return "block" if "mlp" in module else "channel"


def test_a_group_for_each_granularity(tmp_path):
  """Blocks read activations in groups of 128, channels one scale a token; every module stands in exactly one list."""
  recipe = Recipe("fp8", "channel", "fp8")
  scheme, theirs, tensors = exported(
    tmp_path, recipe, kind=mixed, plain=("0.self_attn.q", "1.mlp.up"), quantize_also=("lm_head",)
  )
  groups = {g["weights"]["strategy"] + str(g["input_activations"] is None): g for g in scheme["config_groups"].values()}
  assert set(groups) == {"channelFalse", "blockFalse", "channelTrue"}
  assert groups["channelFalse"]["input_activations"] == TOKEN
  assert groups["blockFalse"]["input_activations"] == TOKEN | {"strategy": "group", "group_size": 128}
  assert groups["channelTrue"]["targets"] == ["lm_head"]  # float8 on disk, dequantized by jaxfp8: nothing rounds its inputs
  assert scheme["ignore"] == ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
  named = [name for group in groups.values() for name in group["targets"]] + scheme["ignore"]
  assert sorted(named) == sorted(
    name.removesuffix(".weight") for name in tensors if name.endswith(("_proj.weight", "head.weight"))
  )
  assert theirs.notes == ()
  convert.convert_checkpoint(theirs, tmp_path / "again", recipe)
  ours, again = Checkpoint(tmp_path / "ours"), Checkpoint(tmp_path / "again")
  assert ours.expected == again.expected and ours.formats == again.formats
  assert {key: ours.manifest.checksums[key] for key in ours.expected} == {
    key: again.manifest.checksums[key] for key in again.expected
  }


@pytest.mark.parametrize(
  ("activations", "inputs"),
  [("bf16", None), ("fp8", TOKEN), ("fp8_static", TOKEN | {"dynamic": False, "strategy": "tensor"})],
)
def test_activations_are_those_of_the_recipe(activations, inputs, tmp_path):
  """A source with static scales: they are exported only where the recipe uses them, the largest of merged matrices for each."""

  def extra(names):
    modules = [name.removesuffix(".weight_scale") for name in names if name.endswith("weight_scale")]
    return {f"{module}.input_scale": np.float32(0.5 + i / 64).reshape(()) for i, module in enumerate(modules)}

  scheme, theirs, tensors = exported(tmp_path, Recipe("fp8", "channel", activations), extra=extra)
  (group,) = scheme["config_groups"].values()
  assert group["input_activations"] == inputs and group["targets"] == ["Linear"] and theirs.notes == ()
  assert len(theirs.static_scales()) == (14 if activations == "fp8_static" else 0)
  for name in theirs.static_scales():
    prefix, matrix = name.removesuffix(".input_scale").rsplit(".", 1)
    merged = next(group for group in (("q", "k", "v"), ("gate", "up"), (matrix[:-5],)) if matrix[:-5] in group)
    assert theirs.read_static(name) == max(tensors[f"{prefix}.{part}_proj.input_scale"] for part in merged)


def test_scales_of_keys_and_values_of_some_layers_are_left_out(tmp_path):
  scales = {f"model.layers.{layer}.self_attn.{w}_scale": np.float32([0.5 - layer]) for layer in range(2) for w in "kv"}
  scales = {name: np.float32([-1]) if "layers.1" in name else value for name, value in scales.items()}
  scheme, theirs, _ = exported(tmp_path, Recipe("fp8", "channel"), extra=lambda names: scales)
  assert scheme["kv_cache_scheme"] is None and theirs.static_scales() == ()


class TestKilled:
  CHILD = """
import pathlib, signal, sys
from jaxfp8 import unfinished
with unfinished.unfinished_folder(pathlib.Path(sys.argv[1])) as folder:
  (folder / "half").write_text("half")
  print("ready", flush=True)
  signal.pause()
"""

  def test_the_next_run_removes_what_a_killed_one_left(self, tmp_path):
    target = tmp_path / "out [1]"
    child = subprocess.Popen([sys.executable, "-c", self.CHILD, target], stdout=subprocess.PIPE, text=True)
    try:
      assert child.stdout is not None and child.stdout.readline() == "ready\n"
      (left,) = tmp_path.iterdir()
      with unfinished.unfinished_folder(target) as mine:  # the other process still writes
        assert {path.name for path in tmp_path.iterdir()} == {left.name, mine.name}
      assert left.exists() and list(target.iterdir()) == []
      target.rmdir()
      child.send_signal(signal.SIGKILL)
      child.wait()
      assert (left / "half").exists()
      with unfinished.unfinished_folder(target):
        assert not left.exists()
      assert list(tmp_path.iterdir()) == [target]
    finally:
      child.kill()

  def test_a_failure_leaves_nothing(self, tmp_path):
    with pytest.raises(ZeroDivisionError), unfinished.unfinished_folder(tmp_path / "out"):
      1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


def test_config_json_is_what_is_returned(tmp_path):
  scheme, _, _ = exported(tmp_path, Recipe("fp8", "block128", "fp8"), kind="block")
  assert json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"] == scheme
