"""Quantizes a Llama checkpoint once and writes it for jaxfp8, with one matrix in memory at a time.

    jaxfp8 convert FOLDER_OR_GGUF OUTPUT
    jaxfp8 convert FOLDER OUTPUT --granularity=block128 --resume
    jaxfp8 convert FOLDER OUTPUT --keep_bf16=auto:4 --gate

INPUT is a Hugging Face folder (BF16, F16, F32, or float8 of compressed-tensors, ModelOpt, FBGEMM, AutoFP8 or DeepSeek's
blocks), a GGUF file or a checkpoint of jaxfp8. Float8 weights of the source are kept bit for bit. The output appears when it
is complete; --resume continues an interrupted conversion. The last line is one JSON object.

--gate compares the written weights with the source's weights in float32 over --text (default: CPython's pydoc_data.topics),
before the output appears. Above a limit the command fails and writes no output. --keep_bf16=auto:N measures the cost of float8
in each matrix alone, over a part of the same text. Both hold the whole model in memory twice, in float32 and quantized.
--calibration_text runs a text through the model, one layer in memory at a time, and writes static scales of inputs, keys and
values.
"""

import concurrent.futures
import functools
import hashlib
import pathlib
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from absl import flags

from jaxfp8 import regular_files
from jaxfp8.commands import calibrate, command, evaluate
from jaxfp8.commands.command import Command, Topic
from jaxfp8.errors import InputError
from jaxfp8.recipe import Granularity
from jaxfp8.terminal import say, show, show_json
from jaxfp8.units import format_bytes, format_seconds

FLAGS = flags.FlagValues()
COST_TOKENS, COST_CONTEXT = 1024, 128  # positions that each matrix is measured on, in chunks of at most so many
CALIBRATION_CONTEXT = 256


_files = Topic("Files", FLAGS)
_files(flags.DEFINE_string, "input", None, "Hugging Face folder, GGUF file or checkpoint of jaxfp8.")
_files(flags.DEFINE_string, "output", None, "Folder to write; it must not exist.")

_precision = Topic("Precision", FLAGS)
_precision(flags.DEFINE_enum, "weights", "fp8", ("fp8", "bf16"), "What the linear layers' weights become.")
_precision(
  flags.DEFINE_enum, "granularity", None, list(Granularity), "What one fp8 weight scale covers (the source's own, or channel)."
)
_precision(
  flags.DEFINE_enum,
  "activations",
  None,
  ("dynamic", "static", "none"),
  "Inputs: scaled when run, by stored scales (the source's or --calibration_text's), or bf16 (default: static where there are "
  "such scales, else dynamic).",
)

_calibration = Topic("Calibration", FLAGS)
_calibration(
  flags.DEFINE_string, "calibration_text", None, "UTF-8 text that static scales of inputs, keys and values come from."
)
_calibration(flags.DEFINE_integer, "calibration_tokens", 8192, "Tokens of it to run, in chunks spread evenly over the text.")

_selection = Topic("Matrices in bf16", FLAGS)
_selection(
  flags.DEFINE_multi_string,
  "keep_bf16",
  [],
  "Matrices that stay bf16: those whose name this expression matches, or the N costliest by auto:N; repeatable.",
)

_gate_flags = Topic("Quality gate", FLAGS)
_gate_flags(
  flags.DEFINE_bool, "gate", False, "Fail, and write nothing, above a limit. The whole model is in memory for that, twice."
)
_gate_flags(flags.DEFINE_float, "max_kl", 0.04, "Limit of --gate: mean KL divergence in nats.")
_gate_flags(flags.DEFINE_float, "max_perplexity_ratio", None, "Limit of --gate: perplexity over the source's.")
_gate_flags(flags.DEFINE_float, "min_top1", None, "Limit of --gate: share of positions with the source's best token.")
_gate_flags(flags.DEFINE_string, "text", None, "UTF-8 text for --gate and auto:N; the default is CPython's pydoc_data.topics.")
_gate_flags(flags.DEFINE_integer, "tokens", 4096, "Positions of it to predict, in chunks spread evenly over the text.")
_gate_flags(flags.DEFINE_integer, "context", 256, "Tokens of a chunk; each is a prompt of its own.")

_execution = Topic("Execution", FLAGS)
_execution(flags.DEFINE_bool, "resume", False, "Go on with an interrupted conversion, and keep what is written if this one is.")


def main() -> int:
  """Runs the command. Raises InputError."""
  from jaxfp8.checkpoint.open import Checkpoint, open_checkpoint
  from jaxfp8.serving.memory import peak_bytes

  if pathlib.Path(FLAGS.output).exists():
    raise InputError(f"convert: {FLAGS.output} exists already. Pass another --output, or remove it first.")
  source = open_checkpoint(FLAGS.input)
  for note in source.notes:
    say(f"readers: {source.path}: {note}.")
  activations = _activations(source)
  keep, notes, seconds, gate_seconds = _convert(source, activations)
  for note in _few(notes):
    say(f"convert: {note}.")
  read = sum(path.stat().st_size for path in source.files())
  ours = Checkpoint(FLAGS.output)
  written = sum(spec.num_bytes for spec in ours.expected.values())
  peak, quality = peak_bytes(), ours.manifest.provenance.get("quality")
  result = {
    "output": FLAGS.output,
    "dialect": source.dialect,
    "recipe": {
      "weights": ours.manifest.recipe.weights,
      "granularity": ours.manifest.recipe.granularity,
      "activations": activations,
    },
    "keep_bf16": keep,
    "quality": quality,
    "read_bytes": read,
    "written_bytes": written,
    "seconds": round(seconds, 3),
    "read_gbps": round(read / seconds / 1e9, 4),
    "peak_rss_bytes": peak,
  }
  if not FLAGS.json:
    show(
      f"{FLAGS.output}: {format_bytes(written)} from {format_bytes(read)} ({source.dialect}) in {format_seconds(seconds)}, "
      f"{read / seconds / 1e9:.3f} GB/s read, at most {format_bytes(peak)} of memory."
    )
    if quality:
      show(f"Passed the gate in {format_seconds(gate_seconds)}: KL {quality['kl']['value']:.4g} nats over {quality['text']}.")
  show_json(result)
  return 0


def _activations(source) -> str:
  """What --activations means with the other flags. Raises InputError for flags that contradict each other."""
  from jaxfp8.checkpoint.quantized_source import has_input_scales

  automatic = _measures()
  for names, owner, there in (
    (("max_kl", "max_perplexity_ratio", "min_top1"), "--gate", FLAGS.gate),
    (("text", "tokens", "context"), "--gate or --keep_bf16=auto:N", FLAGS.gate or automatic),
    (("calibration_tokens",), "--calibration_text", FLAGS.calibration_text),
  ):
    for name in names:
      if not there and not FLAGS[name].using_default_value:
        raise InputError(f"convert: --{name} is for {owner}; got it without. Pass both, or neither.")
  if FLAGS.weights != "fp8" and automatic:
    raise InputError(f"convert: --keep_bf16=auto:N is for --weights=fp8; got --weights={FLAGS.weights}. Leave one of them out.")
  if not FLAGS.calibration_text:
    return FLAGS.activations or ("static" if has_input_scales(source) else "dynamic")
  if FLAGS.activations not in (None, "static"):
    raise InputError(
      f"convert: --calibration_text gives static scales; got --activations={FLAGS.activations}. Leave one of them out."
    )
  if FLAGS.resume:
    raise InputError("convert: a conversion with --calibration_text cannot be gone on with. Leave --resume out.")
  return "static"


def _convert(source, activations: str) -> tuple[list[str], list[str], float, float]:
  """Writes the checkpoint: (--keep_bf16 as expressions, notes, seconds of the conversion, seconds of --gate)."""
  from jaxfp8.checkpoint import convert
  from jaxfp8.checkpoint.quantized_source import default_recipe
  from jaxfp8.progress import Progress
  from jaxfp8.quantization import calibration, quality, quality_gate

  recipe = default_recipe(source, FLAGS.weights, FLAGS.granularity if FLAGS.weights == "fp8" else None)
  held_out = _read(source, "text") if FLAGS.gate or _measures() else None
  training = _read(source, "calibration_text") if FLAGS.calibration_text else None
  if held_out and training and held_out.tokens == training.tokens:
    raise InputError("convert: --text must be held out from calibration; it is the --calibration_text. Pass another --text.")
  gate = _Gate()
  if FLAGS.gate and held_out:
    limits = quality_gate.GateLimits(FLAGS.max_kl, FLAGS.max_perplexity_ratio, FLAGS.min_top1)
    chunks = quality.cut_chunks(held_out.tokens, FLAGS.tokens, FLAGS.context, held_out.bos)
    gate = _Gate(quality_gate.gate(source, chunks, limits, held_out.name))
  if training:
    seen = calibrate.cut_text(training.tokens, training.bos, FLAGS.calibration_tokens, CALIBRATION_CONTEXT)
  with Progress(rate=True) as progress:
    keep = _kept(source, recipe, held_out, progress)
    start = time.perf_counter()
    with (
      progress.task(f"Converting {source.path.name}") as report,
      _Provenance(source.files(), sys.argv[1:]) as provenance,
    ):
      options = {"keep_bf16": keep, "check": gate.check, "progress": report}
      if training:
        about = {"provenance": {"text": training.name}, "late": provenance}
        arrays = calibration.calibrate(
          source.path, FLAGS.output, seen, calibration.all_static(recipe), **about, **options
        ).arrays
      else:
        options |= {"activations": activations, "resume": FLAGS.resume, "provenance": provenance}
        arrays = convert.convert_checkpoint(source, FLAGS.output, recipe, **options)
  return keep, arrays.notes, time.perf_counter() - start - gate.seconds, gate.seconds


class _Text(NamedTuple):
  tokens: list[int]
  bos: int | None  # what each chunk starts with
  name: str


def _read(source, flag: str) -> _Text:
  text, name = evaluate.read_text(FLAGS[flag].value, flag)
  return _Text(*evaluate.encode(source, text), name)


def _measures() -> bool:
  """Whether --keep_bf16 asks for the costliest matrices."""
  from jaxfp8.quantization.quality_gate import is_auto

  return any(map(is_auto, FLAGS.keep_bf16))


def _kept(source, recipe, held_out: _Text | None, progress) -> list[str]:
  """--keep_bf16 with auto:N made explicit."""
  from jaxfp8.checkpoint.quantized_source import QuantizedSource
  from jaxfp8.quantization import quality, quality_gate

  if held_out is None or not _measures():
    return FLAGS.keep_bf16
  for wish in FLAGS.keep_bf16:  # mistakes before minutes of work
    if quality_gate.parse_auto(source, wish) is None:
      QuantizedSource(source, recipe, [wish])
  sizes = min(FLAGS.tokens, COST_TOKENS), min(FLAGS.context, COST_CONTEXT)
  chunks = quality.cut_chunks(held_out.tokens, *sizes, held_out.bos)
  with progress.task("Matrices one at a time") as report:
    return quality_gate.keep_expressions(source, FLAGS.keep_bf16, recipe.granularity, chunks, report)


class _Gate:
  """A check that knows how long it took; none without a gate."""

  def __init__(self, judged=None):
    self.seconds = 0.0
    self.check = functools.partial(self._check, judged) if judged else None

  def _check(self, judged: Callable[[pathlib.Path], dict], folder: pathlib.Path) -> dict:
    start = time.perf_counter()
    try:
      return judged(folder)
    finally:
      self.seconds = time.perf_counter() - start


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
    with regular_files.open_file(path) as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise InputError(f"convert: cannot read {path}: {error.strerror}. Fetch the checkpoint again.") from error


def _few(notes: list[str]) -> list[str]:
  return notes if len(notes) <= 4 else [*notes[:3], f"and {len(notes) - 3} more like these"]


COMMAND = Command(
  "convert",
  main,
  FLAGS,
  topics=(_files, _precision, _calibration, _selection, _gate_flags, _execution),
  positionals=("input", "output"),
  required=("input", "output"),
  json_help="Print only the JSON object.",
  first_only=True,
)


if __name__ == "__main__":
  command.run(COMMAND)
