"""The closing lines of `generate`, and their JSON: a run's speed, and the fraction of its hardware's limits."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax

from jaxfp8.mesh import ONE_DEVICE, MeshShape
from jaxfp8.planning.devices import DeviceSpec, device_names, load_device, measure_cpu
from jaxfp8.planning.roofline import StepCost, decode_step, explain
from jaxfp8.planning.weight_bytes import weight_bytes
from jaxfp8.recipe import Recipe
from jaxfp8.serving.engine import Engine
from jaxfp8.serving.request_output import Completion
from jaxfp8.units import format_bytes, format_rate, format_seconds


@dataclasses.dataclass(frozen=True)
class Report:
  """Measurements of one run. Rates are in tokens per second, over all sequences.

  decode_step_bytes: bytes that the median decode step moves. bandwidth_fraction: the fraction of the device's (or CPU's) memory
    bandwidth that decode steps reached; None if unknown.
  """

  device: str
  recipe: Recipe
  weight_bytes: int
  kv_pool_bytes: int
  start_seconds: float  # from the command's start to the first step: imports, loading, compiling
  ttft_seconds: float  # from submission to the first token, the median over the requests
  prefill_tokens: int
  prefill_tok_s: float
  decode_tokens: int
  decode_tok_s: float
  decode_step_bytes: int
  bandwidth_fraction: float | None
  bound: str  # one sentence on the limit of a decode step; "" if unknown

  def to_json(self) -> dict:
    return dataclasses.asdict(self)

  def lines(self) -> list[str]:
    r = self.recipe
    scales = f" ({r.granularity} scales)" if r.weights == "fp8" else ""
    lines = [
      f"recipe   {r.weights} weights{scales}, {r.activations} activations, {r.kv} KV cache; "
      f"weights {format_bytes(self.weight_bytes)}, KV pool {format_bytes(self.kv_pool_bytes)}",
      f"speed    first token after {format_seconds(self.ttft_seconds)} (start-up {format_seconds(self.start_seconds)}), "
      f"prefill {format_rate(self.prefill_tok_s)} tok/s ({self.prefill_tokens} tokens), "
      f"decode {format_rate(self.decode_tok_s)} tok/s ({self.decode_tokens} tokens)",
    ]
    return [*lines, f"bound    {self.bound}"] if self.bound else lines


def make_report(
  engine: Engine, recipe: Recipe, completions: Sequence[Completion], *, start_seconds: float, cache_dir: str
) -> Report:
  """Reports the work of `engine` so far. The first run on a CPU measures its memory bandwidth and stores it in cache_dir."""
  stats, mesh = engine.stats, engine.mesh_shape
  device = find_device(jax.devices()[0], cache_dir)
  weights = weight_bytes(engine.config, recipe, mesh, engine.formats).stored * mesh.tensor
  # CPU devices share one memory, so the bytes of all devices count against one bandwidth.
  on_cpu = jax.devices()[0].platform == "cpu"
  cost = _median_decode_cost(engine, recipe, ONE_DEVICE if on_cpu else mesh)
  seconds = stats.decode_seconds / len(stats.decode_lengths) if stats.decode_lengths else 0.0
  fraction, sentence = None, ""
  if cost and device and seconds:
    fraction, sentence = cost.memory_bytes / seconds / device.bandwidth, explain(cost, device, seconds)
  first = sorted(completion.ttft_s for completion in completions)
  return Report(
    device=device.title if device else jax.devices()[0].device_kind,
    recipe=recipe,
    weight_bytes=weights,
    kv_pool_bytes=engine.kv_bytes,
    start_seconds=start_seconds,
    ttft_seconds=first[len(first) // 2] if first else math.nan,
    prefill_tokens=stats.prefill_tokens,
    prefill_tok_s=_rate(stats.prefill_tokens, stats.prefill_seconds),
    decode_tokens=stats.decode_tokens,
    decode_tok_s=_rate(stats.decode_tokens, stats.decode_seconds),
    decode_step_bytes=cost.memory_bytes if cost else 0,
    bandwidth_fraction=fraction,
    bound=sentence,
  )


def find_device(device: Any, cache_dir: str = "") -> DeviceSpec | None:
  """The spec of a JAX device: measured for a CPU, from configs/devices for a GPU. None if the device is unknown.

  The device's kind must contain the name of the entry in configs/devices; the longest such name wins.
  """
  if device.platform == "cpu":
    return measure_cpu(cache_dir)
  kind = re.sub(r"[^a-z0-9]", "", device.device_kind.lower())
  matches = [name for name in device_names() if name != "cpu" and re.sub(r"[^a-z0-9]", "", name) in kind]
  return load_device(max(matches, key=len)) if matches else None


def _median_decode_cost(engine: Engine, recipe: Recipe, mesh: MeshShape) -> StepCost | None:
  """The cost of the median decode step, by number of sequences and then by context tokens. None without decode steps."""
  lengths = sorted(engine.stats.decode_lengths, key=lambda step: (len(step), sum(step)))
  return decode_step(engine.config, recipe, lengths[len(lengths) // 2], mesh, formats=engine.formats) if lengths else None


def _rate(tokens: int, seconds: float) -> float:
  return tokens / seconds if seconds else 0.0
