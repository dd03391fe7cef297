"""Will a model fit on a GPU, how fast can it be, and is a measured speed normal? Needs no GPU, no weights and no jax.

    jaxfp8 plan llama-3.1-70b gb10
    jaxfp8 plan llama-3.1-70b gb10 --observed=3.0

Prints the memory of each device, the greatest speed of each batch with its time by part, the speeds that other systems
publish, ways out when the model does not fit, and a verdict on the observed speed. Exits with code 1 and one sentence when
the model does not fit or an argument is wrong.
"""

import functools

from absl import flags

from jaxfp8.checkpoint.manifest import is_checkpoint, read_manifest
from jaxfp8.checkpoint.readers import read_config
from jaxfp8.commands import command
from jaxfp8.commands.command import Command, Topic
from jaxfp8.config import LlamaConfig
from jaxfp8.console import console
from jaxfp8.errors import InputError
from jaxfp8.mesh import round_up
from jaxfp8.planning.advice import Speculation
from jaxfp8.planning.compile_request import CompileRequest, compiled_reports
from jaxfp8.planning.devices import device_names
from jaxfp8.planning.planner import DeploymentPlan, plan_deployment
from jaxfp8.planning.plots import plot_plan
from jaxfp8.planning.report import print_plan, print_sweep, shortfall_sentence
from jaxfp8.planning.roofline import PREFILL_CHUNK
from jaxfp8.plots import check_plot_path
from jaxfp8.recipe import ACTIVATION_PRECISIONS, DEFAULT_PAGE_SIZE, WEIGHT_PRECISIONS, Granularity, LayerFormat, Recipe
from jaxfp8.terminal import say, show_json

PIPE_WIDTH = 120  # columns when the output is not a terminal

# Flags of this command alone: with absl's global FLAGS, importing two commands in one process would be an error.
FLAGS = flags.FlagValues()


_deployment = Topic("Model and devices", FLAGS)
_deployment(flags.DEFINE_string, "model", None, "Name in configs/models, TOML, config.json, checkpoint folder or GGUF file.")
_deployment(flags.DEFINE_list, "device", [], "Name in configs/devices, a TOML of your own, or cpu; several only with --sweep.")
_deployment(flags.DEFINE_integer, "count", None, "Devices in all: tensor times data.")
_deployment(flags.DEFINE_integer, "tensor", None, "Devices over which one copy of the model is cut.")
_deployment(flags.DEFINE_integer, "data", None, "Copies of the model.")

_workload = Topic("Workload", FLAGS)
_workload(flags.DEFINE_list, "batch", ["1", "8", "32"], "Batch sizes, over all devices.")
_workload(flags.DEFINE_integer, "context", None, "Tokens that every sequence holds (8192, or what the model has).")
_workload(flags.DEFINE_integer, "prompt", None, "Tokens of a prompt, for prefill and time to first token (1024).")

_precision = Topic("Precision", FLAGS)
_precision(flags.DEFINE_enum, "weights", "fp8", WEIGHT_PRECISIONS, "What the linear layers are stored in.")
_precision(flags.DEFINE_enum, "granularity", "channel", list(Granularity), "What one FP8 weight scale covers.")
_precision(flags.DEFINE_enum, "activations", "auto", ("auto", *ACTIVATION_PRECISIONS), "What the linear layers multiply in.")
_precision(flags.DEFINE_enum, "kv_cache", "fp8", ACTIVATION_PRECISIONS, "What the KV cache is stored in.")
_precision(flags.DEFINE_integer, "page_tokens", DEFAULT_PAGE_SIZE, "Tokens in a page of the KV cache: 32, 64 or 128.")

_measured = Topic("Comparison with a measurement", FLAGS)
_measured(flags.DEFINE_float, "observed", None, "Tokens a second that you measured in decode, all sequences together.")
_measured(flags.DEFINE_integer, "observed_batch", 1, "Sequences that ran together when --observed was measured.")

_speculation = Topic("Speculation", FLAGS)
_speculation(flags.DEFINE_float, "acceptance", 0.7, "Speculation: probability that a drafted token is accepted.")
_speculation(flags.DEFINE_integer, "draft_tokens", 4, "Speculation: tokens drafted a step.")

_execution = Topic("Output and execution", FLAGS)
_execution(flags.DEFINE_string, "plot", None, "Write the roofline and throughput against latency to this png, svg or pdf.")
_execution(
  flags.DEFINE_bool, "compile", False, "Take temporaries from compiled programs, not an estimate; needs the cuda extra."
)
_execution(flags.DEFINE_integer, "compile_timeout", 600, "Seconds that --compile may take.")
_execution(flags.DEFINE_bool, "sweep", False, "Compare devices in one table: those in --device, or all that are known.")
_execution(
  flags.DEFINE_string, "cache_dir", command.DEFAULT_CACHE_DIR, "Where --device=cpu keeps what it measured; empty: nowhere."
)


def main() -> int:
  """Runs the command; argv[0] is the program. Returns the exit code: 1 when the model does not fit. Raises InputError."""
  if not FLAGS.model:
    raise InputError("plan: --model is missing. Pass for example --model=llama-3.1-70b.")
  if FLAGS.sweep:
    return _sweep()
  if len(FLAGS.device) != 1:
    raise InputError(
      f"plan: --device must name one device; got {','.join(FLAGS.device) or 'none'}. "
      f"Known are {', '.join(device_names())}; --sweep compares several."
    )
  if FLAGS.plot:
    check_plot_path(FLAGS.plot)
  plan = _plan(FLAGS.device[0])
  if FLAGS.json:
    show_json(plan.to_json())
  else:
    print_plan(console(width=PIPE_WIDTH), plan)
  if FLAGS.plot:
    plot_plan(plan, FLAGS.plot)
  if not plan.fits:
    say(shortfall_sentence(plan))
  return 0 if plan.fits else 1


def _sweep() -> int:
  for name in ("observed", "plot", "compile"):
    if FLAGS[name].value not in (None, False):
      raise InputError(f"plan: --{name} is about one device; got it with --sweep. Leave one of them out.")
  names = FLAGS.device or device_names()
  plans, refused = [], []
  for name in names:
    try:
      plans.append(_plan(name))
    except InputError as error:
      # A mesh or a context that no device allows is wrong for all of them; what only this device refuses is left out.
      if name != "cpu":
        raise
      refused.append(f"cpu is left out: {error}")
  if not plans:
    raise InputError(refused[0])
  if FLAGS.json:
    show_json({"devices": [plan.to_json() for plan in plans]})
  else:
    print_sweep(console(width=PIPE_WIDTH), plans, refused)
  return 0


def _plan(device: str) -> DeploymentPlan:
  config, stored, formats = _read_model(FLAGS.model)
  if _given("weights") or _given("granularity"):
    formats = None
  plan_of = functools.partial(
    plan_deployment,
    config,
    device,
    count=FLAGS.count,
    tensor=FLAGS.tensor,
    data=FLAGS.data,
    batches=[_batch_size(text) for text in FLAGS.batch],
    context=FLAGS.context,
    prompt=FLAGS.prompt,
    weights=_given("weights") or (stored.weights if stored else FLAGS.weights),
    granularity=_given("granularity") or (stored.granularity if stored else FLAGS.granularity),
    activations=FLAGS.activations,
    kv_cache=_given("kv_cache") or (stored.kv if stored else FLAGS.kv_cache),
    page_tokens=FLAGS.page_tokens,
    observed=FLAGS.observed,
    observed_batch=FLAGS.observed_batch,
    speculation=Speculation(FLAGS.acceptance, FLAGS.draft_tokens),
    cache_dir=FLAGS.cache_dir,
    formats=formats,
  )
  plan = plan_of()
  return plan_of(temporaries=_compiled_temporaries(plan, device)) if FLAGS.compile else plan


def _compiled_temporaries(plan: DeploymentPlan, device: str) -> int:
  """What the largest batch's decode step and a prefill step say that they need, whichever is more."""
  asked = plan.deployment
  batch = round_up(max(entry.batch for entry in plan.batches), asked.mesh.data)
  sizes = {
    "batch": batch,
    "context": asked.context,
    "prefill": min(asked.prompt, PREFILL_CHUNK),
    "page_tokens": asked.page_tokens,
  }
  compile_request = CompileRequest(asked.config, asked.recipe, device, asked.mesh, formats=asked.formats, **sizes)
  records = compiled_reports(compile_request, timeout_s=FLAGS.compile_timeout)
  return max(records[kind]["temp_bytes"] for kind in ("decode", "prefill"))


def _read_model(name: str) -> tuple[LlamaConfig, Recipe | None, tuple[LayerFormat, ...] | None]:
  """The model's sizes; of a checkpoint of jaxfp8 also its recipe, which then stands in for flags that were not given, and the
  formats of its layers."""
  if not is_checkpoint(name):
    return read_config(name), None, None
  manifest = read_manifest(name)
  return manifest.config, manifest.recipe, manifest.formats


def _given(flag: str) -> str | None:
  return FLAGS[flag].value if FLAGS[flag].present else None


def _batch_size(text: str) -> int:
  try:
    return int(text)
  except ValueError:
    raise InputError(f"plan: --batch must be whole numbers and commas; got {text!r}. Pass --batch=1,8,32.") from None


COMMAND = Command(
  "plan",
  main,
  FLAGS,
  topics=(_deployment, _workload, _precision, _measured, _speculation, _execution),
  positionals=("model", "device"),
  json_help="Print one JSON object instead of tables.",
  uses_devices=False,
)


if __name__ == "__main__":
  command.run(COMMAND)
