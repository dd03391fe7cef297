"""From a path and some wishes to a model, a tokenizer and an engine's sizes: what every command does before it computes."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from jaxfp8.checkpoint import convert, readers
from jaxfp8.checkpoint.manifest import is_checkpoint, read_manifest
from jaxfp8.checkpoint.quantized_source import source_granularity
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.checkpoint.weights_cache import cached_checkpoint, fingerprint
from jaxfp8.distributed import processes as hosts
from jaxfp8.errors import InputError
from jaxfp8.model.llama import Llama
from jaxfp8.progress import Progress
from jaxfp8.recipe import DEFAULT_PAGE_SIZE, Recipe
from jaxfp8.serving import memory
from jaxfp8.serving.engine import sizes_up_to
from jaxfp8.serving.steps import Limits
from jaxfp8.sharding import make_mesh
from jaxfp8.text.tokenizer import Tokenizer
from pallas_kernels import dispatch

MAX_SEQUENCES = 32  # in flight on each data shard; further requests wait
_MAX_CPU_DEVICES = 64  # they are threads, and each costs milliseconds to start
_FP8_UNITS_SINCE = (8, 9)  # compute capability of the first GPUs that multiply float8


@dataclasses.dataclass(frozen=True)
class Wishes:
  """What a user asked for; None is "what is usual"."""

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


@dataclasses.dataclass(frozen=True)
class Opened:
  """A loaded model with what belongs to it. `tokenizer` raises InputError for a checkpoint without one."""

  model: Llama
  mesh: Mesh
  name: str
  tokenizer_files: TokenizerFiles | None

  @property
  def recipe(self) -> Recipe:
    return self.model.recipe

  def tokenizer(self) -> Tokenizer:
    if self.tokenizer_files is None:
      raise InputError(
        f"generate: {self.name} has no tokenizer, so it cannot read text. Pass a checkpoint with tokenizer.json, or use the "
        "library with token ids."
      )
    return Tokenizer(self.tokenizer_files)


def open_model(wishes: Wishes, progress: Progress) -> Opened:
  """Loads a checkpoint, converting it first where it is another project's. Raises InputError for whatever is not right."""
  require_implementation(wishes.implementation)
  path = pathlib.Path(wishes.checkpoint) if wishes.checkpoint else readers.default_model()
  require_devices(wishes.tensor * wishes.data)
  if is_checkpoint(path):
    recipe, source = _stored_recipe(path, wishes), None
  else:
    source = readers.open_source(path) if not wishes.cache_dir else None
    own = source_granularity(source) if source else None
    recipe = _recipe(wishes, wishes.weights or "fp8", wishes.granularity or own or "channel")
    if wishes.cache_dir:
      with progress.task("Converting weights") as report:
        if hosts.count() > 1:
          path = _convert_apart(path, recipe, wishes)
        else:
          path = cached_checkpoint(
            path, recipe, wishes.cache_dir, report, lambda source: _check_source(source, wishes), wishes.granularity is None
          )
      if wishes.granularity is None:
        recipe = dataclasses.replace(recipe, granularity=read_manifest(path).recipe.granularity)
  config = source.config if source else read_manifest(path).config
  if hosts.count() > 1:
    hosts.require_same({"checkpoint": fingerprint(path), "recipe": dataclasses.asdict(recipe)})
  mesh = make_mesh(config, wishes.tensor, wishes.data)
  with progress.task("Loading weights"):
    if source:
      model = convert.load_source(source, recipe, mesh=mesh, implementation=wishes.implementation)
      files = convert.tokenizer_of(source)
    else:
      model = convert.load(path, recipe, mesh=mesh, implementation=wishes.implementation)
      files = read_manifest(path).tokenizer
  return Opened(model, mesh, str(wishes.checkpoint or config.name), files)


def _convert_apart(path: pathlib.Path, recipe: Recipe, wishes: Wishes) -> pathlib.Path:
  """`cached_checkpoint` in a process that is none of many (conversion_child.py says why)."""
  what = {name: getattr(wishes, name) for name in ("cache_dir", "tensor", "data", "needs_tokenizer")}
  what |= {"path": str(path), "recipe": dataclasses.asdict(recipe), "own_granularity": wishes.granularity is None}
  command = [sys.executable, "-m", "jaxfp8.commands.conversion_child", json.dumps(what)]
  ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8")
  try:
    answer = json.loads(ran.stdout.splitlines()[-1])
  except (ValueError, IndexError) as error:
    why = (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1][:300]
    raise InputError(f"generate: converting {path} failed ({why}). Convert it on one host and pass the result.") from error
  if "error" in answer:
    raise InputError(answer["error"])
  return pathlib.Path(answer["folder"])


def _check_source(source: readers.Source, wishes: Wishes) -> None:
  """What would be refused after the conversion is refused before it."""
  make_mesh(source.config, wishes.tensor, wishes.data)
  if wishes.needs_tokenizer:
    Tokenizer(source.tokenizer)


def require_implementation(name: str) -> None:
  """Raises InputError unless `name` is "auto" or the name of an implementation."""
  known = ["auto", *dispatch.implementations()]
  if name not in known:
    raise InputError(
      f"generate: --implementation must be one of {', '.join(known)}; got {name!r}. Leave it out for the best one."
    )


def require_devices(count: int) -> None:
  """As many CPU devices as this process's part is, before JAX starts; GPUs are what they are (see sharding.make_mesh)."""
  if count > _MAX_CPU_DEVICES and os.environ.get("JAX_PLATFORMS") == "cpu":
    raise InputError(f"mesh: --tensor times --data must be at most {_MAX_CPU_DEVICES} on a CPU; got {count}. Use fewer.")
  if count % hosts.count():
    raise InputError(
      f"mesh: --tensor times --data must be a multiple of the {hosts.count()} processes; got {count}. Use other sizes."
    )
  count //= hosts.count()
  if (
    count > 1
    and os.environ.get("JAX_PLATFORMS") == "cpu"
    and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", "")
  ):
    jax.config.update("jax_num_cpu_devices", count)
  if hosts.count() > 1:
    jax.devices()  # waits for all processes, and one that converts weights needs devices while another may not


def limits_for(model: Llama, mesh: Mesh, lengths: Sequence[tuple[int, int]], num_logprobs: int = 0) -> Limits:
  """Programs and a pool that run these requests, each (prompt tokens, new tokens), without compiling on the way.

  Pages are rounded up to few different sizes, so that the next run, a little longer, finds its programs compiled.
  A pool that does not fit into memory is cut to what does, and said so: sequences then wait or are computed again.
  """
  shards = mesh.devices.shape[0]
  context = model.config.max_context
  totals = sorted((min(prompt + new, context) for prompt, new in lengths), reverse=True)
  in_flight = min(MAX_SEQUENCES, -(-len(totals) // shards))
  pages = [-(-total // DEFAULT_PAGE_SIZE) for total in totals]
  longest = max(prompt for prompt, _ in lengths)
  chunk = Limits.prefill_sizes[-1]
  if len(lengths) == 1:
    needed = {min(longest, chunk)} | ({longest % chunk} - {0} if longest > chunk else set())
    prefill_sizes = tuple(sorted({sizes_up_to(size, Limits.prefill_sizes)[-1] for size in needed}))
  else:
    prefill_sizes = sizes_up_to(min(chunk, sum(prompt for prompt, _ in lengths)), Limits.prefill_sizes)
  return Limits(
    num_pages=_affordable(model, mesh, sum(pages[: in_flight * shards : shards]), pages[0]),
    max_sequences=in_flight,
    max_pages=min(_rounded(pages[0]), -(-context // DEFAULT_PAGE_SIZE)),
    prefill_sizes=prefill_sizes,
    decode_sizes=sizes_up_to(in_flight, Limits.decode_sizes),
    num_logprobs=num_logprobs,
  )


def _rounded(pages: int) -> int:
  """8, 16, 32 or 64 pages, then multiples of 64."""
  return max(8, 1 << (pages - 1).bit_length()) if pages <= 64 else -(-pages // 64) * 64


def _affordable(model: Llama, mesh: Mesh, pages: int, least: int) -> int:
  """`pages` rounded up, or what nine tenths of the free memory hold; never fewer than `least`, which the engine refuses."""
  fitting = memory.room_for_pages(model, mesh, 0.9)
  if fitting < least:
    return least
  if fitting < pages:
    print(
      f"jaxfp8: memory holds {fitting} of the {pages} KV pages that all sequences together need; some will wait.",
      file=sys.stderr,
    )
  return min(_rounded(pages), fitting)


def _stored_recipe(path: pathlib.Path, wishes: Wishes) -> Recipe:
  """A checkpoint's own weights, with the activations and the KV cache that are asked for."""
  stored = read_manifest(path).recipe
  recipe = _recipe(wishes, wishes.weights or stored.weights, wishes.granularity or stored.granularity)
  if wishes.activations == "auto" and recipe.activations == stored.activation_dtype:
    recipe = dataclasses.replace(recipe, activations=stored.activations)  # static scales, where they are stored
  return recipe


def _recipe(wishes: Wishes, weights: str, granularity: str) -> Recipe:
  activations = wishes.activations
  if activations == "auto":
    activations = "f32" if weights == "f32" else "fp8" if weights == "fp8" and _has_fp8_units() else "bf16"
  kv = wishes.kv or ("f32" if weights == "f32" else "bf16")
  return Recipe(weights=weights, granularity=granularity, activations=activations, kv=kv)


def _has_fp8_units() -> bool:
  device = jax.local_devices()[0]
  if device.platform == "cpu":
    return False
  major, _, minor = str(device.compute_capability).partition(".")
  return (int(major), int(minor)) >= _FP8_UNITS_SINCE
