"""One model in one recipe on one mesh of devices: does it fit, how many sequences, how fast at most. Imports no jax.

A `Deployment` is the question; every function here answers one part of it for one batch. Memory is per device. A batch is
counted over the whole deployment and dealt out over the mesh's data axis.
"""

import dataclasses
import math

from jaxfp8.config import LlamaConfig
from jaxfp8.mesh import MeshShape
from jaxfp8.planning.devices import DeviceSpec
from jaxfp8.planning.roofline import (
  PREFILL_CHUNK,
  StepTimes,
  bound,
  decode_step,
  kv_bytes_per_token,
  prefill_step,
)
from jaxfp8.planning.weight_bytes import weight_bytes
from jaxfp8.recipe import DEFAULT_PAGE_SIZE, LayerFormat, Recipe

RESERVE_FRACTION = 0.03  # of the device's memory: fragmentation, and what an estimate of the temporaries may miss
LOGIT_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Deployment:
  """context: tokens that every sequence holds at the operating point; prompt: tokens of it that are prefilled.

  compiled_temporaries: bytes that the compiled programs say they need; None: estimated. Only true of this very deployment.
  formats: of the layers of a checkpoint that mixes formats; None: the recipe's weights in all of them.
  """

  config: LlamaConfig
  recipe: Recipe
  device: DeviceSpec
  mesh: MeshShape
  context: int
  prompt: int
  page_tokens: int = DEFAULT_PAGE_SIZE
  compiled_temporaries: int | None = None
  formats: tuple[LayerFormat, ...] | None = None

  def with_recipe(self, **changes: str) -> "Deployment":
    """The same with other numbers; activations in fp8 give way to bf16 where the weights no longer are fp8."""
    recipe = {**dataclasses.asdict(self.recipe), **changes}
    recipe["activations"] = resolve_activations("auto", recipe["weights"], self.device)
    formats = self.formats if recipe["weights"] == self.recipe.weights else None
    return dataclasses.replace(self, recipe=Recipe(**recipe), compiled_temporaries=None, formats=formats)

  def on_device(self, device: DeviceSpec) -> "Deployment":
    return dataclasses.replace(self, device=device).with_recipe()

  def cut_over(self, tensor: int) -> "Deployment":
    mesh = MeshShape.for_model(self.config, tensor, self.mesh.data)
    return dataclasses.replace(self, mesh=mesh, compiled_temporaries=None)


def resolve_activations(activations: str, weights: str, device: DeviceSpec) -> str:
  """What "auto" means: fp8 where the weights are fp8 and the device multiplies fp8, else what the weights are (bf16, f32)."""
  if activations != "auto":
    return activations
  if weights == "fp8":
    return "fp8" if device.fp8_flops else "bf16"
  return weights


@dataclasses.dataclass(frozen=True)
class MemoryBudget:
  """Bytes of one device's memory. kv is what the batch's pages take; free is what stays, negative when it does not fit."""

  total: int
  system: int
  runtime: int
  reserve: int
  temporaries: int
  weights: int
  kv: int

  @property
  def free(self) -> int:
    return self.total - self.system - self.runtime - self.reserve - self.temporaries - self.weights - self.kv


def memory_budget(deployment: Deployment, batch: int) -> MemoryBudget:
  """Memory per device with `batch` sequences of deployment.context tokens, KV rounded up to whole pages."""
  device = deployment.device
  sequences = -(-batch // deployment.mesh.data)
  return MemoryBudget(
    total=device.memory_bytes,
    system=device.system_bytes,
    runtime=device.runtime_bytes,
    reserve=int(RESERVE_FRACTION * device.memory_bytes),
    temporaries=_temporaries(deployment),
    weights=weight_bytes(deployment.config, deployment.recipe, deployment.mesh, deployment.formats).stored,
    kv=sequences * _pages(deployment, deployment.context) * _page_bytes(deployment),
  )


def max_kv_pages(deployment: Deployment) -> int:
  """KV pages that one device can hold beside everything else (so many per copy of the model)."""
  empty = memory_budget(deployment, 0)
  return max(0, empty.free) // _page_bytes(deployment)


def max_sequences(deployment: Deployment, context: int | None = None) -> int:
  """How many sequences of `context` tokens (deployment.context when None) fit, over the whole deployment."""
  return deployment.mesh.data * (max_kv_pages(deployment) // _pages(deployment, context or deployment.context))


def max_context(deployment: Deployment, batch: int) -> int:
  """The longest context that `batch` sequences can all have, in whole pages and at most the model's own."""
  pages = max_kv_pages(deployment) // -(-batch // deployment.mesh.data)
  return min(pages * deployment.page_tokens, deployment.config.max_context)


def decode_times(deployment: Deployment, batch: int, context: int | None = None) -> StepTimes:
  """Floors of one decode step of `batch` sequences that hold `context` tokens each (deployment.context when None)."""
  lengths = [context or deployment.context] * batch
  cost = decode_step(deployment.config, deployment.recipe, lengths, deployment.mesh, formats=deployment.formats)
  return bound(cost, deployment.device)


def prefill_times(deployment: Deployment, batch: int) -> StepTimes:
  """Floors of prefilling `batch` prompts that arrive together."""
  sizes = {"num_sequences": batch, "mesh": deployment.mesh, "formats": deployment.formats}
  return bound(prefill_step(deployment.config, deployment.recipe, deployment.prompt, **sizes), deployment.device)


def compute_bound_batch(deployment: Deployment, context: int) -> int | None:
  """The smallest batch whose decode step is limited by FLOPs and no longer by memory; None when no batch is, since the
  KV cache of every further sequence takes longer to read than its arithmetic."""
  mesh = deployment.mesh

  def excess(batch: int) -> float:
    times = decode_times(deployment, batch * mesh.data, context)
    return times.flops - times.weights - times.kv

  if excess(1) >= 0:
    return mesh.data
  slope = excess(2) - excess(1)  # both sides grow linearly with the batch
  if slope <= 0:
    return None
  return math.ceil(1 - excess(1) / slope) * mesh.data


def _pages(deployment: Deployment, context: int) -> int:
  return -(-context // deployment.page_tokens)


def _page_bytes(deployment: Deployment) -> int:
  return deployment.page_tokens * kv_bytes_per_token(deployment.config, deployment.recipe, deployment.mesh)


def _temporaries(deployment: Deployment) -> int:
  """What the compiled programs say, or an estimate: the widest live arrays of one prefill step (stream, q, k, v and
  attention's output, gate, up and their product), and float32 logits of LOGIT_ROWS sequences."""
  if deployment.compiled_temporaries is not None:
    return deployment.compiled_temporaries
  config, tensor = deployment.config, deployment.mesh.tensor
  heads = (config.num_heads // tensor * 2 + config.num_kv_heads // deployment.mesh.kv * 2) * config.head_dim
  per_token = 4 * config.d_model + heads + 3 * -(-config.d_ff // tensor)
  logits = 4 * -(-config.vocab_size // tensor) * LOGIT_ROWS
  return PREFILL_CHUNK * per_token * deployment.recipe.stream.dtype.itemsize + logits
