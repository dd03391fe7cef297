"""Child processes: answers before an abort or a time limit count, errors come back, and every module of the table starts."""

import ast
import importlib
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jaxfp8 import child_process
from jaxfp8.child_process import Child
from jaxfp8.errors import InputError
from tests.helpers import commands

FUNCTIONS = """
import os, signal, sys, time
from jaxfp8 import child_process
from jaxfp8.errors import InputError

def function(request):
  yield {"got": request["value"]}
  print("a library prints to stdout")
  os.system("echo a program prints to stdout")
  match request["then"]:
    case "end": yield {"got": 2}
    case "abort": print("LLVM ERROR: Cannot select", file=sys.stderr, flush=True); os.abort()
    case "sleep": time.sleep(60)
    case "wait": yield {"got": 2}; time.sleep(60)
    case "mistake": raise InputError("child: value must be even; got 3.")
    case "fault": raise RuntimeError("no such luck")
child_process.serve(function)
"""


@pytest.fixture
def ask(monkeypatch):
  monkeypatch.setattr(child_process, "command_line", lambda *_, **__: [sys.executable, "-c", FUNCTIONS])
  monkeypatch.chdir(commands.ROOT)

  def ask(then: str, **options) -> child_process.Reply:
    return child_process.ask(Child.CONVERSION, {"value": "aé\n", "then": then}, **options)

  return ask


class TestReply:
  def test_answers_alone_are_on_stdout(self, ask):
    reply = ask("end")
    assert (reply.answers, reply.exit_code, reply.failure) == (({"got": "aé\n"}, {"got": 2}), 0, "")

  def test_an_abort_keeps_the_answers_before_it(self, ask):
    reply = ask("abort")
    assert reply.answers == ({"got": "aé\n"},) and reply.exit_code == -signal.SIGABRT
    assert reply.failure == "the process ended with code -6: LLVM ERROR: Cannot select"

  def test_a_time_limit_keeps_the_answers_before_it(self, ask):
    start = time.monotonic()
    reply = ask("sleep", timeout_s=5)
    assert reply.timed_out and "took too long" in reply.failure and time.monotonic() - start < 30
    assert reply.answers == ({"got": "aé\n"},)

  def test_an_input_error_is_the_parents(self, ask):
    with pytest.raises(InputError, match=r"^child: value must be even; got 3\.$"):
      ask("mistake")

  def test_another_error_is_its_last_line(self, ask):
    assert ask("fault").failure == "the process ended with code 1: RuntimeError: no such luck"

  def test_the_environment(self, ask, monkeypatch):
    seen = "import os, json; print(json.dumps({'path': os.environ['PATH'], 'X': os.environ['X']}))"
    monkeypatch.setattr(child_process, "command_line", lambda *_, **__: [sys.executable, "-c", seen])
    monkeypatch.setenv("PATH", "/bin")
    assert ask("end", variables={"X": "1"}).answers == ({"path": "/bin", "X": "1"},)


def test_a_child_hears_ctrl_c_whatever_its_parent_ignores():
  ignoring = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
  command = [sys.executable, "-c", ignoring, sys.executable, "-c", FUNCTIONS]
  options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
  with subprocess.Popen(command, cwd=commands.ROOT, **options) as process:
    process.stdin.write(b'{"value": 1, "then": "wait"}\n')
    process.stdin.flush()
    for _ in range(2):  # os.system, between the two answers, ignores SIGINT
      process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == child_process.INTERRUPTED


class TestTable:
  @pytest.mark.parametrize("child", Child)
  def test_every_module_is_a_program(self, child):
    module = importlib.import_module(child.value)
    source = pathlib.Path(module.__file__).read_text(encoding="utf-8")
    assert 'if __name__ == "__main__":' in source

  def test_the_file_of_an_isolated_child(self):
    python, flag, path, seconds = child_process.command_line(Child.CHAT_TEMPLATE, "2", isolated=True)
    assert (python, flag, seconds) == (sys.executable, "-P", "2")
    assert pathlib.Path(path) == pathlib.Path(importlib.import_module(Child.CHAT_TEMPLATE.value).__file__)

  def test_no_other_module_starts_python(self):
    """`sys.executable` stands in child_process. Elsewhere: env prints it, streams begins the program again in another
    encoding, and platforms tries XLA_FLAGS, at which XLA aborts, with no module of ours."""
    users = set()
    for path in (commands.ROOT / "jaxfp8").rglob("*.py"):
      for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr == "executable":
          users.add(str(path.relative_to(commands.ROOT)))
    others = ("env", "platforms", "streams")
    assert users == {"jaxfp8/child_process.py", *(f"jaxfp8/commands/{name}.py" for name in others)}


@pytest.mark.parametrize(("text", "last"), [("", ""), ("a\n\n b \n\n", "b"), ("x" * 400, "x" * 300)])
def test_last_line(text, last):
  assert child_process.last_line(text) == last
