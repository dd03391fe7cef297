"""The calls of the interpret-mode tests on the GPU that is here (pytest -m gpu): the same arrays, the same truth, real kernels.

The suites of test_fp8_matmul.py, test_paged_attention.py and test_page_write.py have a row for the GPU too.
"""

import contextlib

import jax
import pytest

from pallas_kernels import Target, conformance, dispatch, interpret
from pallas_kernels.fp8_matmul import sm90 as matmul
from pallas_kernels.fused import sm90 as fused
from pallas_kernels.paged_attention import sm90 as attention
from tests.helpers import gpu_calls
from tests.helpers.gpu_calls import Matmul
from tests.pallas_kernels.test_fused_interpreted import NORMS, ROPES, SILUS
from tests.pallas_kernels.test_kernels_interpreted import DECODES, MATMULS, PREFILLS

pytestmark = pytest.mark.gpu
CALLS = (
  *((matmul, call) for call in MATMULS),
  *((attention, call) for call in DECODES + PREFILLS),
  *((fused, call) for call in NORMS + SILUS + ROPES),
)


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch):
  """Calls run as they are, not interpreted."""
  if (target := Target.of(jax.devices()[0])).capability and not dispatch.KERNELS.get(target.capability):
    pytest.skip(dispatch.without_kernels(target.capability))
  monkeypatch.setattr(interpret, "running", lambda *_: contextlib.nullcontext(interpret.Copies()))


def limit(call) -> float:
  """FP8 tensor cores add with some 14 bits; attention's result is rounded to bf16; the others say theirs."""
  if isinstance(call, Matmul):
    return 1e-3 if call.form == "w8a8" else 1e-5
  return call.limit() if hasattr(call, "limit") else 1e-2


@pytest.mark.parametrize(("module", "call"), CALLS, ids=str)
def test_kernels(module, call):
  y, _ = call.run(module)
  assert gpu_calls.relative(y, call.truth()) < limit(call)


def test_first_use():
  device = jax.devices()[0]
  conformance.require_passed(conformance.run(Target.of(device)), device.device_kind)
