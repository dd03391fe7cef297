"""Recipe and LayerFormat: accepted and refused values, and the strings that manifests and cache keys hold."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from jaxfp8.errors import InputError
from jaxfp8.recipe import BLOCK, FLOAT8_MAX, PAGE_SIZES, Granularity, LayerFormat, Precision, Recipe
from pallas_kernels import float8
from pallas_kernels.fp8_matmul import api as fp8_matmul
from pallas_kernels.paged_attention import tiling as attention_tiling


def test_recipes():
  assert Recipe().stream == "bf16" and Recipe(weights="f32", activations="f32").stream == "f32"
  for change in ({"weights": "fp4"}, {"granularity": "row"}, {"activations": "auto"}, {"kv": "int8"}):
    with pytest.raises(InputError, match=next(iter(change))):
      Recipe(**change)
  with pytest.raises(InputError, match="fp8 activations need fp8 weights"):
    Recipe(weights="bf16", activations="fp8")
  with pytest.raises(dataclasses.FrozenInstanceError):
    Recipe().kv = "fp8"


def test_a_recipe_is_written_as_plain_strings():
  """The bytes of manifests, of cache keys and of program keys from before the enums: they must not change."""
  recipe = Recipe("fp8", "block128", "fp8_static", "fp8")
  fields = '{"weights": "fp8", "granularity": "block128", "activations": "fp8_static", "kv": "fp8"}'
  assert json.dumps(dataclasses.asdict(recipe)) == fields
  assert Recipe(**json.loads(fields)) == recipe and hash(Recipe(**json.loads(fields))) == hash(recipe)
  assert f"{recipe.weights} {recipe.granularity} {recipe.stream} {recipe.kv_dtype}" == "fp8 block128 bf16 fp8"
  assert repr(recipe) == "Recipe(weights='fp8', granularity='block128', activations='fp8_static', kv='fp8')"
  layer = LayerFormat("fp8", "bf16", "fp8", "f32")
  assert json.dumps(dataclasses.asdict(layer)) == '{"qkv": "fp8", "o": "bf16", "gate_up": "fp8", "down": "f32"}'
  assert repr(layer) == "LayerFormat(qkv='fp8', o='bf16', gate_up='fp8', down='f32')"


def test_precisions():
  dtypes = {
    "fp8": ml_dtypes.float8_e4m3fn,
    "fp8_static": ml_dtypes.float8_e4m3fn,
    "bf16": ml_dtypes.bfloat16,
    "f32": np.float32,
  }
  assert {precision: precision.dtype for precision in Precision} == {name: np.dtype(dtype) for name, dtype in dtypes.items()}
  assert [precision for precision in Precision if precision.is_static] == ["fp8_static"]
  assert [precision.dynamic for precision in Precision] == ["fp8", "fp8", "bf16", "f32"]
  recipe = dataclasses.replace(Recipe(), activations="fp8_static", kv="fp8_static")
  assert (recipe.activations, recipe.activation_dtype, recipe.kv, recipe.kv_dtype) == ("fp8_static", "fp8", "fp8_static", "fp8")
  assert all(type(value) is Precision for value in (recipe.weights, recipe.activations, recipe.kv, recipe.stream))
  assert type(recipe.granularity) is Granularity


def test_block_scales_are_those_of_float8_weights():
  assert Recipe("fp8", "block128").has_block_scales
  assert not Recipe("fp8", "channel").has_block_scales and not Recipe("bf16", "block128").has_block_scales


def test_a_layer_format_is_of_weights():
  assert LayerFormat.uniform("bf16") == LayerFormat("bf16", "bf16", "bf16", "bf16")
  with pytest.raises(
    InputError, match="the format of gate_up must be one of fp8, fp8_channel, fp8_block128, bf16, f32; got 'fp8_static'"
  ):
    LayerFormat("fp8", "fp8", "fp8_static", "fp8")


def test_a_layer_format_has_a_word_for_each_matrix_that_differs():
  layer = LayerFormat(["bf16", "fp8", "fp8_block128"], "fp8", ("fp8", "fp8"), "fp8_channel")
  assert layer.is_split("qkv") and not layer.is_split("gate_up") and layer.gate_up == "fp8"
  assert layer.matrices("qkv") == ("bf16", "fp8", "fp8_block128") and layer.matrices("gate_up") == ("fp8", "fp8")
  assert LayerFormat(**json.loads(json.dumps(dataclasses.asdict(layer)))) == layer and len({layer, layer}) == 1
  kinds = [matrix.granularity(Recipe("fp8", "tensor")) for matrix in layer.matrices("qkv")]
  assert kinds == [None, "tensor", "block128"] and [matrix.is_float8 for matrix in layer.matrices("qkv")] == [False, True, True]
  with pytest.raises(InputError, match=r"qkv takes one format, or one for each of its 3 matrices; got \('fp8', 'bf16'\)"):
    LayerFormat(("fp8", "bf16"), "fp8", "fp8", "fp8")


def test_constants_are_those_of_the_kernels():
  """pallas_kernels cannot import jaxfp8, so it has its own."""
  assert (FLOAT8_MAX, BLOCK) == (float8.MAX, fp8_matmul.BLOCK) == (448.0, 128)
  assert PAGE_SIZES == attention_tiling.PAGE_SIZES
