"""Programs kept between processes: the second one traces nothing and chooses the same tokens."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax._src import compilation_cache
from jax.sharding import Mesh

from jaxfp8.serving import program_cache

pytestmark = pytest.mark.process

RUN = """
import json, sys
from jaxfp8.commands import command
command.choose_platform()
command.keep_compiled_programs(sys.argv[1])
import jax
if sys.argv[2] == "jax":
  jax.config.update("jax_enable_compilation_cache", True)
from jaxfp8.serving import steps
from jaxfp8.serving.limits import EngineLimits
from jaxfp8.config import LlamaConfig
from jaxfp8.recipe import Recipe
from jaxfp8.serving.engine import Engine, Request
from jaxfp8.model.llama import Llama
from jaxfp8.model.sampling import SamplingParams
from jaxfp8.model.random_weights import random_weights

lowered = []
lower = steps.CompiledSteps.lower
steps.CompiledSteps.lower = lambda self, kind, size: lowered.append(kind) or lower(self, kind, size)
model = random_weights(Llama(LlamaConfig.from_name("tiny"), Recipe(kv="fp8")), jax.random.key(0))
limits = EngineLimits(num_pages=2, max_sequences=2, max_pages=1, prefill_sizes=(32,), decode_sizes=(2,))
engine = Engine(model, limits=limits)
answers = engine.generate([Request((5, 6, 7), SamplingParams(max_new_tokens=8, ignore_eos=True))] * 2)
print(json.dumps([lowered, [answer.token_ids for answer in answers]]))
"""


def run(cache, mode="ours"):
  return run_and_hear(cache, mode)[0]


def run_and_hear(cache, mode="ours"):
  done = subprocess.run([sys.executable, "-c", RUN, str(cache), mode], capture_output=True, text=True, timeout=200)
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout.splitlines()[-1]), done.stderr


def flip_a_bit(path, offset=None):
  data = bytearray(path.read_bytes())
  data[len(data) // 2 if offset is None else offset] ^= 4
  path.write_bytes(data)


@pytest.fixture
def programs(tmp_path):
  return tmp_path / "programs"


def test_the_second_process_traces_nothing(tmp_path, programs):
  first_lowered, first = run(tmp_path)
  assert sorted(first_lowered) == ["decode", "prefill"]
  assert len(list(programs.glob("step-*"))) == 2
  assert run(tmp_path) == [[], first]

  for path in programs.glob("step-*"):
    flip_a_bit(path)
  damaged, err = run_and_hear(tmp_path)
  assert damaged == [first_lowered, first]
  assert sorted(err.splitlines()) == [
    f"cache: {path} is damaged: its SHA-256 is not the stored one; the program is compiled again."
    for path in sorted(programs.glob("step-*"))
  ]
  assert run(tmp_path) == [[], first]


def test_nothing_is_kept_beside_jaxs_own_cache(tmp_path, programs):
  """A program that JAX's cache gave back serializes without its code."""
  lowered, _ = run(tmp_path, "jax")
  assert sorted(lowered) == ["decode", "prefill"]
  assert not list(programs.glob("step-*"))


@pytest.fixture
def small_programs(tmp_path):
  """Programs of one addition in the cache folder: (load, store), each for this process's first CPU."""
  mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
  before = jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache
  jax.config.update("jax_compilation_cache_dir", str(tmp_path))
  jax.config.update("jax_enable_compilation_cache", False)
  yield lambda: program_cache.load("key", mesh), lambda program: program_cache.store("key", program, mesh)
  jax.config.update("jax_compilation_cache_dir", before[0])
  jax.config.update("jax_enable_compilation_cache", before[1])


def test_a_bit_anywhere_is_noticed_before_a_program_is_loaded(tmp_path, small_programs, capsys, monkeypatch):
  load, store = small_programs
  store(jax.jit(lambda x: x + 1).lower(1.0).compile())
  assert load()(1.0) == 2
  (path,) = tmp_path.iterdir()
  whole = path.read_bytes()
  monkeypatch.setattr(program_cache.pickle, "loads", None)
  for offset in range(0, len(whole), max(1, len(whole) // 97)):
    path.write_bytes(whole)
    flip_a_bit(path, offset)
    assert load() is None
    assert capsys.readouterr().err.startswith(f"cache: {path} is damaged")


def test_a_folder_that_cannot_be_written_keeps_no_programs(tmp_path, small_programs, capsys, monkeypatch):
  monkeypatch.setattr(program_cache.stored_files, "_said", set())
  load, store = small_programs
  tmp_path.rmdir()
  tmp_path.write_text("in the way")
  program = jax.jit(lambda x: x + 1).lower(1.0).compile()
  store(program)
  store(program)
  assert "goes on and keeps nothing" in capsys.readouterr().err
  assert load() is None
  tmp_path.unlink()


def test_a_damaged_program_of_jaxs_own_cache_is_compiled_again(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(compilation_cache, "get_file_cache", compilation_cache.get_file_cache)
  program_cache.verify_jax_cache()
  cache, _ = compilation_cache.get_file_cache(str(tmp_path))
  cache.put("key", b"program")
  assert cache.get("key") == b"program" and cache.get("other") is None
  (path,) = tmp_path.iterdir()
  for damage in (flip_a_bit, lambda path: path.write_bytes(path.read_bytes()[:9]), lambda path: path.write_bytes(b"program")):
    damage(path)
    assert cache.get("key") is None
    assert capsys.readouterr().err.startswith(f"cache: {path} is damaged")
    cache.put("key", b"program")  # JAX compiles again
    assert cache.get("key") == b"program"
