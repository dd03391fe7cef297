"""Converts a checkpoint of another project, or one of jaxfp8, into a new checkpoint of jaxfp8.

    source  ->  QuantizedSource: its arrays, a matrix at a time  ->  CheckpointWriter

Refuses to know file formats (readers/), layouts (layout.py) and how each matrix is quantized (quantized_source.py).
"""

import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxfp8.checkpoint import static_scales
from jaxfp8.checkpoint.manifest import FORMAT_VERSION, Manifest
from jaxfp8.checkpoint.open import open_checkpoint
from jaxfp8.checkpoint.quantized_source import QuantizedSource, default_recipe, has_input_scales
from jaxfp8.checkpoint.readers import Source
from jaxfp8.checkpoint.writer import CheckpointWriter
from jaxfp8.errors import InputError
from jaxfp8.recipe import Precision, Recipe

ReportProgress = Callable[[int, int], None]  # (bytes of the checkpoint that are done, bytes in all)
_WRITE_BYTES = 64 << 20  # few large writes: each costs Orbax some 50 ms whatever its size
_OVERLAP_BYTES = 256 << 20
_SCALES = {"static": ("inputs", "kv"), "dynamic": ("kv",), "none": ("kv",)}  # by `activations`: the scales that are taken over


def convert_checkpoint(
  source: Source | str | os.PathLike,
  folder: str | os.PathLike,
  recipe: Recipe | None = None,
  *,
  activations: str | None = None,
  keep_bf16: Sequence[str] = (),
  resume: bool = False,
  provenance: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
  check: Callable[[pathlib.Path], Mapping[str, Any]] | None = None,
  progress: ReportProgress | None = None,
) -> QuantizedSource:
  """Writes a checkpoint of jaxfp8 from a Hugging Face folder, a GGUF file or another checkpoint, a matrix at a time.

  Float8 values and scales that come in are kept bit for bit; everything else is quantized by `recipe`.

  Args:
    recipe: None: float8 with the source's own scales, or one a channel.
    activations: "static" takes over the source's scales of inputs, "dynamic" leaves them out, "none" also asks for bf16
      activations; None takes them over if the source has them.
    keep_bf16: regular expressions; a matrix whose module's name (`model.layers.0.mlp.up_proj`) they match is not float8.
    resume: continue the work of an interrupted call with the same arguments, and keep the written part if this call fails.
    provenance: more to store about where the weights came from; a function is called when everything else is written.
    check: called with the path of the whole checkpoint before it has its name, such as `quality_gate.gate`. Its result is
      stored beside the provenance. If it raises, there is no checkpoint.
    progress: called with the bytes that are done and the bytes in all.

  Returns:
    The arrays that were written; its `notes` are sentences about matrices that are stored otherwise than asked for.

  Raises:
    InputError: bad weights, an existing folder, a full disk, static scales that are not there; without `resume` nothing is
      then left behind.
  """
  source = open_checkpoint(source)
  recipe = recipe or default_recipe(source)
  if activations == "static" and not has_input_scales(source):
    raise InputError(
      f"convert: activations=static takes over the source's scales of inputs, and {source.path} has none. "
      "Pass activations=dynamic."
    )
  if activations in ("static", "dynamic") and recipe.weights == "fp8":
    recipe = dataclasses.replace(recipe, activations="fp8")
  arrays = QuantizedSource(source, recipe, keep_bf16, _SCALES.get(activations or "static", _SCALES["static"]))
  if activations == "static" and static_scales.has_all_input_scales(arrays.formats, arrays.expected):
    recipe = dataclasses.replace(recipe, activations=Precision.FP8_STATIC)
  origin = {"source": source.path.name, "dialect": source.dialect, "versions": versions()}
  late = provenance if callable(provenance) else lambda: provenance or {}
  manifest = Manifest(
    source.config, recipe, arrays.formats, source.find_tokenizer(), origin, dict(arrays.exceptions), arrays.static_scales
  )
  total = sum(spec.num_bytes for spec in arrays.expected.values())
  work = _identity(source, recipe, arrays)
  with CheckpointWriter(folder, manifest, work=work, resume=resume, late=late, check=check) as writer:
    keys = [key for key in arrays.expected if key not in writer.done]
    done = total - sum(arrays.expected[key].num_bytes for key in keys)
    _write_arrays(writer, arrays, keys, lambda written: progress(done + written, total) if progress else None)
  return arrays


def _write_arrays(writer: CheckpointWriter, arrays: QuantizedSource, keys: list[str], report: Callable[[int], None]) -> None:
  """Writes these arrays; `report` is called with the bytes written. Two batches are in memory: one is written meanwhile."""
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    written, writing = 0, None
    for batch, size in _batches(arrays, keys):
      if writing:
        writing.result()
        report(written)
      writing = pool.submit(writer.write, batch)
      written += size
      del batch
      if size > _OVERLAP_BYTES:  # Orbax copies what it writes: no second matrix of that size beside it
        writing.result()
    if writing:
      writing.result()
    report(written)


def _batches(arrays: QuantizedSource, keys: list[str]) -> Iterator[tuple[dict[str, np.ndarray], int]]:
  """(arrays to write together, their bytes); a matrix and its scale are always in one batch."""
  pending, size = {}, 0
  by_module: dict[str, list[str]] = {}
  for key in keys:
    by_module.setdefault(key.rsplit(".", 1)[0], []).append(key)
  for module_keys in by_module.values():
    pending |= arrays.read(tuple(module_keys))
    size += sum(arrays.expected[key].num_bytes for key in module_keys)
    if size > _WRITE_BYTES:
      yield pending, size
      pending, size = {}, 0
  if pending:
    yield pending, size


def _identity(source: Source, recipe: Recipe, arrays: QuantizedSource) -> str:
  """A digest that is equal for equal work, so that it can be resumed: the source's files, and what becomes of them."""
  files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.files()]
  specs = sorted((key, shape, dtype.name) for key, (shape, dtype) in arrays.expected.items())
  work = [files, dataclasses.asdict(recipe), specs, FORMAT_VERSION]
  return hashlib.sha256(json.dumps(work).encode()).hexdigest()


def versions() -> dict[str, str]:
  """The versions of jaxfp8 and of the libraries that take part in a conversion."""
  names = ("jaxfp8", "jax", "numpy", "ml_dtypes", "orbax-checkpoint", "safetensors", "gguf")
  installed = {}
  for name in names:
    try:
      installed[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      installed[name] = "unknown"
  return installed
