"""Shows in ten minutes what a GPU makes of the kernels: are they right, how fast are they, which tile sizes suit it.

    jaxfp8 validate-gpu

Compares every kernel with XLA and with float32, times them by the device's own events beside its peaks, runs prefill and decode
of a model of random weights beside its roofline, and looks for better tile sizes, which later runs on this device take from
the cache folder. All of it goes into one Markdown file, with the records as JSON at its end: attach it to a
report. Each stage runs in a process of its own, so that a kernel that takes the process with it costs one line. Needs a GPU.
"""

import os
import pathlib
import re
import time

from absl import flags

from jaxfp8 import child_process, terminal
from jaxfp8.commands.command import DEFAULT_CACHE_DIR, Command, run
from jaxfp8.commands.gpu_validation import report as gpu_report
from jaxfp8.errors import InputError

FLAGS = flags.FlagValues()
flags.DEFINE_float("minutes", 10, "How long it may take; what is not reached by then is said.", flag_values=FLAGS)
flags.DEFINE_bool("tune", True, "Look for tile sizes and keep faster ones in the cache folder.", flag_values=FLAGS)
flags.DEFINE_string("cache_dir", DEFAULT_CACHE_DIR, "The cache folder; measured tile sizes are in it.", flag_values=FLAGS)
flags.DEFINE_string("output", "", "The report's file (gpu-DEVICE.md).", flag_values=FLAGS)
flags.DEFINE_bool(
  "rehearse", False, "Go through it on this CPU: kernels interpreted, small, times without meaning.", flag_values=FLAGS
)

SHARES = {"conformance": 0.4, "timing": 0.5, "models": 0.6, "tuning": 1.0}  # of the time that is left, in this order
GRACE_SECONDS = 60  # for a stage whose time is over to finish what it is at
STAGE_SECONDS = 120  # for the first stage, which starts JAX on the device


def main() -> int:
  if not 0 < FLAGS.minutes < 1e6:
    raise InputError(f"validate-gpu: --minutes must be positive; got {FLAGS.minutes:g}. Leave it out for ten.")
  if FLAGS.output and not pathlib.Path(FLAGS.output).absolute().parent.is_dir():
    raise InputError(f"validate-gpu: the folder of --output={FLAGS.output} does not exist. Make it first.")
  if FLAGS.tune and not FLAGS.cache_dir:
    raise InputError("validate-gpu: --tune needs a folder for its results; --cache_dir is empty. Pass --notune.")
  if os.environ.get("JAX_PLATFORMS") == "cpu" and not FLAGS.rehearse:
    raise InputError(
      "validate-gpu: needs an NVIDIA GPU, and there is none here that JAX may use. Run it where one is; jaxfp8 "
      "compile shows what can be known without."
    )
  start = time.time()
  records = collect(start + 60 * FLAGS.minutes)
  device = records[0]
  minutes = (time.time() - start) / 60
  path = pathlib.Path(FLAGS.output or f"gpu-{re.sub('[^a-z0-9]+', '-', device['kind'].lower()).strip('-')}.md")
  path.write_text(gpu_report.write_report(records, minutes), encoding="utf-8")
  terminal.show("\n".join(gpu_report.tables(records)))
  terminal.show(f"{gpu_report.verdict(records)} Report: {path}")
  return int(gpu_report.has_failed(records))


def collect(until: float) -> list[dict]:
  """Runs stage after stage; the first record is the device's. Raises InputError where JAX does not find a GPU."""
  first = run_stage("device", ["this machine"], time.time() + STAGE_SECONDS)
  device = first[0]
  if device.get("failure") or (device["kind"] == "cpu" and not FLAGS.rehearse):
    reason = device.get("failure", "JAX sees only the CPU")
    raise InputError(
      f"validate-gpu: JAX cannot use the GPU of this machine: {reason} Install the extra (jaxfp8[cuda]) and look at nvidia-smi."
    )
  records = first
  for stage, share in SHARES.items():
    names = device["names"][stage] if stage != "tuning" or FLAGS.tune else []
    say(f"{stage}: {len(names)} to do")
    records += run_stage(stage, names, time.time() + share * max(0.0, until - time.time()))
  return records


def run_stage(stage: str, names: list[str], until: float) -> list[dict]:
  """A record for each name. A child that dies takes one name with it; another goes on with the rest."""
  records: dict[str, dict] = {}
  while (rest := [name for name in names if name not in records]) and time.time() < until:
    found, last_words = child(stage, rest, until)
    records |= found
    if last_words:
      victim = next((name for name in rest if name not in records), None)
      if victim:
        records[victim] = {"stage": stage, "name": victim, "failure": last_words, "passed": False}
    elif not found:
      break
  missed = {name: {"stage": stage, "name": name, "missed": True} for name in names if name not in records}
  return [(records | missed)[name] for name in names]


def child(stage: str, names: list[str], until: float) -> tuple[dict[str, dict], str]:
  """(records by name as far as the child got, what it said where it died)."""
  request = {"stage": stage, "names": names, "until": until, "rehearsal": FLAGS.rehearse, "cache_dir": FLAGS.cache_dir}
  timeout_s = max(1.0, until - time.time()) + GRACE_SECONDS
  reply = child_process.ask(child_process.Child.GPU_VALIDATION, request, timeout_s=timeout_s)
  return {record["name"]: record for record in reply.answers}, reply.failure


def say(sentence: str) -> None:
  terminal.say(f"validate-gpu: {sentence}")


COMMAND = Command("validate-gpu", main, FLAGS)


if __name__ == "__main__":
  run(COMMAND)
