"""A module or a program in the working directory does not run: at a command, and in the processes that it starts."""

import os
import pathlib
import subprocess
import sys
import types

import pytest

from jaxfp8 import child_process, search_path
from jaxfp8.child_process import Child
from jaxfp8.commands import env
from tests.helpers import commands

SCRIPT = "import sys\nfrom jaxfp8.commands.main import main\nif __name__ == '__main__':\n  sys.exit(main())\n"
NAMES = ("json", "typing", "dataclasses", "difflib", "argparse", "absl", "numpy", "jax", "rich", "sitecustomize")


@pytest.fixture
def trap(tmp_path):
  """A working directory whose modules leave a file behind, named after them."""
  folder = tmp_path / "downloads"
  folder.mkdir()
  for name in NAMES:
    marker = tmp_path / "ran" / name
    (folder / f"{name}.py").write_text(f"import os; os.makedirs({str(marker)!r}, exist_ok=True)\n")
  return folder


def ran(trap):
  return sorted(path.name for path in (trap.parent / "ran").glob("*"))


def run(trap, *arguments, path=str(commands.ROOT)):
  variables = os.environ | {"PYTHONPATH": path}
  return subprocess.run([sys.executable, *arguments], cwd=trap, env=variables, capture_output=True, text=True, timeout=60)


@pytest.mark.process
class TestCommands:
  def test_the_trap_works(self, trap):
    run(trap, "-c", "import json, numpy")
    assert {"json", "numpy"} <= set(ran(trap))

  @pytest.mark.parametrize(
    "module", ["jaxfp8", "jaxfp8.generate", "jaxfp8.plan", "jaxfp8.commands.env", "tools.convert_checkpoint"]
  )
  def test_as_a_module(self, trap, module):
    ended = run(trap, "-m", module, "--help")
    assert ended.returncode == 0, ended.stderr
    assert ran(trap) == []

  def test_settings_of_matplotlib(self, trap):
    """Some versions run what matplotlibrc says."""
    (trap / "matplotlibrc").write_text("no.such.setting: 1\n")
    assert "matplotlibrc" in run(trap, "-P", "-c", "import matplotlib").stderr, "it would be read here"
    ended = run(trap, "-P", "-m", "jaxfp8.plan", "tiny", "h100", "--plot=picture.png")
    assert (ended.returncode, ended.stderr) == (0, "") and (trap / "picture.png").is_file()

  def test_as_a_script(self, trap, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "jaxfp8").write_text(SCRIPT)
    (trap / "sitecustomize.py").unlink()  # Python imports it before any program
    for path in (str(commands.ROOT), f":{commands.ROOT}", f"{commands.ROOT}::"):
      ended = run(trap, str(tmp_path / "bin" / "jaxfp8"), "plan", "--help", path=path)
      assert ended.returncode == 0, ended.stderr
      assert ran(trap) == []

  def test_in_a_child(self, trap, monkeypatch):
    (trap / "sitecustomize.py").unlink()
    monkeypatch.chdir(trap)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("PATH", f":.:{os.environ['PATH']}")
    for child, isolated in ((Child.CONVERSION, False), (Child.CHAT_TEMPLATE, True)):
      arguments = ("1",) if isolated else ()
      process = child_process.start(
        child, *arguments, isolated=isolated, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
      )
      err = process.communicate(timeout=60)[1]
      assert b"No module named" not in err, err
      assert ran(trap) == []


def test_every_child_leaves_the_working_directory():
  for child in Child:
    for isolated in (False, True):
      assert child_process.command_line(child, isolated=isolated)[:2] == [sys.executable, "-P"]


@pytest.fixture
def as_module(monkeypatch):
  """Makes this process look like `python -m NAME`, with this sys.path."""

  def make(name, *entries):
    monkeypatch.setitem(sys.modules, "__main__", types.SimpleNamespace(__spec__=types.SimpleNamespace(name=name)))
    monkeypatch.setattr(sys, "path", list(entries))
    search_path.leave_working_directory()
    return sys.path

  monkeypatch.setenv("PYTHONPATH", "/stated")
  return make


class TestSearchPath:
  def test_a_module_of_ours_leaves_the_first_entry(self, as_module):
    assert as_module("jaxfp8.generate", "/here", "/python", "/packages") == ["/python", "/packages"]
    assert as_module("jaxfp8.generate", "/stated", "/python") == ["/stated", "/python"]

  def test_a_checkout_stays(self, as_module):
    root = str(commands.ROOT)
    assert as_module("jaxfp8.__main__", root, "/python") == [root, "/python"]

  def test_another_program_keeps_its_path(self, as_module, monkeypatch):
    monkeypatch.setenv("PATH", ":/bin")
    assert as_module("pytest.__main__", "/here", "/python") == ["/here", "/python"]
    assert os.environ["PATH"] == ":/bin"

  def test_empty_entries(self, as_module, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ":/stated:")
    monkeypatch.setenv("PATH", ":.:/bin:relative:/usr/bin:")
    here = os.getcwd()
    monkeypatch.setattr(search_path, "_ROOT", "/elsewhere")
    assert as_module("jaxfp8.plan", "/m", here, "/stated", "/python") == ["/stated", "/python"]
    assert (os.environ["PYTHONPATH"], os.environ["PATH"]) == ("/stated", "/bin:/usr/bin")

  def test_a_childs_variables(self, monkeypatch):
    root = str(commands.ROOT)
    assert search_path.child_variables({"PYTHONPATH": ":/a:"})["PYTHONPATH"] == f"{root}:/a"
    assert search_path.child_variables({"PYTHONPATH": f"/a:{root}"})["PYTHONPATH"] == f"/a:{root}"
    monkeypatch.setattr(search_path, "_ROOT", "/usr/lib/python3/site-packages")  # Python finds it there
    assert search_path.child_variables({"A": "b"}) == {"A": "b", "PYTHONPATH": ""}


@pytest.mark.parametrize("path", ["", ".", ":/nowhere", "/nowhere:."])
def test_a_program_in_the_working_directory_does_not_run(tmp_path, monkeypatch, path):
  program = tmp_path / "nvidia-smi"
  program.write_text(f"#!/bin/sh\n: > {tmp_path}/ran\n")
  program.chmod(0o755)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("PATH", path)
  env.gpus()
  assert not (tmp_path / "ran").exists()
  monkeypatch.setenv("PATH", str(tmp_path))
  env.gpus()
  assert pathlib.Path(tmp_path, "ran").exists()
