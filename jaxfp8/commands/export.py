"""Writes a checkpoint of jaxfp8 as a compressed-tensors FP8 folder, for vLLM and for transformers.

    jaxfp8 export CHECKPOINT OUTPUT

Values and scales stay as they are, bit for bit. The names of the matrices that are not float8 stand in `ignore`. The last line
is one JSON object.
"""

import time

from absl import flags

from jaxfp8.commands import command
from jaxfp8.commands.command import Command, Topic
from jaxfp8.terminal import show, show_json
from jaxfp8.units import format_bytes, format_seconds

FLAGS = flags.FlagValues()
_files = Topic("Files", FLAGS)
_files(flags.DEFINE_string, "input", None, "Checkpoint of jaxfp8.")
_files(flags.DEFINE_string, "output", None, "Folder to write; it must not exist.")


def main() -> int:
  """Runs the command. Raises InputError."""
  import pathlib

  from jaxfp8.checkpoint import export
  from jaxfp8.progress import Progress

  start = time.perf_counter()
  with Progress(rate=True) as progress, progress.task("Exporting") as report:
    config = export.export_checkpoint(FLAGS.input, FLAGS.output, report)
  seconds = time.perf_counter() - start
  size = sum(path.stat().st_size for path in pathlib.Path(FLAGS.output).iterdir())
  groups = [group["weights"]["strategy"] for group in config["quantization_config"]["config_groups"].values()]
  if not FLAGS.json:
    show(f"{FLAGS.output}: {format_bytes(size)} of compressed-tensors ({', '.join(groups)}) in {format_seconds(seconds)}.")
  show_json({"output": FLAGS.output, "bytes": size, "strategies": groups, "seconds": round(seconds, 3)})
  return 0


COMMAND = Command(
  "export",
  main,
  FLAGS,
  topics=(_files,),
  positionals=("input", "output"),
  required=("input", "output"),
  json_help="Print only the JSON object.",
  first_only=True,
)


if __name__ == "__main__":
  command.run(COMMAND)
