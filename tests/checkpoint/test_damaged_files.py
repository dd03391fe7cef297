"""Random workloads give the same bits alone and together; damaged files end in success or one InputError, never worse."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfp8.checkpoint import readers
from jaxfp8.errors import InputError
from jaxfp8.model.sampling import SamplingParams
from jaxfp8.recipe import Recipe
from jaxfp8.serving.engine import Engine, Request
from jaxfp8.serving.limits import EngineLimits
from jaxfp8.text.chat_template import ChatTemplate
from tests.helpers import dialect_files, fuzz_worker, gguf_files, tiny_llamas, tiny_models
from tests.helpers.commands import byte_symbols

CASE = "gqa_9_3_untied"
RECIPES = {"f32": tiny_llamas.F32, "fp8": Recipe("fp8", "channel", "fp8", "fp8")}
NUM_CASES = {"safetensors": 350, "index": 250, "config": 300, "tokenizer": 300, "gguf": 350, "float8": 450}

params = st.builds(
  SamplingParams,
  temperature=st.sampled_from([0.0, 0.0, 0.7, 1.0, 3.0]),
  top_k=st.sampled_from([0, 0, 1, 5, 40]),
  top_p=st.sampled_from([1.0, 1.0, 0.9, 0.3]),
  min_p=st.sampled_from([0.0, 0.0, 0.1]),
  seed=st.integers(0, 2**32 - 1),
  max_new_tokens=st.integers(1, 14),
  ignore_eos=st.booleans(),
  logprobs=st.just(2),
)
prompts = st.lists(st.integers(0, 102), min_size=1, max_size=70)
workloads = st.lists(st.tuples(prompts, params), min_size=2, max_size=6)


@functools.cache
def engine(recipe: str) -> Engine:
  """Few pages and places: sequences wait, are cut into chunks, and are preempted and computed again."""
  limits = EngineLimits(
    num_pages=5, max_sequences=3, max_pages=3, prefill_sizes=(8, 32), decode_sizes=(1, 3), page_size=32, num_logprobs=2
  )
  return Engine(tiny_llamas.load(CASE, RECIPES[recipe]), limits=limits)


@pytest.mark.parametrize("recipe", RECIPES)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(workload=workloads)
def test_a_request_gets_the_same_bits_alone_and_in_company(recipe, workload):
  requests = [Request(tuple(prompt), how) for prompt, how in workload]
  together = engine(recipe).generate(requests)
  for request, company in zip(requests, together, strict=True):
    (alone,) = engine(recipe).generate([request])
    for field in ("token_ids", "finish_reason", "logprobs", "num_prompt_tokens"):
      assert getattr(company, field) == getattr(alone, field)


def test_workloads_do_preempt():
  """Else the test above would be weaker than it looks."""
  from jaxfp8.serving import engine as engine_module

  seen = []
  original = engine_module.Scheduler

  class Watched(original):
    def __init__(self, **sizes):
      super().__init__(**sizes)
      seen.append(self)

  requests = [Request(tuple(range(1, 60)), SamplingParams(max_new_tokens=14, ignore_eos=True))] * 3
  engine_module.Scheduler = Watched
  try:
    completions = engine("f32").generate(requests)
  finally:
    engine_module.Scheduler = original
  assert seen[0].num_preemptions > 0 and len({completion.token_ids for completion in completions}) == 1


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
  """What is mutated: a folder in two shards and a GGUF file, both with a tokenizer, and a good shard outside the folder."""
  scratch = tmp_path_factory.mktemp("fuzz")
  config = tiny_models.make_config("mha_tied")
  weights = tiny_models.make_weights(config)
  folder = tiny_models.write_hf_folder(scratch / "folder", config, weights, shards=2)
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
  (scratch / "outside.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
  float8, _, _ = dialect_files.write(
    scratch / "float8",
    config,
    shape=lambda shape, scale: scale.reshape(-1, 1),
    scheme=dialect_files.compressed_tensors("channel", {"dynamic": False, "strategy": "tensor"}) | {"quant_method": "modelopt"},
    quant_file={"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
    extra=lambda names: {
      **{name.replace("weight_scale", "input_scale"): np.float32([0.5]) for name in names if "weight_scale" in name},
      **{f"model.layers.{layer}.self_attn.{which}_scale": np.float32([0.5]) for layer in range(2) for which in "kv"},
    },
  )
  assert readers.open_source(float8).static_scales()
  (scratch / "gguf").mkdir()
  config = dataclasses.replace(config, vocab_size=260)
  tokens = ["<unk>", "<s>", "</s>", *byte_symbols(), "He"]
  tokenizer = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": [3, 3, 3, *[1] * 257],
    "tokenizer.ggml.merges": ["H e"],
    "tokenizer.chat_template": tiny_models.CHAT_TEMPLATE,
  }
  kind = gguf.GGMLQuantizationType.F16
  gguf_files.write_gguf(scratch / "gguf" / "m.gguf", config, tiny_models.make_weights(config), kind, metadata=tokenizer)
  return scratch


@pytest.mark.parametrize("kind", NUM_CASES)
def test_damaged_files(kind, scratch):
  """In processes with little memory and a clock; one that dies is started again behind the case that killed it."""
  start, problems = 0, []
  while start < NUM_CASES[kind] and len(problems) < 6:
    command = [sys.executable, fuzz_worker.__file__, kind, str(start), str(NUM_CASES[kind]), str(scratch)]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "RUST_BACKTRACE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    lines = done.stdout.splitlines()
    problems += [f"{kind} {line}" for line in lines if line.startswith("bad")]
    if lines[-1:] == ["end"]:
      break
    seeds = [int(line.split()[1]) for line in lines if line.startswith("case")]
    assert seeds, done.stderr
    problems.append(f"{kind} {seeds[-1]}: it ended with {done.returncode}: {done.stderr[-300:]}")
    start = seeds[-1] + 1
  assert not problems, "\n".join(problems)


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "head_dim", "intermediate_size", "max_position_embeddings"])
def test_sizes_that_nothing_backs(key, scratch, tmp_path):
  """A billion layers, or heads a billion wide, must be refused before anything of that size is made."""
  folder = shutil.copytree(scratch / "folder", tmp_path / "folder")
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps({**config, key: 10**12}))
  if key == "max_position_embeddings":  # a promise that needs no memory
    assert readers.open_source(folder).config.max_context == 10**12
  else:
    with pytest.raises(InputError, match=r"1,000,000,000,000"):
      readers.open_source(folder)


@pytest.mark.parametrize("field", [{"num_layers": 10**9}, {"head_dim": 2 * 10**9}])
def test_gguf_sizes_that_nothing_backs(field, tmp_path):
  config = tiny_models.make_config("mha_tied")
  weights = tiny_models.make_weights(config)
  extra = {"rope_freqs.weight": np.ones(4, np.float32)} if "head_dim" in field else {}
  true = {name: value for name, value in weights.items() if "_proj" not in name}  # permuted by head_dim
  wrong = dataclasses.replace(config)
  for name, value in field.items():
    object.__setattr__(wrong, name, value)  # past the check of a config
  path = gguf_files.write_gguf(tmp_path / "m.gguf", wrong, true, gguf.GGMLQuantizationType.F32, extra=extra)
  with pytest.raises(InputError, match=r"[0-9]{10}|1,000,000,000"):
    readers.open_source(path)


def test_there_are_two_thousand():
  assert sum(NUM_CASES.values()) == 2000


@pytest.mark.parametrize("template", fuzz_worker.TEMPLATES)
def test_chat_templates_that_misbehave(template):
  with pytest.raises(InputError, match="chat template"):
    ChatTemplate(template, {}, seconds=0.5).render([{"role": "user", "content": "hi"}])


def test_mutations_are_the_same_in_every_run(scratch):
  data = (scratch / "gguf" / "m.gguf").read_bytes()
  a, b, c = (fuzz_worker.mutate_bytes(data, np.random.default_rng(seed)) for seed in (3, 3, 4))
  assert a == b != c


def test_a_worker_notices(scratch, tmp_path):
  """Who reads outside, believes a length or hangs is seen: the worker's own alarms."""
  root = pathlib.Path(fuzz_worker.__file__).parents[2]
  code = f"""
import sys; sys.path.insert(0, {str(root)!r})
import pathlib, time
from tests.helpers import fuzz_worker
fuzz_worker.SECONDS = 2
cases = iter([lambda: open("/etc/hostname").close(), lambda: bytearray(b"x" * (100 << 20)), lambda: 1 / 0,
              lambda: bytearray(1 << 30), lambda: time.sleep(60)])
fuzz_worker.open_everything = lambda folder, with_chat: with_chat is not True and next(cases)()
fuzz_worker.main("config", 0, 5, pathlib.Path({str(tmp_path)!r}))
"""
  os.symlink(scratch / "folder", tmp_path / "folder")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
  bad = [line for line in done.stdout.splitlines() if line.startswith("bad")]
  for line, why in zip(bad, ("opened ['/etc/hostname']", "memory grew by", "ZeroDivisionError", "MemoryError"), strict=True):
    assert why in line
  assert done.returncode == -14 and done.stdout.rstrip().endswith("case 4")
