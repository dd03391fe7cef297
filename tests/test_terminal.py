"""Control characters of strangers are shown and never reach a terminal; an answer in a pipe keeps its bytes."""

import ast
import io
import json
import os
import pathlib
import pty
import re
import subprocess
import sys
import termios
import threading
import unicodedata

import pytest
from rich.table import Table

from jaxfp8 import terminal
from jaxfp8.commands import command, inspect
from jaxfp8.console import console
from jaxfp8.errors import InputError
from jaxfp8.progress import Progress
from jaxfp8.terminal import VisibleStream, visible
from jaxfp8.text.chat_template import ChatTemplate

ROOT = pathlib.Path(__file__).parents[1]
CLIPBOARD = "\x1b]52;c;eA==\x07"
HOSTILE = f"a{CLIPBOARD}\x1b[2J\x9b1A\rb\x7f\u202ec\u2066[red]d[/red][link=http://x]e[/link]:smile:"
SHOWN = r"a\x1b]52;c;eA==\x07\x1b[2J\x9b1A\x0db\x7f\u202ec\u2066[red]d[/red][link=http://x]e[/link]:smile:"
OWN_COLORS = re.compile(r"\x1b\[[0-9;]*m")


def test_every_character_that_acts_is_shown_and_no_other():
  for code in range(0x3000):
    character = chr(code)
    acts = unicodedata.category(character) == "Cc" and character not in "\n\t"
    acts |= unicodedata.bidirectional(character) in ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")
    assert (visible(character) != character) == acts, hex(code)
    if acts:
      assert ast.literal_eval(f"'{visible(character)}'") == character
  assert visible(HOSTILE) == SHOWN == visible(SHOWN)
  assert visible("\ud800\udcff") == r"\ud800\udcff"  # of a file name that is no UTF-8
  assert visible("tab\tnewline\né世🌍 שלום \u200f") == "tab\tnewline\né世🌍 שלום \u200f"


def test_messages_and_results(capsys):
  terminal.say(HOSTILE)
  terminal.show(HOSTILE)
  terminal.show_json({"x": HOSTILE + "\x9d"})
  out, err = capsys.readouterr()
  assert err == SHOWN + "\n" and out.startswith(SHOWN + "\n")
  assert json.loads(out.splitlines()[1]) == {"x": HOSTILE + "\x9d"} and visible(out) == out


def test_a_sequence_in_pieces_stays_shown():
  inner = io.StringIO()
  stream = VisibleStream(inner)
  for piece in HOSTILE:
    assert stream.write(piece) == 1
  print(HOSTILE, file=stream)
  stream.writelines([HOSTILE])
  assert inner.getvalue() == f"{SHOWN}{SHOWN}\n{SHOWN}"


class _Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


def test_tables_show_content_and_keep_their_own_colors(monkeypatch):
  monkeypatch.setenv("TERM", "xterm-256color")
  monkeypatch.setenv("COLUMNS", "400")
  monkeypatch.setattr(sys, "stdout", VisibleStream(_Terminal()))
  table = Table(title=HOSTILE, box=None)
  table.add_column(HOSTILE, style="red")
  table.add_column("x")
  table.add_row(HOSTILE, "end")
  out = console()
  out.print(table)
  out.print(HOSTILE, style="bold")
  written = sys.stdout.getvalue()
  plain = OWN_COLORS.sub("", written)
  assert plain != written and "\x1b" not in plain and plain.count(SHOWN) == 4
  assert visible(plain) == plain
  columns = [
    line.index(word) for line in plain.splitlines() for word in (" x ", " end") if line.rstrip().endswith(word.rstrip())
  ]
  assert len(columns) == 2 and columns[0] == columns[1]  # widths are those of what is shown


def test_inspect_shows_names_and_provenance_of_a_strangers_checkpoint(monkeypatch):
  line = {"key": HOSTILE, "dtype": "float32", "shape": [1], "bytes": 4, "least": 1.0, "largest": 2.0}
  result = {
    "tensors": [line], "recipe": {"weights": HOSTILE}, "provenance": {"came": HOSTILE}, "bytes": 4, "bytes_per_device": 4,
    "tensor": 1, "exceptions": {HOSTILE: HOSTILE}, "calibration": {"x": HOSTILE}, "quality": {"kl": HOSTILE},
    "outliers": [], "verified": None,
  }  # fmt: skip
  monkeypatch.setattr(sys, "stdout", io.StringIO())
  inspect._print(result)
  shown = sys.stdout.getvalue()
  assert SHOWN in shown and r"\x9b1A" in shown and visible(shown) == shown


def test_a_bar_and_the_notes_above_it(monkeypatch):
  """On a terminal rich prints notes above its bar; without care it would obey the sequences in them."""
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "400")
  written = _Terminal()
  monkeypatch.setattr(sys, "stderr", VisibleStream(written))
  with Progress() as progress, progress.task(f"title {HOSTILE}") as report:
    report(1, 2)
    print(f"print {HOSTILE}", file=sys.stderr)
    terminal.say(f"say {HOSTILE}")
  text = written.getvalue()
  assert "\x1b[?25l" in text and "\x1b[?25h" in text  # its own: it hides and shows the cursor
  content = re.sub(r"\x1b\[[0-9;?]*[mKAhl]|\r", "", text)
  assert visible(content) == content and all(f"{name} {SHOWN}" in content for name in ("title", "print", "say"))
  assert "\x1b[2J" not in text and isinstance(sys.stderr, VisibleStream) and sys.stderr.inner is written


@pytest.mark.parametrize("name", ["template", "library", "file"])
def test_errors_of_strangers(name, capsys):
  def main():
    if name == "template":
      ChatTemplate("{{ raise_exception(messages[0].content) }}", {}).render([{"role": "user", "content": HOSTILE}])
    if name == "file":
      raise OSError(2, "No such file", HOSTILE)
    raise InputError(HOSTILE)

  with pytest.raises(SystemExit):
    command.end_with(main, "x")
  err = capsys.readouterr().err
  assert r"\x1b]52;c;eA==\x07\x1b[2J\x9b1A" in err and visible(err) == err and err.count("\n") == 1


def _at_a_terminal(script: str) -> bytes:
  """What a process writes whose stdout and stderr are a terminal."""
  parent, child = pty.openpty()
  mode = termios.tcgetattr(child)
  mode[1] &= ~termios.OPOST  # no \r before \n
  termios.tcsetattr(child, termios.TCSANOW, mode)
  chunks: list[bytes] = []

  def read() -> None:
    try:
      while chunk := os.read(parent, 4096):
        chunks.append(chunk)
    except OSError:  # the last descriptor of the other end is closed
      pass

  reader = threading.Thread(target=read)
  reader.start()
  subprocess.run([sys.executable, "-c", script], stdin=subprocess.DEVNULL, stdout=child, stderr=child, cwd=ROOT, timeout=60)
  os.close(child)
  reader.join(10)
  os.close(parent)
  return b"".join(chunks)


@pytest.mark.process
def test_answers_are_visible_at_a_terminal_and_untouched_in_a_pipe():
  script = f"""
import sys
from jaxfp8.commands import command
text = {HOSTILE!r}
def main():
  for piece in text: print(piece, end="", flush=True)
  print(text, file=sys.stderr)
  raise RuntimeError(text)
command.end_with(main, "x")
"""
  at_terminal = _at_a_terminal(script).decode()
  assert at_terminal.startswith(SHOWN + SHOWN + "\n") and f"RuntimeError: {SHOWN}" in at_terminal
  assert visible(at_terminal) == at_terminal
  ran = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT, timeout=60)
  assert ran.stdout == HOSTILE.encode() and visible(ran.stderr.decode()) == ran.stderr.decode()


def test_nothing_is_printed_past_the_one_place():
  """`print` stands in terminal.py, beside answers, and in children that speak JSON; consoles come from console.py."""
  wrong = []
  for path in sorted((ROOT / "jaxfp8").rglob("*.py")):
    if path.name in ("terminal.py", "chat_template_child.py", "tokenizer_child.py", "answers.py"):
      continue
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
      if name == "print" or name == "Console":
        wrong.append(f"{path.name}:{node.lineno} {name}")
  assert not wrong
