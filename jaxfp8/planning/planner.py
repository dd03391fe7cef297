"""Will it fit, how fast can it be, and what would make it faster: `plan_deployment`. Imports no jax, needs no GPU.

    model, device, mesh, recipe -> Deployment -> memory per device, sequences that fit
                                             -> per batch: ceilings, time by part, gains of FP8
                                             -> ways out, verdict on an observed speed

Ceilings are floors of time turned over: no run can be faster, and `expected_*` says how near published systems came.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.mesh import MeshShape
from jaxfp8.planning.advice import Option, Speculation, smallest_change, ways_out
from jaxfp8.planning.deployment import (
  Deployment,
  MemoryBudget,
  compute_bound_batch,
  decode_times,
  max_context,
  max_kv_pages,
  max_sequences,
  memory_budget,
  prefill_times,
  resolve_activations,
)
from jaxfp8.planning.devices import CPU, DeviceSpec, load_device
from jaxfp8.planning.published import Measurement, expected_fractions
from jaxfp8.planning.roofline import StepTimes, kv_bytes_per_token
from jaxfp8.planning.verdict import Verdict, judge
from jaxfp8.planning.weight_bytes import weight_bytes
from jaxfp8.recipe import DEFAULT_PAGE_SIZE, PAGE_SIZES, LayerFormat, Recipe

MAX_BATCH = 65536
CONTEXT, PROMPT = 8192, 1024
CONTEXTS = (1024, 8192, 32768, 131072)


@dataclasses.dataclass(frozen=True)
class BatchPlan:
  """One batch at the operating point. Rates are tokens/s: decode_* of one sequence, total_* of all, prefill_* of all prompts
  arriving together; ttft_floor_s is when the last of them has its first token.

  times: floors of one decode step by part, in seconds. fp8_*_gain: decode speed over bf16, with nothing else in FP8.
  """

  batch: int
  fits: bool
  shortfall_bytes: int
  decode_ceiling_tok_s: float
  total_ceiling_tok_s: float
  prefill_ceiling_tok_s: float
  ttft_floor_s: float
  bound_by: str
  step_floor_s: float
  times: StepTimes
  expected_tok_s: tuple[float, float]
  fp8_weights_gain: float
  fp8_kv_gain: float


@dataclasses.dataclass(frozen=True)
class DeploymentPlan:
  """Everything the planner says. Bytes are per device; max_kv_tokens, sequences and batches are of the whole deployment.

  fits: whether the smallest batch asked for fits; shortfall_bytes: how much it lacks; smallest_change: what makes it fit.
  """

  deployment: Deployment
  fits: bool
  shortfall_bytes: int
  smallest_change: str
  memory: MemoryBudget
  weights_bytes: int
  weights_read_bytes: int
  kv_bytes_per_token: int
  max_kv_tokens: int
  max_context: int
  sequences: tuple[tuple[int, int], ...]
  batches: tuple[BatchPlan, ...]
  compute_bound_batch: int | None
  compute_bound_batch_empty: int | None
  expected_fraction: tuple[float, float]
  published: tuple[Measurement, ...]
  ways_out: tuple[Option, ...]
  verdict: Verdict | None = None

  def to_json(self) -> dict[str, Any]:
    """One flat object of plain values, with the keys that the command's --json promises."""
    return _to_json(self)


def plan_deployment(
  model: LlamaConfig | str,
  device: DeviceSpec | str,
  *,
  count: int | None = None,
  tensor: int | None = None,
  data: int | None = None,
  batches: Sequence[int] = (1, 8, 32),
  context: int | None = None,
  prompt: int | None = None,
  weights: str = "fp8",
  granularity: str = "channel",
  activations: str = "auto",
  kv_cache: str = "fp8",
  page_tokens: int = DEFAULT_PAGE_SIZE,
  observed: float | None = None,
  observed_batch: int = 1,
  speculation: Speculation | None = None,
  cache_dir: str = "",
  temporaries: int | None = None,
  formats: tuple[LayerFormat, ...] | None = None,
) -> DeploymentPlan:
  """Plans `model` on `count` devices.

  model: a LlamaConfig, a name from configs/models or a TOML; device: a DeviceSpec, a name from configs/devices, a TOML or
  "cpu" (measured, the result kept in cache_dir). context and prompt: 8,192 and 1,024 tokens unless the model has less.
  count = tensor * data; what is not given follows from the rest, and all devices go to `tensor` when neither is.
  observed: tokens/s of all observed_batch sequences together. temporaries: bytes that the compiled programs say they need on a
  device; None: an estimate. formats: of the layers of a checkpoint that mixes formats; `weights` and `granularity` are its own.

  A model that does not fit is an answer (`fits` is False), not an error. Raises InputError for a mesh that is not
  possible, an unknown name, numbers that are not positive, or a context beyond the model's.
  """
  config = model if isinstance(model, LlamaConfig) else _load_model(model)
  spec = device if isinstance(device, DeviceSpec) else load_device(device, cache_dir)
  context = min(CONTEXT, config.max_context) if context is None else context
  prompt = min(PROMPT, context) if prompt is None else prompt
  _check_numbers(config, batches, context, prompt, page_tokens)
  if observed is not None and not 0 < observed < float("inf"):
    raise InputError(f"plan: observed must be positive; got {observed:g}. Pass the tokens a second that you measured.")
  if not 1 <= observed_batch <= MAX_BATCH:
    raise InputError(f"plan: observed_batch must be from 1 to {MAX_BATCH}; got {observed_batch}.")
  recipe = Recipe(weights, granularity, resolve_activations(activations, weights, spec), kv_cache)
  mesh = _mesh(config, count, tensor, data)
  if spec.name == CPU and mesh.num_devices > 1:
    raise InputError(f"plan: cpu is this one machine; got {mesh.num_devices} devices. Leave --count, --tensor and --data at 1.")
  deployment = Deployment(config, recipe, spec, mesh, context, prompt, page_tokens, temporaries, formats)
  return _plan(deployment, sorted(set(batches)), observed, observed_batch, speculation or Speculation())


def _load_model(name: str) -> LlamaConfig:
  return LlamaConfig.from_toml(name) if name.endswith(".toml") else LlamaConfig.from_name(name)


def _check_numbers(config: LlamaConfig, batches: Sequence[int], context: int, prompt: int, page_tokens: int) -> None:
  if not batches:
    raise InputError("plan: batch must name at least one batch size; got none. Pass for example --batch=1,8,32.")
  for name, value in (*(("batch", batch) for batch in batches), ("context", context), ("prompt", prompt)):
    if value < 1:
      raise InputError(f"plan: {name} must be at least 1; got {value}.")
  if max(batches) > MAX_BATCH:
    raise InputError(f"plan: batch must be at most {MAX_BATCH}; got {max(batches)}.")
  if context > config.max_context:
    raise InputError(
      f"plan: context must be at most the {config.max_context:,} tokens of {config.name}; got {context:,}. "
      f"Pass --context={config.max_context} or less."
    )
  if prompt > context:
    raise InputError(
      f"plan: prompt must be at most the context of {context:,} tokens; got {prompt:,}. Pass --prompt={context}."
    )
  if page_tokens not in PAGE_SIZES:
    raise InputError(f"plan: page_tokens must be 32, 64 or 128; got {page_tokens}.")


def _mesh(config: LlamaConfig, count: int | None, tensor: int | None, data: int | None) -> MeshShape:
  for name, value in (("count", count), ("tensor", tensor), ("data", data)):
    if value is not None and value < 1:
      raise InputError(f"plan: {name} must be at least 1; got {value}.")
  if count is None:
    return MeshShape.for_model(config, tensor or 1, data or 1)
  data = data or (1 if tensor is None else max(1, count // tensor))
  tensor = tensor or max(1, count // data)
  if tensor * data != count:
    raise InputError(f"plan: tensor times data must be count; got {tensor} x {data} and {count}. Leave one of them out.")
  return MeshShape.for_model(config, tensor, data)


def _plan(
  deployment: Deployment, batches: list[int], observed: float | None, observed_batch: int, speculation: Speculation
) -> DeploymentPlan:
  config, recipe, mesh = deployment.config, deployment.recipe, deployment.mesh
  weights = weight_bytes(config, recipe, mesh, deployment.formats)
  memory = memory_budget(deployment, batches[0])
  fits = memory.free >= 0
  low, high, published = expected_fractions(deployment.device.name, mesh.tensor)
  contexts = sorted({size for size in (*CONTEXTS, deployment.context) if size <= config.max_context})
  return DeploymentPlan(
    deployment=deployment,
    fits=fits,
    shortfall_bytes=max(0, -memory.free),
    smallest_change="" if fits else smallest_change(deployment, batches[0]),
    memory=memory,
    weights_bytes=weights.stored,
    weights_read_bytes=weights.streamed,
    kv_bytes_per_token=kv_bytes_per_token(config, recipe, mesh),
    max_kv_tokens=max_kv_pages(deployment) * deployment.page_tokens * mesh.data,
    max_context=max_context(deployment, batches[0]),
    sequences=tuple((size, max_sequences(deployment, size)) for size in contexts),
    batches=tuple(_plan_batch(deployment, batch, (low, high)) for batch in batches),
    compute_bound_batch=compute_bound_batch(deployment, deployment.context),
    compute_bound_batch_empty=compute_bound_batch(deployment, 1),
    expected_fraction=(low, high),
    published=published,
    ways_out=ways_out(deployment, observed_batch if observed else batches[0], speculation),
    verdict=judge(deployment, observed, observed_batch) if observed else None,
  )


def _plan_batch(deployment: Deployment, batch: int, expected: tuple[float, float]) -> BatchPlan:
  free = memory_budget(deployment, batch).free
  times, prefill = decode_times(deployment, batch), prefill_times(deployment, batch)
  plain = deployment.with_recipe(weights="bf16", kv="bf16")
  plain_step = decode_times(plain, batch).step
  total = batch / times.step
  return BatchPlan(
    batch=batch,
    fits=free >= 0,
    shortfall_bytes=max(0, -free),
    decode_ceiling_tok_s=1 / times.step,
    total_ceiling_tok_s=total,
    prefill_ceiling_tok_s=batch * deployment.prompt / prefill.step,
    ttft_floor_s=prefill.step,
    bound_by=times.bound_by,
    step_floor_s=times.step,
    times=times,
    expected_tok_s=(expected[0] * total, expected[1] * total),
    fp8_weights_gain=plain_step / decode_times(plain.with_recipe(weights="fp8"), batch).step,
    fp8_kv_gain=plain_step / decode_times(plain.with_recipe(kv="fp8"), batch).step,
  )


def _to_json(plan: DeploymentPlan) -> dict[str, Any]:
  deployment = plan.deployment
  result = {
    "model": deployment.config.name,
    "device": deployment.device.name,
    "count": deployment.mesh.num_devices,
    "mesh": dataclasses.asdict(deployment.mesh),
    "recipe": dataclasses.asdict(deployment.recipe),
    "context": deployment.context,
    "prompt": deployment.prompt,
    "page_tokens": deployment.page_tokens,
    "fits": plan.fits,
    "shortfall_bytes": plan.shortfall_bytes,
    "smallest_change": plan.smallest_change,
    "weights_bytes": plan.weights_bytes,
    "weights_read_bytes": plan.weights_read_bytes,
    "kv_bytes_per_token": plan.kv_bytes_per_token,
    "max_kv_tokens": plan.max_kv_tokens,
    "max_context": plan.max_context,
    "temporaries_compiled": deployment.compiled_temporaries is not None,
    "memory": {**dataclasses.asdict(plan.memory), "free": plan.memory.free},
    "sequences": [{"context": context, "sequences": count} for context, count in plan.sequences],
    "batches": [dataclasses.asdict(batch) for batch in plan.batches],
    "compute_bound_batch": plan.compute_bound_batch,
    "compute_bound_batch_empty": plan.compute_bound_batch_empty,
    "expected_fraction": list(plan.expected_fraction),
    "published": [dataclasses.asdict(row) for row in plan.published],
    "ways_out": [dataclasses.asdict(option) for option in plan.ways_out],
  }
  if plan.verdict:
    result |= {
      "observed_tok_s": plan.verdict.observed_tok_s,
      "observed_batch": plan.verdict.batch,
      "observed_ceiling_tok_s": plan.verdict.ceiling_tok_s,
      "observed_fraction": plan.verdict.fraction,
      "observed_fraction_at_context": plan.verdict.fraction_at_context,
      "verdict_kind": plan.verdict.kind,
      "verdict": plan.verdict.sentence,
    }
  return result
