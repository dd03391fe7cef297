"""Where each number of a checkpoint stands in a model's merged weights, on one device and cut over several."""

import jax
import numpy as np
import pytest

from jaxfp8.checkpoint import layout, stored_arrays
from jaxfp8.checkpoint.quantized_source import QuantizedSource
from jaxfp8.sharding import make_mesh
from tests.helpers import numpy_llama, tiny_llamas, tiny_models
from tests.helpers.checkpoint_cases import BLOCKS, CONFIGS, RECIPES, model_of


class TestLayout:
  @pytest.mark.parametrize("recipe", RECIPES)
  @pytest.mark.parametrize("config", ["odd_tied", "untied", "blocks"])
  def test_split_undoes_merge(self, config, recipe):
    """Every array of the checkpoint goes into the merged weights and comes out again, bit for bit."""
    model = model_of(config, recipe)
    source = QuantizedSource(tiny_llamas.source(CONFIGS[config]), RECIPES[recipe])
    groups = stored_arrays.checkpoint_arrays(model.config, model.recipe, tuple(model.formats))
    for layer, group in enumerate(groups[1:]):
      split, wanted = layout.unmerge_layer(model, layer), source.read(tuple(group))
      assert split.keys() == wanted.keys() == group.keys()
      for key, (shape, dtype) in group.items():
        assert (split[key].shape, split[key].dtype) == (shape, dtype), key
        np.testing.assert_array_equal(split[key].view(np.uint8), np.asarray(wanted[key]).view(np.uint8), err_msg=key)

  def test_values_are_the_sources_rounded(self):
    """What stands in the arrays, by numpy."""
    weights = tiny_models.make_weights(BLOCKS)
    for name, recipe in RECIPES.items():
      arrays = QuantizedSource(tiny_llamas.source(BLOCKS, weights), recipe)
      key = "model.layers.1.self_attn.k_proj.weight[KH,D]"
      scale = {"block128": "scale[KH/128,D/128]"}.get(name, "scale[KH]")
      keys = (key, key.replace("weight[KH,D]", scale)) if recipe.weights == "fp8" else (key,)
      got, w = arrays.read(keys), weights["model.layers.1.self_attn.k_proj.weight"]
      if recipe.weights != "fp8":
        np.testing.assert_array_equal(got[key], w.astype(recipe.weights.dtype))
        continue
      scale = got[keys[1]]
      rows = scale[:, None] if scale.ndim == 1 else np.repeat(np.repeat(scale, 128, 0), 128, 1)[: w.shape[0], : w.shape[1]]
      np.testing.assert_array_equal(got[key].astype(np.float64) * rows, numpy_llama.fake_quantize_weight(w, recipe.granularity))

  def test_qkv_rows_are_grouped_by_kv_head(self):
    """[K, G + 2, H, D]: for each KV head its query heads, its key, its value."""
    weights = tiny_models.make_weights(CONFIGS["untied"])
    qkv = np.asarray(model_of("untied", "f32").segments[0].attention.qkv.weight.get_value())
    assert qkv.shape == (3, 3, 5, 16, 63)
    q, k, v = (weights[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    for head in range(3):
      np.testing.assert_array_equal(qkv[1, head, :3].reshape(48, 63), q[48 * head : 48 * head + 48])
      np.testing.assert_array_equal(qkv[1, head, 3], k[16 * head : 16 * head + 16])
      np.testing.assert_array_equal(qkv[1, head, 4], v[16 * head : 16 * head + 16])


class TestMeshes:
  """What each device holds, against the one-device arrays cut by hand."""

  @pytest.mark.parametrize(
    ("config", "recipe", "tensor"),
    [
      ("untied", "channel", 3),
      ("blocks", "tensor", 4),
      ("whole_blocks", "block128", 2),
      ("groups", "channel", 6),
      ("groups_of_blocks", "block128", 6),
    ],
  )
  def test_devices_hold_their_parts(self, config, recipe, tensor):
    """kv = 3; kv = 2 with group = 2; kv = 2; and kv = 2 with group = 3, where a device has some queries of two KV heads."""
    one = model_of(config, recipe)
    mesh = make_mesh(CONFIGS[config], tensor)
    kv, group = mesh.shape["kv"], mesh.shape["group"]
    many = tiny_llamas.load(CONFIGS[config], RECIPES[recipe], mesh=mesh)
    devices = {mesh.devices[0, i, j]: (i, j) for i in range(kv) for j in range(group)}
    c = CONFIGS[config]
    G, heads = c.group_size // group, c.num_kv_heads // kv
    pads = {"rows": -(-c.vocab_size // tensor)}

    def check(array, part):
      assert len(array.addressable_shards) == tensor
      for shard in array.addressable_shards:
        want = part(*devices[shard.device])
        got = np.asarray(shard.data)
        assert got.shape == want.shape
        np.testing.assert_array_equal(got.view(np.uint8), np.ascontiguousarray(want).view(np.uint8))

    def padded(x, axis, size, filler=0):
      widths = [(0, size - x.shape[axis] if i == axis % x.ndim else 0) for i in range(x.ndim)]
      return np.pad(x, widths, constant_values=filler)

    def qkv_part(x):
      def part(i, j):
        own = x[:, i * heads : (i + 1) * heads]
        return np.concatenate([own[:, :, j * G : (j + 1) * G], own[:, :, -2:]], axis=2)

      return part

    def o_part(x, width):
      """The columns of a device's query heads: G of each of its KV heads, `width` columns a head."""

      def part(i, j):
        own = [k * c.group_size + j * G + g for k in range(i * heads, (i + 1) * heads) for g in range(G)]
        return np.concatenate([x[..., head * width : (head + 1) * width] for head in own], axis=-1)

      return part

    def column_part(x, size, filler=0):
      x = padded(x, -1, size * tensor, filler)
      return lambda i, j: x[..., (i * group + j) * size : (i * group + j + 1) * size]

    def row_part(x, size, filler=0):
      x = padded(x, 2, size * tensor, filler)
      return lambda i, j: x[:, :, (i * group + j) * size : (i * group + j + 1) * size]

    table = np.asarray(one.embedding.get_value())
    table = padded(table, 0, pads["rows"] * tensor)
    check(many.embedding.get_value(), lambda i, j: table[(i * group + j) * pads["rows"] : (i * group + j + 1) * pads["rows"]])
    a, b = one.segments[0], many.segments[0]
    values = {
      name: tuple(jax.tree.map(np.asarray, getattr(getattr(s, owner), name).weight.get_value()) if s is a
                  else getattr(getattr(s, owner), name).weight.get_value() for s in (a, b))
      for owner, name in (("attention", "qkv"), ("attention", "o"), ("mlp", "gate_up"), ("mlp", "down"))
    }  # fmt: skip
    F = many.segments[0].mlp.down.weight.get_value().qvalue.shape[-1] // tensor
    check(values["qkv"][1].qvalue, qkv_part(values["qkv"][0].qvalue))
    check(values["qkv"][1].scale, qkv_part(values["qkv"][0].scale))
    check(values["o"][1].qvalue, o_part(values["o"][0].qvalue, c.head_dim))
    check(values["gate_up"][1].qvalue, row_part(values["gate_up"][0].qvalue[:, :, : c.d_ff], F))
    check(values["down"][1].qvalue, column_part(values["down"][0].qvalue[..., : c.d_ff], F))
    if recipe == "block128":
      check(values["o"][1].scale, o_part(values["o"][0].scale, c.head_dim // 128))
      check(values["gate_up"][1].scale, row_part(values["gate_up"][0].scale, F // 128, 1))
      check(values["down"][1].scale, column_part(values["down"][0].scale, F // 128, 1))
    else:
      check(values["gate_up"][1].scale, row_part(values["gate_up"][0].scale[:, :, : c.d_ff], F, 1))
      check(values["o"][1].scale, lambda i, j: values["o"][0].scale)
      check(values["down"][1].scale, lambda i, j: values["down"][0].scale)
    check(b.attention_norm.weight.get_value(), lambda i, j: np.asarray(a.attention_norm.weight.get_value()))
    if not c.tied_embeddings:
      head = padded(np.asarray(one.head.weight.get_value()), 0, pads["rows"] * tensor)
      check(
        many.head.weight.get_value(), lambda i, j: head[(i * group + j) * pads["rows"] : (i * group + j + 1) * pads["rows"]]
      )
