"""The shape of the house: who may import whom, what stays free of jax, and how long a file may be."""

import ast
import functools
import importlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# A file imports only files of lower floors and files to its left on its own floor. From the bottom up; * imports no jax.
FLOORS = {
  "vocabulary": "errors* units* text* cluster* config* mesh* devices* dims hosts fp8",
  "records": "pages* roofline* batch cache",
  "mathematics": "sampling layers model",
  "programs": """layout filling widening static_scales checkpoint_folder checkpoint_writer checkpoint readers.source*
    readers.safetensors_file* readers.dialects* readers.gguf_tokenizer* readers.gguf_file* readers.huggingface* readers*
    checkpoint_source source_arrays convert export rounding magnitudes* calibration program_cache steps synthetic quality
    quality_gate deviceless hlo* traffic*""",
  "host": """budget* compiled_budget* step_budget published* advice* verdict* planner* chat_child* chat_template* tokenizer
    scheduler* output memory engine progress* weights_cache startup following report plots* quality_plots* plan_report*
    plan_plots*""",
  "entry": "cli conversion_child generate plan",
}
ORDER = [name.rstrip("*") for floor in FLOORS.values() for name in floor.split()]
NO_JAX = {name.rstrip("*") for floor in FLOORS.values() for name in floor.split() if name.endswith("*")}
WITH_JAX = ("jax", "jaxlib", "flax", "orbax", "optax", "tensorstore", "pallas_kernels")
MAY_HAVE_FLAGS = {f"jaxfp8/{name}.py" for name in FLOORS["entry"].split()}
MAX_LINES = 320


def files_of(*folders: str) -> list[pathlib.Path]:
  return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(path: pathlib.Path) -> str:
  """`readers.source` for jaxfp8/readers/source.py, `readers` for its __init__.py."""
  parts = path.relative_to(ROOT / "jaxfp8").with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports_of(path: pathlib.Path) -> frozenset[str]:
  """Dotted names of everything that is imported, inside functions too; `from a import b` counts as a.b."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return frozenset(found)


def files_imported(path: pathlib.Path, package: str, known) -> set[str]:
  """Those of `known` modules of `package` that a file imports."""
  found = set()
  for name in imports_of(path):
    if name.split(".")[0] == package:
      inner = name.split(".")[1:]
      match = next((".".join(inner[:size]) for size in range(len(inner), 0, -1) if ".".join(inner[:size]) in known), None)
      if match:
        found.add(match)
  return found


MODULES = {module_of(path): path for path in files_of("jaxfp8") if module_of(path)}


def test_every_file_has_a_place():
  assert sorted(MODULES) == sorted(ORDER), "tests/test_floors.py says where each file of jaxfp8 stands"
  assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down_or_left(name):
  if name not in ORDER:
    pytest.skip("has no place yet")
  place = ORDER.index(name)
  wrong = [other for other in files_imported(MODULES[name], "jaxfp8", MODULES) if ORDER.index(other) >= place]
  # A package's __init__ is imported with each of its files.
  wrong = [other for other in wrong if not name.startswith(other + ".")]
  assert not wrong, f"{name} may not import {', '.join(wrong)}"


@pytest.mark.parametrize("name", sorted(NO_JAX))
def test_no_jax(name):
  tops = {imported.split(".")[0] for imported in imports_of(MODULES[name])}
  assert not tops & set(WITH_JAX)
  beyond = files_imported(MODULES[name], "jaxfp8", MODULES) - NO_JAX
  assert not beyond, f"{name} imports no jax, but {', '.join(sorted(beyond))} may"


def test_no_jax_when_run():
  """The planner, the readers and the scheduler run where there is no jax at all."""
  code = f"""
import importlib, sys
for name in {sorted(NO_JAX)}:
  importlib.import_module("jaxfp8." + name)
loaded = sorted({{name.split(".")[0] for name in sys.modules}} & set({WITH_JAX}))
assert not loaded, loaded
"""
  ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.parametrize("path", files_of("pallas_kernels"), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_know_nothing_of_the_model(path):
  assert not [name for name in imports_of(path) if name.split(".")[0] in ("jaxfp8", "tools", "flax", "absl")]


def test_flags_only_at_the_entries():
  with_flags = {
    str(path.relative_to(ROOT))
    for path in files_of("jaxfp8", "pallas_kernels")
    if any(name.split(".")[0] == "absl" for name in imports_of(path))
  }
  assert with_flags <= MAY_HAVE_FLAGS
  for path in files_of("jaxfp8", "pallas_kernels", "tools"):
    assert not [name for name in imports_of(path) if name.split(".")[0] == "tests"]
    if path.is_relative_to(ROOT / "jaxfp8"):
      assert not [name for name in imports_of(path) if name.split(".")[0] == "tools"]


def test_import_is_light():
  """`import jaxfp8` alone loads no library for checkpoints or text."""
  heavy = ("orbax", "tensorstore", "safetensors", "gguf", "tokenizers", "jinja2", "matplotlib")
  code = f"import sys, jaxfp8; loaded = [n for n in {heavy} if n in sys.modules]; assert not loaded, loaded"
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
  # And a model can be made and run with none of them.
  code = f"""
import sys, jaxfp8
jaxfp8.Llama(jaxfp8.LlamaConfig.from_name("tiny"), jaxfp8.Recipe()), jaxfp8.KVCache, jaxfp8.prefill, jaxfp8.sample
loaded = [n for n in {[name for name in heavy if name != "matplotlib"]} if n in sys.modules]
assert not loaded, loaded
"""
  ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert ran.returncode == 0, ran.stderr[-2000:]


class TestPublicNames:
  def test_every_name_resolves(self):
    jaxfp8 = importlib.import_module("jaxfp8")
    for name in jaxfp8.__all__:
      value = getattr(jaxfp8, name)
      assert callable(value) and value.__doc__, f"{name} has no docstring"
    assert sorted(dir(jaxfp8)) == sorted(jaxfp8.__all__)
    assert 15 <= len(jaxfp8.__all__) <= 25

  def test_no_name_is_a_modules(self):
    """`from jaxfp8 import x` must not depend on whether jaxfp8.x was imported before."""
    jaxfp8 = importlib.import_module("jaxfp8")
    assert not set(jaxfp8.__all__) & {name.split(".")[0] for name in MODULES}

  def test_an_unknown_name(self):
    jaxfp8 = importlib.import_module("jaxfp8")
    with pytest.raises(AttributeError, match="no attribute 'lama'; it exports Completion"):
      _ = jaxfp8.lama


@pytest.mark.parametrize("path", files_of("jaxfp8", "pallas_kernels", "tools"), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_finished(path):
  text = path.read_text(encoding="utf-8")
  assert text.count("\n") <= MAX_LINES
  assert "TO" + "DO" not in text and "FIX" + "ME" not in text
  assert ast.get_docstring(ast.parse(text)), "a file says what it is"
