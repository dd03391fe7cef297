"""Makes docs/why-3-tokens-per-second.md and its pictures from the planner, so that every number in it stays true.

    python -m tools.make_docs [--out docs]

The prose is tools/why-3-tokens-per-second.md; {{name}} in it stands for a number or a table that is computed here.
"""

import io
import pathlib
import re
import textwrap

from absl import flags
from rich.console import Console

from jaxfp8.commands import command
from jaxfp8.commands.command import Command
from jaxfp8.errors import InputError
from jaxfp8.planning.advice import Speculation
from jaxfp8.planning.deployment import decode_times
from jaxfp8.planning.devices import CPU, device_names
from jaxfp8.planning.planner import DeploymentPlan, plan_deployment
from jaxfp8.planning.plots import plot_plan
from jaxfp8.planning.report import print_ceilings, print_memory, print_sweep, print_times, print_ways_out
from jaxfp8.units import format_bytes, format_rate, format_seconds, format_share

FLAGS = flags.FlagValues()
flags.DEFINE_string("out", "docs", "Folder that the page and its pictures are written to.", flag_values=FLAGS)

PAGE = "why-3-tokens-per-second"
TEMPLATE = pathlib.Path(__file__).parent / f"{PAGE}.md"
MODEL, DEVICE = "llama-3.1-70b", "gb10"
WIDTH = 112


def main() -> int:
  """Writes the page and its two pictures. Raises InputError when there is no such folder."""
  folder = pathlib.Path(FLAGS.out)
  if not folder.is_dir():
    raise InputError(f"make_docs: --out must be a folder that exists; got {FLAGS.out!r}.")
  (folder / f"{PAGE}.md").write_text(make_page(), encoding="utf-8")
  plot_plan(_spark(observed=3.0), str(folder / f"{PAGE}-gb10.png"))
  plot_plan(plan_deployment(MODEL, "h100", tensor=8, batches=(1, 8, 64, 256)), str(folder / f"{PAGE}-h100.png"))
  return 0


def make_page() -> str:
  """The whole page as Markdown. Raises KeyError for a name in the prose that nothing computes."""
  values = _values()
  return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def _spark(**changes) -> DeploymentPlan:
  return plan_deployment(MODEL, DEVICE, **changes)


def _values() -> dict[str, str]:
  plan = _spark(observed=3.0)
  one, eight = plan.batches[:2]
  bf16 = plan_deployment(MODEL, DEVICE, weights="bf16", kv_cache="bf16", count=2)
  empty = decode_times(plan.deployment, 1, 1)
  flops = plan.deployment.device.flops("fp8")
  held = dict(plan.sequences)
  most = plan_deployment(MODEL, DEVICE, batches=(held[8192],)).batches[0]
  a100 = plan_deployment(MODEL, "a100-80", batches=(1,))
  return {
    "verdict": _indented(plan.verdict.sentence),
    "wrong_verdict": _indented(_spark(observed=0.4).verdict.sentence),
    "streamed": format_bytes(plan.weights_read_bytes),
    "bandwidth": format_bytes(plan.deployment.device.bandwidth) + "/s",
    "step_empty": format_seconds(empty.step),
    "ceiling_empty": format_rate(1 / empty.step),
    "flops_time": format_seconds(empty.flops),
    "idle": f"{100 * (1 - empty.flops / empty.step):.1f} %",
    "fp8_teraflops": f"{flops / 1e12:,.0f}",
    "bf16_weights": format_bytes(2 * bf16.weights_bytes),
    "fp8_gain": f"{one.fp8_weights_gain:.2f}",
    "kv_token": format_bytes(plan.kv_bytes_per_token),
    "kv_token_bf16": format_bytes(2 * bf16.kv_bytes_per_token),
    "kv_8k": format_bytes(plan.memory.kv),
    "kv_gain_1": f"{one.fp8_kv_gain:.2f}",
    "kv_gain_32": f"{plan.batches[2].fp8_kv_gain:.2f}",
    "seqs_8k": str(held[8192]),
    "each_8": format_rate(eight.decode_ceiling_tok_s),
    "each_1": format_rate(one.decode_ceiling_tok_s),
    "total_8": format_rate(eight.total_ceiling_tok_s),
    "total_most": format_rate(most.total_ceiling_tok_s),
    "each_most": format_rate(most.decode_ceiling_tok_s),
    "times_most": f"{most.total_ceiling_tok_s / one.total_ceiling_tok_s:.0f}",
    "compute_bound": f"{plan.compute_bound_batch_empty:,}",
    "prefill": format_rate(one.prefill_ceiling_tok_s),
    "ttft": format_seconds(one.ttft_floor_s),
    "a100_prefill": format_rate(a100.batches[0].prefill_ceiling_tok_s),
    "a100_gain": f"{a100.batches[0].fp8_weights_gain:.2f}",
    "left": format_bytes(plan.memory.free),
    "usable": format_bytes(plan.deployment.device.usable_bytes),
    "weights": format_bytes(plan.weights_bytes),
    "expected_low": format_share(plan.expected_fraction[0]),
    "expected_high": format_share(plan.expected_fraction[1]),
    "memory_table": _text(print_memory, plan),
    "ceilings_table": _text(print_ceilings, plan),
    "times_table": _text(print_times, plan),
    "ways_out_table": _text(print_ways_out, plan),
    "tensor_table": _tensor_table(),
    "speculation_table": _speculation_table(),
    "sweep_table": _sweep_table(),
  }


def _text(printer, *args) -> str:
  console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
  printer(console, *args)
  lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
  return "\n".join(lines).strip("\n")


def _indented(sentence: str) -> str:
  return textwrap.fill(sentence, WIDTH, subsequent_indent="    ")


def _tensor_table() -> str:
  rows = ["| machines | GB10, 25 GB/s between them | of that all-reduces | H100, NVLink | of that all-reduces |", "|-|-|-|-|-|"]
  for tensor in (1, 2, 4, 8):
    cells = [str(tensor)]
    for device in (DEVICE, "h100"):
      batch = plan_deployment(MODEL, device, tensor=tensor, batches=(1,)).batches[0]
      share = batch.times.collectives / batch.step_floor_s
      cells += [f"{format_rate(batch.decode_ceiling_tok_s)} tok/s", format_share(share) if share else "none"]
    rows.append("| " + " | ".join(cells) + " |")
  return "\n".join(rows)


def _speculation_table() -> str:
  rows = ["| accepted | tokens a step | speed, one reader |", "|-|-|-|"]
  for acceptance in (0.3, 0.5, 0.7, 0.9):
    speculation = Speculation(acceptance)
    ways = _spark(batches=(1,), speculation=speculation).ways_out
    gain = next((way.total_gain for way in ways if way.what.startswith("speculation")), 1.0)
    rows.append(f"| {format_share(acceptance)} | {speculation.tokens_per_step:.2f} | x {gain:.2f} |")
  return "\n".join(rows)


def _sweep_table() -> str:
  plans = [plan_deployment(MODEL, name, batches=(1, 8)) for name in device_names() if name != CPU]
  return _text(print_sweep, plans, [])


if __name__ == "__main__":
  command.run(Command("make_docs", main, FLAGS))
