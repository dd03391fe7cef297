"""Whole steps on the GPU's path: a tiny model in interpret mode."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxfp8.config import LlamaConfig
from jaxfp8.recipe import Recipe
from pallas_kernels import interpret
from tests.helpers import tiny_llamas, tiny_models

# As wide as the fused kernels need; narrower models leave them to plain XLA.
TINY = dataclasses.replace(LlamaConfig.from_name("tiny"), d_model=128, d_ff=256)
RECIPES = {
  "w8a8-kv8": Recipe(weights="fp8", activations="fp8", kv="fp8"),
  "w8a8-block-kv8": Recipe(weights="fp8", granularity="block128", activations="fp8", kv="fp8"),
  "w8a16-block-kv16": Recipe(weights="fp8", granularity="block128", activations="bf16", kv="bf16"),
}


@functools.cache
def tokens():
  return tiny_models.make_tokens(TINY, 27)


def logits(recipe, implementation):
  model = tiny_llamas.load(TINY, recipe, implementation=implementation)
  out, _ = tiny_llamas.run_pieces(model, tokens(), [20, 6, 1], page_size=32, pad_to=20, run=jax.jit(tiny_llamas.every_logit))
  return out


@pytest.mark.timeout(300)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_tiny_model_on_kernels_gives_the_references_logits(recipe):
  """Ragged prefill in two pieces, then a decode step; linears, attention, head and what lies between are kernels.

  The truth has the same float8 weights with activations and pages in float32. What kernels and reference round differently
  decides now and then between two e4m3 neighbours, so they differ from each other about as much as from the truth.
  """
  with interpret.running(timeout_s=240) as copies:
    got = logits(recipe, "interpret")
  assert copies.bytes_read > 5e5  # kernels ran
  want = logits(recipe, "reference")
  truth = logits(dataclasses.replace(recipe, activations="f32", kv="f32"), "reference")
  assert np.linalg.norm(got - truth) < 1.25 * np.linalg.norm(want - truth)
