"""Every deliberate mistake in a GPU kernel is caught by interpret mode: by a wrong result, a race or a broken barrier."""

import gpu_calls
import gpu_mutants
import pytest
from gpu_calls import Attention, Matmul

CALLS = {
  gpu_mutants.matmul: {
    "block": Matmul("w8a8", 20, 256, 256, block_rows=64),
    "float16": Matmul("w8a16", 2, 64, 1024, x_size=1e6),
    "frees": Matmul("w8a16", 1, 128, 2048),
    "tile": Matmul("w8a8", 136, 256, 128),
    "part": Matmul("w8a8", 3, 64, 512),
    "": Matmul("w8a8", 20, 256, 768),
  },
  gpu_mutants.attention: {
    "stage": Attention("fp8", (400, 65), N=2, K=2),
    "twice": Attention("fp8", (400, 65), N=2, K=2),
    "too many": Attention("fp8", (5,), N=2, K=1),
    "": Attention("fp8", (450, 65), N=2, K=1, spread=1.0),
  },
}


def call_for(mutant):
  """The smallest call that reaches the mutated line."""
  return next(call for word, call in CALLS[mutant.module].items() if word in mutant.name)


def catcher(mutant, limit) -> str:
  """What noticed the mistake, or nothing."""
  call = call_for(mutant)
  try:
    y, _ = call.run(mutant.load())
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


@pytest.mark.parametrize("mutant", gpu_mutants.MATMUL + gpu_mutants.ATTENTION, ids=str)
def test_mutant_is_caught(mutant, capsys):
  caught = catcher(mutant, 1e-5 if mutant in gpu_mutants.MATMUL else 1e-2)
  with capsys.disabled():
    print(f"\n  {mutant!s:60} {caught or 'NOT CAUGHT'}", end="")
  assert caught
