"""Converted weights between runs: used when they are right, made again when they are not, never half there."""

import os
import signal
import time

import numpy as np
import pytest

from jaxfp8.checkpoint import convert, load, readers, weights_cache
from jaxfp8.checkpoint import quantized_source as source_arrays
from jaxfp8.checkpoint.manifest import WRITING
from jaxfp8.commands import command
from jaxfp8.errors import InputError
from jaxfp8.recipe import Recipe
from tests.helpers import commands, tiny_models
from tests.helpers.commands import CHAIN

pytestmark = pytest.mark.process


@pytest.fixture(scope="module", autouse=True)
def restored():
  with commands.compiled_programs_restored():
    yield


@pytest.fixture
def chain(tmp_path):
  return commands.write_chain(tmp_path / "chain")


@pytest.fixture
def cache(tmp_path):
  return tmp_path / "cache"


@pytest.fixture
def convert_chain(chain, cache):
  """What every command does with a source, without computing; gives the converted folder."""
  return lambda **options: weights_cache.cached_checkpoint(chain, Recipe(), cache, **options).path


SLOW_CONVERSION = """
import sys, time
from absl import flags
from jaxfp8.checkpoint import convert
from jaxfp8.commands import command
from jaxfp8.checkpoint.quantized_source import QuantizedSource
from jaxfp8.checkpoint.weights_cache import cached_checkpoint
from jaxfp8.recipe import Recipe

read, convert._WRITE_BYTES = QuantizedSource.read, 0
QuantizedSource.read = lambda *args: time.sleep(0.5) or read(*args)
main = lambda: print(cached_checkpoint(sys.argv[1], Recipe(), sys.argv[2]).path)
command.run(command.Command("slow", main, flags.FlagValues()), [])
"""


def _folders(cache):
  return sorted((cache / "checkpoints").iterdir()) if (cache / "checkpoints").exists() else []


def _forbid_conversion(monkeypatch):
  def fail(*args, **kwargs):
    raise AssertionError("the source is read")

  monkeypatch.setattr(readers, "open_source", fail)
  monkeypatch.setattr(source_arrays, "_quantize", fail)


# --- which conversion belongs to which source ---


def test_second_start_neither_opens_the_source_nor_quantizes(chain, cache, monkeypatch, capsys):
  arguments = ("--checkpoint", chain, "--cache_dir", cache, "--prompt", "x", "--max_new_tokens", "30")
  first = commands.run_here(monkeypatch, capsys, *arguments)
  _forbid_conversion(monkeypatch)
  second = commands.run_here(monkeypatch, capsys, *arguments)
  assert (second.code, second.out) == (0, CHAIN + "\n") == (first.code, first.out)
  for text in (second.err, first.err):
    assert "damaged" not in text


def test_other_content_is_converted_again(convert_chain, chain, cache, monkeypatch):
  first = convert_chain()
  config = chain / "config.json"
  config.write_text(config.read_text().replace('"max_position_embeddings": 256', '"max_position_embeddings": 128'))
  assert convert_chain() != first
  assert len(_folders(cache)) == 2
  config.write_text(config.read_text().replace('"max_position_embeddings": 128', '"max_position_embeddings": 256'))
  _forbid_conversion(monkeypatch)
  assert convert_chain() == first  # the content is what it was, whatever the file's time


def test_other_recipes_have_folders_of_their_own(chain, cache):
  recipes = [Recipe(), Recipe(granularity="tensor"), Recipe(weights="bf16"), Recipe(kv="fp8"), Recipe(activations="bf16")]
  folders = [weights_cache.cached_checkpoint(chain, recipe, cache).path for recipe in recipes]
  assert len(set(folders[:3])) == 3
  assert set(folders[3:]) == {folders[0]}  # which change no weight


def test_damaged_list_of_sources_only_costs_time(convert_chain, cache, monkeypatch):
  first = convert_chain()
  (cache / "sources.json").write_text("[")
  _forbid_conversion(monkeypatch)
  assert convert_chain() == first


def test_an_edit_that_keeps_size_and_time_is_noticed(convert_chain, chain):
  first, config = convert_chain(), chain / "config.json"
  before = config.stat()
  config.write_text(config.read_text().replace('"max_position_embeddings": 256', '"max_position_embeddings": 128'))
  os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns))
  assert config.stat().st_size == before.st_size and config.stat().st_mtime_ns == before.st_mtime_ns
  assert convert_chain() != first


def test_other_times_or_another_copy_of_the_source_convert_nothing(convert_chain, chain, monkeypatch):
  first = convert_chain()
  _forbid_conversion(monkeypatch)
  os.utime(chain / "config.json", (1, 1))
  assert convert_chain() == first
  content = (chain / "config.json").read_bytes()
  (chain / "config.json").unlink()
  (chain / "config.json").write_bytes(content)
  assert convert_chain() == first


def test_a_wrong_bit_in_the_list_of_sources_costs_only_time(convert_chain, cache, monkeypatch, capsys):
  first, path = convert_chain(), cache / "sources.json"
  data = bytearray(path.read_bytes())
  data[-20] ^= 1  # in the hash of the content
  path.write_bytes(data)
  _forbid_conversion(monkeypatch)
  assert convert_chain() == first
  assert capsys.readouterr().err == (
    f"cache: {path} is damaged: its SHA-256 is not the stored one; the source is read again.\n"
  )


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_cache_that_cannot_be_written_is_said_once(chain, tmp_path, monkeypatch, capsys, place):
  monkeypatch.setattr(weights_cache.stored_files, "_said", set())
  (tmp_path / "file").write_text("in the way")
  for _ in range(2):
    assert weights_cache.cached_checkpoint(chain, Recipe(), tmp_path / place) is None
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("cache: cannot write ") and line.endswith("this run goes on and keeps nothing for the next one.")


def test_nothing_is_kept_with_an_empty_cache_dir(chain, tmp_path):
  home = tmp_path / "home"
  arguments = ("--checkpoint", chain, "--cache_dir=", "--prompt", "x", "--max_new_tokens", "30")
  ran = commands.run(*arguments, env={"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")})
  assert (ran.code, ran.out) == (0, CHAIN + "\n"), ran.err
  assert not home.exists()


# --- damage ---


def _damage(how, folder):
  largest = max((path for path in (folder / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
  match how:
    case "truncated data":
      largest.write_bytes(largest.read_bytes()[:-1])
    case "lost data":
      largest.unlink()
    case "lost index":
      (folder / "state" / "manifest.ocdbt").unlink()
    case "empty tokenizer":
      (folder / "tokenizer.json").write_text("")
    case "no manifest":
      (folder / "jaxfp8.json").unlink()
    case "broken manifest":
      (folder / "jaxfp8.json").write_text("{}")


DAMAGE = ["truncated data", "lost data", "lost index", "empty tokenizer", "no manifest", "broken manifest"]


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_checkpoints_are_made_again(convert_chain, cache, capsys, how):
  folder = convert_chain()
  good = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
  _damage(how, folder)
  assert convert_chain() == folder
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"cache: {folder} is damaged: ") and line.endswith("; the source is converted again.")
  assert {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}.keys() == good.keys()
  assert load.load(folder).config.name == "chain"
  assert _folders(cache) == [folder]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_users_damaged_checkpoint_is_a_sentence(convert_chain, tmp_path, how):
  folder = convert_chain().rename(tmp_path / "mine")
  _damage(how, folder)
  with pytest.raises(InputError, match=r"^(checkpoint|readers): .*mine .*\. ?[A-Z][a-z].*\.$"):
    load.load(folder)
  assert folder.exists()


# --- whole or not there ---


def test_bad_weights_leave_nothing(tmp_path, cache, monkeypatch):
  monkeypatch.setattr(convert, "_WRITE_BYTES", 0)  # so that all before is written when the bad one is read
  config = tiny_models.make_config("mha_tied")
  weights = tiny_models.make_weights(config)
  weights["model.layers.1.mlp.down_proj.weight"][3] = np.nan  # in the last layer
  folder = tiny_models.write_hf_folder(tmp_path / "model", config, weights)
  with pytest.raises(InputError, match="finite"):
    weights_cache.cached_checkpoint(folder, Recipe(), cache)
  assert _folders(cache) == []


def test_check_comes_before_the_conversion(convert_chain, cache, monkeypatch):
  monkeypatch.setattr(convert, "convert_checkpoint", None)

  def check(source):
    raise InputError("no")

  with pytest.raises(InputError, match="no"):
    convert_chain(check=check)
  assert _folders(cache) == []


def test_leavings_of_killed_processes_are_removed(convert_chain, cache):
  folder = convert_chain()
  old, new = (folder.with_name(f"{folder.name}{WRITING}{name}.partial_save") for name in ("00", "11"))
  for path in (old, new):
    (path / "state").mkdir(parents=True)
    (path / "state" / "data").write_bytes(b"half")
  hours_ago = time.time() - 2 * 3600
  for path in (old / "state" / "data", old / "state", old):
    os.utime(path, (hours_ago, hours_ago))
  (folder / "jaxfp8.json").unlink()  # so that it is converted again
  convert_chain()
  assert _folders(cache) == [folder, new]


def test_another_process_may_finish_first(convert_chain, cache, monkeypatch):
  real = convert.convert_checkpoint

  def raced(*args, **kwargs):
    real(*args, **kwargs)  # the other process
    real(*args, **kwargs)

  monkeypatch.setattr(convert, "convert_checkpoint", raced)
  folder = convert_chain()
  assert _folders(cache) == [folder]


def test_two_processes_convert_once(chain, cache):
  """The second waits for the first one's lock."""
  processes, writers = [commands.start(chain, cache, script=SLOW_CONVERSION) for _ in range(2)], set()

  def both_ended():
    writers.update(path.name.split(".")[1] for path in _folders(cache) if WRITING in path.name)
    return all(process.poll() is not None for process in processes)

  commands.wait_until(both_ended)
  assert len(writers) == 1
  both = [commands.end(process) for process in processes]
  (folder,) = _folders(cache)
  assert [(ran.code, ran.out, ran.err) for ran in both] == [(0, f"{folder}\n", "")] * 2
  assert load.load(folder).config.name == "chain"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, command.INTERRUPTED), (signal.SIGTERM, command.TERMINATED)])
def test_stopping_a_conversion_leaves_nothing(chain, cache, number, code):
  process = commands.start(chain, cache, script=SLOW_CONVERSION)
  commands.wait_until(lambda: any(WRITING in path.name for path in _folders(cache)))
  process.send_signal(number)
  asked = time.monotonic()
  ran = commands.end(process)
  assert time.monotonic() - asked < 10
  assert (ran.code, ran.out, ran.err) == (code, "", "Stopped.\n")
  assert _folders(cache) == []


def test_stopping_an_answer(tmp_path, cache):
  chain = commands.write_chain(tmp_path / "endless", endless=True, max_context=1 << 16)
  process = commands.start("--checkpoint", chain, "--cache_dir", cache, "--prompt", "x", "--max_new_tokens", "60000")
  assert process.stdout.read(1) == "a"
  process.send_signal(signal.SIGINT)
  asked = time.monotonic()
  ran = commands.end(process)
  assert time.monotonic() - asked < 10
  assert ran.code == command.INTERRUPTED
  assert ran.err.splitlines()[-1] == "Stopped." and "Traceback" not in ran.err
