"""Exports a checkpoint of jaxfp8 as a compressed-tensors folder, which vLLM and transformers with compressed-tensors load.

    X.weight F8_E4M3 [out, in], X.weight_scale F32    (1,) for one scale per tensor, (out, 1), or (out/128, in/128)
    X.input_scale F32 (1,), self_attn.k_scale, v_scale F32 (1,) or (num_kv_heads, 1, 1)    if the checkpoint has them
    every weight that is not float8 in its own dtype, and its module in `ignore`

Values and scales are the checkpoint's, bit for bit. One shard is in memory at a time. quantization_config says what the
checkpoint's recipe computes: a group for each pair of weight scales and activations, with the names of its modules as targets.
Scales that the recipe does not use are left out.
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxfp8.checkpoint.convert import ReportProgress
from jaxfp8.checkpoint.manifest import require_checkpoint
from jaxfp8.checkpoint.open import Checkpoint
from jaxfp8.checkpoint.stored_arrays import MERGED_MATRICES
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.checkpoint.writer import sync_tree
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.recipe import BLOCK, Precision
from jaxfp8.unfinished import unfinished_folder

_SHARD_BYTES = 2 << 30
_STRATEGIES = {"tensor": "tensor", "channel": "channel", "block128": "block"}


def export_checkpoint(
  folder: Checkpoint | str | os.PathLike, output: str | os.PathLike, progress: ReportProgress | None = None
) -> dict[str, Any]:
  """Writes the new folder `output`, which appears when it is whole; returns its config.json.

  Raises InputError for a damaged checkpoint, an output that exists, or a full disk; nothing is then left behind.
  """
  if isinstance(folder, Checkpoint):
    source = folder
  else:
    require_checkpoint(folder)
    source = Checkpoint(folder)
  output = pathlib.Path(output).absolute()
  if output.exists():
    raise InputError(f"export: {output} exists already. Pass another folder, or remove it first.")
  try:
    with unfinished_folder(output) as temporary:
      config = config_to_hf(source.config) | {"quantization_config": _scheme(source)}
      config["dtype"] = config["torch_dtype"] = {"bf16": "bfloat16", "f32": "float32"}[source.manifest.recipe.stream]
      _write_tensors(source, temporary, progress)
      _write_json(temporary / "config.json", config)
      _write_json(temporary / "generation_config.json", {k: config[k] for k in ("bos_token_id", "eos_token_id")})
      if source.manifest.tokenizer:
        _write_tokenizer(source.manifest.tokenizer, temporary)
      sync_tree(temporary)
  except OSError as error:
    reason = os.strerror(error.errno) if error.errno else str(error)
    raise InputError(
      f"export: cannot write {output}: {reason}. Nothing was left behind; pass another folder or free space."
    ) from error
  return config


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
  """config.json of a LlamaForCausalLM, with the names for RoPE of transformers 4, which transformers 5 reads too.

  Raises InputError for rope divisors that no formula of transformers gives.
  """
  rope = config.rope
  if rope.type == "divisors":
    raise InputError(
      f"export: config.json has no place for the rope divisors of {config.name}, which its GGUF file stores as "
      "rope_freqs.weight and no llama3 scaling gives. Run this checkpoint with jaxfp8, or the GGUF file with llama.cpp."
    )
  scaling: dict[str, Any] = {} if rope.type == "default" else {"rope_type": rope.type, "factor": rope.factor}
  if rope.type == "llama3":
    scaling |= {
      "low_freq_factor": rope.low_freq_factor,
      "high_freq_factor": rope.high_freq_factor,
      "original_max_position_embeddings": rope.original_max_context,
    }
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": config.vocab_size,
    "hidden_size": config.d_model,
    "intermediate_size": config.d_ff,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "max_position_embeddings": config.max_context,
    "rms_norm_eps": config.rms_norm_eps,
    "rope_theta": rope.theta,
    "rope_scaling": scaling or None,
    "tie_word_embeddings": config.tied_embeddings,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": config.bos_id,
    "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids),
  }


def _scheme(source: Checkpoint) -> dict[str, Any]:
  """The quantization_config: one group for each granularity and kind of activations."""
  modules = [name.removesuffix(".weight") for name in source.names() if len(source.shape(name)) == 2]
  groups: dict[tuple[str, str], list[str]] = {}
  plain = ["lm_head"] if source.config.tied_embeddings else []
  for module in modules:
    if kind := source.granularity(f"{module}.weight"):
      groups.setdefault((kind, _activations(source, module)), []).append(module)
    elif module != "model.embed_tokens":  # no Linear
      plain.append(module)
  if any("model.embed_tokens" in names for names in groups.values()):
    raise InputError("export: compressed-tensors has no float8 embeddings. Convert with --keep_bf16=embed_tokens first.")
  if not groups:
    raise InputError(
      f"export: {source.path} holds no float8 weights, and compressed-tensors is for those. Pass a float8 checkpoint."
    )
  if source.config.activation_scale_ub is not None and any(activations == "dynamic" for _, activations in groups):
    raise InputError(
      f"export: {source.path} bounds the scales of its activations (activation_scale_ub "
      f"{source.config.activation_scale_ub:g}, from FBGEMM), and compressed-tensors has no such bound. Convert with "
      "--activations=none to export the weights alone."
    )
  return {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "global_compression_ratio": None,
    "ignore": plain,
    "kv_cache_scheme": _kv_scheme(source),
    "config_groups": {
      f"group_{index}": {
        "targets": ["Linear"] if len(groups) == 1 else names,
        "weights": _weights(kind),
        "input_activations": _inputs(kind, activations),
        "output_activations": None,
      }
      for index, ((kind, activations), names) in enumerate(groups.items())
    },
  }


def _activations(source: Checkpoint, module: str) -> str:
  """How the inputs of a float8 matrix are rounded: "static", "dynamic", or "none" (also for one that is dequantized)."""
  activations = source.manifest.recipe.activations
  if activations.dynamic is not Precision.FP8 or module in source.exceptions:
    return "none"
  return "static" if activations.is_static else "dynamic"


def _arguments(strategy: str, dynamic: bool, **more) -> dict[str, Any]:
  return {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": dynamic, "strategy": strategy} | more


def _weights(kind: str) -> dict[str, Any]:
  blocks = {"block_structure": [128, 128]} if kind == "block128" else {}
  return _arguments(_STRATEGIES[kind], False, observer="minmax", **blocks)


def _inputs(kind: str, activations: str) -> dict[str, Any] | None:
  if activations == "none":
    return None
  if activations == "static":
    return _arguments("tensor", False)
  return _arguments("group", True, group_size=BLOCK) if kind == "block128" else _arguments("token", True)


def _kv_scheme(source: Checkpoint) -> dict[str, Any] | None:
  names = _kv_scales(source)
  if not names:
    return None
  return _arguments("tensor" if all(_equal(source.read_static(name)) for name in names) else "attn_head", False)


def _kv_scales(source: Checkpoint) -> list[str]:
  """The names of the scales of keys and values; none unless every layer has both, since the scheme is one for all layers."""
  names = [name for name in source.static_scales() if name.endswith((".k_scale", ".v_scale"))]
  return names if len(names) == 2 * source.config.num_layers else []


def _equal(scales: np.ndarray) -> bool:
  return bool((scales == scales.flat[0]).all())


def _tensors(source: Checkpoint) -> Iterator[tuple[str, int, Callable[[], np.ndarray]]]:
  """(name, bytes, function that reads the tensor) in the order of the computation."""
  per_head = (_kv_scheme(source) or {}).get("strategy") == "attn_head"
  for name in source.names():
    size = int(np.prod(source.shape(name))) * source.dtype(name).itemsize
    yield name, size, lambda name=name: source.read(name)
    if source.granularity(name):
      out = source.shape(name)[0]
      yield f"{name}_scale", 4 * out, lambda name=name: _stored_scale(source, name)
  for name in source.static_scales():
    module = name.removesuffix(".input_scale")
    if module != name and source.granularity(f"{module}.weight") and _activations(source, module) == "static":
      yield name, 4, lambda name=name: _input_scale(source, name)
  for name in _kv_scales(source):
    yield name, 4, lambda name=name: _kv_scale(source.read_static(name), per_head)


def _input_scale(source: Checkpoint, name: str) -> np.ndarray:
  """[1]: the scale that the model multiplies with, the largest of the matrices that are merged with this one."""
  layer, matrix = name.removeprefix("model.layers.").removesuffix(".input_scale").split(".", 1)
  (merged,) = (merged for merged, matrices in MERGED_MATRICES.items() if matrix in matrices)
  names = [name]
  if not source.formats[int(layer)].is_split(merged):
    names = [f"model.layers.{layer}.{other}.input_scale" for other in MERGED_MATRICES[merged]]
  return np.max([source.read_static(other).reshape(1) for other in names], axis=0)


def _kv_scale(scale: np.ndarray, per_head: bool) -> np.ndarray:
  return scale.reshape(-1, 1, 1) if per_head else scale.reshape(-1)[:1]


def _stored_scale(source: Checkpoint, name: str) -> np.ndarray:
  scale, kind = source.read_scale(name), source.granularity(name)
  if kind == "block128":
    return scale
  return scale[:1] if kind == "tensor" else scale.reshape(-1, 1)


def _write_tensors(source: Checkpoint, folder: pathlib.Path, progress: ReportProgress | None) -> None:
  """Writes shards of at most 2 GB (a larger tensor has its own shard), and their index if there are several."""
  from safetensors.numpy import save_file

  shards, sizes = [[]], [0]
  for name, size, read in _tensors(source):
    if shards[-1] and sizes[-1] + size > _SHARD_BYTES:
      shards.append([])
      sizes.append(0)
    shards[-1].append((name, read))
    sizes[-1] += size
  weight_map = {}
  for index, shard in enumerate(shards):
    file = "model.safetensors" if len(shards) == 1 else f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
    arrays = {name: read() for name, read in shard}
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    save_file(arrays, folder / file, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(arrays, file)
    if progress:
      progress(sum(sizes[: index + 1]), sum(sizes))
  if len(shards) > 1:
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def _write_tokenizer(files: TokenizerFiles, folder: pathlib.Path) -> None:
  (folder / "tokenizer.json").write_text(files.tokenizer_json, encoding="utf-8")
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": files.add_bos, **files.special_tokens}
  if files.chat_template is not None:
    (folder / "chat_template.jinja").write_text(files.chat_template, encoding="utf-8")
  _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
