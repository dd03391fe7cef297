"""The README's examples run as they stand."""

import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

README = pathlib.Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_there_is_an_example():
  assert EXAMPLES


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code):
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
  assert done.returncode == 0, done.stderr
  assert "Paris" in done.stdout, "greedy text of the default model should name the capital of France"
