"""Measures one kind of weights for `jaxfp8 benchmark`, in a process whose peak memory is its own.

The request has the keys weights, batches, prompt_lengths, new_tokens, repeats, checkpoint, cache_dir and profile; an answer is
the fields of a `Result`, one for each batch size and prompt length.
"""

import dataclasses
import pathlib
import resource
import statistics
from collections.abc import Iterator
from typing import Any

from jaxfp8 import child_process
from jaxfp8.commands import command, profiling
from jaxfp8.errors import silence_libraries


@dataclasses.dataclass(frozen=True)
class Result:
  """One case. Rates are tokens/s of all sequences together; ceiling_tok_s is the roofline of decode for this case."""

  weights: str
  batch: int
  prompt_tokens: int
  new_tokens: int
  prefill_tok_s: float
  decode_tok_s: float
  ttft_s: float
  peak_rss_bytes: int
  bandwidth_fraction: float
  ceiling_tok_s: float
  device: str
  jax_version: str


def measure(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """Yields a Result per batch size and prompt length, the largest memory last. Raises InputError for an unusable model."""
  import jax

  from jaxfp8.progress import Progress
  from jaxfp8.serving import startup
  from jaxfp8.serving.run_report import find_device

  command.keep_compiled_programs(request["cache_dir"])
  options = startup.LoadOptions(checkpoint=request["checkpoint"], weights=request["weights"], cache_dir=request["cache_dir"])
  loaded = startup.open_model(options, Progress())
  device = find_device(jax.devices()[0], request["cache_dir"])
  for batch in request["batches"]:
    for length in request["prompt_lengths"]:
      yield dataclasses.asdict(_measure_case(loaded, device, request, batch=batch, length=length))


def _measure_case(loaded, device, request: dict[str, Any], *, batch: int, length: int) -> Result:
  """One engine of its own: the first run warms up, and --profile adds a run that is not measured."""
  import jax
  import numpy as np

  from jaxfp8.mesh import ONE_DEVICE
  from jaxfp8.model.sampling import SamplingParams
  from jaxfp8.planning.roofline import bound, decode_step
  from jaxfp8.serving import startup
  from jaxfp8.serving.engine import Engine, Request, Stats

  config, new_tokens = loaded.model.config, request["new_tokens"]
  limits = startup.limits_for(loaded.model, loaded.mesh, [(length, new_tokens)] * batch)
  engine = Engine(loaded.model, mesh=loaded.mesh, limits=limits)
  engine.compile()
  params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
  rng = np.random.default_rng(0)

  def run() -> tuple[Stats, float]:
    engine.stats = Stats()
    prompts = rng.integers(0, config.vocab_size, (batch, length))
    completions = engine.generate([Request(tuple(prompt), params) for prompt in prompts.tolist()])
    return engine.stats, statistics.median(completion.ttft_s for completion in completions)

  run()
  runs = [run() for _ in range(request["repeats"])]
  if request["profile"]:
    with profiling.write_trace(pathlib.Path(request["profile"]) / f"{request['weights']}-batch-{batch}-prompt-{length}"):
      run()
  cost = decode_step(config, loaded.recipe, [length + new_tokens // 2] * batch, ONE_DEVICE)
  step = statistics.median(stats.decode_seconds / len(stats.decode_lengths) for stats, _ in runs)
  return Result(
    weights=request["weights"],
    batch=batch,
    prompt_tokens=length,
    new_tokens=new_tokens,
    prefill_tok_s=statistics.median(stats.prefill_tokens / stats.prefill_seconds for stats, _ in runs),
    decode_tok_s=statistics.median(stats.decode_tokens / stats.decode_seconds for stats, _ in runs),
    ttft_s=statistics.median(ttft for _, ttft in runs),
    peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    bandwidth_fraction=cost.memory_bytes / step / device.bandwidth,
    ceiling_tok_s=batch / bound(cost, device).step,
    device=device.title,
    jax_version=jax.__version__,
  )


if __name__ == "__main__":
  silence_libraries()
  child_process.serve(measure)
