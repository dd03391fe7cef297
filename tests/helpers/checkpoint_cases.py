"""Small models in every recipe and of awkward sizes, for tests of what is stored and loaded."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from jaxfp8.model.llama import Llama
from jaxfp8.recipe import Recipe
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
  "groups": dataclasses.replace(BLOCKS, num_heads=12, num_kv_heads=4, head_dim=10),
  "groups_of_blocks": dataclasses.replace(BLOCKS, num_heads=12, num_kv_heads=4, head_dim=128),
}


@functools.cache
def model_of(config: str, recipe: str) -> Llama:
  """A model that no test may change, on the default device."""
  return tiny_llamas.load(CONFIGS[config], RECIPES[recipe])


def leaves(model: Llama) -> list[jax.Array]:
  return jax.tree.leaves(nnx.state(model))


def assert_same(a: Llama, b: Llama) -> None:
  """Equal configs, recipes and formats, and arrays equal bit for bit."""
  assert (a.config, a.recipe, tuple(a.formats)) == (b.config, b.recipe, tuple(b.formats))
  for x, y in zip(leaves(a), leaves(b), strict=True):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))
