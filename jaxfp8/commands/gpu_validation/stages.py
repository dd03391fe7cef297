"""What validate_gpu does on the device, in a process that may die of it: one record a name, written as soon as it is known.

device        what this machine is
conformance   every kernel's small checks against XLA, and every case of pallas_kernels/cases.py against the reference
timing        every case by its kernel and by XLA: seconds, GB/s, TFLOP/s, shares of the device's peaks
tuning        tile sizes that beat the formula, checked for their results, into the cache folder (pallas_kernels/tuned.py)
models        prefill and decode of a model of random weights, beside the roofline
"""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax

from jaxfp8 import child_process
from jaxfp8.commands import command
from jaxfp8.commands.gpu_validation import search as gpu_search
from jaxfp8.commands.gpu_validation.timing import DeviceTimer, WallTimer
from jaxfp8.planning.devices import DeviceSpec
from jaxfp8.serving.run_report import find_device
from pallas_kernels import Target, conformance, costs, dispatch, tuned
from pallas_kernels.case import Case, TunableCase
from pallas_kernels.cases import CASES
from pallas_kernels.fp8_matmul.cases import MatmulCase
from pallas_kernels.fused.cases import NormCase, RopeCase, SiluCase
from pallas_kernels.paged_attention.cases import AttentionCase

FLOOR = 0.01  # relative error against float32 that rounding to bf16 and 14 bits of accumulator always have
REHEARSAL = (
  MatmulCase("skinny-w8a8", "w8a8", 3, 192, 512),
  AttentionCase("decode-fp8", "fp8", None, 2, 4, 2, 64, 64, 2),
  NormCase("norm", 2, 128),
  SiluCase("silu", 2, 128, 1),
  RopeCase("rope", "fp8", 2, 1, 2, 64, 1),
)
MODELS = (("llama-3.1-8b", 40e9), ("llama-3.2-1b", 8e9), ("smollm2-135m", 0))  # the first that so much memory holds
TUNED = ("skinny-w8a8", "skinny-w8a8-64-tokens", "decode-fp8", "wide-w8a8", "prefill-fp8", "skinny-w8a16", "skinny-bf16-head")


@dataclasses.dataclass(frozen=True)
class Bench:
  """Where the stages run. rehearsal: on a CPU, kernels interpreted, small cases, times that say nothing about a GPU."""

  device: Any  # a jax.Device
  spec: DeviceSpec | None
  target: Target
  timer: Callable
  rehearsal: bool = False

  @classmethod
  def here(cls, rehearsal: bool) -> "Bench":
    device = jax.devices()[0]
    spec = find_device(device)
    if rehearsal:
      return cls(device, spec, Target("cuda", (9, 0), 2), WallTimer(1), True)
    return cls(device, spec, Target.of(device), DeviceTimer())

  @property
  def cases(self) -> tuple[Case, ...]:
    return REHEARSAL if self.rehearsal else CASES

  @property
  def checks(self) -> tuple[conformance.Check, ...]:
    """The small checks of kernels that there are."""
    checks = [check for check in conformance.CHECKS if conformance.kernel_of(check.operation, self.target)]
    return tuple(checks[:1] if self.rehearsal else checks)

  def kernel_of(self, case: Case) -> str | None:
    if self.rehearsal:
      return "interpret"
    return conformance.kernel_of(case.operation, self.target)

  def names(self, stage: str) -> list[str]:
    """What there is to do in a stage, in order."""
    names = [case.name for case in self.cases]
    if stage == "conformance":
      return [check.name for check in self.checks] + names
    if stage == "tuning":
      return [] if self.rehearsal else [name for name in TUNED if self.kernel_of(self.case(name))]
    if stage == "models":
      memory = 0 if self.rehearsal else (self.spec.usable_bytes if self.spec else 0)
      name = "tiny" if self.rehearsal else next(name for name, least in MODELS if memory >= least)
      return [f"{name}, batch {batch}" for batch in ((2,) if self.rehearsal else (1, 8, 32))]
    return names if stage == "timing" else ["this machine"]

  def case(self, name: str) -> Case:
    return next(case for case in self.cases if case.name == name)


def device_record(bench: Bench, name: str) -> dict[str, Any]:
  driver = pathlib.Path("/proc/driver/nvidia/version")
  return {
    "kind": bench.device.device_kind,
    "device_kind": bench.target.kind or bench.device.device_kind,
    "compute_capability": list(bench.target.capability or (0, 0)),
    "num_sms": bench.target.num_sms,
    "spec": bench.spec.name if bench.spec else None,
    "title": bench.spec.title if bench.spec else bench.device.device_kind,
    "rehearsal": bench.rehearsal,
    "jax": jax.__version__,
    "runtime": " ".join(bench.device.client.platform_version.split()),
    "driver": driver.read_text().splitlines()[0] if driver.exists() else "",
    "kernels": {name: list(dispatch.order(name, bench.target)) for name in dispatch.OPERATIONS},
    "names": {stage: bench.names(stage) for stage in STAGES},
  }


def conformance_record(bench: Bench, name: str) -> dict[str, Any]:
  for check in conformance.CHECKS:
    if check.name == name:
      kernel = "interpret" if bench.rehearsal else conformance.kernel_of(check.operation, bench.target)
      outcome = conformance.run_one(check, cast(str, kernel), bench.target)
      return {"against": "xla", "passed": outcome.passed, **dataclasses.asdict(outcome)}
  case = bench.case(name)
  kernel = bench.kernel_of(case) or "xla"
  want = results(bench, case, "reference")
  error, xla_error = (conformance.error_of(results(bench, case, i), want) for i in (kernel, "xla"))
  limit = max(2 * xla_error, conformance.ROUNDED if case.rounds else FLOOR)
  record = {"against": "float32", "implementation": kernel, "error": error, "xla_error": xla_error, "limit": limit}
  return record | {"passed": error <= limit}


def results(bench: Bench, case: Case, implementation: str):
  """One call's results as float32 arrays on this machine."""
  call = functools.partial(case.call, target=bench.target, implementation=implementation)
  return jax.device_get(jax.jit(lambda *arguments: conformance.plain(call(*arguments)))(*case.values()))


def timing_record(bench: Bench, name: str) -> dict[str, Any]:
  case, spec = bench.case(name), bench.spec
  moved, flops = case.least_work(bench.target)
  record: dict[str, Any] = {"bytes": moved, "flops": flops, "times": {}}
  for implementation in dict.fromkeys((bench.kernel_of(case) or "xla", "xla")):
    timing = time_case(bench, case, implementation)
    row = {**dataclasses.asdict(timing), "gbps": moved / timing.seconds / 1e9, "tflops": flops / timing.seconds / 1e12}
    if spec:
      peak = spec.flops(case.number_format)
      least = max(moved / spec.bandwidth, flops / peak)
      row |= {"bandwidth_share": moved / timing.seconds / spec.bandwidth, "flops_share": flops / timing.seconds / peak}
      row |= {"least_seconds": least, "roofline_share": least / timing.seconds}
    record["times"][implementation] = row
  return record


def time_case(bench: Bench, case: Case, implementation: str):
  """Seconds of a call whose arguments come from device memory, as they do in a model, not from the L2 cache."""
  l2 = bench.spec.l2_bytes if bench.spec else 0
  copies = 1 if bench.rehearsal else max(1, min(8, math.ceil(2 * l2 / costs.bytes_of(*jax.tree.leaves(case.arguments())))))
  call = functools.partial(case.call, target=bench.target, implementation=implementation)
  arguments = [case.values(seed) for seed in range(copies)]
  return bench.timer(jax.jit(lambda arguments: [call(*copy) for copy in arguments]), (arguments,), copies)


def tuning_record(bench: Bench, name: str, out_of_time: Callable[[], bool]) -> dict[str, Any]:
  """Searches, checks the results of what was found, and writes it. The record says what became of it."""
  case = bench.case(name)
  kernel = bench.kernel_of(case)
  assert isinstance(case, TunableCase) and kernel is not None  # Bench.names

  def seconds(case: TunableCase, sizes) -> float:
    with tuned.trying(case.operation, sizes):
      try:
        return time_case(bench, case, kernel).seconds
      except Exception:  # the compiler refuses: as good as infinitely slow
        return math.inf

  searched = list(gpu_search.search(case, bench.target, seconds, out_of_time))
  record: dict[str, Any] = {
    "found": [{"key": call.tuning_key(), **dataclasses.asdict(result)} for call, result in searched],
    "written": "",
  }
  entries = gpu_search.entries_of(searched)
  for call, result in searched if entries else ():
    with tuned.trying(case.operation, result.sizes):
      error = conformance.error_of(results(bench, call, kernel), results(bench, call, "reference"))
    if not error <= 2 * FLOOR:
      return record | {"failure": f"{result.sizes} compute something else: off by {error:.2g}"}
  if entries:
    facts = {"device_kind": bench.target.kind, "compute_capability": bench.target.capability, "num_sms": bench.target.num_sms}
    conditions = {"jax": jax.__version__, "runtime": " ".join(bench.device.client.platform_version.split())}
    record["written"] = str(tuned.write(case.operation, {**facts, "conditions": conditions}, entries))
  return record


def models_record(bench: Bench, name: str) -> dict[str, Any]:
  from jaxfp8.mesh import ONE_DEVICE
  from jaxfp8.model.sampling import SamplingParams
  from jaxfp8.planning.roofline import bound, decode_step, prefill_step
  from jaxfp8.serving.engine import Engine, Request, Stats
  from jaxfp8.serving.limits import EngineLimits

  model, batch, prompt, new = model_of(bench, name)
  pages = -(-(prompt + new) // 64)
  limits = EngineLimits(
    num_pages=batch * pages,
    max_sequences=batch,
    max_pages=pages,
    prefill_sizes=(min(512, batch * prompt),),
    decode_sizes=(batch,),
  )
  engine = Engine(model, limits=limits)
  engine.compile()
  requests = [Request((1,) * prompt, SamplingParams(max_new_tokens=new, ignore_eos=True))] * batch
  for _ in range(2):  # the first run warms up
    engine.stats = Stats()
    engine.generate(requests)
  stats, recipe = engine.stats, model.recipe
  decode = stats.decode_seconds / len(stats.decode_lengths)
  record = {
    "batch": batch,
    "prompt": prompt,
    "new_tokens": new,
    "recipe": str(recipe),
    "compile_seconds": engine.steps.compile_seconds,
  }
  record |= {"decode_step_seconds": decode, "decode_tok_s": batch / decode}
  record |= {"prefill_tok_s": stats.prefill_tokens / stats.prefill_seconds}
  if bench.spec:
    cost = decode_step(model.config, recipe, [prompt + new // 2] * batch, ONE_DEVICE)
    least = bound(cost, bench.spec).step
    prefill = bound(prefill_step(model.config, recipe, prompt, num_sequences=batch), bench.spec).step
    record |= {"decode_least_seconds": least, "decode_roofline_share": least / decode, "decode_bytes": cost.memory_bytes}
    record |= {"bandwidth_share": cost.memory_bytes / decode / bench.spec.bandwidth}
    record |= {"prefill_least_seconds": prefill, "prefill_roofline_share": prefill / stats.prefill_seconds}
  return record


@functools.cache
def _model(name: str, rehearsal: bool):
  from jaxfp8.config import LlamaConfig
  from jaxfp8.model.llama import Llama
  from jaxfp8.model.random_weights import random_weights
  from jaxfp8.recipe import Recipe

  recipe = Recipe(weights="fp8", activations="bf16" if rehearsal else "fp8", kv="fp8")
  return random_weights(Llama(LlamaConfig.from_name(name), recipe), jax.random.key(0))


def model_of(bench: Bench, name: str):
  """(model, batch, prompt tokens, new tokens) of a line's name."""
  config, _, batch = name.partition(", batch ")
  return _model(config, bench.rehearsal), int(batch), *((40, 4) if bench.rehearsal else (512, 64))


STAGES: dict[str, Callable] = {
  "device": device_record,
  "conformance": conformance_record,
  "timing": timing_record,
  "models": models_record,
  "tuning": tuning_record,
}


def work(stage: str, names: list[str], until: float, rehearsal: bool, cache_dir: str = "") -> Iterator[dict]:
  """The child: yields one record a name, until the time (of time.time()) is over."""
  command.use_measured_tiles(cache_dir)
  bench = Bench.here(rehearsal)
  for number, name in enumerate(names):
    if time.time() >= until:
      return
    share = time.time() + (until - time.time()) / (len(names) - number)
    options = {"out_of_time": lambda share=share: time.time() >= share} if stage == "tuning" else {}
    start = time.time()
    try:
      record = STAGES[stage](bench, name, **options)
    except Exception as error:  # a line of the report; the next one goes on
      record = {"failure": " ".join(f"{type(error).__name__}: {error}".split())[:400], "passed": False}
    yield {"stage": stage, "name": name, "took_seconds": round(time.time() - start, 2), **record}


if __name__ == "__main__":
  child_process.serve(lambda request: work(**request))
