"""What to do about a deployment: the smallest change that makes it fit, and the ways to more speed. Imports no jax.

Every option is computed like the plan itself, by the roofline of the changed deployment; nothing is a rule of thumb.
"""

import dataclasses
from collections.abc import Iterator

from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.mesh import possible_tensors
from jaxfp8.planning.deployment import Deployment, decode_times, max_context, max_sequences, memory_budget
from jaxfp8.planning.devices import CPU, DeviceSpec, device_names, load_device
from jaxfp8.planning.roofline import bound, decode_step
from jaxfp8.planning.weight_bytes import weight_bytes
from jaxfp8.recipe import Recipe

MAX_DEVICES = 16  # as far as the advice looks
MIN_CONTEXT = 512  # a shorter context than this is no advice
DRAFT_MODEL = "llama-3.2-1b"


@dataclasses.dataclass(frozen=True)
class Option:
  """A way out. Gains are factors of the ceiling now: per_sequence of what one reader sees, total of all sequences."""

  what: str
  per_sequence_gain: float
  total_gain: float
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Speculation:
  """draft_tokens proposed a step; each is accepted with probability `acceptance` if all before it were."""

  acceptance: float = 0.7
  draft_tokens: int = 4

  def __post_init__(self):
    if not 0 <= self.acceptance < 1:
      raise InputError(f"plan: acceptance must be at least 0 and below 1; got {self.acceptance}. Try 0.7.")
    if self.draft_tokens < 1:
      raise InputError(f"plan: draft_tokens must be at least 1; got {self.draft_tokens}. Try 4.")

  @property
  def tokens_per_step(self) -> float:
    """Expected tokens a step yields (Leviathan et al., arXiv 2211.17192, equation 1)."""
    return (1 - self.acceptance ** (self.draft_tokens + 1)) / (1 - self.acceptance)


def smallest_change(deployment: Deployment, batch: int) -> str:
  """The first of these that makes `batch` sequences fit, as a flag to pass: FP8 KV, fewer sequences, a shorter context,
  FP8 weights, more devices, another device."""
  if deployment.recipe.kv_dtype != "fp8" and _fits(deployment.with_recipe(kv="fp8"), batch):
    return "pass --kv_cache=fp8"
  if most := max_sequences(deployment):
    return f"pass --batch={most}"
  if (context := max_context(deployment, batch)) >= MIN_CONTEXT:
    return f"pass --context={context}"
  if deployment.recipe.weights != "fp8" and _fits(deployment.with_recipe(weights="fp8"), batch):
    return "pass --weights=fp8"
  fp8 = deployment.with_recipe(weights="fp8", kv="fp8")
  for candidate, recipe in ((deployment, ""), (fp8, " --weights=fp8 --kv_cache=fp8")):
    if flags := _more_devices(candidate, batch) or _another_device(candidate, batch):
      return f"pass {flags}{recipe}"
  return f"no device in configs/devices holds it on up to {MAX_DEVICES} devices: take a smaller model"


def _more_devices(deployment: Deployment, batch: int) -> str:
  for tensor in [] if deployment.device.name == CPU else _wider(deployment):
    if _fits(deployment.cut_over(tensor), batch):
      return f"--tensor={tensor} --count={tensor * deployment.mesh.data}"
  return ""


def _another_device(deployment: Deployment, batch: int) -> str:
  """The device with the least memory that holds it, on as many devices if that can be, else on more."""
  for tensor in (deployment.mesh.tensor, *_wider(deployment)):
    others = [deployment.cut_over(tensor).on_device(device) for device in _other_devices(deployment)]
    if holding := [other for other in others if _fits(other, batch)]:
      name = min(holding, key=lambda other: other.device.memory_bytes).device.name
      return f"--device={name}" + (f" --tensor={tensor} --count={tensor * deployment.mesh.data}" if tensor > 1 else "")
  return ""


def ways_out(deployment: Deployment, batch: int, speculation: Speculation) -> tuple[Option, ...]:
  """What would make `batch` sequences faster, in total or each, the largest total gain first; only what gains."""
  now = decode_times(deployment, batch).step
  options = [
    *_more_sequences(deployment, batch, now),
    *_other_numbers(deployment, batch, now),
    *_shorter_context(deployment, batch, now),
    _speculate(deployment, batch, now, speculation),
    *_wider_mesh(deployment, batch, now),
    *_better_devices(deployment, batch, now),
  ]
  return tuple(sorted((option for option in options if option.total_gain > 1.005), key=lambda option: -option.total_gain))


def _more_sequences(deployment: Deployment, batch: int, now: float) -> Iterator[Option]:
  most = max_sequences(deployment)
  sizes = {size for size in (2 * batch, 8 * batch, 32 * batch) if size < most} | {min(most, 32 * batch)}
  reached = 1.0
  for size in sorted(size for size in sizes if size > batch):
    each = now / decode_times(deployment, size).step
    total = each * size / batch
    if total > 1.05 * reached:  # where arithmetic is the limit, more sequences only wait for each other
      yield Option(f"{size} sequences at once instead of {batch}", each, total)
      reached = total


def _other_numbers(deployment: Deployment, batch: int, now: float) -> Iterator[Option]:
  for field, description in (("kv", "an FP8 KV cache"), ("weights", "FP8 weights")):
    if getattr(deployment.recipe, field) != "fp8":
      gain = now / decode_times(deployment.with_recipe(**{field: "fp8"}), batch).step
      yield Option(description, gain, gain)


def _shorter_context(deployment: Deployment, batch: int, now: float) -> Iterator[Option]:
  half = deployment.context // 2
  if half >= 1:
    gain = now / decode_times(deployment, batch, half).step
    yield Option(f"{half:,} tokens of context instead of {deployment.context:,}", gain, gain)


def _speculate(deployment: Deployment, batch: int, now: float, speculation: Speculation) -> Option:
  """A checking step reads weights and KV once for all drafted tokens; the draft model's own steps come on top."""
  mesh, device, count = deployment.mesh, deployment.device, speculation.draft_tokens
  lengths = [deployment.context] * batch
  cost = decode_step(deployment.config, deployment.recipe, lengths, mesh, query_tokens=count + 1, formats=deployment.formats)
  seconds = bound(cost, device).step
  draft = _draft_model(deployment.config)
  if draft and weight_bytes(draft, Recipe()).stored > memory_budget(deployment, batch).free:
    draft = None
  if draft:
    recipe = Recipe(activations=deployment.recipe.activations if deployment.recipe.weights == "fp8" else "bf16", kv="fp8")
    # The draft is not cut over the tensor axes: every device runs it, since it is small.
    seconds += count * bound(decode_step(draft, recipe, lengths[:: mesh.data]), device).step
  gain = speculation.tokens_per_step * now / seconds
  who = f"{draft.name} as draft" if draft else "prompt lookup as draft"
  note = f"{count} tokens drafted a step, {100 * speculation.acceptance:.0f} % of them accepted"
  return Option(f"speculation, {who}", gain, gain, note)


def _draft_model(config: LlamaConfig) -> LlamaConfig | None:
  """A small model with the same vocabulary, where there is one that is much smaller than the model itself."""
  draft = LlamaConfig.from_name(DRAFT_MODEL)
  small = config.num_layers * config.d_model * config.d_ff > 10 * draft.num_layers * draft.d_model * draft.d_ff
  return draft if draft.vocab_size == config.vocab_size and small else None


def _wider_mesh(deployment: Deployment, batch: int, now: float) -> Iterator[Option]:
  device = deployment.device
  if device.name == CPU:
    return
  for tensor in _wider(deployment)[:3]:
    gain = now / decode_times(deployment.cut_over(tensor), batch).step
    link = device.link_bandwidth if tensor <= device.link_devices else device.network_bandwidth
    note = f"joined at {link / 1e9:,.0f} GB/s"
    yield Option(f"tensor={tensor}, {tensor * deployment.mesh.data} devices", gain, gain, note)


def _better_devices(deployment: Deployment, batch: int, now: float) -> list[Option]:
  options = []
  for device in _other_devices(deployment):
    other = deployment.on_device(device)
    if _fits(other, batch):
      gain = now / decode_times(other, batch).step
      options.append(Option(f"{device.title} instead", gain, gain))
  return sorted(options, key=lambda option: -option.total_gain)[:3]


def _fits(deployment: Deployment, batch: int) -> bool:
  return memory_budget(deployment, batch).free >= 0


def _wider(deployment: Deployment) -> list[int]:
  most = MAX_DEVICES // deployment.mesh.data
  return [size for size in possible_tensors(deployment.config) if deployment.mesh.tensor < size <= most]


def _other_devices(deployment: Deployment) -> list[DeviceSpec]:
  return [load_device(name) for name in device_names() if name not in (CPU, deployment.device.name)]
