"""Finds static scales, and better rounded weights, from text; writes a new checkpoint that has them.

    jaxfp8 calibrate --output=FOLDER
    jaxfp8 calibrate --checkpoint=SOURCE --output=FOLDER --rounding=gptq

Runs text through the model one layer at a time. Records the magnitudes of the inputs of every linear layer, and of the keys
and values of every head. --scales chooses the magnitude that a scale represents: the largest (max), nearly the largest
(percentile), or the one with the least squared error (mse). --rounding rounds the weights of a source that is not float8. The
text is the part of CPython's pydoc_data.topics that `jaxfp8 evaluate` does not predict, or --text. The last line is one JSON
object.
"""

import dataclasses
import pathlib

from absl import flags
from rich.table import Table

from jaxfp8.commands import command, evaluate
from jaxfp8.commands.command import Command, Topic
from jaxfp8.console import console
from jaxfp8.errors import InputError
from jaxfp8.recipe import ACTIVATION_PRECISIONS, FLOAT8_MAX, Granularity, Recipe
from jaxfp8.terminal import show, show_json

FLAGS = flags.FlagValues()
PIPE_WIDTH = 128


_files = Topic("Files", FLAGS)
_files(flags.DEFINE_string, "checkpoint", None, "Hugging Face folder, GGUF file or checkpoint of jaxfp8 (default model).")
_files(flags.DEFINE_string, "output", None, "Folder to write; it must not exist.")

_text = Topic("Text", FLAGS)
_text(flags.DEFINE_string, "text", None, "UTF-8 text to calibrate on, all of it; the default is a part of pydoc_data.topics.")
_text(flags.DEFINE_integer, "tokens", 8192, "Tokens to run, in chunks spread evenly over the text.")
_text(flags.DEFINE_integer, "context", 256, "Tokens of a chunk.")

_quantization = Topic("Quantization", FLAGS)
_quantization(
  flags.DEFINE_enum, "scales", "max", ("max", "percentile", "mse"), "Which of the sizes seen a static scale represents."
)
_quantization(flags.DEFINE_enum, "rounding", "nearest", evaluate.ROUNDINGS, "How weights are rounded that are not float8 yet.")
_quantization(
  flags.DEFINE_enum, "granularity", None, list(Granularity), "What one weight scale covers (the source's own, or channel)."
)
_quantization(flags.DEFINE_enum, "activations", "fp8_static", ACTIVATION_PRECISIONS, "What the checkpoint is made to run in.")
_quantization(flags.DEFINE_enum, "kv_cache", "fp8_static", ACTIVATION_PRECISIONS, "What its KV pages are to hold.")
_quantization(flags.DEFINE_multi_string, "keep_bf16", [], "Matrices whose name this expression matches stay bf16; repeatable.")


def main() -> int:
  """Runs the command. Raises InputError."""
  if pathlib.Path(FLAGS.output).exists():
    raise InputError(f"calibrate: {FLAGS.output} exists already. Pass another --output, or remove it first.")
  from jaxfp8.checkpoint.open import open_checkpoint
  from jaxfp8.checkpoint.quantized_source import default_recipe
  from jaxfp8.progress import Progress
  from jaxfp8.quantization import calibration

  source = open_checkpoint(FLAGS.checkpoint or None)
  chunks, text = _chunks(source)
  with Progress() as progress, progress.task("Calibrating") as report:
    done = calibration.calibrate(
      source,
      FLAGS.output,
      chunks,
      _recipe(source, default_recipe(source)),
      rounding=FLAGS.rounding,
      scales=FLAGS.scales,
      keep_bf16=FLAGS.keep_bf16,
      provenance={"text": text},
      progress=report,
    )
  lines = [
    {"layer": s.layer, "of": s.name, "amax": s.amax.tolist(), **{name: scale.tolist() for name, scale in s.scales.items()}}
    for s in done.seen
  ]
  if not FLAGS.json:
    _print_table(lines)
    show(f"{FLAGS.output}: {chunks.size:,} tokens of {text}; {FLAGS.scales} scales, {FLAGS.rounding} rounding.")
  show_json({"output": FLAGS.output, "tokens": int(chunks.size), "text": text, "scales": FLAGS.scales, "seen": lines})
  return 0


def _recipe(source, default: Recipe) -> Recipe:
  recipe = source.manifest.recipe if source.dialect == "jaxfp8" else default
  activations = FLAGS.activations if recipe.weights == "fp8" or FLAGS["activations"].present else recipe.activations
  granularity = FLAGS.granularity or recipe.granularity
  return dataclasses.replace(recipe, granularity=granularity, activations=activations, kv=FLAGS.kv_cache)


def _chunks(source):
  """(token ids [chunks, context], what the text is)."""
  from jaxfp8.quantization import quality

  text, name = evaluate.read_text(FLAGS.text)
  tokens, bos = evaluate.encode(source, text)
  if FLAGS.text:
    return cut_text(tokens, bos, FLAGS.tokens, FLAGS.context), name
  held_out = quality.cut_chunks(tokens, evaluate.DEFAULT_TOKENS, evaluate.DEFAULT_CONTEXT, bos)
  return quality.cut_training_chunks(tokens, FLAGS.tokens, FLAGS.context, held_out, bos), name


def cut_text(tokens: list[int], bos: int | None, num_tokens: int, context: int):
  """int32 [chunks, context], evenly over a text that is for calibration alone. Raises InputError for one too short."""
  from jaxfp8.quantization import quality

  count = min(num_tokens, len(tokens)) // context
  return quality.cut_chunks(tokens, count * (context - 1), context - 1, bos)


def _print_table(lines: list[dict]) -> None:
  """The largest size of each, and the largest that each choice of scales represents."""
  table = Table(box=None, pad_edge=False)
  for column, header in enumerate(("layer", "of", "amax", "percentile", "mse")):
    table.add_column(header, justify="left" if column == 1 else "right", no_wrap=True)
  for line in lines:
    sizes = [max(line["amax"]), *(FLOAT8_MAX * max(line[name]) for name in ("percentile", "mse"))]
    table.add_row(str(line["layer"]), line["of"], *(f"{size:.4g}" for size in sizes))
  console(width=PIPE_WIDTH).print(table)


COMMAND = Command(
  "calibrate",
  main,
  FLAGS,
  topics=(_files, _text, _quantization),
  required=("output",),
  json_help="Print only the JSON object.",
  first_only=True,
)


if __name__ == "__main__":
  command.run(COMMAND)
