"""The sizes of a model (`LlamaConfig`). Imports no jax and reads no checkpoint.

A config is validated once, when it is made, from one of these:

    configs/models/NAME.toml          ->  LlamaConfig.from_name, from_toml
    config.json or GGUF metadata      ->  jaxfp8.readers.read_config
    metadata of a jaxfp8 checkpoint   ->  LlamaConfig.from_dict

What is not a Llama that jaxfp8 computes exactly (another architecture, a sliding window, biases, an unknown rope type,
another activation) is refused by name, never run wrongly.
"""

import dataclasses
import difflib
import math
import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxfp8.errors import InputError

ROPE_TYPES = ("default", "linear", "llama3")


def refuse_model(what: str, value: Any) -> InputError:
  """The error for a model that is not a Llama; raised by the readers."""
  return InputError(
    f"config: {what} {value!r} is not a Llama that jaxfp8 computes exactly. Use a LlamaForCausalLM checkpoint without it."
  )


def _require_positive(name: str, value: Any) -> None:
  if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
    raise InputError(f"config: {name} must be a positive number; got {value!r}. Check the model's config.")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding (RoFormer, arXiv 2104.09864); `llama3` is Llama 3.1's frequency scaling."""

  theta: float = 10000.0
  type: str = "default"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_context: int = 8192

  def __post_init__(self):
    if self.type not in ROPE_TYPES:
      raise InputError(
        f"config: rope type must be one of {', '.join(ROPE_TYPES)}; got {self.type!r}. jaxfp8 does not compute this model."
      )
    for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_context"):
      _require_positive(f"rope {name}", getattr(self, name))
    if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
      raise InputError(
        f"config: llama3 rope needs high_freq_factor > low_freq_factor; got {self.high_freq_factor} and "
        f"{self.low_freq_factor}. Check rope_scaling in the checkpoint's config.json."
      )

  def inverse_frequencies(self, head_dim: int) -> np.ndarray:
    """Radians per token of each rotated pair: float32 [head_dim / 2].

    Computed in float32 step by step, since that is what Llama checkpoints were trained and published with.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freq = np.float32(1.0) / np.power(np.float32(self.theta), exponent, dtype=np.float32)
    if self.type == "linear":
      return freq / np.float32(self.factor)
    if self.type == "llama3":
      return self._llama3(freq)
    return freq

  def _llama3(self, freq: np.ndarray) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended (Meta's llama-models `apply_scaling`)."""
    wavelength = np.float32(2 * math.pi) / freq
    low = self.original_max_context / self.low_freq_factor
    high = self.original_max_context / self.high_freq_factor
    scaled = freq / np.float32(self.factor)
    smooth = (self.original_max_context / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
    smooth = smooth.astype(np.float32)
    blended = (1 - smooth) * scaled + smooth * freq
    return np.where(wavelength > low, scaled, np.where(wavelength < high, freq, blended)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """Sizes of one Llama. The letters are the project's alphabet: V D F L N K H (see CONTRIBUTING.md)."""

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

  def __post_init__(self):
    for field in ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_context"):
      value = getattr(self, field)
      if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"config: {field} must be a whole number; got {value!r}. Check the model's config.")
      _require_positive(field, value)
    _require_positive("rms_norm_eps", self.rms_norm_eps)
    if self.num_heads % self.num_kv_heads:
      raise InputError(
        f"config: num_heads must be a multiple of num_kv_heads; got {self.num_heads} and {self.num_kv_heads}. "
        "Check the model's config."
      )
    if self.head_dim % 2:
      raise InputError(f"config: head_dim must be even, since RoPE turns pairs; got {self.head_dim}. Check the model's config.")
    for token in (*self.eos_ids, *(() if self.bos_id is None else (self.bos_id,))):
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
    """The config in configs/models/NAME.toml. Raises InputError, with near names, if there is none."""
    return cls.from_toml(find_config("models", name))

  @classmethod
  def from_toml(cls, path: str | pathlib.Path) -> "LlamaConfig":
    path = pathlib.Path(path)
    return cls.from_dict({"name": path.stem, **read_toml(path)}, where=str(path))

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any], where: str = "the checkpoint's metadata") -> "LlamaConfig":
    """From what `to_dict` gave or a TOML file holds. Raises InputError, naming `where`, on unknown or missing fields."""
    fields = dict(fields)
    try:
      if "eos_ids" in fields:
        fields["eos_ids"] = tuple(fields["eos_ids"])
      return cls(rope=RopeConfig(**fields.pop("rope", {})), **fields)
    except TypeError as error:
      raise InputError(
        f"config: {where} does not hold the fields of a LlamaConfig: {error}. Compare configs/models/tiny.toml."
      ) from error

  def to_dict(self) -> dict[str, Any]:
    """Plain values that JSON keeps; `from_dict` gives the same config back."""
    return {**dataclasses.asdict(self), "eos_ids": list(self.eos_ids)}


def configs_folder() -> pathlib.Path:
  """`configs/` of this installation: inside the package in a wheel, beside it in a checkout."""
  here = pathlib.Path(__file__).parent
  inside = here / "configs"
  return inside if inside.is_dir() else here.parent / "configs"


def find_config(kind: str, name: str) -> pathlib.Path:
  """configs/KIND/NAME.toml; kind is "models" or "devices". Raises InputError with near names."""
  folder = configs_folder() / kind
  names = sorted(path.stem for path in folder.glob("*.toml"))
  if name not in names:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
    raise InputError(f"config: there is no {kind[:-1]} named {name!r}. Near names: {', '.join(near)}.")
  return folder / f"{name}.toml"


def read_toml(path: pathlib.Path) -> dict[str, Any]:
  try:
    with open(path, "rb") as file:
      return tomllib.load(file)
  except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
    raise InputError(f"config: cannot read {path}: {error}. Pass a TOML file or a name from configs/.") from error
