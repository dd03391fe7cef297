"""Tests run on eight CPU devices, whatever else is here; GPU programs are compiled in subprocesses of their own.

`pytest -m gpu` is the exception: the tests that are marked so, on the GPU that is here, and nothing else. They are skipped
everywhere else, with CI=true too, since no machine can be asked for a GPU that it does not have.
"""

import os
import sys

import pytest

ON_GPU = ("gpu" in sys.argv and sys.argv[sys.argv.index("gpu") - 1] == "-m") or "-mgpu" in sys.argv  # before jax is imported
if not ON_GPU:
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads spin: on shared cores numpy takes five times as long
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def pytest_collection_modifyitems(items):
  reason = _why_no_gpu()
  for item in items:
    if reason and item.get_closest_marker("gpu"):
      item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu() -> str:
  """Why tests marked gpu cannot run; empty where they can."""
  if not ON_GPU:
    return "needs a GPU: run pytest -m gpu on a machine that has one"
  import jax

  from jaxfp8.commands.command import choose_platform

  choose_platform()
  try:
    return "" if jax.devices()[0].platform == "gpu" else "JAX sees no GPU here"
  except RuntimeError as error:
    return f"JAX cannot use the GPU here: {error}"
