"""Loads a model and its tokenizer by the options of a command, and chooses the sizes of an engine for some requests.

    open_model(options, progress)  ->  LoadedModel       a source is converted first, into the cache
    limits_for(model, mesh, lengths)  ->  EngineLimits

Every command does this before it computes. Refuses to know flags.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from jaxfp8 import child_process
from jaxfp8.checkpoint import readers
from jaxfp8.checkpoint.load import load
from jaxfp8.checkpoint.manifest import DamagedCheckpoint, is_checkpoint
from jaxfp8.checkpoint.open import Checkpoint
from jaxfp8.checkpoint.quantized_source import source_granularity
from jaxfp8.checkpoint.readers import Source
from jaxfp8.checkpoint.readers.locate import absolute
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.checkpoint.weights_cache import cached_checkpoint, discard, fingerprint
from jaxfp8.config import LlamaConfig
from jaxfp8.distributed import processes
from jaxfp8.errors import InputError
from jaxfp8.model.llama import Llama
from jaxfp8.progress import Progress
from jaxfp8.recipe import DEFAULT_PAGE_SIZE, Granularity, Precision, Recipe
from jaxfp8.serving import memory
from jaxfp8.serving.limits import EngineLimits, sizes_up_to
from jaxfp8.sharding import make_mesh
from jaxfp8.terminal import say, visible
from jaxfp8.text.tokenizer import Tokenizer
from pallas_kernels import dispatch

MAX_SEQUENCES = 32  # in flight on each data shard; further requests wait
_MAX_CPU_DEVICES = 64  # CPU devices are threads, and each takes milliseconds to start
_FP8_UNITS_SINCE = (8, 9)  # compute capability of the first GPUs that multiply float8


@dataclasses.dataclass(frozen=True)
class LoadOptions:
  """The model that a user asked for.

  checkpoint: a path; None is the default model.
  weights, granularity, kv: fields of the recipe; None: the checkpoint's own, or for a source the usual ones.
  activations: a field of the recipe, or "auto".
  cache_dir: the folder that keeps converted weights; "" converts in memory.
  needs_tokenizer: refuse a source without a tokenizer before it is converted.
  stop_token_ids: ids that the requests will name; refuse a model without them, before it is converted.
  """

  checkpoint: str | None = None
  weights: str | None = None
  granularity: str | None = None
  activations: str = "auto"
  kv: str | None = None
  tensor: int = 1
  data: int = 1
  implementation: str = "auto"
  cache_dir: str = ""
  needs_tokenizer: bool = True
  stop_token_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """A model with arrays, the mesh that it is cut over, its name for messages, and its tokenizer's files if it has any."""

  model: Llama
  mesh: Mesh
  name: str
  tokenizer_files: TokenizerFiles | None

  @property
  def recipe(self) -> Recipe:
    return self.model.recipe

  def tokenizer(self) -> Tokenizer:
    """Raises InputError for a checkpoint without a tokenizer."""
    if self.tokenizer_files is None:
      raise InputError(
        f"generate: {self.name} has no tokenizer, so it cannot read text. Pass a checkpoint with tokenizer.json, or use the "
        "library with token ids."
      )
    return Tokenizer(self.tokenizer_files)


def open_model(options: LoadOptions, progress: Progress) -> LoadedModel:
  """Loads a checkpoint; one of another project is converted first. Raises InputError for unusable options or files."""
  require_implementation(options.implementation)
  require_devices(options.tensor * options.data)
  try:
    return _load(*_open(options, progress), options, progress)
  except DamagedCheckpoint as error:
    if error.checkpoint is None or is_checkpoint(options.checkpoint or readers.default_model()):
      raise
    if not discard(error.checkpoint, error.reason):
      options = dataclasses.replace(options, cache_dir="")
    return _load(*_open(options, progress), options, progress)


def _load(checkpoint: Source, recipe: Recipe, options: LoadOptions, progress: Progress) -> LoadedModel:
  _check_stop_token_ids(checkpoint.config, options)
  if processes.count() > 1:
    processes.require_same({"checkpoint": fingerprint(checkpoint), "recipe": dataclasses.asdict(recipe)})
  mesh = make_mesh(checkpoint.config, options.tensor, options.data)
  with progress.task("Loading weights"):
    model = load(checkpoint, recipe, mesh=mesh, implementation=options.implementation)
  return LoadedModel(model, mesh, str(options.checkpoint or checkpoint.config.name), checkpoint.find_tokenizer())


def _open(options: LoadOptions, progress: Progress) -> tuple[Source, Recipe]:
  """The opened checkpoint to load (a source only without a cache), and the recipe to run in."""
  path = absolute(options.checkpoint or readers.default_model())
  if is_checkpoint(path):
    checkpoint = Checkpoint(path)
    return checkpoint, _stored_recipe(checkpoint, options)
  if not options.cache_dir:
    source = readers.open_source(path)
    _check_source(source, options)
    granularity = options.granularity or source_granularity(source) or Granularity.CHANNEL
    return source, _recipe(options, options.weights or Precision.FP8, granularity)
  recipe = _recipe(options, options.weights or Precision.FP8, options.granularity or Granularity.CHANNEL)
  with progress.task("Converting weights") as report:
    if processes.count() > 1:
      checkpoint = _convert_in_child(path, recipe, options)
    else:
      checkpoint = cached_checkpoint(
        path,
        recipe,
        options.cache_dir,
        progress=report,
        check=lambda source: _check_source(source, options),
        keep_granularity=options.granularity is None,
      )
  if checkpoint is None:
    return _open(dataclasses.replace(options, cache_dir=""), progress)
  if options.granularity is None:
    recipe = dataclasses.replace(recipe, granularity=checkpoint.manifest.recipe.granularity)
  return checkpoint, recipe


def _convert_in_child(path: pathlib.Path, recipe: Recipe, options: LoadOptions) -> Checkpoint | None:
  """`cached_checkpoint` in a child process that belongs to no group of processes (conversion_child.py says why)."""
  request = {name: getattr(options, name) for name in ("cache_dir", "tensor", "data", "needs_tokenizer")}
  request |= {"path": str(path), "recipe": dataclasses.asdict(recipe), "keep_granularity": options.granularity is None}
  reply = child_process.ask(child_process.Child.CONVERSION, request)
  if not reply.answers:
    raise InputError(f"generate: converting {path} failed: {reply.failure}. Convert it on one host and pass the result.")
  (answer,) = reply.answers
  sys.stderr.write(visible(answer["said"]))
  return Checkpoint(answer["folder"]) if answer["folder"] else None


def _check_source(source: Source, options: LoadOptions) -> None:
  """Raises before the conversion the InputErrors that would be raised after it."""
  make_mesh(source.config, options.tensor, options.data)
  _check_stop_token_ids(source.config, options)
  if options.needs_tokenizer:
    Tokenizer(source.tokenizer)


def _check_stop_token_ids(config: LlamaConfig, options: LoadOptions) -> None:
  if (greatest := max(options.stop_token_ids, default=0)) >= config.vocab_size:
    raise InputError(
      f"generate: --stop_token_ids must be between 0 and {config.vocab_size - 1}, the ids of this model's tokens; "
      f"got {greatest}. Leave that id out."
    )


def require_implementation(name: str) -> None:
  """Raises InputError unless `name` is "auto" or the name of an implementation."""
  known = ["auto", *dispatch.implementations()]
  if name not in known:
    raise InputError(
      f"generate: --implementation must be one of {', '.join(known)}; got {name!r}. Leave it out for the best one."
    )


def require_devices(count: int) -> None:
  """Makes JAX start with this process's share of `count` CPU devices; the number of GPUs cannot be chosen.

  Raises InputError for a count that the processes cannot share, or that is too large for a CPU.
  """
  if count > _MAX_CPU_DEVICES and os.environ.get("JAX_PLATFORMS") == "cpu":
    raise InputError(f"mesh: --tensor times --data must be at most {_MAX_CPU_DEVICES} on a CPU; got {count}. Use fewer.")
  if count % processes.count():
    raise InputError(
      f"mesh: --tensor times --data must be a multiple of the {processes.count()} processes; got {count}. Use other sizes."
    )
  count //= processes.count()
  if (
    count > 1
    and os.environ.get("JAX_PLATFORMS") == "cpu"
    and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", "")
  ):
    jax.config.update("jax_num_cpu_devices", count)
  if processes.count() > 1:
    jax.devices()  # waits for all processes: one may convert weights, which needs devices, while another does not


def limits_for(model: Llama, mesh: Mesh, lengths: Sequence[tuple[int, int]], num_logprobs: int = 0) -> EngineLimits:
  """The limits of an engine that runs these requests, each (prompt tokens, new tokens), without compiling meanwhile.

  Pages are rounded up to few different sizes, so that the next, slightly longer run finds its programs compiled. A pool that
  exceeds the free memory is cut, with a sentence on stderr: sequences then wait or are preempted.
  """
  shards = mesh.devices.shape[0]
  context = model.config.max_context
  totals = sorted((min(prompt + new, context) for prompt, new in lengths), reverse=True)
  in_flight = min(MAX_SEQUENCES, -(-len(totals) // shards))
  pages = [-(-total // DEFAULT_PAGE_SIZE) for total in totals]
  longest = max(prompt for prompt, _ in lengths)
  chunk = EngineLimits.prefill_sizes[-1]
  if len(lengths) == 1:
    needed = {min(longest, chunk)} | ({longest % chunk} - {0} if longest > chunk else set())
    prefill_sizes = tuple(sorted({sizes_up_to(size, EngineLimits.prefill_sizes)[-1] for size in needed}))
  else:
    prefill_sizes = sizes_up_to(min(chunk, sum(prompt for prompt, _ in lengths)), EngineLimits.prefill_sizes)
  return EngineLimits(
    num_pages=_affordable(model, mesh, sum(pages[: in_flight * shards : shards]), pages[0]),
    max_sequences=in_flight,
    max_pages=min(_rounded(pages[0]), -(-context // DEFAULT_PAGE_SIZE)),
    prefill_sizes=prefill_sizes,
    decode_sizes=sizes_up_to(in_flight, EngineLimits.decode_sizes),
    num_logprobs=num_logprobs,
  )


def _rounded(pages: int) -> int:
  """8, 16, 32 or 64 pages, then multiples of 64."""
  return max(8, 1 << (pages - 1).bit_length()) if pages <= 64 else -(-pages // 64) * 64


def _affordable(model: Llama, mesh: Mesh, pages: int, least: int) -> int:
  """`pages` rounded up, or as many as fit into nine tenths of the free memory; at least `least`, which the engine refuses."""
  fitting = memory.room_for_pages(model, mesh, 0.9)
  if fitting < least:
    return least
  if fitting < pages:
    say(f"jaxfp8: memory holds {fitting} of the {pages} KV pages that all sequences together need; some will wait.")
  return min(_rounded(pages), fitting)


def _stored_recipe(checkpoint: Checkpoint, options: LoadOptions) -> Recipe:
  """The recipe of the checkpoint's own weights, with the activations and the KV cache of the options."""
  stored = checkpoint.manifest.recipe
  recipe = _recipe(options, options.weights or stored.weights, options.granularity or stored.granularity)
  if options.activations == "auto" and recipe.activations == stored.activation_dtype:
    recipe = dataclasses.replace(recipe, activations=stored.activations)  # static scales, if they are stored
  return recipe


def _recipe(options: LoadOptions, weights: str, granularity: str) -> Recipe:
  activations: str = options.activations
  if activations == "auto":
    is_fp8 = weights == Precision.FP8 and _has_fp8_units()
    activations = Precision.F32 if weights == Precision.F32 else Precision.FP8 if is_fp8 else Precision.BF16
  kv = options.kv or (Precision.F32 if weights == Precision.F32 else Precision.BF16)
  return Recipe(weights=weights, granularity=granularity, activations=activations, kv=kv)


def _has_fp8_units() -> bool:
  """Whether the default device multiplies float8."""
  device = jax.local_devices()[0]
  if device.platform == "cpu":
    return False
  major, _, minor = str(device.compute_capability).partition(".")
  return (int(major), int(minor)) >= _FP8_UNITS_SINCE
