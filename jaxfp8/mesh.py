"""The number of devices along each axis of the mesh. Imports no jax, so that planner and programs cut a model by one rule."""

import dataclasses
import math

from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.recipe import BLOCK, LayerFormat, Recipe


@dataclasses.dataclass(frozen=True)
class MeshShape:
  """Devices along each axis. The model is copied over data; each copy is cut over kv and group (their product is `tensor`)."""

  data: int = 1
  kv: int = 1
  group: int = 1

  @property
  def tensor(self) -> int:
    """Devices that hold one copy of the model."""
    return self.kv * self.group

  @property
  def num_devices(self) -> int:
    return self.data * self.tensor

  @classmethod
  def for_model(cls, config: LlamaConfig, tensor: int = 1, data: int = 1) -> "MeshShape":
    """Splits `tensor` into (kv, group): kv as large as the KV heads allow; group cuts the query heads of a KV head.

    Raises InputError if tensor or data is not positive, or if group does not divide G; the message lists the possible sizes.
    """
    for name, value in (("tensor", tensor), ("data", data)):
      if value < 1:
        raise InputError(f"mesh: {name} must be at least 1; got {value}.")
    kv = math.gcd(tensor, config.num_kv_heads)
    if config.group_size % (tensor // kv):
      raise InputError(
        f"mesh: tensor={tensor} cannot cut the {config.num_heads} query and {config.num_kv_heads} KV heads of {config.name}; "
        f"possible are {', '.join(map(str, possible_tensors(config)))}."
      )
    return cls(data=data, kv=kv, group=tensor // kv)


ONE_DEVICE = MeshShape()


def possible_tensors(config: LlamaConfig) -> tuple[int, ...]:
  """Every size of `tensor` that cuts this model's heads evenly, smallest first."""
  sizes = range(1, config.num_heads + 1)
  return tuple(size for size in sizes if config.group_size % (size // math.gcd(size, config.num_kv_heads)) == 0)


@dataclasses.dataclass(frozen=True)
class Padded:
  """Sizes that are padded with rows of zeros for a mesh and a recipe. Results never contain the padding."""

  vocab_size: int
  d_ff: int

  @classmethod
  def of(cls, config: LlamaConfig, recipe: Recipe, shape: MeshShape, layer_format: LayerFormat | None = None) -> "Padded":
    """d_ff is that of a layer in `layer_format`; None: in the recipe's weights."""
    mlp = (*layer_format.matrices("gate_up"), *layer_format.matrices("down")) if layer_format else ()
    has_blocks = recipe.has_block_scales or any(matrix.has_block_scales(recipe) for matrix in mlp)
    unit = shape.tensor * (BLOCK if has_blocks else 1)
    return cls(round_up(config.vocab_size, shape.tensor), round_up(config.d_ff, unit))


def round_up(value: int, unit: int) -> int:
  """The least multiple of `unit` that is at least `value`."""
  return -(-value // unit) * unit
