"""Asks what the compiled steps of a deployment cost, in a child process. Imports no jax.

    CompileRequest -> compiled_reports -> {"decode": {...}, "prefill": {...}}     what serving/compiled_report.py measured

The compiler may abort its process and prints what no user needs, so it works in a child with a time limit; its mistakes come
back as InputError. Refuses to know: how programs are made and read (serving/compiled_report.py).
"""

import dataclasses
import pathlib
import shutil
import tempfile
from typing import Any

from jaxfp8 import child_process
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.mesh import MeshShape
from jaxfp8.planning.deployment import resolve_activations
from jaxfp8.planning.devices import CPU, have_compiler, load_device
from jaxfp8.recipe import DEFAULT_PAGE_SIZE, LayerFormat, Recipe

TIMEOUT_S = 600.0
_QUIET = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_ENABLE_COMPILATION_CACHE": "false"}


@dataclasses.dataclass(frozen=True)
class CompileRequest:
  """Which programs: `batch` sequences of `context` tokens over all devices in decode, and one prompt of `prefill` tokens in one
  step a data shard (None: no prefill). `device` is a name or a TOML. `formats` are those of the layers (None: the recipe's).
  Raises InputError for what cannot be."""

  config: LlamaConfig
  recipe: Recipe
  device: str
  mesh: MeshShape
  batch: int
  context: int
  prefill: int | None = None
  page_tokens: int = DEFAULT_PAGE_SIZE
  formats: tuple[LayerFormat, ...] | None = None

  def __post_init__(self):
    config = self.config
    if self.device == CPU or not load_device(self.device).num_sms:
      raise InputError(f"compile: programs are compiled for GPUs; {self.device!r} is none. Pass for example --device=h100.")
    if self.batch < 1 or self.batch % self.mesh.data:
      raise InputError(f"compile: batch must divide over data={self.mesh.data}; got {self.batch}. Pass a multiple.")
    if not 1 <= self.context <= config.max_context:
      raise InputError(f"compile: context must be from 1 to the {config.max_context:,} of {config.name}; got {self.context:,}.")
    if self.prefill is not None and not 1 <= self.prefill <= self.context:
      raise InputError(f"compile: prefill must be from 1 to the context of {self.context:,} tokens; got {self.prefill:,}.")

  @classmethod
  def of(
    cls,
    model: LlamaConfig | str,
    device: str,
    *,
    tensor=1,
    data=1,
    weights="fp8",
    granularity="channel",
    activations="auto",
    kv_cache="fp8",
    **sizes,
  ) -> "CompileRequest":
    """From what flags say."""
    config = model if isinstance(model, LlamaConfig) else LlamaConfig.from_name(model)
    if activations == "auto":
      activations = resolve_activations(activations, weights, load_device(device)) if device != CPU else weights
    recipe = Recipe(weights, granularity, activations, kv_cache)
    return cls(config, recipe, device, MeshShape.for_model(config, tensor, data), **sizes)

  def to_dict(self) -> dict[str, Any]:
    return {**dataclasses.asdict(self), "config": self.config.to_dict()}

  @classmethod
  def from_dict(cls, fields: dict[str, Any]) -> "CompileRequest":
    config = LlamaConfig.from_dict(fields["config"], "the request")
    formats = tuple(LayerFormat(**layer) for layer in fields["formats"]) if fields["formats"] else None
    recipe, mesh = Recipe(**fields["recipe"]), MeshShape(**fields["mesh"])
    return cls(**{**fields, "config": config, "recipe": recipe, "mesh": mesh, "formats": formats})


def compiled_reports(request: CompileRequest, *, timeout_s: float = TIMEOUT_S, save: str = "") -> dict[str, Any]:
  """Compiles the programs. Returns a report by kind of step, and under "notes" the compiler's remarks for a user.

  save: a folder for each kind's HLO and its jax.export; created if it is missing, written only after all programs compiled.
  Raises InputError if no compiler is installed, the compiler aborts, or compiling takes longer than timeout_s.
  """
  if not have_compiler():
    raise InputError('compile: the CUDA compiler is not installed. Install the extra: pip install "jaxfp8[cuda]".')
  if save and pathlib.Path(save).exists() and not pathlib.Path(save).is_dir():
    raise InputError(f"compile: save must name a folder; {save} is a file. Pass another.")
  with tempfile.TemporaryDirectory() as folder:
    kept = pathlib.Path(folder) / "kept"
    if save:
      kept.mkdir()
    message = {"compile_request": request.to_dict(), "save": str(kept) if save else ""}
    reply = child_process.ask(child_process.Child.COMPILED_REPORT, message, variables=_QUIET, timeout_s=timeout_s)
    if reply.timed_out:
      raise InputError(f"compile: the compiler took more than {timeout_s:.0f} s. Pass a longer --timeout.")
    if not reply.answers:
      raise InputError(f"compile: the compiler ended without a result: {reply.last_line or 'it said nothing'}")
    result = reply.answers[0]
    if save:
      try:
        shutil.copytree(kept, save, dirs_exist_ok=True)
      except OSError as error:
        raise InputError(f"compile: save must name a folder that can be written; {save}: {error}. Pass another.") from error
  return result
