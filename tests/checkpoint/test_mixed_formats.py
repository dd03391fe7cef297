"""Checkpoints whose matrices differ in format: each keeps its float8 values and scales, on disk and in memory."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from jaxfp8.checkpoint import convert, layout, load, readers
from jaxfp8.checkpoint.open import Checkpoint
from jaxfp8.checkpoint.quantized_source import QuantizedSource, source_granularity
from jaxfp8.checkpoint.save import save
from jaxfp8.errors import InputError
from jaxfp8.mesh import MeshShape
from jaxfp8.model.layers import SplitLinear
from jaxfp8.model.llama import Llama
from jaxfp8.planning.weight_bytes import weight_bytes
from jaxfp8.recipe import LayerFormat, Precision, Recipe
from jaxfp8.sharding import make_mesh
from tests.helpers import dialect_files, numpy_llama, tiny_llamas, tiny_models
from tests.helpers.checkpoint_cases import assert_same, leaves
from tests.helpers.dialect_files import FLOAT8

BASE = tiny_models.make_config("gqa_9_3_untied")
RAGGED = dataclasses.replace(BASE, d_model=144, d_ff=130, num_layers=2, head_dim=32)  # blocks of 128 with ragged edges
MESH = dataclasses.replace(BASE, d_model=144, d_ff=300, num_layers=1, num_heads=12, num_kv_heads=4, head_dim=32)
F32 = Recipe("fp8", "channel", "f32", "f32")
LIMIT = 1e-4


def two_groups(module):
  return "block" if "mlp" in module else "channel"


def parts_differ(module):
  """Layer 0: q is plain, v has blocks, up is plain. Layer 1: everything per channel, but down, which has blocks."""
  return "block" if "0.self_attn.v" in module or "1.mlp.down" in module else "channel"


PLAIN = ("0.self_attn.q_proj", "0.mlp.up_proj")


def write(folder, config=RAGGED, *, kind=parts_differ, plain=PLAIN, **more):
  return dialect_files.write(folder, config, kind=kind, plain=plain, **more)


def float8_bytes(tensors) -> int:
  return sum(array.nbytes for array in tensors.values() if array.dtype == FLOAT8)


def float8_in_memory(model) -> int:
  return sum(leaf.nbytes for leaf in leaves(model) if leaf.dtype == FLOAT8)


def test_two_groups_stay_float8_in_memory(tmp_path):
  """Attention per channel, MLP per block: no matrix is widened, and the logits are those of the dequantized weights."""
  folder, tensors, meaning = write(tmp_path / "model", kind=two_groups, plain=())
  source = readers.open_source(folder)
  assert source_granularity(source) == "channel"
  model = load.load_source(source, F32)
  assert set(model.formats) == {LayerFormat("fp8", "fp8", "fp8_block128", "fp8_block128")} and len(model.segments) == 1
  padded = dataclasses.replace(RAGGED, d_ff=256)  # whole blocks
  assert float8_in_memory(model) == float8_bytes(tensors) * _matrix_elements(padded) // _matrix_elements(RAGGED)
  tokens = tiny_models.make_tokens(RAGGED, 30)
  logits, _ = tiny_llamas.run_pieces(model, tokens, [30])
  assert np.abs(logits - numpy_llama.forward(RAGGED, meaning, tokens)).max() < LIMIT


def _matrix_elements(c) -> int:
  heads = c.num_heads + c.num_kv_heads
  return c.num_layers * c.d_model * (2 * heads * c.head_dim + 3 * c.d_ff)


class TestPartsThatDiffer:
  """A layer whose q is bf16 beside float8 k and v, whose v has other scales than its k, and whose up is bf16."""

  def test_a_checkpoint_keeps_every_bit_and_the_logits(self, tmp_path):
    folder, tensors, meaning = write(tmp_path / "model", quantize_also=("lm_head",))
    arrays = convert.convert_checkpoint(folder, tmp_path / "ours", F32)
    assert any("q_proj (f32)" in note and "k_proj (channel)" in note and "v_proj (block128)" in note for note in arrays.notes)
    ours = Checkpoint(tmp_path / "ours")
    assert set(ours.exceptions) == {"lm_head"}
    assert ours.formats == (
      LayerFormat(("f32", "fp8", "fp8_block128"), "fp8", ("fp8", "f32"), "fp8"),
      LayerFormat("fp8", "fp8", "fp8", "fp8_block128"),
    )
    for name in ours.names():
      if tensors[name].dtype == FLOAT8:
        assert ours.read(name).tobytes() == tensors[name].tobytes(), name
    model, tokens = load.load(ours), tiny_models.make_tokens(RAGGED, 30)
    logits, _ = tiny_llamas.run_pieces(model, tokens, [20, 10], pad_to=20)
    assert np.abs(logits - numpy_llama.forward(RAGGED, meaning, tokens)).max() < LIMIT
    attention = model.segments[0].attention
    assert [leaf.dtype for leaf in jax.tree.leaves(nnx.state(attention.qkv))].count(FLOAT8) == 2
    for layer in range(2):
      for key, array in layout.unmerge_layer(model, layer).items():
        np.testing.assert_array_equal(array.view(np.uint8), ours.read_array(key).view(np.uint8), err_msg=key)
    assert_same(load.load_source(readers.open_source(folder), F32), model)

  def test_saved_and_loaded_again(self, tmp_path):
    folder, _, _ = write(tmp_path / "model")
    model = load.load(folder)
    save(model, tmp_path / "saved")
    assert_same(load.load(tmp_path / "saved"), model)

  def test_activations_are_rounded_for_float8_matrices_alone(self, tmp_path):
    """q and up read what the norm gave; k, v, gate and the others read it in float8. By numpy in float64."""
    config = dataclasses.replace(RAGGED, num_layers=1)
    folder, tensors, meaning = write(tmp_path / "model", config, kind="channel")
    model = load.load(folder, Recipe("fp8", "channel", "fp8", "f32"))
    truths, tokens = [], tiny_models.make_tokens(config, 40)
    for rounded in (lambda name: tensors[name].dtype == FLOAT8, lambda name: True):

      def linear(x, name, rounded=rounded):
        return (numpy_llama.fake_quantize(x, 1) if rounded(name) else x) @ meaning[name].T

      truths.append(numpy_llama.forward(config, meaning, tokens, linear))
    logits, _ = tiny_llamas.run_pieces(_in_float32(model, meaning), tokens, [40])
    cost = rms(truths[1] - truths[0])
    assert rms(logits - truths[0]) < 0.2 * cost and rms(logits - truths[1]) > 0.8 * cost

  @pytest.mark.parametrize("tensor", [2, 6])
  def test_devices_hold_their_parts(self, tensor, tmp_path):
    """The parts of a split matrix on a mesh are cuts of the merged one, whose cuts tests/checkpoint/test_layout.py checks."""
    whole, _, _ = write(tmp_path / "whole", MESH, kind="channel", plain=())
    split, _, _ = write(tmp_path / "split", MESH, kind="channel", plain=("q_proj", "up_proj"))
    mesh = make_mesh(MESH, tensor)
    a, b = (load.load(folder, Recipe("fp8", "channel"), mesh=mesh).segments[0] for folder in (whole, split))
    q, k, v = (part.weight.get_value() for part in b.attention.qkv.parts)
    gate, up = (part.weight.get_value() for part in b.mlp.gate_up.parts)
    qkv, gate_up = a.attention.qkv.weight.get_value(), a.mlp.gate_up.weight.get_value()
    assert q.dtype == up.dtype == Precision.BF16.dtype and q.shape[2] == qkv.shape[2] - 2
    for merged, part in (
      (qkv.qvalue[:, :, -2:-1], k.qvalue), (qkv.scale[:, :, -2:-1], k.scale),
      (qkv.qvalue[:, :, -1:], v.qvalue), (qkv.scale[:, :, -1:], v.scale),
      (gate_up.qvalue[:, :1], gate.qvalue), (gate_up.scale[:, :1], gate.scale),
    ):  # fmt: skip
      np.testing.assert_array_equal(np.asarray(merged).view(np.uint8), np.asarray(part).view(np.uint8))
      assert {s.device: s.index for s in part.addressable_shards} == {s.device: s.index for s in merged.addressable_shards}

  def test_a_static_scale_of_each_part(self, tmp_path):
    """k and v have scales of their inputs, q has none: a model with static scales reads each, and does not ask for q's."""

    def extra(names):
      modules = [name.removesuffix(".weight_scale") for name in names if name.endswith("weight_scale")]
      return {f"{module}.input_scale": np.float32(0.5 + i / 64).reshape(()) for i, module in enumerate(modules)}

    folder, tensors, _ = write(tmp_path / "model", extra=extra)
    convert.convert_checkpoint(folder, tmp_path / "ours", activations="static")
    model = load.load(tmp_path / "ours")
    assert model.recipe.activations == "fp8_static"
    q, k, v = model.segments[0].attention.qkv.parts
    assert q.input_scale is None
    for part, name in ((k, "k"), (v, "v")):
      assert part.static_scale.tolist() == [tensors[f"model.layers.0.self_attn.{name}_proj.input_scale"]]
    save(model, tmp_path / "saved")
    assert_same(load.load(tmp_path / "saved"), model)


def test_a_plain_source_keeps_merged_matrices_whole(tmp_path):
  """One part that `keep` names keeps its neighbours plain too: a model that jaxfp8 quantizes itself has no split matrices."""
  arrays = QuantizedSource(tiny_llamas.source(RAGGED), Recipe(), ["layers.0.self_attn.q_proj"])
  assert arrays.formats[0] == LayerFormat("bf16", "fp8", "fp8", "fp8") and "one matrix in memory" in arrays.notes[0]


def test_a_float8_part_that_is_kept_plain_leaves_its_neighbours_float8(tmp_path):
  folder, _, _ = write(tmp_path / "model", kind="channel", plain=())
  arrays = QuantizedSource(readers.open_source(folder), Recipe(), ["layers.0.self_attn.q_proj"])
  assert arrays.formats[0] == LayerFormat(("bf16", "fp8", "fp8"), "fp8", "fp8", "fp8") and not arrays.exceptions


def test_one_scale_a_tensor_is_not_made_of_one_a_channel(tmp_path):
  """An export would write the first row's scale for all rows."""
  folder, _, _ = write(tmp_path / "model", kind="channel", plain=())
  with pytest.raises(InputError, match=r"with channel scales, which are never rounded again; got granularity='tensor'"):
    convert.convert_checkpoint(folder, tmp_path / "ours", Recipe("fp8", "tensor"))


class TestBytes:
  FORMATS = (
    LayerFormat(("bf16", "fp8", "fp8_block128"), "fp8", ("fp8", "bf16"), "fp8"),
    LayerFormat("fp8", "fp8_block128", "fp8_block128", "fp8_block128"),
    LayerFormat("fp8", "fp8_block128", "fp8_block128", "fp8_block128"),
    LayerFormat.uniform("bf16"),
  )

  @pytest.mark.parametrize("tensor", [1, 2, 4])
  @pytest.mark.parametrize("granularity", ["channel", "block128"])
  def test_the_planner_counts_those_of_the_model(self, tensor, granularity):
    config = dataclasses.replace(MESH, num_layers=4, d_ff=300, head_dim=128)
    recipe, mesh = Recipe("fp8", granularity), MeshShape.for_model(config, tensor)
    model = Llama(config, recipe, formats=self.FORMATS, shape=mesh)
    total = 0
    for leaf, spec in zip(jax.tree.leaves(nnx.state(model)), model.partitions(), strict=True):
      cut = tensor if any(axis is not None for axis in spec) else 1
      total += leaf.size * leaf.dtype.itemsize // cut
    assert weight_bytes(config, recipe, mesh, self.FORMATS).stored == total
    assert weight_bytes(config, recipe, mesh).stored < total

  def test_the_plan_of_a_checkpoint_counts_its_formats(self, tmp_path, monkeypatch):
    from jaxfp8.commands import plan

    folder, _, _ = write(tmp_path / "model")
    convert.convert_checkpoint(folder, tmp_path / "ours")
    config, recipe, formats = plan._read_model(str(tmp_path / "ours"))
    assert recipe is not None and formats is not None and isinstance(formats[0].qkv, tuple)
    stored = weight_bytes(config, recipe, formats=formats).stored
    assert stored == sum(leaf.nbytes for leaf in leaves(load.load(tmp_path / "ours")))


def test_a_manifest_holds_words(tmp_path):
  folder, _, _ = write(tmp_path / "model", kind=two_groups)
  convert.convert_checkpoint(folder, tmp_path / "ours")
  formats = json.loads((tmp_path / "ours" / "jaxfp8.json").read_text())["formats"]
  assert formats[0] == {"qkv": ["bf16", "fp8", "fp8"], "o": "fp8", "gate_up": ["fp8_block128", "bf16"], "down": "fp8_block128"}
  assert formats[1] == {"qkv": "fp8", "o": "fp8", "gate_up": "fp8_block128", "down": "fp8_block128"}


def rms(x) -> float:
  return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def _in_float32(model, meaning):
  """A W8A8 model whose stream, embedding, head and plain matrices are float32, which no recipe offers."""
  for _, module in nnx.iter_modules(model):
    if hasattr(module, "runtime"):
      module.runtime = dataclasses.replace(module.runtime, stream=Precision.F32)
  model.embedding.set_value(jax.numpy.asarray(meaning["model.embed_tokens.weight"]))
  model.head.weight.set_value(jax.numpy.asarray(meaning["lm_head.weight"]))
  attention, mlp = model.segments[0].attention, model.segments[0].mlp
  assert isinstance(attention.qkv, SplitLinear) and isinstance(mlp.gate_up, SplitLinear)
  q, up = attention.qkv.parts[0].weight, mlp.gate_up.parts[1].weight
  q.set_value(jax.numpy.asarray(meaning["model.layers.0.self_attn.q_proj.weight"], "float32").reshape(q.get_value().shape))
  up.set_value(jax.numpy.asarray(meaning["model.layers.0.mlp.up_proj.weight"], "float32").reshape(up.get_value().shape))
  return model
