"""`Source`, the interface of every checkpoint reader: tensors in Hugging Face's names and layouts, one at a time.

Opening a source checks everything that can be checked without reading a weight; the arrays that `read` returns are finite.
Refuses to know jax, quantization and the layouts of models: it returns the content of the file, as numpy.
"""

import abc
import os
import pathlib
from collections.abc import Collection, Mapping

import ml_dtypes
import numpy as np

from jaxfp8 import regular_files
from jaxfp8.checkpoint.readers.file_kinds import LFS_POINTER, LFS_TEXT
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.recipe import BLOCK, FLOAT8_MAX

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
HEAD = "lm_head.weight"
_CHUNK_BYTES = 64 << 20  # weights that one search for NaN and Inf covers, so that the temporaries stay small


class Source(abc.ABC):
  """An opened checkpoint. `config` is validated, and every tensor that it needs is there with the right shape.

  Names are Hugging Face's (`model.layers.0.self_attn.q_proj.weight`); linear weights are [out, in]. Bytes stay on
  disk until `read`.
  """

  path: pathlib.Path
  config: LlamaConfig
  dialect: str = "plain"  # the float8 dialect, for messages
  notes: tuple[str, ...] = ()  # sentences about disagreements of config and tensors

  @abc.abstractmethod
  def names(self) -> tuple[str, ...]:
    """The tensors that the config needs, in the order of `expected_tensors`."""

  @abc.abstractmethod
  def dtype(self, name: str) -> np.dtype:
    """The dtype of the array that `read` returns: float32, float16, bfloat16, or float8_e4m3fn for a weight with a scale."""

  @abc.abstractmethod
  def shape(self, name: str) -> tuple[int, ...]: ...

  @abc.abstractmethod
  def read(self, name: str) -> np.ndarray:
    """One tensor, perhaps a read-only view of the file. Raises InputError, naming the tensor, for NaN and Inf."""

  def granularity(self, name: str) -> str | None:
    """The weights that share one float8 scale: "tensor", "channel" or "block128"; None for a weight that is not float8."""
    return None

  def read_scale(self, name: str) -> np.ndarray:
    """The scale of a float8 weight [out, in], float32: [out] (also for "tensor") or [ceil(out / 128), ceil(in / 128)]."""
    raise KeyError(name)

  def static_scales(self) -> tuple[str, ...]:
    """Names of the static scales: MODULE.input_scale, and MODULE.k_scale and v_scale of `self_attn` modules."""
    return ()

  def read_static(self, name: str) -> np.ndarray:
    """float32: [] for an input, [K] for keys and values. Raises InputError unless it is positive and finite."""
    raise KeyError(name)

  @property
  @abc.abstractmethod
  def tokenizer(self) -> TokenizerFiles:
    """Read at the first access and kept. Raises InputError for a checkpoint without a tokenizer."""
    ...

  def find_tokenizer(self) -> TokenizerFiles | None:
    """The tokenizer, or None for a checkpoint without one: its weights are still worth loading."""
    try:
      return self.tokenizer
    except InputError:
      return None

  @abc.abstractmethod
  def files(self) -> list[pathlib.Path]:
    """The files whose content determines weights, config and tokenizer."""


def expected_tensors(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
  """Name and shape of each tensor of a Llama, in the order of the computation."""
  D, F, H = config.d_model, config.d_ff, config.head_dim
  heads, kv_heads = config.num_heads * H, config.num_kv_heads * H
  shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, D)}
  for layer in range(config.num_layers):
    prefix = f"model.layers.{layer}."
    shapes |= {
      prefix + "input_layernorm.weight": (D,),
      prefix + "self_attn.q_proj.weight": (heads, D),
      prefix + "self_attn.k_proj.weight": (kv_heads, D),
      prefix + "self_attn.v_proj.weight": (kv_heads, D),
      prefix + "self_attn.o_proj.weight": (D, heads),
      prefix + "post_attention_layernorm.weight": (D,),
      prefix + "mlp.gate_proj.weight": (F, D),
      prefix + "mlp.up_proj.weight": (F, D),
      prefix + "mlp.down_proj.weight": (D, F),
    }
  shapes["model.norm.weight"] = (D,)
  if not config.tied_embeddings:
    shapes[HEAD] = (config.vocab_size, D)
  return shapes


def check_tensors(
  path: pathlib.Path,
  config: LlamaConfig,
  shapes: Mapping[str, tuple[int, ...]],
  dtypes: Mapping[str, np.dtype | str],
  quantized: Collection[str] = (),
  *,
  way_out: str = "Use the config that belongs to these weights.",
) -> None:
  """Raises InputError unless `shapes` are exactly the tensors of `config`, in dtypes that jaxfp8 reads.

  A head beside tied embeddings is allowed and ignored.

  dtypes: by tensor; the file's own name for a dtype that is not one of `DTYPES`. quantized: weights that may be float8.
  way_out: where config and tensors contradict each other.
  """
  if config.num_layers > len(shapes):  # before a list as long as num_layers is made: a damaged config may say a billion
    raise InputError(
      f"readers: the config says num_layers={config.num_layers}, and {path} holds {len(shapes)} tensors. {way_out}"
    )
  expected = expected_tensors(config)
  missing = [name for name in expected if name not in shapes]
  if missing == [HEAD]:
    raise InputError(
      f"readers: the config says that embeddings are not tied, so {path} must hold {HEAD}; it is absent. "
      "Set tie_word_embeddings in config.json, or fetch the missing shard."
    )
  if missing:
    prefixed = next((name for name in shapes if name.endswith(f".{missing[0]}")), None)
    if prefixed:
      raise InputError(
        f"readers: {path} must hold {missing[0]}; got {prefixed}, and tensors without that prefix. "
        "Save the Llama alone again (save_pretrained of the inner model)."
      )
    raise InputError(f"readers: {path} must hold {some_of(missing)}; absent. Fetch the whole checkpoint again.")
  unknown = [name for name in shapes if name not in expected and name != HEAD]
  if unknown:
    raise InputError(
      f"readers: {path} holds {some_of(unknown)}, which no Llama of jaxfp8 uses. "
      "Pass a plain LlamaForCausalLM: no biases, no experts, no adapters."
    )
  for name, shape in expected.items():
    if tuple(shapes[name]) != shape:
      raise InputError(
        f"readers: {name} in {path} must have shape {list(shape)} by the config; got {list(shapes[name])}. {way_out}"
      )
    if dtypes[name] not in DTYPES and name not in quantized:
      raise InputError(
        f"readers: {name} in {path} must be float32, float16 or bfloat16; got {dtypes[name]}. Convert it to bfloat16 first."
      )


def check_finite(name: str, array: np.ndarray, path: pathlib.Path, way_out: str = "Fetch the checkpoint again.") -> None:
  """Raises InputError naming the tensor and the first bad index."""
  rows = max(1, _CHUNK_BYTES // max(1, array[:1].nbytes))
  for start in range(0, array.shape[0], rows):
    bad = _not_finite(array[start : start + rows])
    if bad.any():
      index = [int(i) for i in np.argwhere(bad)[0]]
      index[0] += start
      raise InputError(f"readers: weights must be finite; {name} in {path} is {array[tuple(index)]} at {index}. {way_out}")


def expand_scale(name: str, scale: np.ndarray, shape: tuple[int, ...], granularity: str, path: pathlib.Path) -> np.ndarray:
  """A scale as `Source.read_scale` promises it. Raises InputError if it is negative, or 448 times it is not finite."""
  good = (scale >= 0) & (scale <= np.finfo(np.float32).max / FLOAT8_MAX)
  if not good.all():
    raise InputError(
      f"readers: scales must be finite and not negative, and 448 times a scale must be finite; {name} in {path} holds "
      f"{scale[~good].flat[0]}. Fetch the checkpoint again."
    )
  if granularity == "tensor":
    return np.full(shape[:1], scale.reshape(()), np.float32)
  if granularity == "channel":
    return scale.reshape(-1)
  return scale.reshape(-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))


def check_zero_scales(name: str, weight: np.ndarray, scale: np.ndarray, path: pathlib.Path) -> None:
  """Raises InputError, naming the index, if a float8 weight [out, in] that is not zero has the scale zero.

  Such a weight would become zero. Zeros may have any scale. `scale` is as `Source.read_scale` promises it.
  """
  for index in map(tuple, np.argwhere(scale == 0)):
    start = [part * (1 if scale.ndim == 1 else BLOCK) for part in index]
    size = (1, weight.shape[1]) if scale.ndim == 1 else (BLOCK, BLOCK)
    row, column = (*start, 0)[:2]
    bad = np.argwhere(weight[row : row + size[0], column : column + size[1]].view(np.uint8) & 0x7F)
    if len(bad):
      at = [int(row + bad[0][0]), int(column + bad[0][1])]
      raise InputError(
        f"readers: a weight that is not zero needs a scale that is not zero; {name} in {path} is {weight[tuple(at)]} at {at}, "
        f"and its scale at {[int(part) for part in index]} is 0. Fetch the checkpoint again."
      )


def _not_finite(array: np.ndarray) -> np.ndarray:
  """NaN and Inf have an exponent of ones; on the bits, since ml_dtypes has no fast isfinite. float8_e4m3fn has no Inf."""
  if array.dtype == FLOAT8:
    return (array.view(np.uint8) & 0x7F) == 0x7F
  if array.dtype == np.float32:
    return ~np.isfinite(array)
  mask = np.uint16(0x7C00 if array.dtype == np.float16 else 0x7F80)
  return (array.view(np.uint16) & mask) == mask


def some_of(names: Collection[str]) -> str:
  """The first three, and how many more."""
  names = list(names)
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_text(path: pathlib.Path, max_bytes: int = regular_files.TEXT_BYTES) -> str:
  """The text of a file of a model's folder, without a byte-order mark.

  Raises InputError for a file that is not regular, that a link leads to out of the folder, or that is too large.
  """
  try:  # without the mark that some editors put first
    text = regular_files.read_text(path, max_bytes, within=path.parent, encoding="utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    raise InputError(f"readers: cannot read {path}: {reason}. Fetch the file again.") from error
  if text.startswith(LFS_TEXT):
    raise InputError(f"readers: cannot read {path}: {LFS_POINTER.sentence}")
  return text
