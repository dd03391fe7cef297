"""What quantization costs: perplexity, KL divergence to the source weights and top-1 agreement, recipe by recipe.

    python -m tools.evaluate
    python -m tools.evaluate --recipes=fp8-channel:fp8:fp8 --tokens=8192 --gate
    python -m tools.evaluate --layers --plot=layers.png

A recipe is weights[-granularity]:activations:kv, such as fp8-block128:bf16:fp8. Each figure has a 95 % confidence interval
from resampling whole chunks of the text (bootstrap). The text is CPython's own pydoc_data.topics, or --text.
--layers quantizes one layer at a time, all else in float32, and gives each layer's cost. --gate exits with code 1 above limits.
The last line is one JSON object.
"""

import dataclasses
import hashlib
import json
import pathlib
import sys

from absl import flags
from rich.console import Console
from rich.table import Table

from jaxfp8 import cli
from jaxfp8.config import Recipe
from jaxfp8.errors import InputError
from jaxfp8.plots import check_plot_path
from jaxfp8.quality_plots import plot_layers

FLAGS = flags.FlagValues()
DEFAULT_RECIPES = (
  "bf16:bf16:bf16",
  "bf16:bf16:fp8",
  "fp8-tensor:bf16:bf16",
  "fp8-channel:bf16:bf16",
  "fp8-block128:bf16:bf16",
  "fp8-channel:bf16:fp8",
  "fp8-channel:fp8:bf16",
  "fp8-channel:fp8:fp8",
  "fp8-block128:fp8:fp8",
)
REFERENCES = ("f32", "bf16")
TOPICS_PYTHON = "3.12.1"
TOPICS_SHA256 = "a783e3b11f1e1fb3f70beed4f70fd49df4e94fad6677a2850094360e352928cd"
PIPE_WIDTH = 128
LAYER_CONTEXT = 128  # short chunks, so that few positions still give intervals


def _define(kind, *args, **kwargs) -> None:
  kind(*args, flag_values=FLAGS, **kwargs)


_define(flags.DEFINE_string, "checkpoint", None, "Hugging Face folder or GGUF file with the source weights (default model).")
_define(flags.DEFINE_list, "recipes", list(DEFAULT_RECIPES), "Recipes, each weights[-granularity]:activations:kv.")
_define(flags.DEFINE_enum, "reference", "f32", REFERENCES, "What the source weights are computed in.")
_define(flags.DEFINE_string, "text", None, "UTF-8 text to predict; the default is CPython's pydoc_data.topics.")
_define(flags.DEFINE_integer, "tokens", 4096, "Positions to predict, in chunks spread evenly over the text.")
_define(flags.DEFINE_integer, "context", 256, "Tokens of a chunk; each is a prompt of its own.")
_define(flags.DEFINE_bool, "layers", False, "Also what quantizing each single layer costs (its weights, all else f32).")
_define(flags.DEFINE_enum, "layer_granularity", "channel", ("tensor", "channel", "block128"), "Scales of --layers.")
_define(flags.DEFINE_integer, "layer_tokens", 1024, "Positions to predict for --layers, in chunks of at most 128.")
_define(flags.DEFINE_string, "plot", None, "Draw the layers' cost into this png, svg or pdf; implies --layers.")
_define(flags.DEFINE_bool, "gate", False, "Exit with code 1 if a recipe is above a limit.")
_define(flags.DEFINE_float, "max_kl", 0.04, "Limit of --gate: mean KL divergence in nats.")
_define(flags.DEFINE_float, "max_perplexity_ratio", None, "Limit of --gate: perplexity over the reference's.")
_define(flags.DEFINE_float, "min_top1", None, "Limit of --gate: share of positions with the reference's best token.")
_define(flags.DEFINE_bool, "json", False, "Print only the JSON object.")
_define(flags.DEFINE_bool, "markdown", False, "Print the recipes as a Markdown table.")
_define(flags.DEFINE_string, "implementation", "auto", "Which kernels: auto, or the name of one in pallas_kernels.")
_define(flags.DEFINE_string, "cache_dir", cli.DEFAULT_CACHE_DIR, "Where compiled programs are kept; empty: nowhere.")


def main(argv: list[str]) -> int:
  """Runs the command; returns 1 when --gate finds a recipe above its limits. Raises InputError."""
  if len(argv) > 1:
    raise InputError(f"evaluate: every argument is a flag; got {argv[1]!r}. Run with --help to see them.")
  recipes = {name: parse_recipe(name) for name in FLAGS.recipes}
  if FLAGS.plot:
    check_plot_path(FLAGS.plot)
  cli.keep_compiled_programs(FLAGS.cache_dir)
  result = _evaluate(recipes)
  if FLAGS.plot:
    plot_layers(result["layers"], _layers_title(result), FLAGS.plot)
  failures = _failures(result["recipes"])
  if FLAGS.markdown:
    print(_markdown(result), end="\n\n")
  elif not FLAGS.json:
    _print_tables(result)
  print(json.dumps({**result, "failures": failures}))
  if FLAGS.gate:
    for failure in failures:
      print(failure, file=sys.stderr)
  return int(FLAGS.gate and bool(failures))


def parse_recipe(text: str) -> Recipe:
  """`weights[-granularity]:activations:kv` as a Recipe. Raises InputError for anything else."""
  parts = text.strip().split(":")
  weights, _, granularity = parts[0].partition("-")
  if len(parts) != 3 or (granularity and weights != "fp8"):
    raise InputError(
      f"evaluate: a recipe is weights[-granularity]:activations:kv, with a granularity for fp8 alone; got {text!r}. "
      "Pass for example --recipes=fp8-channel:bf16:fp8,bf16:bf16:bf16."
    )
  return Recipe(weights, granularity or "channel", parts[1], parts[2])


def read_text(path: str | None) -> tuple[str, str]:
  """(text, what it is, in words) of --text. Says so when CPython's topics are others than the README's figures were made on."""
  if path is None:
    from pydoc_data.topics import topics

    text, name = "\n\n".join(topics[key].strip() for key in sorted(topics)), "pydoc_data.topics"
    if hashlib.sha256(text.encode()).hexdigest() != TOPICS_SHA256:
      print(
        f"evaluate: this Python's pydoc_data.topics is not that of CPython {TOPICS_PYTHON}, which published figures stand on: "
        "compare figures of this run alone, or pass --text.",
        file=sys.stderr,
      )
  else:
    try:
      text, name = pathlib.Path(path).read_text(encoding="utf-8"), pathlib.Path(path).name
    except (OSError, UnicodeDecodeError) as error:
      reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
      raise InputError(f"evaluate: cannot read --text={path}: {reason}. Pass a text file.") from error
  return text, f"{name} (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"


def _evaluate(recipes: dict[str, Recipe]) -> dict:
  """Everything that is printed, as plain values."""
  import jax

  from jaxfp8 import convert, quality, readers
  from jaxfp8.progress import Progress
  from jaxfp8.tokenizer import Tokenizer

  path = pathlib.Path(FLAGS.checkpoint) if FLAGS.checkpoint else readers.default_model()
  if convert.is_checkpoint(path):
    raise InputError(f"evaluate: {path} is converted already; what it costs is measured against its source. Pass the source.")
  text, text_name = read_text(FLAGS.text)
  source = readers.open_source(path)
  tokenizer = Tokenizer(source.tokenizer)
  tokens, bos = tokenizer.encode(text), None
  if tokens[: len(tokenizer.encode(""))] == [tokenizer.bos_id]:
    tokens, bos = tokens[1:], tokenizer.bos_id
  chunks = quality.cut_chunks(tokens, FLAGS.tokens, FLAGS.context, bos)
  result = {
    "model": source.config.name,
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "text": text_name,
    "tokens": int(chunks.shape[0] * FLAGS.context),
    "context": FLAGS.context,
    "chunks": int(chunks.shape[0]),
    "reference": FLAGS.reference,
    "interval": f"{quality.CONFIDENCE:.0%} percentile bootstrap over chunks, {quality.RESAMPLES} resamples",
  }
  with Progress() as progress:
    with progress.task(f"Reference in {FLAGS.reference}"):
      plain = Recipe(FLAGS.reference, "channel", FLAGS.reference, FLAGS.reference)
      base = convert.load_source(source, plain, implementation=FLAGS.implementation)
      reference = quality.Reference(base, chunks)
    result["reference_perplexity"] = _plain(quality.bootstrap(reference.nll, quality.EXP))
    result["recipes"] = [_score(source, reference, name, recipe, progress) for name, recipe in recipes.items()]
    if FLAGS.layers or FLAGS.plot:
      reference = None
      result |= _score_layers(
        source, quality.cut_chunks(tokens, FLAGS.layer_tokens, min(FLAGS.context, LAYER_CONTEXT), bos), progress
      )
  return result


def _score(source, reference, name: str, recipe: Recipe, progress) -> dict:
  """One recipe's line."""
  from jaxfp8 import convert, quality

  with progress.task(f"Recipe {name}"):
    model = convert.load_source(source, recipe, implementation=FLAGS.implementation)
    found = quality.Quality.of(reference.score(model), reference.nll)
  return {"recipe": name, **_plain(found)}


def _score_layers(source, chunks, progress) -> dict:
  """KL divergence and top-1 agreement when one layer's weights are quantized, layer by layer."""
  from jaxfp8 import convert, quality

  f32 = convert.load_source(source, Recipe("f32", "channel", "f32", "f32"), implementation=FLAGS.implementation)
  recipe = Recipe("fp8", FLAGS.layer_granularity, "f32", "f32")
  quantized = convert.load_source(source, recipe, implementation=FLAGS.implementation)
  reference, lines = quality.Reference(f32, chunks), []
  with progress.task("Layers one at a time") as report:
    for layer in range(source.config.num_layers):
      found = quality.Quality.of(reference.score(quality.with_layers(f32, quantized, [layer])), reference.nll)
      lines.append({"layer": layer, **_plain(found)})
      report(layer + 1, source.config.num_layers)
    together = quality.Quality.of(reference.score(quantized), reference.nll)
  return {"layers": lines, "all_layers": _plain(together), "layer_tokens": int(chunks[:, 1:].size)}


def _plain(record) -> dict:
  return dataclasses.asdict(record)


def _failures(lines: list[dict]) -> list[str]:
  """One sentence for each figure beyond its limit; the estimates themselves count, not their intervals."""
  limits = (
    ("kl", "KL divergence", FLAGS.max_kl, 1),
    ("perplexity_ratio", "perplexity ratio", FLAGS.max_perplexity_ratio, 1),
    ("top1", "top-1 agreement", FLAGS.min_top1, -1),
  )
  return [
    f"evaluate: {line['recipe']}: {title} must be at {'most' if sign > 0 else 'least'} {limit:g}; got {line[key]['value']:.4g}."
    for line in lines
    for key, title, limit, sign in limits
    if limit is not None and not sign * line[key]["value"] <= sign * limit
  ]


def _conditions(result: dict) -> str:
  return (
    f"{result['model']} on {result['device']}, jax {result['jax']}; {result['tokens']:,} positions of {result['text']} in "
    f"{result['chunks']} chunks of {result['context']}; reference: source weights in {result['reference']}, perplexity "
    f"{_with_interval(result['reference_perplexity'], '.2f')}; {result['interval']}."
  )


def _layers_title(result: dict) -> str:
  return (
    f"{result['model']}: one layer's weights in FP8 ({FLAGS.layer_granularity} scales), all else f32; "
    f"{result['layer_tokens']:,} positions"
  )


HEADERS = ("recipe", "perplexity", "over reference", "KL, nats", "top-1 agreement, %")


def _cells(line: dict) -> tuple[str, ...]:
  top1 = {key: 100 * value for key, value in line["top1"].items()}
  return (
    str(line.get("recipe", line.get("layer"))),
    _with_interval(line["perplexity"], ".2f"),
    _with_interval(line["perplexity_ratio"], ".4f"),
    _with_interval(line["kl"], ".5f" if "layer" in line else ".4f"),
    _with_interval(top1, ".1f"),
  )


def _with_interval(estimate: dict, form: str) -> str:
  return f"{estimate['value']:{form}} [{estimate['low']:{form}}, {estimate['high']:{form}}]"


def _markdown(result: dict) -> str:
  rows = [HEADERS, ("-",) * len(HEADERS), *map(_cells, result["recipes"])]
  return "\n".join(["| " + " | ".join(row) + " |" for row in rows] + ["", _conditions(result)])


def _print_tables(result: dict) -> None:
  console = Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)
  _print_table(console, HEADERS, result["recipes"])
  if "layers" in result:
    console.print(f"\n{_layers_title(result)}:", highlight=False)
    _print_table(console, ("layer", *HEADERS[1:]), [*result["layers"], {"layer": "all", **result["all_layers"]}])
  console.print("\n" + _conditions(result) + "\n", highlight=False)


def _print_table(console: Console, headers: tuple[str, ...], lines: list[dict]) -> None:
  table = Table(box=None, pad_edge=False)
  for place, header in enumerate(headers):
    table.add_column(header, justify="right" if place else "left", no_wrap=True)
  for line in lines:
    table.add_row(*_cells(line))
  console.print(table)


if __name__ == "__main__":
  cli.run(main, FLAGS)
