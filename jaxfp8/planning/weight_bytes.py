"""Bytes of a model's weights on one device of a mesh: merged, padded, replicated, with float32 scales. Imports no jax.

LlamaConfig, Recipe, MeshShape, formats -> weight_bytes        the bytes of each matrix
                                        -> local_matrices      a device's part of each matrix of a layer
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.mesh import ONE_DEVICE, MeshShape, Padded
from jaxfp8.recipe import BLOCK, LayerFormat, MatrixFormat, Precision, Recipe

SCALE_BYTES = 4


@dataclasses.dataclass(frozen=True)
class WeightBytes:
  """Bytes of the weights on one device. `scales` are those of all linear layers; `embedding` is 0 when it is tied to `head`."""

  qkv: int
  o: int
  gate_up: int
  down: int
  scales: int
  norms: int
  embedding: int
  head: int

  @property
  def matrices(self) -> int:
    """The linear layers' matrices and the head, without scales: what literature calls the bytes of a token."""
    return self.qkv + self.o + self.gate_up + self.down + self.head

  @property
  def streamed(self) -> int:
    """What every step reads whole: all but the embedding, of which it reads one row a token."""
    return self.matrices + self.scales + self.norms

  @property
  def stored(self) -> int:
    return self.streamed + self.embedding


Formats = Sequence[LayerFormat] | None  # one for each layer; None: the recipe's weights in all of them


def weight_bytes(config: LlamaConfig, recipe: Recipe, mesh: MeshShape = ONE_DEVICE, formats: Formats = None) -> WeightBytes:
  """Bytes of the arrays that one device of the mesh holds, with padding, replication and scales."""
  totals: Counter[str] = Counter()
  for layer_format, count in count_formats(config, recipe, formats):
    size = local_sizes(config, recipe, mesh, layer_format)
    for matrix in local_matrices(config, recipe, size, layer_format):
      totals[matrix.merged] += count * matrix.rows * matrix.columns * matrix.format.dtype.itemsize
      totals["scales"] += count * matrix.num_scales * SCALE_BYTES
  vocab = Padded.of(config, recipe, mesh).vocab_size // mesh.tensor * config.d_model * recipe.stream.dtype.itemsize
  return WeightBytes(
    qkv=totals["qkv"],
    o=totals["o"],
    gate_up=totals["gate_up"],
    down=totals["down"],
    scales=totals["scales"],
    norms=(2 * config.num_layers + 1) * config.d_model * Precision.F32.dtype.itemsize,
    embedding=0 if config.tied_embeddings else vocab,
    head=vocab,
  )


def count_formats(config: LlamaConfig, recipe: Recipe, formats: Formats) -> list[tuple[LayerFormat, int]]:
  """(format, how many layers have it)."""
  return list(Counter(formats).items()) if formats else [(LayerFormat.uniform(recipe.weights), config.num_layers)]


@dataclasses.dataclass(frozen=True)
class LocalSizes:
  query_rows: int
  kv_rows: int  # of the keys, and of the values
  attention: int  # N * H on this device
  d_ff: int


def local_sizes(config: LlamaConfig, recipe: Recipe, mesh: MeshShape, layer_format: LayerFormat) -> LocalSizes:
  tensor = mesh.tensor
  attention = config.num_heads // tensor * config.head_dim
  if layer_format.matrices("o")[0].has_block_scales(recipe) and tensor > 1 and attention % BLOCK:
    raise InputError(
      f"roofline: block128 scales need whole blocks of {BLOCK} columns on each device; tensor={tensor} leaves {attention} of "
      f"{config.name}'s heads. Pass another --tensor or --granularity=channel."
    )
  kv_heads, padded = config.num_kv_heads // mesh.kv, Padded.of(config, recipe, mesh, layer_format)
  return LocalSizes(
    query_rows=kv_heads * (config.group_size // mesh.group) * config.head_dim,
    kv_rows=kv_heads * config.head_dim,
    attention=attention,
    d_ff=padded.d_ff // tensor,
  )


class Matrix(NamedTuple):
  """A device's part of a stored matrix."""

  merged: str
  format: MatrixFormat
  rows: int
  columns: int
  num_scales: int


def local_matrices(config: LlamaConfig, recipe: Recipe, size: LocalSizes, layer_format: LayerFormat) -> Iterator[Matrix]:
  """The matrices of a layer on one device."""
  D, H = config.d_model, config.head_dim
  shapes = {  # rows, columns, and the rows that blocks lie in: a head or a model may be narrower than a block
    "qkv": ((size.query_rows, D, H), (size.kv_rows, D, H), (size.kv_rows, D, H)),
    "o": ((D, size.attention, D),),
    "gate_up": ((size.d_ff, D, size.d_ff), (size.d_ff, D, size.d_ff)),
    "down": ((D, size.d_ff, D),),
  }
  for merged, matrices in shapes.items():
    for (rows, columns, run), matrix in zip(matrices, layer_format.matrices(merged), strict=True):
      scales = 0
      if matrix.has_block_scales(recipe):
        scales = rows // math.gcd(BLOCK, run) * -(-columns // BLOCK)
      elif matrix.is_float8:  # one a row; a scale per tensor is stored once a row, too
        scales = rows
      yield Matrix(merged, matrix, rows, columns, scales)
