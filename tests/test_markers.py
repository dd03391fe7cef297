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


FAST = "tests/model/test_fp8.py"
NOT_FAST = {
  "compile": "tests/pallas_kernels/test_compiled_kernels.py",
  "process": "tests/distributed/test_processes.py",
  "gpu": "tests/pallas_kernels/test_gpu_device.py",
  "slow": "tests/pallas_kernels/test_mutants.py",
}


def test_fast_selects_the_tests_without_another_marker():
  command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", "fast", FAST]
  ran = subprocess.run([*command, *NOT_FAST.values()], cwd=ROOT, capture_output=True, text=True, timeout=240)
  assert ran.returncode == 0, ran.stdout + ran.stderr
  assert {line.split("::")[0] for line in ran.stdout.splitlines() if "::" in line} == {FAST}
  assert "test_every_granularity" not in ran.stdout, "slow_tests.txt lists it"
