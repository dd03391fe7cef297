"""Exports a checkpoint of jaxfp8 as a compressed-tensors folder, which vLLM and transformers with compressed-tensors load.

    X.weight F8_E4M3 [out, in], X.weight_scale F32    (1,) for one scale per tensor, (out, 1), or (out/128, in/128)
    X.input_scale F32 (1,), self_attn.k_scale, v_scale F32 (1,) or (num_kv_heads, 1, 1)    if the checkpoint has them
    every weight that is not float8 in its own dtype, and its module in `ignore`

Values and scales are the checkpoint's, bit for bit. One shard is in memory at a time.
"""

import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxfp8.checkpoint.convert import ReportProgress
from jaxfp8.checkpoint.open import Checkpoint
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.checkpoint.writer import sync_tree
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.unfinished import unfinished

_SHARD_BYTES = 2 << 30
_STRATEGIES = {"tensor": "tensor", "channel": "channel", "block128": "block"}


def export_checkpoint(
  folder: Checkpoint | str | os.PathLike, output: str | os.PathLike, progress: ReportProgress | None = None
) -> dict[str, Any]:
  """Writes the new folder `output`, which appears when it is whole; returns its config.json.

  Raises InputError for a damaged checkpoint, an output that exists, or a full disk; nothing is then left behind.
  """
  source = folder if isinstance(folder, Checkpoint) else Checkpoint(folder)
  output = pathlib.Path(output).absolute()
  if output.exists():
    raise InputError(f"export: {output} exists already. Pass another folder, or remove it first.")
  temporary = output.with_name(f"{output.name}.writing-{secrets.token_hex(4)}")
  try:
    with unfinished(lambda: shutil.rmtree(temporary, ignore_errors=True)):
      temporary.mkdir(parents=True)
      config = config_to_hf(source.config) | {"quantization_config": _scheme(source)}
      config["dtype"] = config["torch_dtype"] = {"bf16": "bfloat16", "f32": "float32"}[source.manifest.recipe.stream]
      _write_tensors(source, temporary, progress)
      _write_json(temporary / "config.json", config)
      _write_json(temporary / "generation_config.json", {k: config[k] for k in ("bos_token_id", "eos_token_id")})
      if source.manifest.tokenizer:
        _write_tokenizer(source.manifest.tokenizer, temporary)
      sync_tree(temporary)
      os.rename(temporary, output)
  except OSError as error:
    reason = os.strerror(error.errno) if error.errno else str(error)
    raise InputError(
      f"export: cannot write {output}: {reason}. Nothing was left behind; pass another folder or free space."
    ) from error
  return config


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
  """config.json of a LlamaForCausalLM, with the names for RoPE of transformers 4, which transformers 5 reads too."""
  rope = config.rope
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
  """The quantization_config: one group for each granularity."""
  by_kind: dict[str, list[str]] = {}
  modules = [name.removesuffix(".weight") for name in source.names() if len(source.shape(name)) == 2]
  for module in modules:
    by_kind.setdefault(source.granularity(f"{module}.weight") or "plain", []).append(module)
  plain = [module for module in by_kind.pop("plain", []) if module != "model.embed_tokens"]
  if "model.embed_tokens" in [module for kind in by_kind.values() for module in kind]:
    raise InputError("export: compressed-tensors has no float8 embeddings. Convert with --keep_bf16=embed_tokens first.")
  if not by_kind:
    raise InputError(
      f"export: {source.path} holds no float8 weights, and compressed-tensors is for those. Pass a float8 checkpoint."
    )
  if source.config.tied_embeddings:
    plain.append("lm_head")
  static = {name.rpartition(".")[0] for name in source.static_scales() if name.endswith(".input_scale")}
  groups = {}
  for kind, names in by_kind.items():
    inputs = _inputs(kind, all(name in static for name in names), source.manifest.recipe.activation_dtype)
    targets = ["Linear"] if len(by_kind) == 1 else names
    groups[f"group_{len(groups)}"] = {
      "targets": targets, "weights": _weights(kind), "input_activations": inputs, "output_activations": None,
    }  # fmt: skip
  return {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "global_compression_ratio": None,
    "ignore": plain,
    "kv_cache_scheme": _kv_scheme(source),
    "config_groups": groups,
  }


def _arguments(strategy: str, dynamic: bool, **more) -> dict[str, Any]:
  return {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": dynamic, "strategy": strategy} | more


def _weights(kind: str) -> dict[str, Any]:
  blocks = {"block_structure": [128, 128]} if kind == "block128" else {}
  return _arguments(_STRATEGIES[kind], False, observer="minmax", **blocks)


def _inputs(kind: str, static: bool, activations: str) -> dict[str, Any] | None:
  if activations != "fp8":
    return None
  if static:
    return _arguments("tensor", False)
  return _arguments("group", True, group_size=128) if kind == "block128" else _arguments("token", True)


def _kv_scheme(source: Checkpoint) -> dict[str, Any] | None:
  names = [name for name in source.static_scales() if name.endswith((".k_scale", ".v_scale"))]
  if not names:
    return None
  return _arguments("tensor" if all(_equal(source.read_static(name)) for name in names) else "attn_head", False)


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
    heads = per_head and not name.endswith(".input_scale")
    yield name, 4, lambda name=name, heads=heads: _stored_static(source.read_static(name), heads)


def _stored_static(scale: np.ndarray, heads: bool) -> np.ndarray:
  return scale.reshape(-1, 1, 1) if heads else scale.reshape(-1)[:1]


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
