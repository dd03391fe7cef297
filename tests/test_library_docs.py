"""docs/library.md runs as it stands, block after block, and prints what it says that it prints."""

import contextlib
import io
import pathlib
import re

import pytest

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "library.md"
BLOCKS = re.findall(r"\n## ([^\n]*)\n|```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def examples():
  """(title, code) of each block, in order."""
  title, found = "imports", []
  for heading, code in BLOCKS:
    title = heading or title
    if code:
      found.append(pytest.param(code, id=title.replace(" ", "-")))
  return found


@pytest.fixture(scope="module")
def namespace():
  return {}


@pytest.mark.parametrize("code", examples())
def test_block(code, namespace):
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    exec(compile(code, str(PAGE), "exec"), namespace)
  assert out.getvalue().splitlines() == re.findall(r"# -> (.*)", code)
  assert out.getvalue().count("\n") == code.count("print("), "every print says what it prints"
