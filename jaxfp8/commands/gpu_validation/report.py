"""What validate_gpu found, as one file to attach to a report: tables to read, then the records as JSON."""

import json
import math
from typing import Any

from jaxfp8.units import format_rate, format_seconds, format_share

Records = list[dict[str, Any]]


def verdict(records: Records) -> str:
  """One sentence: what passed, what did not, what was not reached."""
  checks = [r for r in records if r["stage"] == "conformance"]
  failed = [r["name"] for r in checks if not r.get("passed")]
  others = [f"{r['stage']} of {r['name']}" for r in records if r["stage"] != "conformance" and r.get("failure")]
  missed = [f"{r['stage']} of {r['name']}" for r in records if r.get("missed")]
  parts = [f"{len(checks) - len(failed)} of {len(checks)} comparisons passed"]
  parts += [f"wrong or failed: {', '.join(failed)}"] if failed else []
  parts += [f"failed: {', '.join(others)}"] if others else []
  parts += [f"not reached in time: {', '.join(missed)}"] if missed else []
  return "; ".join(parts) + "."


def has_failed(records: Records) -> bool:
  """Whether anything but time was missing."""
  return any(r.get("failure") or (r["stage"] == "conformance" and not r.get("passed") and not r.get("missed")) for r in records)


def write_report(records: Records, minutes: float) -> str:
  """The whole file: Markdown, with every record at its end."""
  device = next((r for r in records if r["stage"] == "device"), {})
  lines = [
    f"# {device.get('title', 'unknown device')}",
    "",
    *(["A rehearsal: kernels were interpreted on a CPU, and times say nothing.", ""] if device.get("rehearsal") else []),
    verdict(records),
    "",
    f"{device.get('kind')}, compute capability {_dotted(device)}, {device.get('num_sms')} SMs; jax {device.get('jax')}; "
    f"{device.get('runtime')}; {device.get('driver') or 'no driver version'}; {minutes:.1f} minutes.",
    "",
    *tables(records),
    "## Records",
    "",
    "```json",
    "[",
    ",\n".join(json.dumps(_finite(record)) for record in records),
    "]",
    "```",
  ]
  return "\n".join(lines) + "\n"


def tables(records: Records) -> list[str]:
  """The tables that have rows."""
  made = [
    ("Conformance", ("comparison", "kernel", "against", "error", "allowed", "XLA's error", ""), _conformance_rows),
    ("Times", ("call", "by", "time", "GB/s", "TFLOP/s", "of bandwidth", "of peak", "of roofline", "clock"), _timing_rows),
    ("Tile sizes", ("call", "formula", "best", "tried", "sizes", "written"), _tuning_rows),
    (
      "Models of random weights",
      ("model", "decode", "step", "of roofline", "of bandwidth", "prefill", "of roofline"),
      _model_rows,
    ),
  ]
  lines = []
  for title, head, rows_of in made:
    rows = rows_of(records)
    if rows:
      lines += [f"## {title}", "", _row(head), _row(["---"] * len(head)), *map(_row, rows), ""]
  return lines


def _row(cells) -> str:
  return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def _of(records: Records, stage: str) -> Records:
  return [record for record in records if record["stage"] == stage]


def _problem(record: dict[str, Any]) -> str:
  return "not reached" if record.get("missed") else f"FAILED: {record.get('failure', '')}"


def _conformance_rows(records: Records):
  rows = []
  for r in _of(records, "conformance"):
    if "error" in r and not r.get("failure"):
      xla = f"{r['xla_error']:.2g}" if "xla_error" in r else ""
      word = "" if r["passed"] else "WRONG"
      rows.append((r["name"], r["implementation"], r["against"], f"{r['error']:.2g}", f"{r['limit']:.2g}", xla, word))
    else:
      rows.append((r["name"], r.get("implementation", ""), r.get("against", ""), "", "", "", _problem(r)))
  return rows


def _timing_rows(records: Records):
  rows = []
  for r in _of(records, "timing"):
    for by, t in r.get("times", {}).items():
      shares = [format_share(t[name]) if name in t else "" for name in ("bandwidth_share", "flops_share", "roofline_share")]
      clock = t["method"] + (f" ({t['note']})" if t["note"] else "")
      rows.append((r["name"], by, format_seconds(t["seconds"]), f"{t['gbps']:,.0f}", f"{t['tflops']:.1f}", *shares, clock))
    if not r.get("times"):
      rows.append((r["name"], *[""] * 7, _problem(r)))
  return rows


def _tuning_rows(records: Records):
  rows = []
  for r in _of(records, "tuning"):
    for found in r.get("found", []):
      times = [
        format_seconds(found[name]) if math.isfinite(found[name] or math.inf) else "" for name in ("formula_seconds", "seconds")
      ]
      key = f"{r['name']} ({found['key']['regime']})"
      rows.append((key, *times, found["tried"], json.dumps(found["sizes"]), r["written"] or r.get("failure", "no: not faster")))
    if not r.get("found"):
      rows.append((r["name"], "", "", "", "", _problem(r)))
  return rows


def _model_rows(records: Records):
  rows = []
  for r in _of(records, "models"):
    if "decode_tok_s" not in r:
      rows.append((r["name"], *[""] * 5, _problem(r)))
      continue
    shares = [
      format_share(r[n]) if n in r else "" for n in ("decode_roofline_share", "bandwidth_share", "prefill_roofline_share")
    ]
    decode, prefill = (f"{format_rate(r[name])} tok/s" for name in ("decode_tok_s", "prefill_tok_s"))
    rows.append((r["name"], decode, format_seconds(r["decode_step_seconds"]), *shares[:2], prefill, shares[2]))
  return rows


def _seconds(seconds: float) -> str:
  return format_seconds(seconds) if math.isfinite(seconds) else "cannot be"


def _dotted(device: dict[str, Any]) -> str:
  return ".".join(map(str, device.get("compute_capability", ["?"])))


def _finite(value):
  """JSON has no NaN and no infinity: null."""
  if isinstance(value, dict):
    return {name: _finite(entry) for name, entry in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(entry) for entry in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
