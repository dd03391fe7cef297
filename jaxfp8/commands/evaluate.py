"""Measures the cost of quantization: perplexity, KL divergence to the source weights and top-1 agreement of each recipe.

    jaxfp8 evaluate
    jaxfp8 evaluate --recipes=fp8-channel:fp8:fp8 --tokens=8192 --gate
    jaxfp8 evaluate --layers --plot=layers.png

A recipe is weights[-granularity[-rounding]]:activations:kv, such as fp8-channel-gptq:fp8_static:fp8. Each figure has a 95 %
confidence interval from resampling whole chunks of the text (bootstrap). The text is CPython's own pydoc_data.topics, or
--text. Static scales and roundings are calibrated on parts of the text that are not predicted.

--layers and --matrices quantize one layer or matrix at a time, with all others in float32, and show its cost.
--keep_bf16=auto:N keeps the N costliest matrices of every fp8 recipe in bf16. --gate exits with code 1 above a limit. The last
line is one JSON object.
"""

import dataclasses
import hashlib
import pathlib

from absl import flags

from jaxfp8 import regular_files
from jaxfp8.commands import command
from jaxfp8.commands.command import Command, Topic
from jaxfp8.commands.evaluate_tables import layers_title, markdown, print_tables
from jaxfp8.errors import InputError
from jaxfp8.plots import check_plot_path
from jaxfp8.quantization.plots import plot_layers
from jaxfp8.recipe import Granularity, Recipe
from jaxfp8.terminal import say, show, show_json

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
  "fp8-channel:bf16:fp8_static",
  "fp8-channel:fp8_static:bf16",
  "fp8-channel:fp8_static:fp8_static",
  "fp8-channel-mse:bf16:bf16",
  "fp8-channel-gptq:bf16:bf16",
  "fp8-channel-gptq:fp8:fp8",
  "fp8-channel-gptq:fp8_static:fp8_static",
)
ROUNDINGS = ("nearest", "mse", "gptq")  # as in jaxfp8.rounding, which imports jax
REFERENCES = ("f32", "bf16")
TOPICS_PYTHON = "3.12.1"
TOPICS_SHA256 = "a783e3b11f1e1fb3f70beed4f70fd49df4e94fad6677a2850094360e352928cd"
CALIBRATION_CONTEXT = 256
DEFAULT_TOKENS, DEFAULT_CONTEXT = 4096, 256  # the part of the text that is predicted
LAYER_CONTEXT = 128  # short chunks, so that few positions still give intervals


_recipes = Topic("Model and recipes", FLAGS)
_recipes(flags.DEFINE_string, "checkpoint", None, "Hugging Face folder or GGUF file with the source weights (default model).")
_recipes(flags.DEFINE_list, "recipes", list(DEFAULT_RECIPES), "Recipes, each weights[-granularity]:activations:kv.")
_recipes(flags.DEFINE_enum, "reference", "f32", REFERENCES, "What the source weights are computed in.")

_text = Topic("Text", FLAGS)
_text(flags.DEFINE_string, "text", None, "UTF-8 text to predict; the default is CPython's pydoc_data.topics.")
_text(flags.DEFINE_integer, "tokens", DEFAULT_TOKENS, "Positions to predict, in chunks spread evenly over the text.")
_text(flags.DEFINE_integer, "context", DEFAULT_CONTEXT, "Tokens of a chunk; each is a prompt of its own.")

_costs = Topic("Cost of single layers and matrices", FLAGS)
_costs(flags.DEFINE_bool, "layers", False, "Also what quantizing each single layer costs (its weights, all else f32).")
_costs(flags.DEFINE_bool, "matrices", False, "Also what quantizing each single matrix costs.")
_costs(
  flags.DEFINE_multi_string, "keep_bf16", [], "Matrices of fp8 recipes that stay bf16: an expression or auto:N; repeatable."
)

_calibration = Topic("Calibration", FLAGS)
_calibration(flags.DEFINE_integer, "calibration_tokens", 8192, "Tokens that static scales and roundings are chosen on.")
_calibration(
  flags.DEFINE_enum, "scales", "max", ("max", "percentile", "mse"), "Which of the sizes seen static scales represent."
)

_single = Topic("Sizes of --layers and --matrices", FLAGS)
_single(flags.DEFINE_enum, "layer_granularity", "channel", list(Granularity), "Scales of --layers and --matrices.")
_single(flags.DEFINE_integer, "layer_tokens", 1024, "Positions to predict for --layers, in chunks of at most 128.")
_single(flags.DEFINE_string, "plot", None, "Draw the layers' cost into this png, svg or pdf; implies --layers.")

_gate = Topic("Quality gate", FLAGS)
_gate(flags.DEFINE_bool, "gate", False, "Exit with code 1 if a recipe is above a limit.")
_gate(flags.DEFINE_float, "max_kl", 0.04, "Limit of --gate: mean KL divergence in nats.")
_gate(flags.DEFINE_float, "max_perplexity_ratio", None, "Limit of --gate: perplexity over the reference's.")
_gate(flags.DEFINE_float, "min_top1", None, "Limit of --gate: share of positions with the reference's best token.")

_execution = Topic("Output and execution", FLAGS)
_execution(flags.DEFINE_bool, "markdown", False, "Print the recipes as a Markdown table.")
_execution(flags.DEFINE_string, "implementation", "auto", "Which kernels: auto, or the name of one in pallas_kernels.")
_execution(flags.DEFINE_string, "cache_dir", command.DEFAULT_CACHE_DIR, "Where compiled programs are kept; empty: nowhere.")


def main() -> int:
  """Runs the command; returns 1 when --gate finds a recipe above its limits. Raises InputError."""
  recipes = {name: parse_recipe(name) for name in FLAGS.recipes}
  if FLAGS.plot:
    check_plot_path(FLAGS.plot)
  command.keep_compiled_programs(FLAGS.cache_dir)
  from jaxfp8.quantization.quality_gate import GateLimits

  result = _evaluate(recipes)
  if FLAGS.plot:
    plot_layers(result["layers"], layers_title(result), FLAGS.plot)
  limits = GateLimits(FLAGS.max_kl, FLAGS.max_perplexity_ratio, FLAGS.min_top1)
  failures = [failure for line in result["recipes"] for failure in limits.failures(f"evaluate: {line['recipe']}", line)]
  if FLAGS.markdown:
    show(markdown(result) + "\n")
  elif not FLAGS.json:
    print_tables(result)
  show_json({**result, "failures": failures})
  if FLAGS.gate:
    for failure in failures:
      say(failure)
  return int(FLAGS.gate and bool(failures))


def parse_recipe(text: str) -> Recipe:
  """`weights[-granularity[-rounding]]:activations:kv` as a Recipe. Raises InputError for anything else."""
  parts = text.strip().split(":")
  weights, *rest = parts[0].split("-")
  if len(parts) != 3 or len(rest) > 2 or (rest and weights != "fp8") or rounding_of(text) not in ROUNDINGS:
    raise InputError(
      f"evaluate: a recipe is weights[-granularity[-rounding]]:activations:kv, with a granularity for fp8 alone and a rounding "
      f"of {', '.join(ROUNDINGS)}; got {text!r}. Pass for example --recipes=fp8-channel:bf16:fp8,bf16:bf16:bf16."
    )
  return Recipe(weights, rest[0] if rest else "channel", parts[1], parts[2])


def rounding_of(text: str) -> str:
  """How the weights of a recipe are rounded."""
  names = text.strip().split(":")[0].split("-")
  return names[2] if len(names) > 2 else "nearest"


def read_text(path: str | None, flag: str = "text") -> tuple[str, str]:
  """(text, what it is, in words) of --text, or of another flag.

  Says so when CPython's topics are others than the README's figures were made on.
  """
  if path is None:
    from pydoc_data.topics import topics

    text, name = "\n\n".join(topics[key].strip() for key in sorted(topics)), "pydoc_data.topics"
    if hashlib.sha256(text.encode()).hexdigest() != TOPICS_SHA256:
      say(
        f"evaluate: this Python's pydoc_data.topics is not that of CPython {TOPICS_PYTHON}, which published figures stand on: "
        "compare figures of this run alone, or pass --text."
      )
  else:
    try:
      text, name = regular_files.read_text(path, regular_files.CORPUS_BYTES), pathlib.Path(path).name
    except (OSError, UnicodeDecodeError) as error:
      reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
      raise InputError(f"evaluate: cannot read --{flag}={path}: {reason}. Pass a text file.") from error
  return text, f"{name} (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"


def _evaluate(recipes: dict[str, Recipe]) -> dict:
  """Everything that is printed, as plain values."""
  import jax

  from jaxfp8.checkpoint import load, readers
  from jaxfp8.checkpoint.manifest import is_checkpoint
  from jaxfp8.progress import Progress
  from jaxfp8.quantization import quality, quality_gate

  path = pathlib.Path(FLAGS.checkpoint) if FLAGS.checkpoint else readers.default_model()
  if is_checkpoint(path):
    raise InputError(f"evaluate: {path} is converted already; what it costs is measured against its source. Pass the source.")
  text, text_name = read_text(FLAGS.text)
  source = readers.open_source(path)
  for name in FLAGS.keep_bf16:  # refuses a wrong N before minutes of work
    quality_gate.parse_auto(source, name)
  tokens, bos = encode(source, text)
  chunks = quality.cut_chunks(tokens, FLAGS.tokens, FLAGS.context, bos)
  training = quality.cut_training_chunks(tokens, FLAGS.calibration_tokens, CALIBRATION_CONTEXT, chunks, bos)
  result = {
    "model": source.config.name,
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "text": text_name,
    "tokens": int(chunks.shape[0] * FLAGS.context),
    "context": FLAGS.context,
    "chunks": int(chunks.shape[0]),
    "calibration_tokens": int(training.size),
    "scales": FLAGS.scales,
    "layer_granularity": FLAGS.layer_granularity,
    "reference": FLAGS.reference,
    "interval": f"{quality.CONFIDENCE:.0%} percentile bootstrap over chunks, {quality.RESAMPLES} resamples",
  }
  with Progress() as progress:
    with progress.task(f"Reference in {FLAGS.reference}"):
      plain = Recipe(FLAGS.reference, "channel", FLAGS.reference, FLAGS.reference)
      base = load.load_source(source, plain, implementation=FLAGS.implementation)
      reference = quality.Reference(base, chunks)
    result["reference_perplexity"] = _plain(quality.bootstrap(reference.nll, quality.EXP))
    short = quality.cut_chunks(tokens, FLAGS.layer_tokens, min(FLAGS.context, LAYER_CONTEXT), bos)
    if FLAGS.matrices or any(map(quality_gate.is_auto, FLAGS.keep_bf16)):
      with progress.task("Matrices one at a time") as report:
        result["matrices"] = quality_gate.matrix_costs(source, FLAGS.layer_granularity, short, report)
    keep = _kept(source, result.get("matrices", ()))
    models = _Models(source, training, keep)
    for name, recipe in recipes.items():
      with progress.task(f"Recipe {name}"):
        quality_of_recipe = quality.Quality.of(reference.score(models.load(recipe, rounding_of(name))), reference.nll)
      result.setdefault("recipes", []).append({"recipe": name, **_plain(quality_of_recipe)})
    result["keep_bf16"] = keep
    if FLAGS.layers or FLAGS.plot:
      reference = models = None
      result |= _score_layers(source, short, progress)
  return result


def encode(source, text: str) -> tuple[list[int], int | None]:
  """(tokens without bos, the bos that each chunk starts with or None)."""
  from jaxfp8.text.tokenizer import Tokenizer

  tokenizer = Tokenizer(source.tokenizer)
  tokens = tokenizer.encode(text)
  if tokens[: len(tokenizer.encode(""))] == [tokenizer.bos_id]:
    return tokens[1:], tokenizer.bos_id
  return tokens, None


def _kept(source, costs) -> list[str]:
  """--keep_bf16 with auto:N made explicit."""
  from jaxfp8.quantization import quality_gate

  counts = [(name, quality_gate.parse_auto(source, name)) for name in FLAGS.keep_bf16]
  return [e for name, count in counts for e in ([name] if count is None else quality_gate.costliest(costs, count))]


class _Models:
  """Loads recipes; one calibration serves all recipes in a row that have its weights."""

  def __init__(self, source, training, keep: list[str]):
    self.source, self.training, self.keep = source, training, keep
    self._last = None

  def load(self, recipe: Recipe, rounding: str):
    from jaxfp8.checkpoint import load
    from jaxfp8.quantization import calibration

    keep = self.keep if recipe.weights == "fp8" else []
    if rounding == "nearest" and not (recipe.activations.is_static or recipe.kv.is_static):
      return load.load_source(self.source, recipe, keep_bf16=keep, implementation=FLAGS.implementation)
    key_of_weights = recipe.weights, recipe.granularity, rounding
    if self._last is None or self._last[0] != key_of_weights:
      calibrator = calibration.Calibrator(self.source, recipe, self.training, rounding, FLAGS.scales, keep_bf16=keep)
      arrays = {key: array for _, group in calibrator.layers() for key, array in group.items()}
      self._last = key_of_weights, calibrator, arrays
    _, calibrator, arrays = self._last
    model = calibration.abstract_calibrated(calibrator, recipe, FLAGS.implementation)
    return calibration.load_calibrated(model, calibrator, arrays)


def _score_layers(source, chunks, progress) -> dict:
  """KL divergence and top-1 agreement when one layer's weights are quantized, layer by layer."""
  from jaxfp8.checkpoint import load
  from jaxfp8.quantization import quality

  f32 = load.load_source(source, Recipe("f32", "channel", "f32", "f32"), implementation=FLAGS.implementation)
  recipe = Recipe("fp8", FLAGS.layer_granularity, "f32", "f32")
  quantized = load.load_source(source, recipe, implementation=FLAGS.implementation)
  reference, lines = quality.Reference(f32, chunks), []
  with progress.task("Layers one at a time") as report:
    for layer in range(source.config.num_layers):
      score = quality.Quality.of(reference.score(quality.with_layers(f32, quantized, [layer])), reference.nll)
      lines.append({"layer": layer, **_plain(score)})
      report(layer + 1, source.config.num_layers)
    together = quality.Quality.of(reference.score(quantized), reference.nll)
  return {"layers": lines, "all_layers": _plain(together), "layer_tokens": int(chunks[:, 1:].size)}


def _plain(record) -> dict:
  return dataclasses.asdict(record)


COMMAND = Command(
  "evaluate",
  main,
  FLAGS,
  topics=(_recipes, _text, _costs, _calibration, _single, _gate, _execution),
  json_help="Print only the JSON object.",
  keeps_cache=True,
)


if __name__ == "__main__":
  command.run(COMMAND)
