"""Is what I see normal? An observed speed beside the ceiling of the same hardware, in one sentence. Imports no jax."""

import dataclasses

from jaxfp8.planning.deployment import Deployment, decode_times
from jaxfp8.planning.published import expected_fractions
from jaxfp8.planning.roofline import decode_step
from jaxfp8.units import format_rate, format_share

ABOVE = 1.02  # a share above this is no rounding error
WRONG = 0.5  # below this part of what the slowest published system reaches, something is wrong
PCIE_BYTES_PER_SECOND = 32e9  # PCIe 4 x16, one way
SWAP_BYTES_PER_SECOND = 7e9  # a fast NVMe drive
HOST_LAUNCH_SECONDS = 6e-6  # a kernel launched on its own by a framework's host thread: an estimate


@dataclasses.dataclass(frozen=True)
class Verdict:
  """fraction: observed over ceiling_tok_s, the ceiling of the batch with empty caches, which no run can exceed.

  fraction_at_context: observed over the ceiling with the deployment's context in every cache. kind: "above" (impossible
  as described), "hardware" (as fast as published systems), "slow" (slower than those), "wrong".
  """

  observed_tok_s: float
  batch: int
  ceiling_tok_s: float
  fraction: float
  fraction_at_context: float
  kind: str
  sentence: str


def judge(deployment: Deployment, observed_tok_s: float, batch: int) -> Verdict:
  """observed_tok_s: tokens a second of all `batch` sequences together, as servers report it."""
  ceiling = batch / decode_times(deployment, batch, 1).step
  held = batch / decode_times(deployment, batch).step
  fraction, at_context = observed_tok_s / ceiling, observed_tok_s / held
  low, high, _ = expected_fractions(deployment.device.name, deployment.mesh.tensor)
  first = (
    f"{format_observed(observed_tok_s)} tok/s{_batch_words(batch)} is {format_share(fraction)} of the "
    f"{format_rate(ceiling)} tok/s that {_limit(deployment, batch)} allow"
  )
  if format_share(at_context) != format_share(fraction):
    first += f" ({format_share(at_context)} of the {format_rate(held)} with {deployment.context:,} tokens in every cache)"
  usual = f"other systems reach {format_share(low)} to {format_share(high)}"
  if fraction > ABOVE:
    kind, rest = (
      "above",
      (
        "more than this hardware can do as described; look at what was counted: prompt tokens, speculation, a larger batch, "
        "fewer bits a weight, a smaller model"
      ),
    )
  elif at_context >= low * 0.95:
    kind, rest = "hardware", "this is the hardware, not a fault"
  elif at_context >= low * WRONG:
    kind, rest = "slow", f"slower than it should be ({usual}); look at {_causes(deployment, batch)}"
  else:
    kind, rest = "wrong", f"something is wrong ({usual}); look at {_causes(deployment, batch)}"
  return Verdict(observed_tok_s, batch, ceiling, fraction, at_context, kind, f"{first}: {rest}.")


def format_observed(rate: float) -> str:
  """As a person would have typed it: 3.0, 0.4, 52.9, 1,234."""
  if rate >= 1000:
    return f"{rate:,.0f}"
  text = f"{rate:.3g}"
  return text if "." in text or "e" in text or rate >= 100 else f"{text}.0"


def _batch_words(batch: int) -> str:
  return "" if batch == 1 else f" over {batch} sequences"


def _limit(deployment: Deployment, batch: int) -> str:
  device, mesh = deployment.device, deployment.mesh
  times = decode_times(deployment, batch, 1)
  busy = mesh.tensor * min(mesh.data, batch)
  count = f"{busy} times " if busy > 1 else ""
  if times.bound_by in ("weights", "kv"):
    return f"{count}{device.bandwidth / 1e9:,.0f} GB/s"
  if times.bound_by == "flops":
    return f"{count}{device.flops(deployment.recipe.activation_dtype) / 1e12:,.3g} TFLOP/s"
  if times.bound_by == "launches":
    return f"{device.launch_seconds * 1e6:.1f} us a kernel"
  return f"{mesh.tensor} devices joined at {device.link_bandwidth / 1e9:,.0f} GB/s"


def _causes(deployment: Deployment, batch: int) -> str:
  """The usual causes, the likeliest first, each with the speed that it would still allow."""
  device, mesh = deployment.device, deployment.mesh
  causes: list[tuple[str, float | None]] = []
  if deployment.recipe.weights == "fp8":
    causes.append(("weights that are not in FP8", batch / decode_times(deployment.with_recipe(weights="bf16"), batch, 1).step))
    if not device.num_sms:
      causes.append(("FP8 widened in software, since a CPU has no FP8 arithmetic: compare --weights=bf16", None))
  cost = decode_step(deployment.config, deployment.recipe, [1] * batch, mesh, formats=deployment.formats)
  if device.unified_memory:
    causes.append(("weights swapped out to a drive (see vmstat 1)", batch * SWAP_BYTES_PER_SECOND / cost.weight_read_bytes))
    causes.append(("other programs on the same memory bus", None))
  else:
    causes.append(("weights offloaded to the host over PCIe", batch * PCIE_BYTES_PER_SECOND / cost.weight_read_bytes))
  if device.launch_seconds:
    launched = decode_times(deployment, batch, 1).step + cost.launches * HOST_LAUNCH_SECONDS
    causes.append(("every kernel launched by the host instead of one graph a token", batch / launched))
  if mesh.tensor > 1:
    causes.append(("tensor parallelism over PCIe or the host (see nvidia-smi topo -m)", None))
  causes.append(("clocks (see nvidia-smi -q -d CLOCK,PERFORMANCE)" if device.num_sms else "fewer threads than cores", None))
  return "; ".join(cause if allows is None else f"{cause} ({format_rate(allows)} tok/s at most)" for cause, allows in causes)
