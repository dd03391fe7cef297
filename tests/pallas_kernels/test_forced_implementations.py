"""One name forces the kernels of a whole model: on a GPU that is not here, and on this CPU."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.inspection import deviceless
from jaxfp8.model.llama import Llama
from jaxfp8.planning.devices import load_device
from jaxfp8.recipe import Recipe
from jaxfp8.serving.limits import EngineLimits
from jaxfp8.serving.startup import require_implementation
from jaxfp8.serving.steps import CompiledSteps
from jaxfp8.sharding import MESH_AXES
from pallas_kernels import Target, dispatch, interpret, page_write
from tests.helpers import tiny_llamas, tiny_models

# Sizes that every kernel takes. rope_write finds no register layouts for two query heads of 64 to a KV head.
SIZES = {"d_model": 128, "d_ff": 128, "num_layers": 1, "vocab_size": 128, "num_heads": 4, "num_kv_heads": 1, "head_dim": 128}
TINY = dataclasses.replace(LlamaConfig.from_name("tiny"), **SIZES)
FP8 = Recipe(weights="fp8", activations="fp8", kv="fp8")
OPERATIONS = {"fp8_matmul", "paged_attention", "residual_norm", "rope_write", "silu_multiply"}  # those of a model
ELSEWHERE = {"cpu", "xla", "reference", "interpret"}


def test_the_names_come_from_the_table_of_kernels():
  kernels = {name for names in dispatch.KERNELS.values() for name in names}
  assert set(dispatch.implementations()) == kernels | ELSEWHERE and "sm90" in kernels
  for name in ("auto", *dispatch.implementations()):
    require_implementation(name)
  for name in ("tiling", "combine", "cost", "cases", "api", "wgmma", "mosaic"):
    with pytest.raises(InputError, match="--implementation must be one of auto, cpu, interpret, reference, sm90, xla; got"):
      require_implementation(name)


def test_every_operation_of_a_model_has_every_kernel_name():
  for capability, kernels in dispatch.KERNELS.items():
    for operation in OPERATIONS:
      assert dispatch.order(operation, Target("cuda", capability)) == (*kernels, "xla")
  assert set(dispatch.OPERATIONS) == OPERATIONS | {"page_write"}


def test_an_operation_without_the_forced_kernel_is_named():
  pools = (np.zeros((2, 1, 32, 64), np.float32),)
  arguments = pools, (np.zeros((1, 1, 64), np.float32),), (2,), np.zeros((1, 1), np.int32), None, np.ones(1, np.int32)
  with pytest.raises(ValueError, match=r"page_write: implementation='sm90' cannot run here \(sm90: page_write has no kernel"):
    page_write(*arguments, implementation="sm90", target=Target("cuda", (9, 0), 132))


@pytest.mark.compile
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("name", ["sm90", "xla", "reference"])
def test_a_model_for_a_gpu(name, kind):
  """Compiled for an H100: sm90 is kernels for every operation, the others have none."""
  if not deviceless.have_compiler():
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("the CUDA compiler is not installed")
  spec = load_device("h100")
  mesh = deviceless.absent_mesh(spec, (1, 1, 1), MESH_AXES)
  model = Llama(TINY, FP8, implementation=name)
  steps = CompiledSteps(
    model, mesh, EngineLimits(num_pages=4, max_sequences=2, max_pages=2, decode_sizes=(2,), prefill_sizes=(16,))
  )
  with deviceless.lowering_for(spec):
    lowered = steps.lower(kind, 2 if kind == "decode" else 16)
  text = steps.build(lowered).as_text()
  # A layer is two norms, three more matrices, rope, attention and silu; then the last norm and the head.
  assert (text.count('custom_call_target="mosaic') >= 10) == (name == "sm90")
  assert name == "sm90" or 'custom_call_target="mosaic' not in text


def logits(name):
  tokens = tiny_models.make_tokens(TINY, 6)
  model = tiny_llamas.load(TINY, FP8, implementation=name)
  out, _ = tiny_llamas.run_pieces(model, tokens, [5, 1], page_size=32, run=jax.jit(tiny_llamas.every_logit))
  return out


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["cpu", "interpret", "xla"])
def test_a_model_on_a_cpu(name):
  """A prompt and a decode step give the reference's logits, up to the rounding to float8."""
  if name == "interpret":
    with interpret.running(timeout_s=240) as copies:
      got = logits(name)
    assert copies.bytes_read > 0  # kernels ran
  else:
    got = logits(name)
  want = logits("reference")
  assert np.linalg.norm(got - want) < 0.1 * np.linalg.norm(want)


def test_a_kernel_of_a_gpu_does_not_run_on_a_cpu():
  with pytest.raises(ValueError, match=r"implementation='sm90' cannot run here .*sm90 needs a GPU of compute capability 9\.0"):
    logits("sm90")
