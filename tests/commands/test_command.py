"""The `jaxfp8` command and what all its commands share: names, flags, positional arguments, help, version, lightness."""

import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
import time

import pytest
from absl import flags

import jaxfp8
from jaxfp8.commands import command, command_help, main
from jaxfp8.commands.command import Command, Topic
from jaxfp8.errors import InputError
from tests.helpers import commands

WITH_JAX = ("jax", "jaxlib", "flax", "orbax", "tensorstore")


def make_command(**options) -> Command:
  values = flags.FlagValues()
  topic = Topic("Numbers", values)
  topic(flags.DEFINE_integer, "max_new_tokens", 8, "Tokens.")
  topic(flags.DEFINE_string, "model", None, "A model.")
  topic(flags.DEFINE_list, "device", [], "Devices.")
  topic(flags.DEFINE_multi_string, "prompt", [], "Text.")
  topic(flags.DEFINE_bool, "start_up", True, "Whether to start.")
  return Command("try", lambda: None, values, topics=(topic,), **options)


class TestFlags:
  @pytest.mark.parametrize("name", ["--max-new-tokens", "--max_new_tokens", "-max-new-tokens", "--max-new_tokens"])
  @pytest.mark.parametrize("form", ["{}=5", "{} 5"])
  def test_dashes_and_underscores_are_alike(self, name, form):
    tried = make_command()
    tried.parse(form.format(name).split())
    assert tried.flags.max_new_tokens == 5

  @pytest.mark.parametrize("argument", ["--nostart_up", "--no-start-up", "--no_start_up", "--start-up=false"])
  def test_a_negated_flag(self, argument):
    tried = make_command()
    tried.parse([argument])
    assert tried.flags.start_up is False

  def test_a_value_is_never_changed(self):
    tried = make_command()
    tried.parse(["--prompt", "--max-new-tokens", "--prompt=a-b", "--max-new-tokens", "-1"])
    assert tried.flags.prompt == ["--max-new-tokens", "a-b"] and tried.flags.max_new_tokens == -1

  def test_an_unknown_flag_names_near_ones(self):
    with pytest.raises(flags.Error, match=r"max_new_token.*Did you mean: max_new_tokens"):
      make_command().parse(["--max-new-token", "5"])

  def test_a_required_flag(self):
    with pytest.raises(InputError, match="try: --model must be given"):
      make_command(required=("model",)).parse([])


class TestPositionals:
  @pytest.mark.parametrize(
    "arguments",
    [["m", "d,e"], ["m", "--device=d,e"], ["--model=m", "d,e"], ["--max-new-tokens", "3", "m", "d,e"], ["--", "m", "d,e"]],
  )
  def test_they_set_flags_in_their_order(self, arguments):
    tried = make_command(positionals=("model", "device"))
    tried.parse(arguments)
    assert (tried.flags.model, tried.flags.device) == ("m", ["d", "e"]) and tried.flags["model"].present

  def test_a_stray_argument(self):
    with pytest.raises(InputError, match=r"try: takes MODEL, and every other argument is a flag; got also 'b'\."):
      make_command(positionals=("model",)).parse(["a", "b"])
    with pytest.raises(InputError, match=r"try: every argument is a flag; got 'b'\. Write --prompt='b'\."):
      make_command(stray_advice="Write --prompt={argument}.").parse(["b"])

  @pytest.mark.parametrize(
    ("name", "positionals"),
    [
      ("plan", ("model", "device")),
      ("inspect", ("checkpoint",)),
      ("convert", ("input", "output")),
      ("export", ("input", "output")),
    ],
  )
  def test_commands_that_take_them(self, name, positionals):
    assert load(name).positionals == positionals


def load(name: str) -> Command:
  return importlib.import_module(f"jaxfp8.commands.{main.COMMANDS[name][0]}").COMMAND


@pytest.mark.parametrize("name", main.COMMANDS)
class TestEveryCommand:
  def test_help_fits_80_columns_and_shows_every_flag_once(self, name):
    text = command_help.format_help(load(name))
    assert max(map(len, text.splitlines())) < 80, [line for line in text.splitlines() if len(line) >= 80]
    shown = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    hidden = {flag for flag in load(name).flags if load(name).flags[flag].help.startswith("Internal:")}
    assert sorted(shown) == sorted({*load(name).flags, "help", "version"} - hidden)
    assert text.startswith(f"Usage: jaxfp8 {name}")

  def test_texts_name_no_tool_of_the_checkout(self, name):
    assert not re.search(r"tools[./]\w|python -m", command_help.format_help(load(name)))

  def test_help_and_a_wrong_flag_load_no_jax(self, name):
    for arguments, code in ((["--help"], 0), (["--no-such-flag"], 1)):
      loaded, ran = run_and_see_modules(name, *arguments)
      assert (ran, loaded) == (code, [])


def run_and_see_modules(*arguments: str) -> tuple[list[str], int]:
  """(modules of jax that `jaxfp8 ARGUMENTS` loads, its exit code)."""
  code = f"""
import json, sys
from jaxfp8.commands.main import main
sys.argv[1:] = {list(arguments)}
try:
  main()
except SystemExit as end:
  print(json.dumps([sorted({{name.split(".")[0] for name in sys.modules}} & set({WITH_JAX})), end.code]), file=sys.stderr)
"""
  ran = subprocess.run([sys.executable, "-c", code], cwd=commands.ROOT, capture_output=True, text=True, timeout=60)
  return tuple(json.loads(ran.stderr.splitlines()[-1]))


class TestMain:
  @staticmethod
  def run(*arguments: str) -> subprocess.CompletedProcess:
    command_line = [sys.executable, "-m", "jaxfp8", *arguments]
    return subprocess.run(command_line, cwd=commands.ROOT, capture_output=True, text=True, timeout=60)

  def test_plan_loads_no_jax(self):
    assert run_and_see_modules("plan", "llama-3.1-70b", "gb10") == ([], 0)

  @pytest.mark.parametrize("arguments", [["--help"], ["generate", "--no-such-flag"], ["plan", "llama-3.1-70b", "gb10"]])
  def test_answers_at_once(self, arguments):
    """0.5 s on an idle machine; the fastest of five runs, and three times as long, since others use this machine too."""
    seconds = []
    for _ in range(5):
      start = time.perf_counter()
      self.run(*arguments)
      seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.5, seconds

  def test_help_lists_every_command(self):
    ran = self.run("--help")
    assert ran.returncode == 0 and all(f"\n  {name} " in ran.stdout for name in main.COMMANDS)
    assert max(map(len, ran.stdout.splitlines())) < 80
    assert self.run().stdout == ran.stdout

  @pytest.mark.parametrize("arguments", [["--version"], ["plan", "--version"]])
  def test_version(self, arguments):
    assert self.run(*arguments).stdout == f"jaxfp8 {jaxfp8.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", jaxfp8.__version__)

  @pytest.mark.parametrize(("name", "near"), [("genrate", "generate"), ("validate", "validate-gpu"), ("benchmrk", "benchmark")])
  def test_a_wrong_command_names_near_ones(self, name, near):
    ran = self.run(name)
    assert (ran.returncode, ran.stdout) == (1, "") and ran.stderr.count("\n") == 1
    assert f"there is no command {name!r}. Did you mean {near}" in ran.stderr

  def test_a_command_is_the_same_code_as_its_door(self):
    door = [sys.executable, "-m", "jaxfp8.plan", "--model=llama-3.1-70b", "--device=gb10"]
    ran = subprocess.run(door, cwd=commands.ROOT, capture_output=True, text=True, timeout=60)
    assert self.run("plan", "llama-3.1-70b", "gb10").stdout == ran.stdout and ran.returncode == 0

  def test_chat_is_an_interactive_generate(self):
    chat = load("chat")
    chat.parse([])
    try:
      assert chat.flags is load("generate").flags and chat.flags.interactive is True
    finally:
      chat.flags["interactive"].unparse()
      chat.flags.unparse_flags()

  def test_the_script_of_the_package(self):
    (entry,) = [point for point in importlib.metadata.distribution("jaxfp8").entry_points if point.group == "console_scripts"]
    assert (entry.name, entry.load()) == ("jaxfp8", main.main)


def test_the_functions_that_end_a_process_exist():
  processes = importlib.import_module(command.PROCESSES_MODULE)
  assert all(callable(getattr(processes, name)) for name in ("announce", "count", "leave"))
  assert callable(command.unfinished.abandon_unfinished)


def test_every_module_of_a_command_says_its_command():
  for name in main.COMMANDS:
    assert load(name).name == name and callable(load(name).main)
  assert command.DEFAULT_CACHE_DIR
