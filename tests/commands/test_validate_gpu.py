"""validate_gpu without a GPU: its timers by fake clocks, its search over a stub, its report of what interpret mode gives."""

import itertools
import json
import math
import os
import re
import stat
import subprocess
import sys

import jax
import pytest

from jaxfp8.commands import validate_gpu
from jaxfp8.commands.gpu_validation import report as gpu_report
from jaxfp8.commands.gpu_validation import search as gpu_search
from jaxfp8.commands.gpu_validation import stages as gpu_stages
from jaxfp8.commands.gpu_validation.search import Found
from jaxfp8.commands.gpu_validation.timing import DeviceTimer, Timing, WallTimer
from pallas_kernels import Target, debug, tuned
from pallas_kernels.cases import CASES, by_name
from pallas_kernels.fp8_matmul import tiling as matmul_tiling
from pallas_kernels.fused import sm90
from pallas_kernels.paged_attention.cases import AttentionCase
from tests.helpers import commands

H100 = Target("cuda", (9, 0), 132, "NVIDIA H100 80GB HBM3")


def test_without_a_gpu_it_is_one_sentence():
  environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
  command = [sys.executable, "-m", "tools.validate_gpu"]
  ran = subprocess.run(command, cwd=commands.ROOT, env=environment, capture_output=True, text=True, timeout=120)
  assert (ran.returncode, ran.stdout) == (1, "")
  assert ran.stderr.startswith("validate-gpu: needs an NVIDIA GPU") and ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--minutes=0", "--minutes must be positive"),
    ("--output=/no/such/place/x.md", "folder of --output"),
    ("x", "every argument is a flag"),
  ],
)
def test_bad_flags(flag, message):
  command = [sys.executable, "-m", "tools.validate_gpu", flag]
  ran = subprocess.run(command, cwd=commands.ROOT, capture_output=True, text=True, timeout=120)
  assert ran.returncode == 1 and message in ran.stderr and ran.stderr.count("\n") == 1


class TestTimers:
  def test_the_clocks_median(self):
    ticks = iter([0, 5, 10, 11, 20, 29])  # runs of 5, 1 and 9 seconds
    runs = []
    timing = WallTimer(3, clock=lambda: next(ticks))(lambda x: runs.append(x) or x, (7,), calls=2)
    assert timing == Timing(2.5, "wall") and runs == [7] * 4  # the first is not counted

  def test_device_events_without_copies(self):
    """Milliseconds of the middle run, by kernel, for one of two calls; a copy of a pool is not the operation's."""
    runs = [
      [("matmul", 4.0), ("copy_pool", 90.0), ("sum", 1.0)],
      [("matmul", 2.0), ("sum", 1.0)],
      [("matmul", 9.0), ("sum", 1.0)],
    ]

    def measure(program, aggregate, iterations):
      assert not aggregate and iterations == 3
      return lambda *arguments: (program(*arguments), runs)

    timing = DeviceTimer(3, measure)(lambda x: x, (1,), calls=2)
    assert timing.seconds == pytest.approx(2.5e-3) and timing.method == "device"
    assert timing.kernels == pytest.approx({"matmul": 2e-3, "copy_pool": 45e-3, "sum": 0.5e-3})

  def test_one_iteration(self):
    timing = DeviceTimer(1, lambda *_, **__: lambda *_: (None, [("a", 1.0), ("b", 2.0)]))(None, ())
    assert timing.seconds == pytest.approx(3e-3)

  @pytest.mark.parametrize("outcome", [RuntimeError("CUPTI_ERROR_MULTIPLE_SUBSCRIBERS"), None])
  def test_no_device_events_is_said(self, outcome):
    def measured(*_):
      if outcome:
        raise outcome
      return 0, None

    ticks = itertools.count()
    clock = WallTimer(2, clock=lambda: next(ticks))
    timing = DeviceTimer(2, lambda *_, **__: measured, clock)(lambda x: x, (1,))
    assert (timing.method, timing.seconds) == ("wall", 1)
    assert timing.note == f"wall clock, since {outcome or 'CUPTI saw no kernel'}"

  def test_jax_still_measures_by_that_name(self):
    """What DeviceTimer calls on a GPU exists, and takes these arguments; on a CPU it has no kernel to see, or no CUPTI."""
    timing = DeviceTimer(2)(jax.jit(lambda x: x + 1), (1.0,))
    assert timing.method == "wall" and timing.seconds > 0 and timing.note


class TestSearch:
  CHOICES = {"a": [1, 2, 3, 4], "b": [1, 2, 3]}  # noqa: RUF012

  def test_it_finds_the_best_one_size_at_a_time(self):
    asked = []

    def seconds(sizes):
      asked.append(tuple(sizes.values()))
      return 1 + abs(sizes["a"] - 3) + abs(sizes["b"] - 2)

    found = gpu_search.descend({"a": 1, "b": 1}, self.CHOICES, seconds)
    assert found == Found({"a": 3, "b": 2}, 1, {"a": 1, "b": 1}, 4, len(asked)) and len(set(asked)) == len(asked)
    assert found.is_better

  def test_noise_is_no_gain(self):
    found = gpu_search.descend({"a": 1, "b": 1}, self.CHOICES, lambda sizes: 1 - 0.001 * sizes["a"])
    assert found.sizes == {"a": 1, "b": 1} and not found.is_better

  def test_it_ends_with_its_time(self):
    left = itertools.chain([False] * 3, itertools.repeat(True))
    found = gpu_search.descend({"a": 1, "b": 1}, self.CHOICES, lambda sizes: 1 / sizes["a"], lambda: next(left))
    assert found.tried <= 3

  @pytest.mark.parametrize("name", gpu_stages.TUNED)
  def test_what_is_written_is_what_the_tiling_then_takes(self, name, tmp_path, monkeypatch):
    """Over a stub of a timer: faster with fewer stages and splits. Only possible sizes are timed."""
    tuned.use_folder(tmp_path)
    case, timed = by_name(name), []

    def seconds(case, sizes):
      assert gpu_search.is_possible(case, sizes, H100)
      timed.append(sizes)
      return sizes["stages"] + 0.1 * sizes["splits"]

    found = list(gpu_search.search(case, H100, seconds))
    entries = gpu_search.entries_of(found)
    assert entries and len(timed) > 5
    facts = {"device_kind": H100.kind, "compute_capability": [9, 0], "num_sms": 132, "conditions": {}}
    tuned.write(case.operation, facts, entries)
    try:
      for call, result in found:
        assert call.sizes(H100) == result.sizes
        assert result.seconds == min(
          seconds(call, s) for s in (result.sizes, result.formula) if gpu_search.is_possible(call, s, H100)
        )
    finally:
      tuned.use_folder(None)
    if not isinstance(case, AttentionCase) and case.is_skinny:
      assert len({result.sizes["splits"] for _, result in found}) == 1 and len(found) == 2

  def test_nothing_is_written_that_is_not_faster(self):
    case = by_name("skinny-w8a8")
    assert gpu_search.entries_of(list(gpu_search.search(case, H100, lambda *_: 1.0))) == []
    assert gpu_search.entries_of(list(gpu_search.search(case, H100, lambda *_: math.inf))) == []

  def test_every_formula_is_a_start(self):
    """The formula's own sizes pass as measured ones, or a search could not begin."""
    for case in CASES:
      if case.operation in ("fp8_matmul", "paged_attention"):
        assert gpu_search.is_possible(case, case.sizes(H100), H100), case.name
    assert matmul_tiling.MAX_SKINNY == 64


@pytest.fixture
def bench():
  return gpu_stages.Bench.here(rehearsal=True)


class TestStages:
  @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
  def test_work_that_no_way_avoids(self, case):
    moved, flops = case.least_work(H100)
    assert 0 < moved < 2e9 and 0 < flops < 1e13
    if case.operation in ("fp8_matmul", "paged_attention"):
      assert moved <= 1.02 * case.cost(H100)[0] + 2e7 and flops <= case.cost(H100)[1]

  @pytest.mark.parametrize("T", [None, 12])
  def test_arguments_are_calls_that_can_be(self, T):
    case = AttentionCase("a call", "fp8", T, 2, 4, 2, 64, 64, 2)
    q, k, _, table, starts, lengths, *_ = case.values()
    debug.require_pages("test", table, lengths, starts, num_pages=k.shape[0], num_tokens=q.shape[0], page_size=64)
    assert lengths.tolist() == [128, 128] and len(set(table.ravel().tolist())) == table.size
    assert starts is None or starts.tolist() == [0, 6, 12]

  def test_records_of_interpreted_kernels(self, bench, tmp_path):
    records = []
    for stage, names in (("device", ["this machine"]), ("conformance", ["norm", "no such case"]), ("timing", ["norm"])):
      records += gpu_stages.work(stage, names, math.inf, True)
    device, right, wrong, timing = json.loads(json.dumps(records))
    assert device["kernels"]["fp8_matmul"] == ["sm90", "xla"] and device["names"]["conformance"][-1] == "rope"
    assert right["passed"] and 0 < right["error"] < right["limit"] and right["against"] == "float32"
    assert not wrong["passed"] and "StopIteration" in wrong["failure"]
    assert timing["times"]["interpret"]["seconds"] > timing["times"]["xla"]["seconds"] > 0
    text = gpu_report.write_report([device, right, wrong, timing], 0.1)
    assert "A rehearsal" in text and re.search(r"\| norm \| interpret \| float32 \| 0\.0\d+ \| 0\.05 \|", text)

  def test_a_wrong_kernel_does_not_pass(self, bench, monkeypatch):
    right = sm90.residual_norm

    def twice(*arguments, **options):
      x, (values, scale) = right(*arguments, **options)
      return x, type(right(*arguments, **options)[1])(values, 2 * scale)

    monkeypatch.setattr(sm90, "residual_norm", twice)
    record = gpu_stages.conformance_record(bench, "norm")
    assert not record["passed"] and record["error"] > 0.5

  def test_time_that_is_over(self, tmp_path):
    assert list(gpu_stages.work("timing", ["norm"], 0, True)) == []

  def test_tuning_writes_what_is_right_and_faster(self, bench, tmp_path, monkeypatch):
    tuned.use_folder(tmp_path)
    target = Target("cuda", (9, 0), 8, "a GPU")
    stub = gpu_stages.dataclasses.replace(bench, target=target)
    monkeypatch.setattr(gpu_stages, "time_case", lambda bench, case, kernel: Timing(case.tiling(target).depth, "device"))
    record = gpu_stages.tuning_record(stub, "skinny-w8a8", lambda: False)
    assert record["written"] == str(tmp_path / "fp8_matmul" / "a-gpu.json"), record
    assert [found["key"]["regime"] for found in record["found"]] == ["skinny-16", "skinny-64"]
    tuned.use_folder(None)
    monkeypatch.setattr(gpu_stages.conformance, "error_of", lambda *_: 0.5)
    record = gpu_stages.tuning_record(stub, "skinny-w8a8", lambda: False)
    assert not record["written"]
    tuned.use_folder(None)


class TestParent:
  def test_a_death_costs_one_name(self, monkeypatch):
    runs = []

    def child(stage, names, until):
      runs.append(tuple(names))
      alive = names[: names.index("b")] if "b" in names else names
      return {n: {"stage": stage, "name": n, "passed": True} for n in alive}, "LLVM ERROR" if "b" in names else ""

    monkeypatch.setattr(validate_gpu, "child", child)
    records = validate_gpu.run_stage("conformance", ["a", "b", "c"], math.inf)
    assert [r.get("failure", "") for r in records] == ["", "LLVM ERROR", ""] and runs == [("a", "b", "c"), ("c",)]

  def test_a_real_death(self, monkeypatch, tmp_path):
    """A process that writes one record and is killed: the record and its last words come back."""
    fake = tmp_path / "python"
    fake.write_text(
      "#!/bin/sh\nread request\n"
      'echo \'{"stage": "timing", "name": "a"}\'; echo "LLVM ERROR: Cannot select" >&2; kill -ABRT $$\n'
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr("sys.executable", str(fake))
    validate_gpu.FLAGS(["validate_gpu"])
    records, last_words = validate_gpu.child("timing", ["a", "b"], validate_gpu.time.time() + 5)
    assert list(records) == ["a"] and "code -6" in last_words and "LLVM ERROR: Cannot select" in last_words

  def test_what_time_did_not_allow_is_said(self):
    records = validate_gpu.run_stage("timing", ["a"], 0)
    assert records == [{"stage": "timing", "name": "a", "missed": True}]
    assert "not reached in time: timing of a" in gpu_report.verdict(records) and not gpu_report.has_failed(records)


def test_the_report_reads_and_parses():
  """Every stage, with what failed, what is infinite and what was not reached."""
  nan, inf = float("nan"), float("inf")
  times = {
    "seconds": 1e-5,
    "method": "device",
    "note": "",
    "gbps": 2900.0,
    "tflops": 5.8,
    "bandwidth_share": 0.87,
    "kernels": {},
  }
  found = {"key": {"regime": "decode"}, "sizes": {"stages": 3}, "seconds": 1e-5, "formula_seconds": inf, "tried": 9}
  records = [
    {"stage": "device", "kind": "NVIDIA H100", "title": "NVIDIA H100 SXM", "compute_capability": [9, 0], "num_sms": 132},
    {
      "stage": "conformance",
      "name": "a",
      "implementation": "sm90",
      "against": "xla",
      "error": nan,
      "limit": 0.01,
      "passed": False,
    },
    {"stage": "conformance", "name": "b", "failure": "died | of it", "passed": False},
    {"stage": "timing", "name": "c", "times": {"sm90": times}},
    {"stage": "timing", "name": "d", "missed": True},
    {"stage": "tuning", "name": "e", "found": [found], "written": ""},
    {"stage": "models", "name": "f", "decode_tok_s": 100.0, "decode_step_seconds": 0.01, "prefill_tok_s": 5e3},
  ]
  text = gpu_report.write_report(records, 9.5)
  assert "0 of 2 comparisons passed; wrong or failed: a, b; not reached in time: timing of d." in text
  assert "| c | sm90 | 10.0 us | 2,900 | 5.8 | 87 % |" in text and "| WRONG |" in text and "FAILED: died / of it" in text
  assert gpu_report.has_failed(records)
  (stored,) = re.findall(r"```json\n(.*)\n```", text, re.S)
  assert [record["stage"] for record in json.loads(stored)] == [record["stage"] for record in records]
  assert json.loads(stored)[1]["error"] is None
  rows = [line for line in text.splitlines() if line.startswith("|")]
  assert all(line.count("|") >= 6 for line in rows)
