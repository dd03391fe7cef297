"""Compiles kernels, or a model's whole steps, for GPUs that are not there and prints what the programs say.

    jaxfp8 compile --device h100 --kernel fp8_matmul
    jaxfp8 compile --device h200 --json
    jaxfp8 compile --model llama-3.1-70b --tensor 8 --prefill 2048

With --model: memory, traffic beside its floor, launches and collectives a layer, CUDA graphs and the roofline of each part of a
step, for one GPU (docs/deviceless.md says how to read it).
Else one line a kernel and regime: registers a thread, spilled and stack bytes (both must be 0), shared memory, CTAs an SM
holds, bytes under way to one SM beside what the device's bandwidth needs at 700 ns (Little's law), the tensor and copy
instructions, and what one call moves and computes.
Needs the `cuda` extra, no GPU. Times are floors from the device's peaks, not forecasts.
"""

import re
from typing import Any

from absl import flags

from jaxfp8.commands import compile_model
from jaxfp8.commands.command import Command, run
from jaxfp8.errors import InputError
from jaxfp8.terminal import show, show_json

FLAGS = flags.FlagValues()
flags.DEFINE_string("device", "h100", "Name in configs/devices, or a TOML of your own.", flag_values=FLAGS)
flags.DEFINE_string("kernel", "", "Only this operation: fp8_matmul, paged_attention, residual_norm, ...", flag_values=FLAGS)
flags.DEFINE_string("case", "", "Only cases whose name contains this.", flag_values=FLAGS)
flags.DEFINE_bool("json", False, "A list of objects instead of a table.", flag_values=FLAGS)
flags.DEFINE_float("timeout", 600, "Seconds for the compiler.", flag_values=FLAGS)
compile_model.define_flags(FLAGS)

LATENCY_SECONDS = 700e-9
SHOWN = r"[QH]GMMA|[QH]MMA|UTC.?MMA|UTMALDG|LDGSTS|LDL|STL|LDS\.U16|LDS\.U8"


def main() -> int:
  if FLAGS.model:
    if FLAGS.kernel or FLAGS.case:
      raise InputError("compile: --model is about whole steps; got it with --kernel or --case. Leave one of them out.")
    return compile_model.main(FLAGS)
  compile_model.check_no_model_flags(FLAGS)
  from jaxfp8.inspection.deviceless import compile_cases, kernel_target, target_config
  from jaxfp8.planning.devices import load_device
  from pallas_kernels import dispatch
  from pallas_kernels.cases import CASES

  kernels = sorted({case.operation for case in CASES})
  if FLAGS.kernel and FLAGS.kernel not in kernels:
    raise InputError(f"compile: --kernel must be one of {', '.join(kernels)}; got {FLAGS.kernel!r}.")
  cases = [case for case in CASES if FLAGS.kernel in ("", case.operation) and FLAGS.case in case.name]
  if not cases:
    raise InputError(f"compile: no case's name contains {FLAGS.case!r}. Leave --case out to see all.")
  spec = load_device(FLAGS.device)
  target_config(spec)  # refuses what is no GPU
  target = kernel_target(spec)
  if target.capability is None or not dispatch.KERNELS.get(target.capability):
    reason = dispatch.without_kernels(target.capability)
    raise InputError(f"compile: {spec.name}: {reason}, so nothing is compiled. Pass --device=h100.")
  results = compile_cases(FLAGS.device, [case.name for case in cases], FLAGS.timeout)
  rows = [row for case in cases for row in describe(case, results[case.name], spec, target)]
  if FLAGS.json:
    show_json(rows)
  else:
    print_table(rows, spec)
  return int(any(row["error"] or row["spill_bytes"] or row["stack_bytes"] for row in rows))


def describe(case, result: Any, spec, target) -> list[dict]:
  """A row for each kernel of a call; bytes and operations stand with the first. `result`: reports, or what went wrong."""
  row = {"kernel": f"{case.operation}/{case.name}", "device": spec.name, "error": result if isinstance(result, str) else ""}
  if isinstance(result, str):
    return [row | dict.fromkeys(("registers", "spill_bytes", "stack_bytes", "smem_bytes", "bytes_in_flight", "opcodes"))]
  rows = []
  for number, report in enumerate(result):
    bytes_moved, flops = case.cost(target) if number == 0 else (0, 0)
    ctas = report.ctas_per_sm(spec)
    rows.append(
      row
      | {
        "kernel": row["kernel"] + ("" if number == 0 else "+combine"),
        "registers": report.registers,
        "spill_bytes": report.spill_bytes,
        "stack_bytes": report.stack_bytes,
        "smem_bytes": report.smem_bytes,
        "ctas_per_sm": ctas,
        "bytes_in_flight": case.flight(target).per_sm(ctas, spec.num_sms) if number == 0 else 0,
        "bytes_needed": int(spec.bandwidth * LATENCY_SECONDS / spec.num_sms),
        "bytes_moved": bytes_moved,
        "flops": flops,
        "target": report.target,
        "warnings": list(report.warnings),
        "opcodes": report.opcodes,
      }
    )
  return rows


def print_table(rows: list[dict], spec) -> None:
  needed = rows[0].get("bytes_needed", 0)
  show(f"{spec.title}: with {needed:,} bytes in flight an SM draws its share of {spec.bandwidth / 1e12:.2f} TB/s")
  columns = f"{'regs':>4} {'spill':>5} {'stack':>5} {'smem':>7} {'CTAs':>4} {'in flight':>9} {'MB':>8} {'GFLOP':>8}"
  show(f"{'kernel':46} {columns}  opcodes")
  for row in rows:
    if row["error"]:
      show(f"{row['kernel']:46} FAILED: {row['error'].strip().splitlines()[-1][:160]}")
      continue
    shown = {opcode: number for opcode, number in row["opcodes"].items() if re.match(SHOWN, opcode)}
    show(
      f"{row['kernel']:46} {row['registers']:4} {row['spill_bytes']:5} {row['stack_bytes']:5} {row['smem_bytes']:7} "
      f"{row['ctas_per_sm']:4} {row['bytes_in_flight']:9,} {row['bytes_moved'] / 1e6:8.1f} {row['flops'] / 1e9:8.2f}  "
      + " ".join(f"{opcode} {number}" for opcode, number in shown.items())
    )


COMMAND = Command("compile", main, FLAGS, stray_advice="Use --kernel, --case or --model.")


if __name__ == "__main__":
  run(COMMAND)
