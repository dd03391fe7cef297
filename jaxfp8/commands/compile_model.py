"""`jaxfp8 compile --model`: whole steps compiled for absent GPUs, as a table or as JSON."""

import json
import pathlib
from typing import Any

from absl import flags

from jaxfp8.errors import InputError
from jaxfp8.planning.compile_request import CompileRequest, compiled_reports
from jaxfp8.planning.devices import load_device
from jaxfp8.recipe import WEIGHT_PRECISIONS, Granularity
from jaxfp8.terminal import show, show_json
from jaxfp8.units import format_bytes, format_seconds

FLAG_NAMES = ("tensor", "data", "batch", "context", "weights", "granularity", "activations", "kv_cache", "prefill", "save")


def define_flags(flag_values: flags.FlagValues) -> None:
  def define(kind, *args):
    kind(*args, flag_values=flag_values)

  define(flags.DEFINE_string, "model", "", "Whole steps of this model, a name in configs/models, instead of single kernels.")
  define(flags.DEFINE_integer, "tensor", 1, "GPUs over which one copy of the model is cut.")
  define(flags.DEFINE_integer, "data", 1, "Copies of the model.")
  define(flags.DEFINE_integer, "batch", 8, "Sequences that decode together, over all copies.")
  define(flags.DEFINE_integer, "context", 4096, "Tokens that every sequence holds.")
  define(flags.DEFINE_enum, "weights", "fp8", WEIGHT_PRECISIONS, "What the linear layers are stored in.")
  define(flags.DEFINE_enum, "granularity", "channel", list(Granularity), "What one scale of fp8 weights covers.")
  define(flags.DEFINE_enum, "activations", "auto", ("auto", *WEIGHT_PRECISIONS), "What the linear layers multiply in.")
  define(flags.DEFINE_enum, "kv_cache", "fp8", WEIGHT_PRECISIONS, "What the KV cache is stored in.")
  define(flags.DEFINE_integer, "prefill", None, "Also the step that takes a prompt of so many tokens.")
  define(flags.DEFINE_string, "save", "", "Folder for the HLO, the table, the JSON and a jax.export of each step.")


def main(flag_values: flags.FlagValues) -> int:
  """Compiles and prints. Raises InputError for what cannot be compiled."""
  given: dict[str, Any] = {name: flag_values[name].value for name in FLAG_NAMES if name != "save"}
  asked = CompileRequest.of(flag_values.model, flag_values.device, **given)
  result = compiled_reports(asked, timeout_s=flag_values.timeout, save=flag_values.save)
  answer = {
    "model": asked.config.name,
    "device": asked.device,
    "recipe": vars(asked.recipe),
    **given,
    **result,
  }
  table = "\n\n".join([heading(asked), *(make_table(kind, result[kind], asked) for kind in kinds(result))])
  if flag_values.save:
    folder = pathlib.Path(flag_values.save)
    (folder / "table.txt").write_text(table + "\n", encoding="utf-8")
    (folder / "budget.json").write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
  if flag_values.json:
    show_json(answer)
  else:
    show(table)
  return 0


def check_no_model_flags(flag_values: flags.FlagValues) -> None:
  """Raises InputError where a flag of whole models is given with no model."""
  stray = next((name for name in FLAG_NAMES if flag_values[name].present), None)
  if stray:
    raise InputError(f"compile: --{stray} is about a whole model; got it without one. Add --model=llama-3.1-70b.")


def kinds(result: dict) -> list[str]:
  return [kind for kind in ("decode", "prefill") if kind in result]


def heading(asked: CompileRequest) -> str:
  recipe, mesh = asked.recipe, asked.mesh
  title = load_device(asked.device).title
  scales = f" ({recipe.granularity} scales)" if recipe.weights == "fp8" else ""
  return (
    f"{asked.config.name} on {mesh.num_devices} x {title} (tensor {mesh.tensor}, data {mesh.data}), "
    f"{recipe.weights} weights{scales}, {recipe.activations} activations, {recipe.kv} KV; "
    "everything for one GPU, compiled without it. Times are floors."
  )


def make_table(kind: str, record: dict, asked: CompileRequest) -> str:
  """What one step costs, a line each."""
  tokens = f"{record['tokens']} sequences of {asked.context:,} tokens" if kind == "decode" else f"{record['tokens']:,} tokens"
  times = ", ".join(f"{name} {format_seconds(ms / 1e3)}" for name, ms in record["times_ms"].items())
  layer = ", ".join(f"{number} x {name}" for name, number in record["collectives_in_layer"].items()) or "none"
  step = ", ".join(f"{number} x {name}" for name, number in record["collectives_elsewhere"].items()) or "none"
  graph = "one CUDA graph a layer" if record["layer_in_one_command_buffer"] else "a layer is not one CUDA graph"
  show = {name: format_bytes(value) for name, value in record.items() if name.endswith("_bytes")}
  lines = [
    f"{kind}: {tokens} a GPU",
    f"  compiled in      {record['compile_seconds']:.1f} s (tracing {record['trace_seconds']:.1f} s; "
    f"{record['compile_cpu_seconds']:.1f} s of CPU time), {show['serialized_bytes']} serialized",
    f"  memory           arguments {show['argument_bytes']} (weights {show['weight_bytes']}, KV pool {show['kv_bytes']}), "
    f"aliased {show['alias_bytes']}, temporaries {show['temp_bytes']}",
    f"  floor of traffic {show['hbm_floor_bytes']}: weights {show['weight_read_bytes']}, KV read {show['kv_read_bytes']}, "
    f"KV written {show['kv_written_bytes']}",
    f"  traffic          {show['hbm_bytes']}: kernels {show['kernel_bytes']}, XLA's operations {show['xla_bytes']}; "
    f"{record['hbm_bytes'] / record['hbm_floor_bytes']:.2f} of the floor if no cache helped",
    f"                   copies of weights {show['weight_written_bytes']}; top-k and top-p up to {show['sampling_bytes']} more",
    f"  a layer          {record['launches_per_layer']} launches: {record['kernels_per_layer']} Pallas kernels, "
    f"{record['xla_kernels_per_layer']} of XLA, {record['copies_per_layer']} copies; collectives: {layer}",
    f"  a step           {record['launches_per_step']:,} launches, {record['command_buffers']} command buffers, {graph}",
    f"                   collectives beside the layers: {step}",
    f"  at least         {record['roofline_ms']:.3f} ms, bound by {record['bound_by']} ({times})",
    f"  {'part':16} {'calls':>7} {'bytes':>10} {'GFLOP':>10} {'at least':>10}",
  ]
  for part in record["parts"]:
    lines.append(
      f"  {part['operation']:16} {part['calls']:>7,} {format_bytes(part['bytes']):>10} {part['flops'] / 1e9:>10,.1f} "
      f"{format_seconds(part['roofline_ms'] / 1e3):>10}"
    )
  return "\n".join(lines)
