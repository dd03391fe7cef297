"""Measures how fast this machine runs a model, beside the roofline of its memory.

    jaxfp8 benchmark
    jaxfp8 benchmark --weights=fp8 --batch=1,8 --plot=speed.png

For each of --weights, --batch and --prompt_tokens: prefill and decode tokens/s, time to the first token, peak memory, and the
share of the memory bandwidth that decode reaches. Each of --weights runs in a process of its own, so that its peak memory is
its own. The start-up time is that of `jaxfp8 generate` to its first token with an empty cache (cold) and with a filled cache
(warm). Figures are medians over --repeats runs. The last line is one JSON list.
"""

import os
import statistics
import subprocess
import tempfile
import time

from absl import flags
from rich.console import Console
from rich.table import Table

from jaxfp8 import child_process
from jaxfp8.commands import command, profiling
from jaxfp8.commands.command import Command, Topic
from jaxfp8.console import console
from jaxfp8.errors import InputError
from jaxfp8.planning.devices import measure_cpu
from jaxfp8.plots import COLOURS, MARKERS, check_plot_path, new_figure, save_figure
from jaxfp8.recipe import WEIGHT_PRECISIONS
from jaxfp8.terminal import show_json
from jaxfp8.units import format_bytes, format_rate, format_seconds, format_share

FLAGS = flags.FlagValues()


_cases = Topic("Cases", FLAGS)
_cases(flags.DEFINE_string, "checkpoint", None, "Checkpoint of jaxfp8, Hugging Face folder or GGUF file.")
_cases(flags.DEFINE_list, "weights", ["fp8", "bf16", "f32"], "Which weights, separated by commas.")
_cases(flags.DEFINE_list, "batch", ["1", "8", "32"], "Sequences at once.")
_cases(flags.DEFINE_list, "prompt_tokens", ["128", "512"], "Tokens of each prompt.")

_runs = Topic("Runs", FLAGS)
_runs(flags.DEFINE_integer, "new_tokens", 64, "Tokens generated for each sequence.")
_runs(flags.DEFINE_integer, "repeats", 3, "Runs of each case; the medians are reported.")
_runs(flags.DEFINE_bool, "start_up", True, "Also measure start-up, cold and warm.")

_execution = Topic("Output and execution", FLAGS)
_execution(flags.DEFINE_string, "plot", None, "Write throughput over batch with the roofline to this png, svg or pdf.")
_execution(flags.DEFINE_string, "cache_dir", command.DEFAULT_CACHE_DIR, "Keeps converted weights and programs; empty: nowhere.")
_execution(flags.DEFINE_string, "profile", None, profiling.HELP)


def main() -> int:
  _check()
  profiling.check_folder("benchmark", FLAGS.profile)
  if FLAGS.plot:
    check_plot_path(FLAGS.plot)
  out = console(stderr=FLAGS.json)
  if FLAGS.cache_dir:  # where every process reads it; without, each measures for itself
    measure_cpu(FLAGS.cache_dir, again=True)
  rows = []
  for weights in FLAGS.weights:
    rows += _measure(weights)
  start_up = [_start_up(weights) for weights in FLAGS.weights] if FLAGS.start_up else []
  if not FLAGS.json:
    _print(out, rows, start_up)
  if FLAGS.plot:
    _plot(rows, FLAGS.plot)
  for row in rows:
    row |= next((entry for entry in start_up if entry["weights"] == row["weights"]), {})
  show_json(rows)
  return 0


def _check() -> None:
  for name in ("batch", "prompt_tokens"):
    for value in getattr(FLAGS, name):
      if not value.isdigit() or int(value) < 1:
        raise InputError(f"benchmark: --{name} must be positive whole numbers; got {value!r}. Pass for example --{name}=1,8.")
  for value in FLAGS.weights:
    if value not in WEIGHT_PRECISIONS:
      raise InputError(f"benchmark: --weights must be of {', '.join(WEIGHT_PRECISIONS)}; got {value!r}.")
  if FLAGS.new_tokens < 2 or FLAGS.repeats < 1:
    raise InputError(f"benchmark: needs 2 new tokens and 1 repeat at least; got {FLAGS.new_tokens} and {FLAGS.repeats}.")


def _measure(weights: str) -> list[dict]:
  """One row for each batch size and prompt length, measured in a process of its own."""
  request = {
    "weights": weights,
    "batches": [int(batch) for batch in FLAGS.batch],
    "prompt_lengths": [int(length) for length in FLAGS.prompt_tokens],
    **{name: FLAGS[name].value for name in ("checkpoint", "new_tokens", "repeats", "cache_dir", "profile")},
  }
  reply = child_process.ask(child_process.Child.BENCHMARK, request, show_errors=True)
  if reply.exit_code:
    raise InputError(f"benchmark: the run with --weights={weights} ended with code {reply.exit_code}; its message is above.")
  return list(reply.answers)


def _start_up(weights: str) -> dict:
  """Seconds of `generate` to its first token with an empty and with a filled cache, and peak memory of the second."""
  with tempfile.TemporaryDirectory() as cache_dir:
    cold, _ = _first_token(weights, cache_dir)
    runs = [_first_token(weights, cache_dir) for _ in range(FLAGS.repeats)]
  return {
    "weights": weights,
    "start_cold_s": cold,
    "start_warm_s": statistics.median(seconds for seconds, _ in runs),
    "generate_peak_rss_bytes": max(peak for _, peak in runs),
  }


def _first_token(weights: str, cache_dir: str) -> tuple[float, int]:
  arguments = ["--prompt=Hello", "--max_new_tokens=2", f"--weights={weights}", f"--cache_dir={cache_dir}"]
  arguments += [f"--checkpoint={FLAGS.checkpoint}"] if FLAGS.checkpoint else []
  start = time.perf_counter()
  child = child_process.start(child_process.Child.GENERATE, *arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
  assert child.stdout
  child.stdout.read(1)
  seconds = time.perf_counter() - start
  child.stdout.read()
  _, status, usage = os.wait4(child.pid, 0)
  child.returncode = os.waitstatus_to_exitcode(status)
  if child.returncode:
    raise InputError(f"benchmark: generate with --weights={weights} ended with code {child.returncode}. Run it by hand.")
  return seconds, usage.ru_maxrss * 1024


def _print(out: Console, rows: list[dict], start_up: list[dict]) -> None:
  table = Table(title=f"{rows[0]['device']}, jax {rows[0]['jax_version']}; tokens/s of all sequences", title_justify="left")
  for name in ("weights", "batch", "prompt", "prefill", "decode", "ceiling", "bandwidth", "first token", "peak memory"):
    table.add_column(name, justify="left" if name == "weights" else "right")
  for row in rows:
    table.add_row(
      row["weights"],
      str(row["batch"]),
      str(row["prompt_tokens"]),
      *(format_rate(row[name]) for name in ("prefill_tok_s", "decode_tok_s", "ceiling_tok_s")),
      format_share(row["bandwidth_fraction"]),
      format_seconds(row["ttft_s"]),
      format_bytes(row["peak_rss_bytes"]),
    )
  out.print(table)
  for entry in start_up:
    out.print(
      f"{entry['weights']}: first token {format_seconds(entry['start_cold_s'])} after a cold start, "
      f"{format_seconds(entry['start_warm_s'])} after a warm one; peak memory {format_bytes(entry['generate_peak_rss_bytes'])}"
    )


def _plot(rows: list[dict], path: str) -> None:
  """Decode throughput over batch, one line per weights and prompt length, each with its ceiling dashed."""
  figure = new_figure(9, 5)
  axes = figure.subplots()
  lengths = sorted({row["prompt_tokens"] for row in rows})
  for index, weights in enumerate(dict.fromkeys(row["weights"] for row in rows)):
    for length, marker in zip(lengths, MARKERS, strict=False):
      mine = [row for row in rows if (row["weights"], row["prompt_tokens"]) == (weights, length)]
      batches = [row["batch"] for row in mine]
      axes.plot(
        batches, [row["decode_tok_s"] for row in mine], marker=marker, color=COLOURS[index], label=f"{weights}, prompt {length}"
      )
      if length == lengths[0]:
        axes.plot(batches, [row["ceiling_tok_s"] for row in mine], "--", color=COLOURS[index], label=f"{weights}, roofline")
  axes.set(xscale="log", yscale="log", xlabel="sequences at once", ylabel="decode tokens/s, all sequences")
  batches = sorted({row["batch"] for row in rows})
  axes.set_xticks(batches, [str(batch) for batch in batches])
  axes.minorticks_off()
  axes.grid(alpha=0.3)
  axes.set_title(rows[0]["device"], fontsize=10)
  figure.legend(loc="outside right upper", fontsize=8)
  save_figure(figure, path)


COMMAND = Command(
  "benchmark", main, FLAGS, topics=(_cases, _runs, _execution), json_help="Print only the JSON list.", keeps_cache=True
)


if __name__ == "__main__":
  command.run(COMMAND)
