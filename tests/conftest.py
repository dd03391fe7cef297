"""Tests run on eight CPU devices, on every machine; GPU programs are compiled in subprocesses of their own.

Markers (pyproject.toml describes them): a test file sets `compile`, `process` and `gpu`; this file sets `slow` on the tests
that slow_tests.txt lists, and `fast` on every test without a marker. `pytest -m fast` is the inner loop.

`pytest -m gpu` runs the tests marked `gpu`, and no others, on the GPU of this machine. A machine without a GPU skips them,
with CI=true too.
"""

import os
import pathlib
import sys

import pytest

ON_GPU = ("gpu" in sys.argv and sys.argv[sys.argv.index("gpu") - 1] == "-m") or "-mgpu" in sys.argv  # before jax is imported
if not ON_GPU:
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads spin: on shared cores numpy takes five times as long
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

SLOW_TESTS = pathlib.Path(__file__).parent / "slow_tests.txt"
NOT_FAST = ("compile", "process", "gpu", "slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
  no_gpu = _why_no_gpu()
  slow = _slow_tests()
  for item in items:
    if slow & {item.nodeid.split("[")[0], item.nodeid.split("::")[0]}:
      item.add_marker("slow")
    if not any(item.get_closest_marker(name) for name in NOT_FAST):
      item.add_marker("fast")
    if no_gpu and item.get_closest_marker("gpu"):
      item.add_marker(pytest.mark.skip(reason=no_gpu))


def _slow_tests() -> frozenset[str]:
  """The entries of slow_tests.txt: node ids without parameters, and paths of whole files."""
  lines = SLOW_TESTS.read_text(encoding="utf-8").splitlines()
  return frozenset(line for line in lines if line and not line.startswith("#"))


def _why_no_gpu() -> str:
  """Why tests marked gpu cannot run; empty if they can."""
  if not ON_GPU:
    return "needs a GPU: run pytest -m gpu on a machine that has one"
  import jax

  from jaxfp8.commands.command import choose_platform

  choose_platform()
  try:
    return "" if jax.devices()[0].platform == "gpu" else "JAX sees no GPU here"
  except RuntimeError as error:
    return f"JAX cannot use the GPU here: {error}"
