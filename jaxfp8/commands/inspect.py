"""Shows the content of a checkpoint of jaxfp8: tensors with their scales, outliers, bytes a device, and provenance.

    jaxfp8 inspect CHECKPOINT --tensor=8
    jaxfp8 inspect CHECKPOINT --verify

Saturated values are those of +-448, zero values those of +-0. A layer is an outlier when its largest scale is more than
--outlier times the median of the same matrix over all layers. --verify compares the SHA-256 of every array with the one that
was stored, and exits with code 1 if one differs; a damaged manifest or text is refused in any case. The last line is one JSON
object.
"""

import json
import math
import re
import statistics
from typing import Any

from absl import flags
from rich.table import Table

from jaxfp8.commands import command
from jaxfp8.commands.command import Command, Topic
from jaxfp8.console import console
from jaxfp8.errors import InputError
from jaxfp8.terminal import say, show_json
from jaxfp8.units import format_bytes, format_share

FLAGS = flags.FlagValues()
_PIPE_WIDTH = 160


_checks = Topic("Checkpoint and checks", FLAGS)
_checks(flags.DEFINE_string, "checkpoint", None, "Checkpoint of jaxfp8.")
_checks(flags.DEFINE_integer, "tensor", 1, "Bytes a device where the model is cut over this many.", lower_bound=1)
_checks(flags.DEFINE_float, "outlier", 4.0, "A scale this many times its matrix's median over the layers stands out.")
_checks(flags.DEFINE_bool, "verify", False, "Compare everything with its checksum; exit with code 1 if something differs.")


def main() -> int:
  """Runs the command. Raises InputError."""
  from jaxfp8.checkpoint.manifest import require_checkpoint
  from jaxfp8.checkpoint.open import Checkpoint
  from jaxfp8.progress import Progress

  require_checkpoint(FLAGS.checkpoint)
  source = Checkpoint(FLAGS.checkpoint)
  raw = json.loads(source.manifest.text)
  if FLAGS.verify and not raw.get("checksums"):
    raise InputError(
      f"inspect: {FLAGS.checkpoint} was written without checksums (format version {raw['format_version']}). Convert it again."
    )
  per_device = _bytes_per_device(source.manifest, FLAGS.tensor)
  with Progress(rate=True) as progress, progress.task("Reading") as report:
    lines, wrong = _read_all(source, raw, report)
  outliers = _outliers(lines)
  result = {
    "checkpoint": FLAGS.checkpoint,
    "format_version": raw["format_version"],
    "recipe": raw["recipe"],
    "provenance": raw["provenance"],
    "calibration": raw["provenance"].get("calibration"),
    "quality": raw["provenance"].get("quality"),
    "exceptions": raw.get("exceptions", {}),
    "tensors": lines,
    "outliers": outliers,
    "bytes": sum(line["bytes"] for line in lines),
    "tensor": FLAGS.tensor,
    "bytes_per_device": per_device,
    "verified": not wrong if FLAGS.verify else None,
    "wrong": wrong,
  }
  if not FLAGS.json:
    _print(result)
  for key in wrong:
    say(f"inspect: {key} is not what was written. Convert the checkpoint again.")
  show_json(result)
  return 1 if wrong else 0


def _read_all(source, raw: dict, report) -> tuple[list[dict], list[str]]:
  """(one line for each array, keys whose checksum differs), an array in memory at a time."""
  from jaxfp8.checkpoint.block_digests import sha256_of

  lines, wrong, done = [], [], 0
  total = sum(spec.num_bytes for spec in source.expected.values())
  for key, (shape, dtype) in source.expected.items():
    array = source.read_array(key, verify=not FLAGS.verify)
    line = {"key": key, "dtype": dtype.name, "shape": list(shape), "bytes": _size(shape, dtype)}
    lines.append(line | _figures(key, array))
    if FLAGS.verify and raw["checksums"].get(key) != sha256_of(array):
      wrong.append(key)
    done += line["bytes"]
    report(done, total)
  return lines, wrong


def _size(shape: tuple[int, ...], dtype) -> int:
  return math.prod(shape) * dtype.itemsize


def _figures(key: str, array) -> dict:
  """Shares of a float8 array's values that are saturated and zero; least and largest scale."""
  import numpy as np

  if array.dtype.name == "float8_e4m3fn":
    counts = np.bincount(np.ascontiguousarray(array).view(np.uint8).reshape(-1), minlength=256)
    return {
      "saturated": float(counts[0x7E] + counts[0xFE]) / array.size,
      "zero": float(counts[0x00] + counts[0x80]) / array.size,
      "nan": int(counts[0x7F] + counts[0xFF]),
    }
  if re.search(r"scale\[", key):
    return {"least": float(array.min()), "largest": float(array.max())}
  return {}


def _outliers(lines: list[dict]) -> list[dict]:
  by_matrix: dict[str, list[tuple[int, float]]] = {}
  for line in lines:
    match = re.match(r"model\.layers\.(\d+)\.(.*\.scale)\[", line["key"])
    if match:
      by_matrix.setdefault(match[2], []).append((int(match[1]), line["largest"]))
  outliers = []
  for matrix, scales in by_matrix.items():
    median = statistics.median(scale for _, scale in scales)
    outliers += [
      {"layer": layer, "matrix": matrix.removesuffix(".scale"), "scale": scale, "times_median": scale / median}
      for layer, scale in scales
      if median > 0 and scale > FLAGS.outlier * median
    ]
  return sorted(outliers, key=lambda entry: -entry["times_median"])


def _bytes_per_device(manifest, tensor: int) -> int:
  """Of the weights as they are in memory: merged, padded, replicated where KV heads are fewer than devices."""
  import jax
  from flax import nnx

  from jaxfp8.mesh import MeshShape
  from jaxfp8.model.llama import Llama

  model = Llama(manifest.config, manifest.recipe, formats=manifest.formats, shape=MeshShape.for_model(manifest.config, tensor))
  leaves = jax.tree.leaves(nnx.state(model))
  return sum(
    leaf.size * leaf.dtype.itemsize // (tensor if any(axis is not None for axis in spec) else 1)
    for leaf, spec in zip(leaves, model.partitions(), strict=True)
  )


def _print(result: dict) -> None:
  out = console(width=_PIPE_WIDTH)
  table = Table(box=None, pad_edge=False)
  for column, header in enumerate(("tensor", "dtype", "shape", "bytes", "scales", "saturated", "zero")):
    table.add_column(header, justify="right" if column > 2 else "left", no_wrap=True)
  for line in result["tensors"]:
    scales = f"{line['least']:.3g} .. {line['largest']:.3g}" if "least" in line else ""
    shares = [format_share(line[name]) if name in line else "" for name in ("saturated", "zero")]
    shape = " x ".join(map(str, line["shape"])) or "one"
    table.add_row(line["key"], line["dtype"], shape, format_bytes(line["bytes"]), scales, *shares)
  out.print(table)
  recipe = result["recipe"]
  came_from = {key: value for key, value in result["provenance"].items() if key not in ("calibration", "quality")}
  for title, value in (
    ("recipe", " ".join(f"{name}={recipe[name]}" for name in recipe)),
    ("total", format_bytes(result["bytes"])),
    ("on a device", f"{format_bytes(result['bytes_per_device'])} with tensor={result['tensor']}"),
    ("exceptions", ", ".join(f"{module} ({kind})" for module, kind in result["exceptions"].items()) or "none"),
    ("calibration", json.dumps(result["calibration"]) if result["calibration"] else "none"),
    ("quality", _quality(result["quality"]) if result["quality"] else "not measured"),
    ("outliers", "; ".join(_outlier(entry) for entry in result["outliers"][:8]) or "none"),
    ("came from", json.dumps(came_from, ensure_ascii=False)),
    ("checksums", {None: "not compared (--verify)", True: "all equal", False: "DIFFERENT"}[result["verified"]]),
  ):
    out.print(f"{title:<12} {value}", highlight=False, soft_wrap=True)


def _quality(score: Any) -> str:
  """What a conversion with a gate has stored; as it is if someone else has written it."""
  try:
    return _gate_words(score)
  except (KeyError, TypeError, ValueError, AttributeError):
    return json.dumps(score)


def _gate_words(score: Any) -> str:
  kl, ratio, top1 = (score[name]["value"] for name in ("kl", "perplexity_ratio", "top1"))
  limits = ", ".join(f"{name} {value:g}" for name, value in score["limits"].items() if value is not None)
  return (
    f"KL {kl:.4g} nats [{score['kl']['low']:.4g}, {score['kl']['high']:.4g}], perplexity times {ratio:.4g}, top-1 agreement "
    f"{format_share(top1)}; {score['positions']:,} positions of {score['text']} against the source; limits: {limits or 'none'}"
  )


def _outlier(entry: dict) -> str:
  return f"layer {entry['layer']} {entry['matrix']}: {entry['scale']:.3g}, {entry['times_median']:.1f} times the median"


COMMAND = Command(
  "inspect",
  main,
  FLAGS,
  topics=(_checks,),
  positionals=("checkpoint",),
  required=("checkpoint",),
  json_help="Print only the JSON object.",
)


if __name__ == "__main__":
  command.run(COMMAND)
