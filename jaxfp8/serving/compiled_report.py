"""The cost of a deployment's compiled steps on each GPU: memory, traffic, launches, collectives, CUDA graphs.

    CompileRequest -> CompiledSteps on a mesh of absent devices -> lower (kernels state their costs) -> compile -> HLO text
             -> measure -> one flat record of plain values for decode, and one for prefill

The compiler may abort its process, so planning/compile_request.py runs this module as a program in a child process. The steps
do not run on a GPU: all times are lower bounds, computed from the device's peaks.
"""

import collections
import dataclasses
import pathlib
import re
import tempfile
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import serialize_executable

from jaxfp8 import child_process
from jaxfp8.errors import InputError
from jaxfp8.inspection import deviceless, hlo, traffic
from jaxfp8.model.llama import Llama
from jaxfp8.planning import roofline
from jaxfp8.planning.compile_request import CompileRequest
from jaxfp8.planning.devices import DeviceSpec, load_device
from jaxfp8.serving.limits import EngineLimits
from jaxfp8.serving.steps import CompiledSteps
from jaxfp8.sharding import MESH_AXES
from pallas_kernels import costs


def make_steps(compile_request: CompileRequest, spec: DeviceSpec) -> CompiledSteps:
  """The steps of an abstract model on a mesh of absent devices."""
  shape = compile_request.mesh
  mesh = deviceless.absent_mesh(spec, (shape.data, shape.kv, shape.group), MESH_AXES)
  config, recipe, formats = compile_request.config, compile_request.recipe, compile_request.formats
  model = Llama(config, recipe, formats=formats, shape=dataclasses.replace(shape, data=1))
  sequences, pages = compile_request.batch // shape.data, -(-compile_request.context // compile_request.page_tokens)
  limits = EngineLimits(
    num_pages=sequences * pages,
    max_sequences=sequences,
    max_pages=pages,
    decode_sizes=(sequences,),
    prefill_sizes=(compile_request.prefill or 1,),
    page_size=compile_request.page_tokens,
  )
  return CompiledSteps(model, mesh, limits)


def measure(compile_request: CompileRequest, kind: str, save: pathlib.Path | None = None) -> dict[str, Any]:
  """The record of "decode" or "prefill" for one device. save: an existing folder for the HLO text and a jax.export."""
  spec = load_device(compile_request.device)
  steps = make_steps(compile_request, spec)
  sequences = compile_request.batch // compile_request.mesh.data
  prefill = compile_request.prefill or 0
  size, lengths = (sequences, (compile_request.context,) * sequences) if kind == "decode" else (prefill, (prefill,))
  begin, cpu = time.perf_counter(), time.process_time()
  with tempfile.TemporaryDirectory() as dump:
    with deviceless.lowering_for(spec), costs.recording(lengths) as calls:
      lowered = steps.lower(kind, size)
    lowered_at = time.perf_counter()
    program = steps.build(lowered, xla_dump_to=dump)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
    thunks = next(pathlib.Path(dump).glob("*thunk_sequence_after_thunk_passes.txt")).read_text()
  text = program.as_text() or ""
  record = {
    "tokens": size,
    "compile_seconds": round(seconds, 3),
    "trace_seconds": round(lowered_at - begin, 3),
    "compile_cpu_seconds": round(cpu_seconds, 3),
    "serialized_bytes": len(serialize_executable.serialize(program)[0]),
    **_memory(program, text, steps),
    **_traffic(text, calls, steps),
    **_graphs(thunks),
  }
  cost = _step_cost(record, compile_request, size)
  times = roofline.bound(cost, spec)
  record |= {
    "roofline_ms": 1e3 * times.step,
    "bound_by": times.bound_by,
    "times_ms": {name: 1e3 * seconds for name, seconds in dataclasses.asdict(times).items()},
    "parts": _parts(record, calls, spec),
  }
  if save is not None:
    (save / f"{kind}.hlo.txt").write_text(text, encoding="utf-8")
    with deviceless.lowering_for(spec):
      (save / f"{kind}.jax_export").write_bytes(_export(steps, kind, size))
  return record


def _export(steps: CompiledSteps, kind: str, size: int) -> bytes:
  """The serialized jax.export of the step over flat arrays, since jax.export does not know our records. Donates the state."""
  step, arguments = steps.traceable(kind, size)
  leaves, tree = jax.tree.flatten(arguments)
  state = range(steps.num_weights, steps.num_weights + len(jax.tree.leaves(arguments[1])))
  flat = jax.jit(lambda *leaves: tuple(jax.tree.leaves(step(*jax.tree.unflatten(tree, leaves)))), donate_argnums=tuple(state))
  return bytes(jax.export.export(flat, platforms=["cuda"])(*leaves).serialize())


def _counts(steps: CompiledSteps) -> tuple[int, int]:
  """(number of weights, number of KV pool arrays): the program's arguments begin with the weights, then the pools."""
  return steps.num_weights, len(jax.tree.leaves(steps.abstract_state().cache))


def _memory(program: jax.stages.Compiled, text: str, steps: CompiledSteps) -> dict[str, int]:
  """Bytes on one device. weight_bytes and kv_bytes are the sizes of the program's own arguments."""
  memory: Any = program.memory_analysis()
  parsed = hlo.parse(text)
  sizes = {int(x.operands[0]): x.bytes for x in parsed.computations[parsed.entry] if x.opcode == "parameter"}
  weights, pools = _counts(steps)
  return {
    "argument_bytes": memory.argument_size_in_bytes,
    "alias_bytes": memory.alias_size_in_bytes,
    "temp_bytes": memory.temp_size_in_bytes,
    "weight_bytes": sum(sizes[number] for number in range(weights)),
    "kv_bytes": sum(sizes[number] for number in range(weights, weights + pools)),
  }


def _traffic(text: str, calls: list[costs.Call], steps: CompiledSteps) -> dict[str, Any]:
  """The bytes that a step moves on one device, its FLOPs, launches and collectives.

  hbm_bytes: of XLA's operations and the kernels, as if no value stayed in a cache. hbm_floor_bytes: of weights and KV alone.
  """
  tally = traffic.tally(hlo.parse(text), range(_counts(steps)[0]))

  def total(field):
    return sum(getattr(call.cost, field) * call.repeats for call in calls)

  flops = collections.Counter()
  for call in calls:
    flops[call.cost.number_format] += call.cost.flops * call.repeats
  kv_read, kv_written, kernels = total("kv_read_bytes"), total("kv_written_bytes"), total("total_bytes")
  floor = tally.weight_read_bytes + kv_read + kv_written
  layer = max((body for _, body in tally.loops), key=lambda body: body.launches, default=traffic.Tally())
  reduces = sum(number for collective, number in layer.collectives.items() if collective.kind == "all-reduce")
  in_layers = collections.Counter()
  for trips, body in tally.loops:
    in_layers.update({collective: trips * number for collective, number in body.collectives.items()})
  return {
    "weight_read_bytes": tally.weight_read_bytes,
    "weight_written_bytes": tally.weight_written_bytes,
    "kernel_weight_bytes": total("weight_bytes"),
    "kv_read_bytes": kv_read,
    "kv_written_bytes": kv_written,
    "kernel_bytes": kernels,
    "xla_bytes": tally.xla_bytes,
    "sampling_bytes": tally.optional_bytes,
    "hbm_bytes": kernels + tally.xla_bytes,
    "hbm_floor_bytes": floor,
    "activation_bytes": kernels + tally.xla_bytes - floor,
    "flops": dict(flops),
    "layers": sum(trips for trips, _ in tally.loops),
    "kernels_per_step": tally.kernels,
    "kernel_costs_per_step": sum(call.repeats for call in calls),
    "launches_per_step": tally.launches,
    "launches_per_layer": layer.launches,
    "kernels_per_layer": layer.kernels,
    "xla_kernels_per_layer": layer.operations,
    "copies_per_layer": layer.copies,
    "all_reduces_per_layer": reduces,
    "other_collectives_per_layer": sum(layer.collectives.values()) - reduces,
    "collectives_in_layer": {str(collective): number for collective, number in layer.collectives.items()},
    "collectives_elsewhere": {str(collective): number for collective, number in (tally.collectives - in_layers).items()},
    "all_reduce_bytes": sum(x.all_reduce_bytes * number for x, number in tally.collectives.items()),
    "num_collectives": sum(tally.collectives.values()),
  }


def _graphs(thunks: str) -> dict[str, Any]:
  """The number of command buffers (CUDA graphs) in XLA's thunk sequence, and whether a layer is one command buffer."""
  bodies = re.findall(r"body:\n( *)\d+: (\w+) +\[source *\| sink *\]", thunks)
  return {
    "command_buffers": thunks.count(": kCommandBuffer"),
    "layer_in_one_command_buffer": any(kind == "kCommandBuffer" for _, kind in bodies),
  }


def _step_cost(record: dict[str, Any], compile_request: CompileRequest, size: int) -> roofline.StepCost:
  """The roofline's step cost, with bytes and launches taken from the compiled program."""
  return roofline.StepCost(
    mesh=compile_request.mesh,
    num_tokens=size,
    weight_read_bytes=record["weight_read_bytes"],
    kv_read_bytes=record["kv_read_bytes"],
    kv_written_bytes=record["kv_written_bytes"],
    flops=record["flops"],
    all_reduce_bytes=record["all_reduce_bytes"] if compile_request.mesh.tensor > 1 else 0,
    num_collectives=record["num_collectives"] if compile_request.mesh.tensor > 1 else 0,
    launches=record["launches_per_step"],
  )


def _parts(record: dict[str, Any], calls: list[costs.Call], spec: DeviceSpec) -> list[dict[str, Any]]:
  """Per operation: the number of calls, the bytes, the FLOPs and the roofline time of all calls in a step."""
  parts: dict[str, collections.Counter] = {}
  for call in calls:
    part = parts.setdefault(call.operation, collections.Counter())
    seconds = max(call.cost.total_bytes / spec.bandwidth, call.cost.flops / spec.flops(call.cost.number_format))
    part.update(calls=call.repeats, bytes=call.cost.total_bytes * call.repeats, flops=call.cost.flops * call.repeats)
    part.update({"roofline_ms": 1e3 * seconds * call.repeats})
  xla = record["launches_per_step"] - record["kernels_per_step"]
  parts["xla"] = collections.Counter(
    calls=xla, bytes=record["xla_bytes"], roofline_ms=1e3 * record["xla_bytes"] / spec.bandwidth
  )
  return [{"operation": name, "calls": 0, "bytes": 0, "flops": 0, **part} for name, part in parts.items()]


def answer(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """Serves the child process: one answer, with the record of each kind. Raises InputError with the compiler's last line."""
  compile_request = CompileRequest.from_dict(request["compile_request"])
  kinds = ("decode", *(["prefill"] if compile_request.prefill else []))
  save = pathlib.Path(request["save"]) if request["save"] else None
  try:
    yield {kind: measure(compile_request, kind, save) for kind in kinds}
  except InputError:
    raise
  except Exception as error:
    reason = traceback.format_exc().strip().splitlines()[-1][:300]
    raise InputError(f"compile: the compiler gave up: {reason}") from error


if __name__ == "__main__":
  child_process.serve(answer)
