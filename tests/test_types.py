"""What the type checker of a user's editor knows about jaxfp8."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

import jaxfp8

pytestmark = pytest.mark.process

ROOT = pathlib.Path(__file__).parent.parent
# A user's script. `reveal_type` makes the type checker report the type of an expression.
SCRIPT = """\
import jaxfp8

{names}
model = jaxfp8.load("folder", recipe=jaxfp8.Recipe(weights="fp8"))
reveal_type(model)
reveal_type(model.config.num_layers)
reveal_type(jaxfp8.SamplingParams(max_new_tokens=8))
reveal_type(jaxfp8.Engine(model).generate([jaxfp8.Request("x")]))
reveal_type(jaxfp8.Tokenizer.load("folder").encode("x"))
jaxfp8.lode("folder")
jaxfp8.load(recipe="fp8")
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
  """The type checker's messages about SCRIPT, which lies outside the checkout: by severity, (line, message)."""
  folder = tmp_path_factory.mktemp("typed")
  names = "\n".join(f"reveal_type(jaxfp8.{name})" for name in jaxfp8.__all__)
  (folder / "script.py").write_text(SCRIPT.format(names=names), encoding="utf-8")
  settings = {"typeCheckingMode": "basic", "include": ["script.py"], "extraPaths": [str(ROOT)]}
  (folder / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
  command = [pathlib.Path(sys.executable).parent / "basedpyright", "--outputjson", "--pythonpath", sys.executable]
  ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
  lines = (folder / "script.py").read_text(encoding="utf-8").splitlines()
  messages: dict[str, dict[str, str]] = {"information": {}, "error": {}, "warning": {}}
  for message in json.loads(ran.stdout)["generalDiagnostics"]:
    messages[message["severity"]][lines[message["range"]["start"]["line"]]] = message["message"]
  return messages


def test_every_public_name_has_a_type(report):
  for name in jaxfp8.__all__:
    revealed = report["information"][f"reveal_type(jaxfp8.{name})"]
    result = revealed.split(" -> ")[-1]  # of a function; else the whole type
    assert "Any" not in result and "Unknown" not in result, f"{name}: {revealed}"


def test_types_of_a_users_script(report):
  def revealed(expression):
    return report["information"][f"reveal_type({expression})"].split(" is ", 1)[1].strip('"')

  assert revealed("model") == "Llama"
  assert revealed("model.config.num_layers") == "int"
  assert revealed("jaxfp8.SamplingParams(max_new_tokens=8)") == "SamplingParams"
  assert revealed('jaxfp8.Engine(model).generate([jaxfp8.Request("x")])') == "list[Completion]"
  assert revealed('jaxfp8.Tokenizer.load("folder").encode("x")') == "list[int]"


def test_a_users_mistakes_are_errors(report):
  assert list(report["error"]) == ['jaxfp8.lode("folder")', 'jaxfp8.load(recipe="fp8")'], report["error"]
  assert '"lode" is not a known attribute' in report["error"]['jaxfp8.lode("folder")']
  assert not report["warning"], report["warning"]


def test_the_imports_for_type_checkers_are_the_public_names():
  tree = ast.parse((ROOT / "jaxfp8" / "__init__.py").read_text(encoding="utf-8"))
  (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
  imported = {
    alias.name: statement.module
    for statement in block.body
    if isinstance(statement, ast.ImportFrom)
    for alias in statement.names
  }
  assert imported == {name: f"jaxfp8.{module}" for name, module in jaxfp8._HOME.items()}


@pytest.mark.parametrize("package", ["jaxfp8", "pallas_kernels"])
def test_a_package_says_that_it_has_types(package):
  assert (ROOT / package / "py.typed").is_file()
