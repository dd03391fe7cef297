"""The markers: the inner loop is what it says, and slow_tests.txt names tests that exist."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ENTRIES = [
  line for line in (ROOT / "tests" / "slow_tests.txt").read_text(encoding="utf-8").splitlines() if line[:1] not in ("#", "")
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_slow_test_exists(entry):
  path, *names = entry.split("::")
  body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
  for name in names:
    (node,) = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name]
    body = node.body


def test_entries_are_sorted():
  assert sorted(set(ENTRIES)) == ENTRIES


def collected(*arguments: str) -> set[str]:
  """Files of the tests that pytest would run."""
  command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
  ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
  assert ran.returncode == 0, ran.stdout + ran.stderr
  return {line.split("::")[0] for line in ran.stdout.splitlines() if "::" in line}


@pytest.mark.slow
def test_every_marker_selects_its_tests_and_fast_the_others():
  markers = {name: collected("-m", name) for name in ("fast", "slow", "compile", "process", "gpu")}
  assert "tests/model/test_fp8.py" in markers["fast"]
  assert "tests/pallas_kernels/test_compiled_kernels.py" in markers["compile"] - markers["fast"]
  assert "tests/distributed/test_processes.py" in markers["process"] - markers["fast"]
  assert "tests/pallas_kernels/test_mutants.py" in markers["slow"] - markers["fast"]
  assert "tests/pallas_kernels/test_gpu_device.py" in markers["gpu"] - markers["fast"]
