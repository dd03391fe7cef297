"""The linters that the repository passes: ruff, the order of the rooms (import-linter), and the types (basedpyright)."""

import pathlib
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

ROOT = pathlib.Path(__file__).parent.parent
TOOLS = pathlib.Path(sys.executable).parent


def run(tool: str, *arguments: str, folder: pathlib.Path = ROOT) -> subprocess.CompletedProcess:
  """Runs a linter of this environment; one that is not installed is an error, not a skip."""
  return subprocess.run([TOOLS / tool, *arguments], cwd=folder, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff(arguments):
  ran = run("ruff", *arguments, "--quiet", ".")
  assert ran.returncode == 0, ran.stdout + ran.stderr


def test_types():
  ran = run("basedpyright")
  assert ran.returncode == 0 and "0 errors, 0 warnings" in ran.stdout, ran.stdout + ran.stderr


def test_imports():
  ran = run("lint-imports", "--no-cache")
  assert ran.returncode == 0 and " 0 broken" in ran.stdout, ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
  folder = tmp_path_factory.mktemp("copy")
  for name in ("jaxfp8", "pallas_kernels", "tools", "tests"):
    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "goldens"))
  shutil.copy(ROOT / "pyproject.toml", folder)
  return folder


class TestContractsCanBreak:
  """One forbidden import in a copy of the checkout breaks the contract that forbids it."""

  @pytest.mark.parametrize(
    "file, statement",
    [
      ("jaxfp8/model/layers.py", "import jaxfp8.serving.engine"),
      ("jaxfp8/checkpoint/open.py", "def f():\n  from jaxfp8.text import tokenizer"),
      ("jaxfp8/stray.py", "pass"),
      ("pallas_kernels/dispatch.py", "import jaxfp8.units"),
      ("pallas_kernels/fp8_matmul/api.py", "import flax"),
      ("jaxfp8/serving/engine.py", "import tools"),
      ("jaxfp8/planning/planner.py", "import jax"),
      ("jaxfp8/serving/scheduler.py", "import jaxfp8.model.fp8"),
    ],
  )
  def test_an_import_that_is_forbidden(self, copy, file, statement):
    path = copy / file
    before = path.read_text(encoding="utf-8") if path.exists() else None
    path.write_text(f"{before or ''}\n{statement}\n", encoding="utf-8")
    try:
      ran = run("lint-imports", "--no-cache", folder=copy)
    finally:
      path.unlink() if before is None else path.write_text(before, encoding="utf-8")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert file.removesuffix(".py").replace("/", ".") in ran.stdout
