"""Makes docs/deviceless.md: whole models compiled for absent GPUs, in one table. Needs the `cuda` extra, no GPU; some minutes.

    python -m tools.make_deviceless_docs [--out docs] [--results FILE]

The prose is tools/deviceless.md. --results keeps what was measured, and what FILE holds already is not compiled again.
"""

import json
import pathlib
import re

from absl import flags

from jaxfp8.commands import command
from jaxfp8.commands.command import Command
from jaxfp8.commands.compile_model import heading, make_table
from jaxfp8.errors import InputError
from jaxfp8.planning.compile_request import CompileRequest, compiled_reports
from jaxfp8.planning.devices import load_device
from jaxfp8.units import format_bytes, format_seconds

FLAGS = flags.FlagValues()
flags.DEFINE_string("out", "docs", "Folder that the page is written to.", flag_values=FLAGS)
flags.DEFINE_string("results", "", "JSON file that keeps what was measured.", flag_values=FLAGS)

TEMPLATE = pathlib.Path(__file__).parent / "deviceless.md"
BATCH, CONTEXT, PREFILL = 8, 4096, 2048
BF16 = {"weights": "bf16", "kv_cache": "bf16"}
ROWS = (  # model, device, tensor, what is not FP8
  ("llama-3.1-70b", "h100", 8, {}),
  ("llama-3.1-70b", "h100", 8, BF16),
  ("llama-3.1-70b", "h200", 8, {}),
  ("llama-3.1-70b", "h200", 8, BF16),
  ("llama-3.1-8b", "h100", 1, {}),
  ("llama-3.1-405b", "h100", 16, {}),
)


def main() -> int:
  """Writes the page. Raises InputError when there is no such folder or something does not compile."""
  folder = pathlib.Path(FLAGS.out)
  if not folder.is_dir():
    raise InputError(f"make_deviceless_docs: --out must be a folder that exists; got {FLAGS.out!r}.")
  kept = pathlib.Path(FLAGS.results) if FLAGS.results else None
  results = json.loads(kept.read_text(encoding="utf-8")) if kept and kept.exists() else {}
  for row in ROWS:
    if _name(row) not in results:
      results[_name(row)] = compiled_reports(_compile_request(row))
      if kept:
        kept.write_text(json.dumps(results, indent=1), encoding="utf-8")
  (folder / "deviceless.md").write_text(make_page(results), encoding="utf-8")
  return 0


def make_page(results: dict) -> str:
  """The page as Markdown. Raises KeyError for a name in the prose that nothing computes."""
  values = _values([results[_name(row)] for row in ROWS])
  return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def _compile_request(row) -> CompileRequest:
  model, device, tensor, changes = row
  return CompileRequest.of(model, device, tensor=tensor, batch=BATCH, context=CONTEXT, prefill=PREFILL, **changes)


def _name(row) -> str:
  model, device, tensor, changes = row
  return f"{model}, {'bf16' if changes else 'fp8'}, {tensor} x {device}"


def _values(records: list[dict]) -> dict[str, str]:
  fp8, bf16 = records[0], records[1]
  asked, decode = _compile_request(ROWS[0]), fp8["decode"]
  full = "\n\n".join([heading(asked), *(make_table(kind, fp8[kind], asked) for kind in ("decode", "prefill"))])
  most = max(record["decode"]["launches_per_layer"] for record in records)
  return {
    "conditions": f"batch {BATCH}, {CONTEXT:,} tokens of context a sequence, pages of 64 tokens",
    "decode": _table([record["decode"] for record in records]),
    "prefill": _table([record["prefill"] for record in records]),
    "gain": f"{bf16['decode']['hbm_floor_bytes'] / decode['hbm_floor_bytes']:.2f}",
    "handed": format_bytes(decode["activation_bytes"]),
    "temp": format_bytes(decode["temp_bytes"]),
    "l2": format_bytes(load_device("h100").l2_bytes),
    "sampling": format_bytes(decode["sampling_bytes"]),
    "launches": f"In decode they are at most {most}; tests hold them to 12.",
    "full": "\n".join(f"    {line}".rstrip() for line in full.splitlines()),
  }


def _table(records: list[dict]) -> str:
  names = "program", "weights read", "copied", "KV read", "traffic / floor", "temporaries"
  names += "launches a layer", "collectives a layer", "graphs", "at least", "compile"
  rows = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
  for row, record in zip(ROWS, records, strict=True):
    collectives = ", ".join(f"{number} {name}" for name, number in record["collectives_in_layer"].items())
    cells = [
      _name(row),
      format_bytes(record["weight_read_bytes"]),
      format_bytes(record["weight_written_bytes"]),
      format_bytes(record["kv_read_bytes"]),
      f"{format_bytes(record['hbm_bytes'])} / {format_bytes(record['hbm_floor_bytes'])}",
      format_bytes(record["temp_bytes"]),
      str(record["launches_per_layer"]),
      collectives or "none",
      str(record["command_buffers"]),
      format_seconds(record["roofline_ms"] / 1e3),
      f"{record['compile_cpu_seconds']:.0f} s",
    ]
    rows.append("| " + " | ".join(cells) + " |")
  return "\n".join(rows)


if __name__ == "__main__":
  command.run(Command("make_deviceless_docs", main, FLAGS))
