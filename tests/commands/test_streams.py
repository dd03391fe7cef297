"""Closed and full streams, odd locales, absent devices: the command works, or says one line and exits with 1."""

import os
import re
import subprocess
import sys
import threading

import pytest

from jaxfp8.commands import command, generate, platforms, prompt_files, streams
from jaxfp8.errors import InputError
from tests.helpers import commands

PLAN = ("plan", "llama-3.1-8b", "h100")
_NO_SPACE = r"stdout: the answer cannot be written: No space left on device\."


def shell(redirection, *arguments, env=None):
  line = [sys.executable, "-m", "jaxfp8", *arguments]
  return subprocess.run(
    ["sh", "-c", f'exec "$@" {redirection}', "sh", *line], capture_output=True, env={**os.environ, **(env or {})}, timeout=120
  )


@pytest.mark.process
@pytest.mark.parametrize(
  ("redirection", "arguments", "code", "error"),
  [
    (">&-", PLAN, 1, r"stdout: it is closed, so the answer has no place to go\. Open it"),
    (">&-", ("--help",), 1, r"stdout: it is closed"),
    (">/dev/full", PLAN, 1, _NO_SPACE),
    (">/dev/full", ("--version",), 1, _NO_SPACE),
    ("<&-", ("generate", "--prompt_file=-"), 1, r"generate: stdin is closed, so there is nothing to read\. Open it"),
    ("<&-", ("chat",), 1, r"generate: stdin is closed"),
    ("2>&-", ("plan", "nonsense", "h100"), 1, ""),
    ("2>/dev/full", PLAN, 0, ""),
    ("<&- 2>&-", PLAN, 0, ""),
  ],
)
def test_streams_that_are_closed_or_full(redirection, arguments, code, error):
  ran = shell(redirection, *arguments)
  assert ran.returncode == code, ran
  assert bool(ran.stdout) == (code == 0), ran.stdout
  assert ran.stderr.count(b"\n") == bool(error) and re.match(error, ran.stderr.decode()), ran.stderr


@pytest.mark.process
def test_a_locale_without_utf8():
  locale = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
  ran = shell("", "generate", "--prompt=x", "--prompt_file=/nowhere/é世", env=locale)
  assert ran.returncode == 1 and ran.stdout == b""
  assert ran.stderr.decode().startswith("generate: cannot read --prompt_file=/nowhere/é世: No such file or directory.")


@pytest.mark.process
def test_characters_that_stdout_cannot_hold():
  script = "from jaxfp8.commands import command; command.end_with(lambda: print('aé世') or print('ü'), 'x')"
  variables = {**os.environ, "PYTHONIOENCODING": "ascii"}
  ran = subprocess.run([sys.executable, "-c", script], capture_output=True, env=variables, timeout=60)
  assert (ran.returncode, ran.stdout) == (0, b"a??\n?\n")
  assert ran.stderr.count(b"\n") == 1 and b"encoding ascii lacks characters" in ran.stderr


def test_lines_leave_at_once_where_python_is_told_not_to_buffer():
  """As in many container images. What stands in a buffer is lost when the process is killed."""
  script = "import os; from jaxfp8.commands import streams; from jaxfp8.terminal import say; streams.prepare()\n"
  script += "say('a note'); print('an answer'); os._exit(3)"
  ran = commands.run(script=script, env={"PYTHONUNBUFFERED": "1"})
  assert (ran.code, ran.out, ran.err) == (3, "an answer\n", "a note\n")


def test_a_terminal_of_no_width_counts_as_unknown(monkeypatch):
  for columns, kept in (("0", None), ("", None), ("100", "100")):
    monkeypatch.setenv("COLUMNS", columns)
    streams.prepare()
    assert os.environ.get("COLUMNS") == kept


# --- devices ---


@pytest.mark.process
@pytest.mark.parametrize("name", ["nonsense", "cuda"])
def test_a_platform_that_is_not_here(name):
  if name == "cuda" and any(path.startswith("nvidia") for path in os.listdir("/dev")):
    pytest.skip("a GPU is here")
  ran = shell("", "generate", "--prompt=x", "--cache_dir=", env={"JAX_PLATFORMS": name, "XLA_FLAGS": ""})
  assert (ran.returncode, ran.stdout) == (1, b"")
  assert ran.stderr.count(b"\n") == 1, ran.stderr
  assert re.match(rf"devices: JAX_PLATFORMS={name} names devices that are not here.* Unset JAX_PLATFORMS", ran.stderr.decode())


@pytest.mark.process
def test_xla_flags_that_xla_refuses(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--garbage")
  with pytest.raises(InputError, match=r"XLA_FLAGS='--garbage': Unknown flag in XLA_FLAGS: --garbage\. Correct the variable"):
    platforms.check_xla_flags()


@pytest.mark.parametrize(
  ("variables", "wanted"),
  [({"JAX_PLATFORMS": ""}, "cpu"), ({"JAX_PLATFORMS": " cpu "}, "cpu"), ({"CUDA_VISIBLE_DEVICES": ""}, "cpu")],
)
def test_the_platform_that_is_chosen(monkeypatch, variables, wanted):
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(platforms.pathlib.Path, "exists", lambda path: "CUDA_VISIBLE_DEVICES" in variables)
  platforms.choose_platform()
  assert os.environ["JAX_PLATFORMS"] == wanted


# --- files of prompts ---


@pytest.mark.parametrize(
  ("content", "text"),
  [
    (b"\xef\xbb\xbfhello", "hello"),
    ("a\ufeffé".encode(), "a\ufeffé"),
    (b"one\r\ntwo\rthree\n", "one\ntwo\nthree\n"),
    (b"", ""),
  ],
)
def test_prompt_files(tmp_path, content, text):
  (tmp_path / "prompt").write_bytes(content)
  assert prompt_files.read(str(tmp_path / "prompt")) == text


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    ("hello".encode("utf-16"), r"it is UTF-16\. Convert it: iconv -f UTF-16 -t UTF-8\."),
    ("hello".encode("utf-32"), r"it is UTF-32\."),
    (b"a\0b", r"it holds NUL bytes"),
    (b"\xff", r"it is not UTF-8 text"),
  ],
)
def test_prompt_files_that_are_no_utf8_text(tmp_path, content, reason):
  (tmp_path / "prompt").write_bytes(content)
  with pytest.raises(InputError, match=rf"generate: cannot read --prompt_file=.*/prompt: {reason}"):
    prompt_files.read(str(tmp_path / "prompt"))


def test_prompt_files_without_an_end():
  with pytest.raises(InputError, match=r"/dev/zero: it has more than 64 MB\. Pass a shorter text\."):
    prompt_files.read("/dev/zero")


def test_a_prompt_from_a_pipe(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("hello",))
  writer.start()
  assert prompt_files.read(str(tmp_path / "pipe")) == "hello"
  writer.join()


# --- paths ---


def test_flags_with_a_path_know_the_home_folder(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  flags = generate.FLAGS
  commands.forget_flags(flags)  # which tests before this one may have left parsed
  try:
    generate.COMMAND.parse(["--checkpoint=~/m", "--cache_dir=~/c", "--prompt_file=~/p", "--prompt=~/stays"])
    values = flags.checkpoint, flags.cache_dir, flags.prompt_file, flags.prompt
    assert values == (f"{tmp_path}/m", f"{tmp_path}/c", [f"{tmp_path}/p"], ["~/stays"])
  finally:
    commands.forget_flags(flags)


def test_no_home_folder_is_no_cache(monkeypatch, capsys):
  monkeypatch.setattr(command.pathlib.Path, "expanduser", lambda path: exec("raise RuntimeError('no home directory.')"))
  assert command._usable_cache_dir("~/.cache/jaxfp8") == ""
  assert capsys.readouterr().err.startswith("cache: cannot write ~/.cache/jaxfp8: no home directory. This run goes on without")
