"""Files are opened once a start, and paths hold whatever the working directory becomes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import jaxfp8
from jaxfp8.checkpoint import export, weights_cache
from jaxfp8.checkpoint.load import load
from jaxfp8.checkpoint.open import open_checkpoint
from jaxfp8.checkpoint.quantized_source import default_recipe
from jaxfp8.recipe import Recipe
from jaxfp8.text.tokenizer import Tokenizer
from tests.helpers import commands, tiny_models
from tests.helpers.checkpoint_cases import assert_same

CONFIG = tiny_models.make_config("mha_tied")

# argv: a source, a cache folder. Prints the files that each start opens for reading, with the number of times.
STARTS = """
import collections, json, os, sys
opened = collections.Counter()

def count(event, arguments):
  if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
    path, mode, flags = arguments
    if not (mode and "r" in mode or not mode and flags & os.O_NOFOLLOW):  # open, or regular_files.open_file
      return
    if os.path.basename(arguments[0]) in ("jaxfp8.json", "tokenizer.json"):
      opened[os.fspath(arguments[0])] += 1

sys.addaudithook(count)
import jaxfp8
from jaxfp8.progress import Progress
from jaxfp8.serving import startup
source, cache = sys.argv[1:]

def files():
  counts = dict(opened)
  opened.clear()
  return counts

result = {}
for start in ("first", "cached"):
  loaded = startup.open_model(startup.LoadOptions(checkpoint=source, cache_dir=cache), Progress(silent=True))
  loaded.tokenizer()
  result[start] = files()
(folder,) = os.listdir(cache + "/checkpoints")
folder = f"{cache}/checkpoints/{folder}"
startup.open_model(startup.LoadOptions(checkpoint=folder), Progress(silent=True)).tokenizer()
result["own"] = files()
jaxfp8.load(folder)
result["load"] = files()
jaxfp8.load(source)
result["load a source"] = files()
jaxfp8.Tokenizer.load(folder)
result["tokenizer"] = files()
startup.open_model(startup.LoadOptions(checkpoint=source), Progress(silent=True)).tokenizer()
result["no cache"] = files()
print(json.dumps(result))
"""


@pytest.fixture
def source(tmp_path):
  return tiny_models.write_hf_folder(tmp_path / "source", CONFIG, tiny_models.make_weights(CONFIG))


@pytest.mark.process
def test_files_are_read_once(source, tmp_path):
  ran = commands.run(source, tmp_path / "cache", script=STARTS, env={"JAX_PLATFORMS": "cpu"})
  assert ran.code == 0, ran.err
  counts = json.loads(ran.out)
  (folder,) = (tmp_path / "cache" / "checkpoints").iterdir()
  ours = {str(folder / "jaxfp8.json"): 1, str(folder / "tokenizer.json"): 1}
  theirs = str(source / "tokenizer.json")
  written = [counts["first"].pop(path) for path in list(counts["first"]) if ".writing-" in path]
  assert written == [1]  # the conversion reads what it wrote, for its digest
  assert counts["first"] == {**ours, theirs: 2}  # once for the digest of its content, once to be parsed
  assert counts["cached"] == counts["own"] == counts["load"] == counts["tokenizer"] == ours
  assert counts["load a source"] == counts["no cache"] == {theirs: 1}


class TestRelativePaths:
  """Every door makes its paths absolute, so that a change of the working directory does no harm."""

  @pytest.fixture
  def here(self, source, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    os.chdir(tmp_path)

  def test_our_checkpoints(self, here):
    jaxfp8.convert_checkpoint("source", "ours", Recipe())
    checkpoint = open_checkpoint("ours")
    relative = jaxfp8.load("ours")
    os.chdir("elsewhere")
    assert_same(load(checkpoint), relative)
    jaxfp8.save(relative, "saved")
    assert (here / "elsewhere" / "saved" / "jaxfp8.json").is_file()
    os.chdir("..")
    assert_same(jaxfp8.load("elsewhere/saved"), relative)
    assert Tokenizer.load("ours").encode("a") == Tokenizer.load(here / "ours").encode("a")

  def test_a_source(self, here):
    source = open_checkpoint("source")
    os.chdir("elsewhere")
    assert source.tokenizer.special_tokens
    assert_same(load(source), load(here / "source", default_recipe(source)))

  def test_an_output_whose_writer_outlives_a_chdir(self, here):
    source = open_checkpoint("source")
    source.read, read = lambda name: os.chdir(here / "elsewhere") or read(name), source.read
    jaxfp8.convert_checkpoint(source, "ours", Recipe())
    assert (here / "ours").is_dir() and not list((here / "elsewhere").iterdir())

  def test_an_export(self, here):
    jaxfp8.convert_checkpoint("source", "ours", Recipe())
    export.export_checkpoint("ours", "theirs")
    assert (here / "theirs" / "model.safetensors").is_file()
    assert np.isfinite(np.asarray(jaxfp8.load("theirs").embedding.get_value(), np.float32)).all()

  def test_a_cache(self, here):
    checkpoint = weights_cache.cached_checkpoint("source", Recipe(), "cache")
    os.chdir("elsewhere")
    assert checkpoint.path.is_relative_to(here / "cache")
    assert_same(load(checkpoint), load(here / "source"))

  @pytest.mark.process
  def test_the_command(self, tmp_path):
    chain = commands.write_chain(tmp_path / "chain")
    jaxfp8.convert_checkpoint(chain, tmp_path / "ours", Recipe("f32", "channel", "f32", "f32"))
    command = [sys.executable, "-m", "jaxfp8.generate", "--checkpoint", "ours", "--cache_dir", "cache", "--prompt", "x"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(commands.ROOT)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, commands.CHAIN + "\n"), ran.stderr
