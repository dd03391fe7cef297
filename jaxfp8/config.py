"""The sizes of a model (`LlamaConfig`). Imports no jax and reads no checkpoint.

A config is validated once, when it is made, from one of these:

    configs/models/NAME.toml          ->  LlamaConfig.from_name, from_toml
    config.json or GGUF metadata      ->  jaxfp8.checkpoint.readers.read_config
    metadata of a jaxfp8 checkpoint   ->  LlamaConfig.from_dict

A model that jaxfp8 does not compute exactly (another architecture, a sliding window, biases, an unknown rope type, another
activation) is refused by name and never run wrongly.
"""

import dataclasses
import difflib
import math
import pathlib
import sys
import tomllib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxfp8 import regular_files
from jaxfp8.errors import InputError, shown

ROPE_TYPES = ("default", "linear", "llama3")  # the types that a file names; "divisors" is the fourth type of RopeConfig


def _require_positive(name: str, value: Any) -> None:
  if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
    raise InputError(f"config: {name} must be a positive number; got {shown(value)}. Check the model's config.")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding (RoFormer, arXiv 2104.09864); `llama3` is Llama 3.1's frequency scaling.

  divisors: for the type "divisors", the number that divides each pair's frequency, [head_dim / 2]. A GGUF file stores them
    (`rope_freqs.weight`), and not the formula that gave them. Empty for the other types.

  Raises InputError for an unknown type, and for numbers that are not positive or not in order.
  """

  theta: float = 10000.0
  type: str = "default"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_context: int = 8192
  divisors: tuple[float, ...] = ()

  def __post_init__(self):
    if self.type not in (*ROPE_TYPES, "divisors"):
      raise InputError(
        f"config: rope type must be one of {', '.join(ROPE_TYPES)}; got {shown(self.type)}. jaxfp8 does not compute this model."
      )
    object.__setattr__(self, "divisors", tuple(self.divisors))
    if (self.type == "divisors") != bool(self.divisors):
      raise InputError(
        f"config: rope divisors belong to the rope type 'divisors' and to no other; got type {shown(self.type)} and "
        f"{len(self.divisors)} divisors. Check the model's config."
      )
    for divisor in self.divisors:
      _require_positive("every rope divisor", divisor)
    for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_context"):
      _require_positive(f"rope {name}", getattr(self, name))
    if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
      raise InputError(
        f"config: llama3 rope needs high_freq_factor > low_freq_factor; got {self.high_freq_factor} and "
        f"{self.low_freq_factor}. Check rope_scaling in the checkpoint's config.json."
      )

  def inverse_frequencies(self, head_dim: int) -> np.ndarray:
    """Radians per token of each rotated pair: float32 [head_dim / 2].

    Every step is in float32, as in the code that trained and published Llama checkpoints.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freq = np.float32(1.0) / np.power(np.float32(self.theta), exponent, dtype=np.float32)
    if self.type == "linear":
      return freq / np.float32(self.factor)
    if self.type == "divisors":
      return freq / np.array(self.divisors, np.float32)
    if self.type == "llama3":
      return self._llama3(freq)
    return freq

  def _llama3(self, freq: np.ndarray) -> np.ndarray:
    """Divides the frequencies of long wavelengths by `factor`, keeps those of short ones, and blends between the two.

    Source: `apply_scaling` in Meta's llama-models.
    """
    wavelength = np.float32(2 * math.pi) / freq
    low = self.original_max_context / self.low_freq_factor
    high = self.original_max_context / self.high_freq_factor
    scaled = freq / np.float32(self.factor)
    smooth = (self.original_max_context / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
    smooth = smooth.astype(np.float32)
    blended = (1 - smooth) * scaled + smooth * freq
    return np.where(wavelength > low, scaled, np.where(wavelength < high, freq, blended)).astype(np.float32)


# Larger numbers come from damaged files, and would fill memory. A context is a promise that takes none.
_MAX_SIZE, _MAX_LAYERS, _MAX_CONTEXT = 1 << 31, 1 << 16, 1 << 53


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """Sizes of one Llama. The letters are the project's alphabet: V D F L N K H (see docs/architecture.md).

  Raises InputError, naming the field, for sizes that are not positive whole numbers or do not fit together.
  """

  vocab_size: int  # V
  d_model: int  # D
  d_ff: int  # F
  num_layers: int  # L
  num_heads: int  # N
  num_kv_heads: int  # K
  head_dim: int  # H, which may differ from D / N
  max_context: int
  rms_norm_eps: float = 1e-5
  rope: RopeConfig = RopeConfig()
  tied_embeddings: bool = False
  bos_id: int | None = None
  eos_ids: tuple[int, ...] = ()
  name: str = "llama"
  activation_scale_ub: float | None = None  # FBGEMM's name: larger activations do not raise a token's dynamic float8 scale

  def __post_init__(self):
    for field in ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_context"):
      value = getattr(self, field)
      if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"config: {field} must be a whole number; got {shown(value)}. Check the model's config.")
      _require_positive(field, value)
      if value > (most := {"num_layers": _MAX_LAYERS, "max_context": _MAX_CONTEXT}.get(field, _MAX_SIZE)):
        raise InputError(f"config: {field} must be at most {most:,}; got {value:,}. Check the model's config.")
    _require_positive("rms_norm_eps", self.rms_norm_eps)
    if self.activation_scale_ub is not None:
      _require_positive("activation_scale_ub", self.activation_scale_ub)
    if self.num_heads % self.num_kv_heads:
      raise InputError(
        f"config: num_heads must be a multiple of num_kv_heads; got {self.num_heads} and {self.num_kv_heads}. "
        "Check the model's config."
      )
    if self.head_dim % 2:
      raise InputError(f"config: head_dim must be even, since RoPE turns pairs; got {self.head_dim}. Check the model's config.")
    if self.rope.divisors and len(self.rope.divisors) != self.head_dim // 2:
      raise InputError(
        f"config: rope divisors must be one a pair, {self.head_dim // 2} for heads of {self.head_dim}; "
        f"got {len(self.rope.divisors)}. Check the model's config."
      )
    for field, kind in (("name", str), ("tied_embeddings", bool)):
      if not isinstance(value := getattr(self, field), kind):
        raise InputError(f"config: {field} must be a {kind.__name__}; got {value!r}. Check the model's config.")
    for token in (*self.eos_ids, *(() if self.bos_id is None else (self.bos_id,))):
      if not isinstance(token, int) or isinstance(token, bool):
        raise InputError(f"config: special tokens must be whole numbers; got {token!r}. Check the model's config.")
      if not 0 <= token < self.vocab_size:
        raise InputError(
          f"config: special tokens must be below vocab_size {self.vocab_size}; got {token}. Check the model's config."
        )

  @property
  def group_size(self) -> int:
    """G: query heads per KV head."""
    return self.num_heads // self.num_kv_heads

  @classmethod
  def from_name(cls, name: str) -> "LlamaConfig":
    """The config in configs/models/NAME.toml. Raises InputError, with similar names, if there is no such file."""
    return cls.from_toml(find_config("models", name))

  @classmethod
  def from_toml(cls, path: str | pathlib.Path) -> "LlamaConfig":
    """The config in a TOML file. Raises InputError, naming the file, if it cannot be read or holds another set of fields."""
    path = pathlib.Path(path)
    return cls.from_dict({"name": path.stem, **read_toml(path)}, source=str(path))

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any], source: str = "the checkpoint's metadata") -> "LlamaConfig":
    """The config from the fields that `to_dict` returns or a TOML file holds.

    source: the file, for messages. Raises InputError, naming the source, for unknown and for missing fields.
    """
    fields = dict(fields)
    try:
      if "eos_ids" in fields:
        fields["eos_ids"] = tuple(fields["eos_ids"])
      return cls(rope=RopeConfig(**fields.pop("rope", {})), **fields)
    except TypeError as error:
      raise InputError(
        f"config: {source} does not hold the fields of a LlamaConfig: {error}. Compare configs/models/tiny.toml."
      ) from error

  def to_dict(self) -> dict[str, Any]:
    """Plain values for JSON; `from_dict` returns an equal config. A bound of activations is left out if there is none."""
    fields = {**dataclasses.asdict(self), "eos_ids": list(self.eos_ids)}
    if self.activation_scale_ub is None:
      del fields["activation_scale_ub"]
    divisors = fields["rope"].pop("divisors")  # only where they are: versions before them read all other manifests
    if divisors:
      fields["rope"]["divisors"] = list(divisors)
    return fields


def configs_folder() -> pathlib.Path:
  """The folder `configs/` of this installation: in the package for a wheel, beside the package in a checkout."""
  here = pathlib.Path(__file__).parent
  inside = here / "configs"
  return inside if inside.is_dir() else here.parent / "configs"


def find_config(kind: str, name: str) -> pathlib.Path:
  """The path configs/KIND/NAME.toml; kind is "models" or "devices". Raises InputError, with similar names, if absent."""
  folder = configs_folder() / kind
  names = sorted(path.stem for path in folder.glob("*.toml"))
  if name not in names:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
    raise InputError(f"config: there is no {kind[:-1]} named {shown(name)}. Near names: {', '.join(near)}.")
  return folder / f"{name}.toml"


def read_toml(path: pathlib.Path) -> dict[str, Any]:
  """The content of a TOML file. Raises InputError, naming the file, if it cannot be read."""
  try:
    return tomllib.loads(regular_files.read_text(path))
  except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
    reason = (isinstance(error, OSError) and error.strerror) or error
    raise InputError(f"config: cannot read {path}: {reason}. Pass a TOML file or a name from configs/.") from error
