"""Whole steps on the GPU's path: a tiny model in interpret mode."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny_llamas
import tiny_models

from jaxfp8.config import LlamaConfig, Recipe
from pallas_kernels import interpret

# As wide as the fused kernels need; narrower models leave them to plain XLA.
TINY = dataclasses.replace(LlamaConfig.from_name("tiny"), d_model=128, d_ff=256)
# With the largest difference that rounding explains: bf16 rounds at every layer, and where activations and pages are float8 a
# last bit decides now and then between two e4m3 neighbours, 6 % apart.
RECIPES = {
  "w8a8-kv8": (Recipe(weights="fp8", activations="fp8", kv="fp8"), 0.06),
  "w8a16-block-kv16": (Recipe(weights="fp8", granularity="block128", activations="bf16", kv="bf16"), 0.02),
}


@functools.cache
def tokens():
  return tiny_models.make_tokens(TINY, 27)


def logits(recipe, implementation):
  model = tiny_llamas.load(TINY, recipe, implementation=implementation)
  out, _ = tiny_llamas.run_pieces(model, tokens(), [20, 6, 1], page_size=32, pad_to=20, run=jax.jit(tiny_llamas.every_logit))
  return out


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("recipe", "limit"), RECIPES.values(), ids=RECIPES)
def test_tiny_model_on_kernels_gives_the_references_logits(recipe, limit):
  """Ragged prefill in two pieces, then a decode step; linears, attention and head are kernels."""
  with interpret.running(timeout_s=240) as copies:
    got = logits(recipe, "interpret")
  want = logits(recipe, "reference")
  assert copies.bytes_read > 5e5  # kernels ran
  assert np.linalg.norm(got - want) < limit * np.linalg.norm(want)
