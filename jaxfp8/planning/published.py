"""What other systems reached: the rows of configs/published.toml beside our ceiling for the same setup. Imports no jax."""

import dataclasses
import functools
import math

from jaxfp8.config import LlamaConfig, configs_folder, read_toml
from jaxfp8.mesh import MeshShape
from jaxfp8.planning.devices import CPU, load_device
from jaxfp8.planning.roofline import bound, decode_step
from jaxfp8.planning.weight_bytes import weight_bytes
from jaxfp8.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Measurement:
  """A published decode speed. fraction: its share of `ceiling_tok_s`, or the share that the source itself states.

  tok_s and ceiling_tok_s count all sequences of the batch; they are None where the source states only the share.
  """

  who: str
  source: str
  device: str
  tensor: int
  fraction: float
  tok_s: float | None = None
  ceiling_tok_s: float | None = None


@functools.cache
def published_measurements() -> tuple[Measurement, ...]:
  rows = read_toml(configs_folder() / "published.toml")["measurement"]
  return tuple(_measurement(row) for row in rows)


def expected_fractions(device: str, tensor: int) -> tuple[float, float, tuple[Measurement, ...]]:
  """(lowest, highest, the measurements) of the shares of the ceiling that others reach in a like setup: on a CPU those of
  CPUs, else those of GPUs with as many devices a model copy, or with the number nearest to it."""
  alike = [row for row in published_measurements() if row.device and (row.device == CPU) == (device == CPU)]
  if tensor > 1:
    alike = [row for row in alike if row.tensor > 1]
  distance = {row.tensor: abs(math.log2(row.tensor / tensor)) for row in alike}
  rows = tuple(row for row in alike if distance[row.tensor] == min(distance.values()))
  return min(row.fraction for row in rows), max(row.fraction for row in rows), rows


def _measurement(row: dict) -> Measurement:
  tensor = row.get("tensor", 1)
  if "fraction" in row:
    return Measurement(row["who"], row["source"], row.get("device", ""), tensor, row["fraction"])
  config = LlamaConfig.from_name(row["model"])
  if "vocab_size" in row:
    config = dataclasses.replace(config, vocab_size=row["vocab_size"], bos_id=None, eos_ids=())
  ceiling = _ceiling(config, row, tensor)
  return Measurement(row["who"], row["source"], row["device"], tensor, row["tok_s"] / ceiling, row["tok_s"], ceiling)


def _ceiling(config: LlamaConfig, row: dict, tensor: int) -> float:
  """Tokens a second in total: the roofline with the linear layers at `bits` a weight and the head at `head_bits`."""
  wide = row["bits"] > 8
  recipe = Recipe(weights="bf16", activations="bf16") if wide else Recipe(activations="fp8")
  mesh = MeshShape.for_model(config, tensor)
  weights = weight_bytes(config, recipe, mesh)
  linears = weights.matrices - weights.head
  read = linears * row["bits"] / (16 if wide else 8) + weights.head * row.get("head_bits", 16) / 16
  cost = decode_step(config, recipe, [row["context"]] * row.get("batch", 1), mesh)
  cost = dataclasses.replace(cost, weight_read_bytes=int(read))
  return row.get("batch", 1) / bound(cost, load_device(row["device"])).step
