"""Rules of the source: modules that load no jax, imports that stay light, lengths of files, parameters, names in strings."""

import ast
import functools
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Modules and packages that load no jax in a fresh process.
NO_JAX = [
  "errors",
  "units",
  "progress",
  "plots",
  "config",
  "recipe",
  "mesh",
  "source_digest",
  "child_process",
  "private_files",
  "regular_files",
  "search_path",
  "planning.devices",
  "planning.roofline",
  "planning.deployment",
  "planning.planner",
  "planning.advice",
  "planning.verdict",
  "planning.published",
  "planning.compile_request",
  "planning.report",
  "planning.plots",
  "inspection.hlo",
  "inspection.traffic",
  "checkpoint.tokenizer_files",
  "checkpoint.manifest",
  "checkpoint.open",
  "checkpoint.stored_arrays",
  "checkpoint.dequantize_on_read",
  "unfinished",
  "checkpoint.writer",
  "checkpoint.readers",
  "checkpoint.readers.huggingface",
  "checkpoint.readers.huggingface_config",
  "checkpoint.readers.huggingface_tokenizer",
  "checkpoint.readers.json_file",
  "checkpoint.readers.safetensors_file",
  "checkpoint.readers.dialects",
  "checkpoint.readers.source",
  "checkpoint.readers.file_bytes",
  "checkpoint.readers.file_kinds",
  "checkpoint.readers.locate",
  "checkpoint.readers.tensor_names",
  "checkpoint.readers.gguf_file",
  "checkpoint.readers.gguf_header",
  "checkpoint.readers.gguf_config",
  "checkpoint.readers.gguf_tokenizer",
  "text.chat_template",
  "text.tokenizer",
  "quantization.observers",
  "quantization.plots",
  "distributed.environment",
  "serving.limits",
  "serving.pages",
  "serving.scheduler",
  "commands.command",
  "commands.main",
  "commands.env",
  "commands.plan",
  "commands.generate",
]
WITH_JAX = ("jax", "jaxlib", "flax", "orbax", "optax", "tensorstore", "pallas_kernels")
MAX_LINES = 320


def files_of(*folders: str) -> list[pathlib.Path]:
  return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def imports_of(path: pathlib.Path) -> frozenset[str]:
  """Dotted names of all imports of a file, those inside functions too; `from a import b` counts as a.b."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return frozenset(names)


def test_a_fresh_process_loads_no_jax():
  """The planner, the readers, an opened checkpoint and the scheduler need no jax."""
  code = f"""
import importlib, sys
for name in {NO_JAX}:
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
  assert all(path.startswith("jaxfp8/commands/") for path in with_flags), with_flags
  for path in files_of("jaxfp8", "pallas_kernels", "tools"):
    # These write what the tests compare with, for the tests' own tiny models and tokenizers.
    if path.name not in ("make_goldens.py", "make_tokenizer_goldens.py", "make_w8a8_goldens.py"):
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
    assert not set(jaxfp8.__all__) & {path.stem for path in (ROOT / "jaxfp8").iterdir()}

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


# Array operands of operations, of jitted steps and of their checks do not count (DESIGN's rule); these functions take arrays.
ARRAY_OPERANDS = {
  *("_step", "_one_layer", "_rope", "_check", "_add_page"),
  *("rope_write", "page_write", "_write_tokens", "_write_pages", "paged_attention"),
}


@pytest.mark.parametrize("path", files_of("jaxfp8", "pallas_kernels"), ids=lambda path: str(path.relative_to(ROOT)))
def test_at_most_five_positional_parameters(path):
  long = {}
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.FunctionDef) and node.name not in ARRAY_OPERANDS:
      names = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
      if len(names) > 5:
        long[node.name] = names
  assert not long, f"make the others keyword-only: {long}"


DOTTED = re.compile(r"(?<![\w./-])(?:jaxfp8|pallas_kernels|tools)(?:\.[A-Za-z_]\w*)+(?![\w/-])")
FILE_NAMES = {"jaxfp8.json"}  # the manifest of a checkpoint: a file, no module


def unresolved(dotted: str) -> str | None:
  """The part of a dotted name that is neither a module nor defined in the module before it; None if every part is."""
  parts = dotted.split(".")
  folder = ROOT / parts[0]
  for index, part in enumerate(parts[1:], 1):
    if (folder / part).is_dir():
      folder = folder / part
      continue
    if (folder / f"{part}.py").is_file():
      if index + 1 == len(parts):
        return None
      module, name = folder / f"{part}.py", parts[index + 1]
    else:
      module, name = folder / "__init__.py", part
    if not module.is_file() or not re.search(rf"\b{name}\b", "\n".join(_defined(module))):
      return name
    return None
  return None


@functools.cache
def _defined(path: pathlib.Path) -> tuple[str, ...]:
  """The names that a module defines or imports at its top level, or under an `if` there."""
  names = []
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      names.append(node.name)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      names.append(node.id)
    elif isinstance(node, ast.alias):
      names.append((node.asname or node.name).split(".")[-1])
  return tuple(names)


@pytest.mark.parametrize(
  "path", files_of("jaxfp8", "pallas_kernels", "tools", "examples"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_names_in_strings_exist(path):
  """A module that moved leaves no old name behind in a message, a docstring or a command line."""
  stale = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      names = set(DOTTED.findall(node.value)) - FILE_NAMES
      stale |= {name for name in names if unresolved(name)}
  assert not stale, f"no such module or name: {sorted(stale)}"


@pytest.mark.parametrize(
  ("name", "part"),
  [
    ("jaxfp8.hosts", "hosts"),
    ("jaxfp8.planning.budget", "budget"),
    ("tools.gpu_report", "gpu_report"),
    ("jaxfp8.quantization.quality_gate.Limits", "Limits"),
    ("jaxfp8.planning.deployment", None),
    ("jaxfp8.quantization.quality_gate.GateLimits", None),
    ("jaxfp8.load", None),
  ],
)
def test_an_old_name_does_not_resolve(name, part):
  assert unresolved(name) == part
