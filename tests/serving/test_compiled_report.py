"""Whole models compiled for GPUs that are not here: what must be true of their programs, and that the planner says the same."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from jaxfp8.commands import plan
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.mesh import MeshShape
from jaxfp8.planning import compile_request as compile_requests
from jaxfp8.planning.compile_request import CompileRequest
from jaxfp8.planning.devices import have_compiler
from jaxfp8.planning.roofline import decode_step, prefill_step
from jaxfp8.planning.weight_bytes import weight_bytes

pytestmark = pytest.mark.compile

ROOT = pathlib.Path(__file__).parents[2]
PROMISED = """
compile_seconds argument_bytes alias_bytes kv_bytes temp_bytes weight_bytes weight_read_bytes weight_written_bytes kv_read_bytes
hbm_bytes hbm_floor_bytes launches_per_layer all_reduces_per_layer other_collectives_per_layer command_buffers roofline_ms
"""
TOOL = "tools.compile_deviceless"
CONTEXT, BATCH, PREFILL = 4096, 8, 2048


def few_layers(name: str) -> LlamaConfig:
  """Where only what a layer does is asked: the loop's body is the same for any number of them."""
  return dataclasses.replace(LlamaConfig.from_name(name), num_layers=4)


QUESTIONS = {
  "70b-fp8": (LlamaConfig.from_name("llama-3.1-70b"), "h100", 8, {"prefill": PREFILL}),
  "70b-bf16": (LlamaConfig.from_name("llama-3.1-70b"), "h100", 8, {"weights": "bf16", "kv_cache": "bf16"}),
  "70b-block128": (few_layers("llama-3.1-70b"), "h100", 8, {"granularity": "block128"}),
  "8b-fp8": (LlamaConfig.from_name("llama-3.1-8b"), "h200", 1, {}),
  "405b-fp8": (few_layers("llama-3.1-405b"), "h100", 16, {}),
}


def compile_request(name: str) -> CompileRequest:
  config, device, tensor, changes = QUESTIONS[name]
  return CompileRequest.of(config, device, tensor=tensor, batch=BATCH, context=CONTEXT, **changes)


def need_compiler() -> None:
  if not have_compiler():
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("the CUDA compiler is not installed")


@functools.cache
def records(name: str) -> dict:
  need_compiler()
  return compile_requests.compiled_reports(compile_request(name), timeout_s=280)


def planned(name: str, kind: str):
  """(weights' bytes, cost of the step) as the planner has them, from the model's sizes alone."""
  asked = compile_request(name)
  model = asked.config, asked.recipe
  weights = weight_bytes(*model, asked.mesh).stored
  if kind == "decode":
    return weights, decode_step(*model, [CONTEXT] * BATCH, asked.mesh)
  return weights, prefill_step(*model, PREFILL, mesh=asked.mesh)


@pytest.mark.timeout(300)
class TestDecode70B:
  """Llama-3.1-70B over eight H100s, batch 8, context 4,096."""

  def test_weights_are_read_once_and_never_copied(self):
    record = records("70b-fp8")["decode"]
    assert record["weight_read_bytes"] == pytest.approx(8.82e9, rel=0.01)
    assert record["weight_written_bytes"] < 0.02e9

  def test_memory(self):
    record = records("70b-fp8")["decode"]
    pool = 80 * BATCH * CONTEXT * (2 * 128 + 8)
    assert record["kv_bytes"] == pool <= record["alias_bytes"]  # updated in place, whole
    assert record["temp_bytes"] <= 20e6
    assert record["argument_bytes"] < 1.001 * (record["weight_bytes"] + pool)

  def test_a_layer_is_few_launches_and_two_all_reduces(self):
    record = records("70b-fp8")["decode"]
    assert record["layers"] == 80
    assert 1 <= record["launches_per_layer"] <= 12
    assert record["collectives_in_layer"] == {"all-reduce bf16[8,8192]": 2}
    assert (record["all_reduces_per_layer"], record["other_collectives_per_layer"]) == (2, 0)
    assert not any("f8" in name or ("8192]" in name and "gather" in name) for name in record["collectives_elsewhere"])

  def test_block_scales_take_no_launch_more(self):
    record, channels = (records(name)["decode"] for name in ("70b-block128", "70b-fp8"))
    assert record["xla_kernels_per_layer"] == 0
    assert record["launches_per_layer"] <= channels["launches_per_layer"]

  def test_a_layer_is_one_cuda_graph(self):
    record = records("70b-fp8")["decode"]
    assert record["layer_in_one_command_buffer"]
    assert record["command_buffers"] == 3

  def test_it_compiles_in_fifteen_seconds_on_two_cores(self):
    record = records("70b-fp8")["decode"]
    assert min(record["compile_seconds"], record["compile_cpu_seconds"] / 2) <= 15  # cores may be shared with others

  def test_traffic(self):
    record = records("70b-fp8")["decode"]
    assert record["hbm_bytes"] == record["kernel_bytes"] + record["xla_bytes"]
    assert record["hbm_floor_bytes"] <= record["hbm_bytes"] < 1.06 * record["hbm_floor_bytes"]

  def test_bf16_reads_almost_twice_as_much(self):
    fp8, bf16 = (records(name)["decode"] for name in ("70b-fp8", "70b-bf16"))
    assert bf16["hbm_floor_bytes"] >= 1.8 * fp8["hbm_floor_bytes"]
    assert bf16["hbm_bytes"] >= 1.8 * fp8["hbm_bytes"]
    assert bf16["weight_written_bytes"] < 0.02e9


@pytest.mark.timeout(300)
class TestPrefill70B:
  """The step that takes a prompt of 2,048 tokens."""

  def test_linears_run_on_fp8_tensor_cores(self):
    record = records("70b-fp8")["prefill"]
    _, cost = planned("70b-fp8", "prefill")
    assert record["flops"]["fp8"] == pytest.approx(cost.flops["fp8"], rel=0.03)  # attention counts as fp8 in the plan
    assert record["kernels_per_layer"] == 9  # 4 linears, 2 norms, attention, RoPE, SwiGLU

  def test_memory(self):
    record = records("70b-fp8")["prefill"]
    assert record["temp_bytes"] <= 1e9
    assert record["weight_written_bytes"] == 0  # so no bf16 copy either
    assert record["alias_bytes"] >= record["kv_bytes"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", QUESTIONS)
class TestEveryModel:
  def test_kernels_account_for_themselves(self, name):
    """As many costs as Mosaic calls, and as many bytes of weights as their operands in the program have."""
    for kind in {"decode", "prefill"} & set(records(name)):
      record = records(name)[kind]
      assert record["kernel_costs_per_step"] == record["kernels_per_step"] > 0
      rows = record["tokens"] * compile_request(name).config.d_model * 2  # of the embedding, which XLA reads
      assert record["weight_read_bytes"] - record["kernel_weight_bytes"] == rows

  def test_a_layer_is_few_launches(self, name):
    record, alone = records(name)["decode"], compile_request(name).mesh.tensor == 1
    assert record["launches_per_layer"] <= 12
    assert record["weight_written_bytes"] < 0.02e9
    assert record["temp_bytes"] <= (32e6 if alone else 20e6)  # the float32 logits of a whole vocabulary are 4.1 MB
    assert record["layer_in_one_command_buffer"]
    reduces = 0 if alone else 2
    assert (record["all_reduces_per_layer"], record["other_collectives_per_layer"]) == (reduces, 0)

  def test_the_planner_says_the_same(self, name):
    for kind in {"decode", "prefill"} & set(records(name)):
      record, (weights, cost) = records(name)[kind], planned(name, kind)
      assert record["weight_bytes"] == weights
      assert record["kv_read_bytes"] == cost.kv_read_bytes
      assert record["kv_written_bytes"] == cost.kv_written_bytes
      assert record["weight_read_bytes"] == cost.weight_read_bytes
      assert record["hbm_floor_bytes"] == pytest.approx(cost.memory_bytes, rel=0.02)


class TestQuestions:
  @pytest.mark.parametrize(
    ("changes", "words"),
    [
      ({"device": "cpu"}, "compiled for GPUs; 'cpu' is none"),
      ({"tensor": 7}, "possible are 1, 2, 4, 8"),
      ({"data": 3}, "batch must divide over data=3"),
      ({"context": 1 << 20}, "context must be from 1"),
      ({"prefill": 5000}, "prefill must be from 1 to the context"),
      ({"activations": "fp8", "weights": "bf16"}, "fp8 activations need fp8 weights"),
    ],
  )
  def test_wrong_ones_are_one_sentence(self, changes, words):
    with pytest.raises(InputError, match=words):
      CompileRequest.of("llama-3.1-8b", **{"device": "h100", "batch": BATCH, "context": CONTEXT, **changes})

  def test_json_and_back(self):
    asked = CompileRequest.of("llama-3.1-8b", "h100", batch=8, context=64, prefill=32, data=2)
    assert CompileRequest.from_dict(json.loads(json.dumps(asked.to_dict()))) == asked
    assert asked.mesh == MeshShape(data=2)

  def test_an_abort_and_a_slow_compiler(self, monkeypatch, tmp_path):
    monkeypatch.setattr(compile_requests, "have_compiler", lambda: True)
    asked = CompileRequest.of("llama-3.1-8b", "h100", batch=8, context=64)
    with pytest.raises(InputError, match="took more than 0 s"):
      compile_requests.compiled_reports(asked, timeout_s=0.05)
    (tmp_path / "python").write_text("#!/bin/sh\necho LLVM ERROR: cannot select >&2\nkill -6 $$\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(InputError, match="ended without a result: LLVM ERROR"):
      compile_requests.compiled_reports(asked, save=str(tmp_path / "kept"))
    assert not (tmp_path / "kept").exists()

  def test_no_compiler(self, monkeypatch):
    monkeypatch.setattr(compile_requests, "have_compiler", lambda: False)
    with pytest.raises(InputError, match="Install the extra"):
      compile_requests.compiled_reports(CompileRequest.of("llama-3.1-8b", "h100", batch=8, context=64))


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", module, *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.timeout(300)
def test_the_command_keeps_what_it_made(tmp_path):
  """A small model: --json prints one object, and the folder has programs, table and exports."""
  need_compiler()
  sizes = ("--model", "llama-3.2-1b", "--batch", "2", "--context", "128", "--prefill", "128")
  ran = run(TOOL, *sizes, "--json", "--save", str(tmp_path / "kept"))
  assert ran.returncode == 0, ran.stderr
  assert ran.stderr == ""
  answer = json.loads(ran.stdout)
  assert all(set(PROMISED.split()) <= set(answer[kind]) for kind in ("decode", "prefill"))
  kept = {path.name: path.stat().st_size for path in (tmp_path / "kept").iterdir()}
  assert set(kept) == {
    "budget.json",
    "table.txt",
    *(f"{kind}.{what}" for kind in ("decode", "prefill") for what in ("hlo.txt", "jax_export")),
  }
  assert all(kept.values())
  exported = jax.export.deserialize(bytearray((tmp_path / "kept" / "decode.jax_export").read_bytes()))
  assert exported.platforms == ("cuda",)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (("--model", "nix"), "no model named 'nix'"),
    (("--tensor", "8"), "--tensor is about a whole model"),
    (("--model", "llama-3.1-8b", "--kernel", "fp8_matmul"), "Leave one of them out"),
    (("--model", "llama-3.1-8b", "--device", "cpu"), "compiled for GPUs"),
  ],
)
def test_a_wrong_command_is_one_sentence(arguments, words):
  ran = run(TOOL, *arguments)
  assert ran.returncode == 1 and ran.stdout == ""
  assert words in ran.stderr and ran.stderr.count("\n") == 1


@pytest.mark.timeout(300)
def test_the_plan_takes_temporaries_from_the_program():
  need_compiler()
  sizes = ("--model", "llama-3.1-70b", "--device", "h100", "--tensor", "8", "--batch", "8", "--context", "4096", "--json")
  plans = [json.loads(run("jaxfp8.plan", *sizes, *more).stdout) for more in ([], ["--compile", "--prompt", "2048"])]
  estimated, compiled = (plan["memory"]["temporaries"] for plan in plans)
  assert [plan["temporaries_compiled"] for plan in plans] == [False, True]
  assert compiled == records("70b-fp8")["prefill"]["temp_bytes"]
  assert compiled != estimated
  assert plans[0]["memory"]["weights"] == plans[1]["memory"]["weights"] == records("70b-fp8")["decode"]["weight_bytes"]


def test_the_plan_says_where_nothing_can_compile(monkeypatch, capsys):
  monkeypatch.setattr(compile_requests, "have_compiler", lambda: False)
  plan.COMMAND.parse(["--model=llama-3.1-8b", "--device=h100", "--compile"])
  with pytest.raises(InputError, match="Install the extra"):
    plan.main()
  plan.FLAGS.unparse_flags()
