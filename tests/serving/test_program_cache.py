"""Programs kept between processes: the second one traces nothing and chooses the same tokens."""

import json
import subprocess
import sys

import pytest

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
  done = subprocess.run([sys.executable, "-c", RUN, str(cache), mode], capture_output=True, text=True, timeout=200)
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def programs(tmp_path):
  return tmp_path / "programs"


def test_the_second_process_traces_nothing(tmp_path, programs):
  first_lowered, first = run(tmp_path)
  assert sorted(first_lowered) == ["decode", "prefill"]
  assert len(list(programs.glob("step-*"))) == 2
  assert run(tmp_path) == [[], first]

  for path in programs.glob("step-*"):  # a damaged program is compiled again
    path.write_bytes(path.read_bytes()[:1000])
  assert run(tmp_path) == [first_lowered, first]
  assert run(tmp_path) == [[], first]


def test_nothing_is_kept_beside_jaxs_own_cache(tmp_path, programs):
  """A program that JAX's cache gave back serializes without its code."""
  lowered, _ = run(tmp_path, "jax")
  assert sorted(lowered) == ["decode", "prefill"]
  assert not list(programs.glob("step-*"))
