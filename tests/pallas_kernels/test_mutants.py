"""Every deliberate mistake in a GPU kernel is caught by interpret mode: by a wrong result, a race or a broken barrier."""

import pytest

from tests.helpers import gpu_calls, gpu_mutants
from tests.helpers.fused_calls import Joined, Norm, Rope, Silu
from tests.helpers.gpu_calls import Attention, Matmul

CALLS = {
  gpu_mutants.matmul: {
    "block": Matmul("w8a8", 20, 256, 256, block_rows=64),
    "first tokens": Matmul("w8a8", 130, 64, 256, block_rows=64),
    "static": Matmul("w8a8", 4, 64, 256, static=True),
    "float16": Matmul("w8a16", 2, 64, 1024, x_size=1e6),
    "frees": Matmul("w8a16", 1, 64, 4096),
    "tile": Matmul("w8a8", 264, 512, 128),  # six tiles a CTA: a race between two of them escapes one time in eight
    "part": Matmul("w8a8", 3, 64, 512, num_sms=16),
    "": Matmul("w8a8", 20, 256, 768),
  },
  gpu_mutants.attention: {
    "stage": Attention("fp8", (400, 65), N=2, K=2),
    "twice": Attention("fp8", (400, 65), N=2, K=2),
    "too many": Attention("fp8", (5,), N=2, K=1),
    "overflow": Attention("fp8", (5,), N=2, K=1, q_size=1e6),
    "alike": Attention("fp8", (10, 300), counts=(2, 3), N=2, K=1, spread=1.0, num_sms=16),
    "": Attention("fp8", (450, 65), N=2, K=1, spread=1.0),
  },
  gpu_mutants.combine: {
    "one head": Joined(S=3, K=2, G=2),
    "first head": Joined(S=3, K=2, G=2, grouped=True),
    "": Joined(S=150, K=1, G=2),
  },
  gpu_mutants.rows: {
    "warpgroup": Norm(2, 512),
    "meetings": Norm(1, 512),
    "group": Norm(1, 1024, grouped=True),
  },
  gpu_mutants.fused: {
    "residual": Norm(2, 512),
    "norm": Norm(2, 512),
    "gate": Silu(2, 256, S=3),
    "token": Silu(2, 256, S=3),
    "nobody": Rope("fp8", (5, 0, 40), counts=(5, 0, 37), G=1),
    "": Rope("fp8", (40, 33), S=3),
  },
}
LIMITS = {gpu_mutants.matmul: 1e-5, gpu_mutants.attention: 1e-2, gpu_mutants.combine: 0.05}
MUTANTS = gpu_mutants.MATMUL + gpu_mutants.ATTENTION + gpu_mutants.COMBINE + gpu_mutants.FUSED


def call_for(mutant):
  """The smallest call that reaches the mutated line."""
  return next(call for word, call in CALLS[mutant.module].items() if word in mutant.name)


def catcher(mutant, limit) -> str:
  """What noticed the mistake, or nothing."""
  call, kernels = call_for(mutant), mutant.load()
  try:
    y, _ = call.run(kernels)
    error = gpu_calls.relative(y, call.truth())
  except AssertionError:
    return "not finite"
  except Exception as failure:
    text = str(failure)
    for sign, name in (("RACE DETECTED", "race"), ("observed", "barrier phase"), ("not done after", "deadlock")):
      if sign in text:
        return name
    raise
  return f"error {error:.1g}" if error > limit else ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_caught(mutant, capsys):
  call = call_for(mutant)
  caught = catcher(mutant, LIMITS[mutant.module] if mutant.module in LIMITS else call.limit())
  with capsys.disabled():
    print(f"\n  {mutant!s:60} {caught or 'NOT CAUGHT'}", end="")
  assert caught
