"""Which numbers a model is stored and computed in: `Recipe`, `LayerFormat`, `MatrixFormat`, and their constants.

    Recipe("fp8", "channel", "fp8_static", "fp8")   ->  .weights.dtype, .activations.is_static, .kv.dtype, ...

`Precision` is the one table of dtypes. Its members, like those of `Granularity`, are strings: they compare, hash, format and
serialize as the words that flags take and manifests hold. Imports no jax; refuses to know arrays, models and devices.
"""

import dataclasses
import enum
from collections.abc import Iterable, Sequence

import ml_dtypes
import numpy as np

from jaxfp8.errors import InputError, shown

BLOCK = 128  # rows, and columns, of a block of weights that has one scale
FLOAT8_MAX = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)  # 448
PAGE_SIZES = (32, 64, 128)  # tokens in a page of the KV cache
DEFAULT_PAGE_SIZE = 64


class _Word(enum.StrEnum):
  """A string of a fixed set. Its repr is that of the string, as error messages and cache keys show it."""

  def __repr__(self) -> str:
    return repr(self.value)


class Granularity(_Word):
  """The weights that share one float8 scale: the whole matrix, an output channel (a row), or a block of 128 x 128."""

  TENSOR = "tensor"
  CHANNEL = "channel"
  BLOCK128 = "block128"


class Precision(_Word):
  """A number format: float8 e4m3fn (with dynamic or with stored scales), bfloat16 or float32."""

  FP8 = "fp8"
  FP8_STATIC = "fp8_static"
  BF16 = "bf16"
  F32 = "f32"

  @property
  def dtype(self) -> np.dtype:
    """The dtype of arrays in this format, for numpy (with ml_dtypes) and jax alike."""
    return _DTYPES[self]

  @property
  def is_static(self) -> bool:
    """Whether the scales are stored with the weights. Dynamic scales are measured at run time."""
    return self is Precision.FP8_STATIC

  @property
  def dynamic(self) -> "Precision":
    """The format with the same dtype and no stored scales."""
    return Precision.FP8 if self.is_static else self


_DTYPES = {
  Precision.FP8: np.dtype(ml_dtypes.float8_e4m3fn),
  Precision.FP8_STATIC: np.dtype(ml_dtypes.float8_e4m3fn),
  Precision.BF16: np.dtype(ml_dtypes.bfloat16),
  Precision.F32: np.dtype(np.float32),
}
WEIGHT_PRECISIONS = (Precision.FP8, Precision.BF16, Precision.F32)
ACTIVATION_PRECISIONS = tuple(Precision)  # of the inputs of linear layers, and of KV pages


def _member[T: _Word](kind: type[T], allowed: Iterable[T], field: str, value: str) -> T:
  """The member of `kind` that `value` names. Raises InputError, naming `field`, unless it is one of `allowed`."""
  if value not in tuple(allowed):
    raise InputError(f"recipe: {field} must be one of {', '.join(allowed)}; got {shown(value)}.")
  return kind(value)


@dataclasses.dataclass(frozen=True, init=False)
class Recipe:
  """The number formats that a model runs in. Every checkpoint stores its recipe.

  weights: of the linear layers: "fp8" (e4m3fn with float32 scales), "bf16" or "f32". Embedding and head are bf16 in an fp8
    recipe (quantizing the head costs more quality than quantizing all layers).
  granularity: the weights that share one scale: a "tensor", an output "channel" or a "block128" of 128 x 128. A matrix that
    came with other scales keeps these (`LayerFormat`).
  activations: of the inputs of linear layers: "fp8" (dynamic scale per token; beside block scales of weights, per token and 128
    columns), "fp8_static" (one stored scale per matrix, from calibration), "bf16" or "f32".
  kv: of the KV pages: "fp8" (scale per token and head), "fp8_static" (one stored scale per head), "bf16" or "f32".

  Takes strings and holds enums. Raises InputError for other values, and for fp8 activations with weights that are not fp8.
  """

  weights: Precision
  granularity: Granularity
  activations: Precision
  kv: Precision

  def __init__(self, weights: str = "fp8", granularity: str = "channel", activations: str = "bf16", kv: str = "bf16"):
    hold = object.__setattr__  # the class is frozen
    hold(self, "weights", _member(Precision, WEIGHT_PRECISIONS, "weights", weights))
    hold(self, "granularity", _member(Granularity, Granularity, "granularity", granularity))
    hold(self, "activations", _member(Precision, ACTIVATION_PRECISIONS, "activations", activations))
    hold(self, "kv", _member(Precision, ACTIVATION_PRECISIONS, "kv", kv))
    if self.activation_dtype == Precision.FP8 and self.weights != Precision.FP8:
      raise InputError(f"recipe: fp8 activations need fp8 weights; got weights={shown(self.weights)}. Pass --activations=auto.")

  @property
  def activation_dtype(self) -> Precision:
    """The format of `activations`, however they are scaled: fp8, bf16 or f32."""
    return self.activations.dynamic

  @property
  def kv_dtype(self) -> Precision:
    """The format of `kv`, however it is scaled: fp8, bf16 or f32."""
    return self.kv.dynamic

  @property
  def stream(self) -> Precision:
    """The format of the residual stream, embedding and head: f32 if weights or activations are f32, else bf16."""
    return Precision.F32 if Precision.F32 in (self.weights, self.activations) else Precision.BF16

  @property
  def has_block_scales(self) -> bool:
    """Whether the weights are float8 with one scale per block of 128 x 128."""
    return self.weights is Precision.FP8 and self.granularity is Granularity.BLOCK128


class MatrixFormat(_Word):
  """The format of one matrix: float8 with the scales of the recipe ("fp8") or with its own, "bf16" or "f32"."""

  FP8 = "fp8"
  FP8_CHANNEL = "fp8_channel"
  FP8_BLOCK128 = "fp8_block128"
  BF16 = "bf16"
  F32 = "f32"

  @property
  def is_float8(self) -> bool:
    return self in (MatrixFormat.FP8, MatrixFormat.FP8_CHANNEL, MatrixFormat.FP8_BLOCK128)

  @property
  def dtype(self) -> np.dtype:
    """The dtype of the values."""
    return Precision.FP8.dtype if self.is_float8 else Precision(self.value).dtype

  def granularity(self, recipe: Recipe) -> Granularity | None:
    """The weights that share one scale; None for a matrix that is not float8."""
    if self is MatrixFormat.FP8:
      return recipe.granularity
    return {MatrixFormat.FP8_CHANNEL: Granularity.CHANNEL, MatrixFormat.FP8_BLOCK128: Granularity.BLOCK128}.get(self)

  def has_block_scales(self, recipe: Recipe) -> bool:
    return self.granularity(recipe) is Granularity.BLOCK128


_PARTS = {"qkv": 3, "o": 1, "gate_up": 2, "down": 1}  # stored matrices of each merged one


@dataclasses.dataclass(frozen=True, init=False)
class LayerFormat:
  """The formats of one layer's four merged matrices: words of `MatrixFormat`.

  qkv may also be three words, of q, k and v, and gate_up two. If these differ, the matrices are kept apart (`SplitLinear`).
  Takes strings and holds enums; equal words become one word. Raises InputError for other values.
  """

  qkv: MatrixFormat | tuple[MatrixFormat, ...]
  o: MatrixFormat | tuple[MatrixFormat, ...]
  gate_up: MatrixFormat | tuple[MatrixFormat, ...]
  down: MatrixFormat | tuple[MatrixFormat, ...]

  def __init__(self, qkv: str | Sequence[str], o: str | Sequence[str], gate_up: str | Sequence[str], down: str | Sequence[str]):
    for field, value in {"qkv": qkv, "o": o, "gate_up": gate_up, "down": down}.items():
      words = [value] * _PARTS[field] if isinstance(value, str) else list(value)
      if len(words) != _PARTS[field]:
        raise InputError(
          f"recipe: {field} takes one format, or one for each of its {_PARTS[field]} matrices; got {shown(value)}."
        )
      formats = tuple(_member(MatrixFormat, MatrixFormat, f"the format of {field}", word) for word in words)
      object.__setattr__(self, field, formats[0] if len(set(formats)) == 1 else formats)

  @classmethod
  def uniform(cls, weights: str) -> "LayerFormat":
    """All four matrices in one format."""
    return cls(weights, weights, weights, weights)

  def matrices(self, merged: str) -> tuple[MatrixFormat, ...]:
    """The format of each stored matrix of a merged one."""
    value = getattr(self, merged)
    return value if isinstance(value, tuple) else (value,) * _PARTS[merged]

  def is_split(self, merged: str) -> bool:
    """Whether the stored matrices of a merged one are kept apart."""
    return isinstance(getattr(self, merged), tuple)
