"""How many bytes and FLOPs a step costs on each device of a mesh, and how long that takes at least. Imports no jax.

    LlamaConfig, Recipe, MeshShape -> kv_bytes_per_token                         what is stored (and weight_bytes.py)
                                   -> decode_step, prefill_step -> StepCost      what a step moves and computes
    StepCost, DeviceSpec           -> bound -> StepTimes                         how long that takes at least
                                   -> explain                                    the same in one sentence

Everything is for one device, the busiest of the mesh. Bytes are those of the arrays the program holds (merged, padded,
replicated, with their float32 scales), read once a step. Times are floors: weights and KV share the memory's bandwidth,
FLOPs and launches run beside them, and a layer cannot go on before its all-reduce has ended:

    step = max(weights + KV, FLOPs, launches) + collectives

What activations move is left out: it is small, and a ceiling on speed must not rest on what a better kernel would keep on chip.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.mesh import ONE_DEVICE, MeshShape, Padded
from jaxfp8.planning.devices import DeviceSpec
from jaxfp8.planning.weight_bytes import SCALE_BYTES, Formats, count_formats, local_matrices, local_sizes, weight_bytes
from jaxfp8.recipe import Precision, Recipe
from jaxfp8.units import format_bytes, format_seconds, format_share

PREFILL_CHUNK = 2048  # tokens that one prefill step takes at most
LAUNCHES_PER_LAYER = 12  # what the compiled decode step is held to
LAUNCHES_PER_STEP = 8  # embedding, last norm, head, sampling


def kv_bytes_per_token(config: LlamaConfig, recipe: Recipe, mesh: MeshShape = ONE_DEVICE) -> int:
  """Bytes that one token adds to one device's KV pool, over all layers: K and V, and with fp8 one float32 scale a head each."""
  scales = 2 * SCALE_BYTES if recipe.kv_dtype == "fp8" else 0
  per_head = 2 * config.head_dim * recipe.kv_dtype.dtype.itemsize + scales
  return config.num_layers * (config.num_kv_heads // mesh.kv) * per_head


@dataclasses.dataclass(frozen=True)
class StepCost:
  """What one step costs the busiest device of `mesh`.

  num_tokens: query tokens on that device. flops: by the dtype they are multiplied in. all_reduce_bytes: the sum of the
  payloads of `num_collectives` collectives over the tensor axes; what the wire carries follows from the device's link.
  """

  mesh: MeshShape
  num_tokens: int
  weight_read_bytes: int
  kv_read_bytes: int
  kv_written_bytes: int
  flops: Mapping[str, float]
  all_reduce_bytes: int
  num_collectives: int
  launches: int

  @property
  def memory_bytes(self) -> int:
    """Bytes that cross the device's memory bus."""
    return self.weight_read_bytes + self.kv_read_bytes + self.kv_written_bytes


def decode_step(
  config: LlamaConfig,
  recipe: Recipe,
  lengths: Sequence[int],
  mesh: MeshShape = ONE_DEVICE,
  *,
  query_tokens: int = 1,
  formats: Formats = None,
) -> StepCost:
  """One token for every sequence; lengths: tokens each sequence attends to, the new one included.

  query_tokens > 1 is the step that checks so many tokens a sequence at once, as speculation does. Sequences are dealt
  out over `data`, the longest first; the cost is that of the device that gets most.
  """
  if not lengths or min(lengths) < 1:
    raise InputError(f"roofline: lengths must hold at least one positive length; got {list(lengths)[:4]}.")
  lengths = sorted(lengths, reverse=True)[:: mesh.data]
  rows, read = len(lengths) * query_tokens, sum(lengths)
  counts = {"tokens": rows, "sampled": rows, "kv_read": read, "attended": read * query_tokens, "passes": 1}
  return _step(config, recipe, mesh, formats=formats, **counts)


def prefill_step(
  config: LlamaConfig,
  recipe: Recipe,
  num_tokens: int,
  context: int = 0,
  *,
  num_sequences: int = 1,
  mesh: MeshShape = ONE_DEVICE,
  formats: Formats = None,
) -> StepCost:
  """`num_tokens` new tokens for each of num_sequences sequences that hold `context` tokens already.

  Steps take PREFILL_CHUNK tokens, and each reads the weights again; the head runs once a sequence.
  """
  if num_tokens < 1 or num_sequences < 1 or context < 0:
    raise InputError(
      f"roofline: a prefill needs at least one token and one sequence; got {num_tokens} tokens, "
      f"{num_sequences} sequences, {context} tokens of context."
    )
  sequences = -(-num_sequences // mesh.data)
  ends = [min(end, num_tokens) for end in range(PREFILL_CHUNK, num_tokens + PREFILL_CHUNK, PREFILL_CHUNK)]
  return _step(
    config,
    recipe,
    mesh,
    tokens=sequences * num_tokens,
    sampled=sequences,
    kv_read=sequences * sum(context + end for end in ends),
    attended=sequences * (num_tokens * context + num_tokens * (num_tokens + 1) // 2),
    passes=-(-sequences * num_tokens // PREFILL_CHUNK),
    formats=formats,
  )


@dataclasses.dataclass(frozen=True)
class StepTimes:
  """Floors in seconds, each as if it were alone."""

  weights: float
  kv: float
  flops: float
  collectives: float
  launches: float

  @property
  def step(self) -> float:
    """The shortest time that the whole step can take."""
    return max(self.weights + self.kv, self.flops, self.launches) + self.collectives

  @property
  def bound_by(self) -> str:
    """What costs most of the step: "weights", "kv", "flops", "collectives" or "launches"."""
    beside = {"flops": self.flops, "launches": self.launches}
    memory = self.weights + self.kv
    if memory >= max(beside.values()):
      beside = {"weights": self.weights, "kv": self.kv}
    return max({**beside, "collectives": self.collectives}.items(), key=lambda part: part[1])[0]


def bound(cost: StepCost, device: DeviceSpec) -> StepTimes:
  """The times below which `device` cannot get this step, whatever the program."""
  return StepTimes(
    weights=cost.weight_read_bytes / device.bandwidth,
    kv=(cost.kv_read_bytes + cost.kv_written_bytes) / device.bandwidth,
    flops=sum(amount / device.flops(dtype) for dtype, amount in cost.flops.items()),
    collectives=_collective_seconds(cost, device),
    launches=cost.launches * device.launch_seconds,
  )


BOUND_WORDS = {
  "weights": "reading the weights",
  "kv": "reading the KV cache",
  "flops": "arithmetic",
  "collectives": "the all-reduces between devices",
  "launches": "launching kernels",
}


def explain(cost: StepCost, device: DeviceSpec, seconds: float) -> str:
  """One sentence on a step that took `seconds`: bytes moved, share of the bandwidth, the bound, share of its speed."""
  times = bound(cost, device)
  rate = cost.memory_bytes / seconds
  return (
    f"a step moved {format_bytes(cost.memory_bytes)} in {format_seconds(seconds)}: {format_bytes(rate)}/s, about "
    f"{format_share(rate / device.bandwidth)} of the {format_bytes(device.bandwidth)}/s of {device.name}; "
    f"{BOUND_WORDS[times.bound_by]} bounds it: a step takes at least {format_seconds(times.step)}, "
    f"and {format_share(times.step / seconds)} of that speed was reached."
  )


def _step(
  config: LlamaConfig,
  recipe: Recipe,
  mesh: MeshShape,
  *,
  tokens: int,
  sampled: int,
  kv_read: int,
  attended: int,
  passes: int,
  formats: Formats,
) -> StepCost:
  """tokens: rows through the layers; sampled: rows through the head; kv_read: tokens read from the pool; attended:
  query-key pairs; passes: how often the layers' weights are read."""
  weights = weight_bytes(config, recipe, mesh, formats)
  stream = recipe.stream.dtype.itemsize
  row = config.d_model * stream
  flops = dict.fromkeys(Precision, 0.0)
  for layer_format, count in count_formats(config, recipe, formats):
    size = local_sizes(config, recipe, mesh, layer_format)
    for matrix in local_matrices(config, recipe, size, layer_format):
      inputs = recipe.activation_dtype if matrix.format.is_float8 or recipe.activation_dtype != "fp8" else recipe.stream
      flops[inputs] += 2.0 * matrix.rows * matrix.columns * count * tokens
  heads, vocab = config.num_heads // mesh.tensor, Padded.of(config, recipe, mesh).vocab_size // mesh.tensor
  flops[recipe.kv_dtype] += 4.0 * heads * config.head_dim * config.num_layers * attended  # q times k, and p times v
  flops[recipe.stream] += 2.0 * vocab * config.d_model * sampled
  kv_token = kv_bytes_per_token(config, recipe, mesh)
  cut = mesh.tensor > 1
  return StepCost(
    mesh=mesh,
    num_tokens=tokens,
    weight_read_bytes=passes * (weights.streamed - weights.head) + weights.head + tokens * row,
    kv_read_bytes=kv_read * kv_token,
    kv_written_bytes=tokens * kv_token,
    flops={dtype: amount for dtype, amount in flops.items() if amount},
    # After attention, after the MLP, after the embedding; sampling gathers a few candidates, which only cost latency.
    all_reduce_bytes=(2 * config.num_layers + 1) * tokens * row if cut else 0,
    num_collectives=passes * (2 * config.num_layers + 2) if cut else 0,
    launches=passes * (LAUNCHES_PER_LAYER * config.num_layers + LAUNCHES_PER_STEP),
  )


def _collective_seconds(cost: StepCost, device: DeviceSpec) -> float:
  """All-reduces over the tensor axes: within a host a ring carries 2 (n - 1) / n of the payload each way, a switch that
  adds up (n + 1) / n; between hosts each device carries its share. Both latencies count, since one follows the other."""
  tensor = cost.mesh.tensor
  if tensor == 1:
    return 0.0
  local = min(tensor, device.link_devices)
  hosts = -(-tensor // local)
  seconds = 0.0
  if local > 1:
    factor = 2 * (local - 1) / local
    wire = cost.all_reduce_bytes * (min(factor, (local + 1) / local) if device.link_reduces else factor)
    seconds += wire / device.link_bandwidth + cost.num_collectives * device.link_latency_seconds
  if hosts > 1:
    wire = 2 * (hosts - 1) / hosts * cost.all_reduce_bytes / local
    seconds += wire / device.network_bandwidth + cost.num_collectives * device.network_latency_seconds
  return seconds
