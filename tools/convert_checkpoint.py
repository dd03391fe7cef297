"""Any Llama checkpoint in, one checkpoint of jaxfp8 out: quantized once, a matrix in memory at a time.

    python -m tools.convert_checkpoint --input FOLDER_OR_GGUF --output FOLDER
    python -m tools.convert_checkpoint --input FOLDER --output FOLDER --granularity=block128 --keep_bf16=v_proj --resume

--input is a Hugging Face folder (BF16, F16, F32, or float8 of compressed-tensors, ModelOpt, FBGEMM, AutoFP8 or DeepSeek's
blocks), a GGUF file or a checkpoint of jaxfp8. Float8 that comes in is kept bit for bit. The output appears when it is whole;
an interrupted conversion goes on with --resume. The last line is one JSON object.
"""

import concurrent.futures
import hashlib
import json
import math
import os
import pathlib
import sys
import time

from absl import flags

from jaxfp8 import cli
from jaxfp8.config import GRANULARITIES
from jaxfp8.errors import InputError
from jaxfp8.units import format_bytes, format_seconds

FLAGS = flags.FlagValues()


def _define(kind, *args, **kwargs) -> None:
  kind(*args, flag_values=FLAGS, **kwargs)


_define(flags.DEFINE_string, "input", None, "Hugging Face folder, GGUF file or checkpoint of jaxfp8.")
_define(flags.DEFINE_string, "output", None, "Folder to write; it must not exist.")
_define(flags.DEFINE_enum, "weights", "fp8", ("fp8", "bf16"), "What the linear layers' weights become.")
_define(
  flags.DEFINE_enum, "granularity", None, GRANULARITIES, "What one fp8 weight scale covers (the source's own, or channel)."
)
_define(
  flags.DEFINE_enum,
  "activations",
  None,
  ("dynamic", "static", "none"),
  "Inputs: scaled when run, by the source's scales, or bf16 (default: static where the source has scales, else dynamic).",
)
_define(flags.DEFINE_multi_string, "keep_bf16", [], "Matrices whose name this expression matches stay bf16; repeatable.")
_define(flags.DEFINE_bool, "resume", False, "Go on with an interrupted conversion, and keep what is written if this one is.")
_define(flags.DEFINE_bool, "json", False, "Print only the JSON object.")


def main(argv: list[str]) -> int:
  """Runs the command. Raises InputError."""
  if len(argv) > 1:
    raise InputError(f"convert: every argument is a flag; got {argv[1]!r}. Run with --help to see them.")
  for name in ("input", "output"):
    if not FLAGS[name].value:
      raise InputError(f"convert: --{name} must be given. Run with --help to see the flags.")
  from jaxfp8 import convert
  from jaxfp8.checkpoint_source import open_any
  from jaxfp8.memory import peak_bytes
  from jaxfp8.progress import Progress
  from jaxfp8.source_arrays import has_inputs

  source = open_any(FLAGS.input)
  for note in source.notes:
    print(f"readers: {source.path}: {note}.", file=sys.stderr)
  activations = FLAGS.activations or ("static" if has_inputs(source) else "dynamic")
  recipe = convert.default_recipe(source, FLAGS.weights, FLAGS.granularity if FLAGS.weights == "fp8" else None)
  start = time.perf_counter()
  with (
    Progress(rate=True) as progress,
    progress.task(f"Converting {source.path.name}") as report,
    _Provenance(source.files(), sys.argv[1:]) as provenance,
  ):
    arrays = convert.convert_checkpoint(
      source,
      FLAGS.output,
      recipe,
      activations=activations,
      keep_bf16=FLAGS.keep_bf16,
      resume=FLAGS.resume,
      provenance=provenance,
      progress=report,
    )
  seconds = time.perf_counter() - start
  for note in _few(arrays.notes):
    print(f"convert: {note}.", file=sys.stderr)
  read = sum(path.stat().st_size for path in source.files())
  written = sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays.expected.values())
  peak = peak_bytes()
  result = {
    "output": FLAGS.output,
    "dialect": source.dialect,
    "recipe": {"weights": recipe.weights, "granularity": recipe.granularity, "activations": activations},
    "read_bytes": read,
    "written_bytes": written,
    "seconds": round(seconds, 3),
    "read_gbps": round(read / seconds / 1e9, 4),
    "peak_rss_bytes": peak,
  }
  if not FLAGS.json:
    print(
      f"{FLAGS.output}: {format_bytes(written)} from {format_bytes(read)} ({source.dialect}) in {format_seconds(seconds)}, "
      f"{read / seconds / 1e9:.3f} GB/s read, at most {format_bytes(peak)} of memory."
    )
  print(json.dumps(result))
  return 0


class _Provenance:
  """The command and the source's hashes; the files are hashed beside the conversion and awaited when they are written down."""

  def __init__(self, files: list[pathlib.Path], command: list[str]):
    self._pool = concurrent.futures.ThreadPoolExecutor(1)
    self._command, self._sums = command, {path: self._pool.submit(_digest, path) for path in files}

  def __call__(self) -> dict:
    return {"command": self._command, "source_sha256": {path.name: sums.result() for path, sums in self._sums.items()}}

  def __enter__(self) -> "_Provenance":
    return self

  def __exit__(self, *error) -> None:
    self._pool.shutdown(wait=False, cancel_futures=True)


def _digest(path: pathlib.Path) -> str:
  try:
    with open(path, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise InputError(f"convert: cannot read {path}: {os.strerror(error.errno)}. Fetch the checkpoint again.") from error


def _few(notes: list[str]) -> list[str]:
  return notes if len(notes) <= 4 else [*notes[:3], f"and {len(notes) - 3} more like these"]


if __name__ == "__main__":
  cli.run(main, FLAGS)
