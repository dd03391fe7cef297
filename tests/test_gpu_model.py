"""Whole steps on the GPU's path: a tiny model in interpret mode, and a 70B cut over eight absent H100s."""

import dataclasses
import functools
import os

import jax
import numpy as np
import pytest
import tiny_llamas
import tiny_models

from jaxfp8 import deviceless
from jaxfp8.config import LlamaConfig, Recipe
from jaxfp8.devices import load_device
from jaxfp8.mesh import MeshShape
from jaxfp8.model import Llama
from jaxfp8.steps import CompiledSteps, Limits
from pallas_kernels import interpret

# As wide as the fused kernels need; narrower models leave them to plain XLA.
TINY = dataclasses.replace(LlamaConfig.from_name("tiny"), d_model=128, d_ff=256)
RECIPES = {
  "w8a8-kv8": Recipe(weights="fp8", activations="fp8", kv="fp8"),
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


@pytest.mark.timeout(600)
def test_70b_over_eight_gpus_copies_no_weights_and_no_pages():
  """Decode: every argument byte is a weight or a page, the pool is updated in place, and almost nothing is temporary."""
  if not deviceless.have_compiler():
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("the CUDA compiler is not installed")
  spec, config = load_device("h100"), LlamaConfig.from_name("llama-3.1-70b")
  shape = MeshShape.for_model(config, 8)
  mesh = deviceless.make_mesh(spec, (1, shape.kv, shape.group), ("data", "kv", "group"))
  model = Llama(config, Recipe(weights="fp8", activations="fp8", kv="fp8"), shape=shape)
  steps = CompiledSteps(model, mesh, Limits(num_pages=512, max_sequences=8, max_pages=64))
  program = steps.lower("decode", 8).compile()
  memory, text = program.memory_analysis(), program.as_text()
  assert memory.alias_size_in_bytes > 2 * 80 * 512 * 64 * 128  # the whole pool
  assert memory.temp_size_in_bytes < 50e6
  assert text.count("mosaic_gpu") >= 5
  assert not [line for line in text.splitlines() if "all-gather(" in line and "f8e4m3fn" in line]
