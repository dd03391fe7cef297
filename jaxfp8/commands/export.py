"""A checkpoint of jaxfp8 as a compressed-tensors FP8 folder, for vLLM and for transformers with compressed-tensors.

    python -m tools.export_checkpoint --input CHECKPOINT --output FOLDER

Values and scales stay as they are, bit for bit; what is not float8 is listed in `ignore`. The last line is one JSON object.
"""

import json
import time

from absl import flags

from jaxfp8.commands import command as cli
from jaxfp8.errors import InputError
from jaxfp8.units import format_bytes, format_seconds

FLAGS = flags.FlagValues()
flags.DEFINE_string("input", None, "Checkpoint of jaxfp8.", flag_values=FLAGS)
flags.DEFINE_string("output", None, "Folder to write; it must not exist.", flag_values=FLAGS)
flags.DEFINE_bool("json", False, "Print only the JSON object.", flag_values=FLAGS)


def main(argv: list[str]) -> int:
  """Runs the command. Raises InputError."""
  if len(argv) > 1:
    raise InputError(f"export: every argument is a flag; got {argv[1]!r}. Run with --help to see them.")
  for name in ("input", "output"):
    if not FLAGS[name].value:
      raise InputError(f"export: --{name} must be given. Run with --help to see the flags.")
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
    print(f"{FLAGS.output}: {format_bytes(size)} of compressed-tensors ({', '.join(groups)}) in {format_seconds(seconds)}.")
  print(json.dumps({"output": FLAGS.output, "bytes": size, "strategies": groups, "seconds": round(seconds, 3)}))
  return 0


if __name__ == "__main__":
  cli.run(main, FLAGS)
