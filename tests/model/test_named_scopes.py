"""Every stage of a compiled step has a name, so that a profile reads like the model."""

import re

import pytest

from jaxfp8.recipe import Recipe
from tests.helpers import tiny_llamas
from tests.helpers.step_driver import Driver

STAGES = {
  *("tokens", "embedding", "rope_angles", "norm", "head", "history", "results"),
  *("attention.qkv", "attention.rope", "attention.pages", "attention.o", "mlp.gate_up", "mlp.silu", "mlp.down"),
  *("sample.penalties", "sample.choice", "sample.logprobs"),
}
ARITHMETIC = {"dot", "exponential", "cosine", "divide", "rsqrt", "gather", "scatter", "sort", "reduce", "custom-call"}


@pytest.fixture(scope="module", params=["decode", "prefill"])
def operations(request):
  """(opcode, the scopes around it) of the operations in a compiled step of a tiny model."""
  steps = Driver(tiny_llamas.load("mha_tied", Recipe("fp8", "channel", "f32", "fp8"), implementation="reference")).steps
  text = steps.build(steps.lower(request.param, {"decode": 2, "prefill": 40}[request.param])).as_text()
  lines = re.findall(r'= \S+ ([a-z][a-z-]*)\(.*metadata=\{[^}]*op_name="([^"]*)"', text)
  assert len(lines) > 100
  return [(opcode, set(name.split("/"))) for opcode, name in lines]


def test_every_stage_has_its_name(operations):
  scopes = set().union(*(scopes for _, scopes in operations))
  assert scopes >= STAGES, STAGES - scopes


def test_no_arithmetic_is_without_a_name(operations):
  stages = STAGES | {"last_tokens"}  # of prefill
  nameless = [(opcode, scopes) for opcode, scopes in operations if opcode in ARITHMETIC and not scopes & stages]
  assert not nameless, nameless[:5]
