"""Memory and speed of a conversion: a synthetic checkpoint is written, converted by the tool in a process of its own, removed.

    python -m tools.measure_conversion --folder /tmp/measure --layers 20

The default is 20 layers of Llama-3.1-8B's size with its vocabulary: 10.8 GB of random bf16, two layers a shard. The last line
is one JSON object: bytes, seconds, GB/s, peak resident memory, and the limit (3 times
the largest of layers, embedding and head, plus 500 MB).
"""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
from absl import flags
from safetensors.numpy import save_file

from jaxfp8.checkpoint.export import config_to_hf
from jaxfp8.checkpoint.readers import expected_tensors
from jaxfp8.commands import command
from jaxfp8.commands.command import Command
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.units import format_bytes

FLAGS = flags.FlagValues()
flags.DEFINE_string("folder", None, "Where to put source and checkpoint; it must not exist, and is removed.", flag_values=FLAGS)
flags.DEFINE_string("model", "llama-3.1-8b", "A name in configs/models.", flag_values=FLAGS)
flags.DEFINE_integer("layers", 20, "How many layers the synthetic model has.", flag_values=FLAGS, lower_bound=1)
flags.DEFINE_integer("vocab", None, "Another size of the vocabulary.", flag_values=FLAGS)
flags.DEFINE_list("convert", [], "More flags for the conversion.", flag_values=FLAGS)


def main() -> int:
  """Runs the measurement. Raises InputError."""
  if not FLAGS.folder or pathlib.Path(FLAGS.folder).exists():
    raise InputError("measure: pass --folder with a path that does not exist. Run with --help to see the flags.")
  config = dataclasses.replace(LlamaConfig.from_name(FLAGS.model), num_layers=FLAGS.layers)
  if FLAGS.vocab:
    config = dataclasses.replace(config, vocab_size=FLAGS.vocab, bos_id=None, eos_ids=())
  folder = pathlib.Path(FLAGS.folder)
  try:
    largest = write_source(folder / "source", config)
    command = [
      sys.executable,
      "-m",
      "tools.convert_checkpoint",
      "--input",
      folder / "source",
      "--output",
      folder / "out",
      "--json",
    ]
    ran = subprocess.run([*map(str, command), *FLAGS.convert], capture_output=True, text=True, check=False)
    if ran.returncode:
      raise InputError(f"measure: the conversion failed: {ran.stderr.strip()[-500:]}")
    result = json.loads(ran.stdout.splitlines()[-1])
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  result |= {"largest_layer_bytes": largest, "limit_bytes": 3 * largest + 500_000_000}
  print(
    f"{format_bytes(result['read_bytes'])} in {result['seconds']:.0f} s, {result['read_gbps']:.3f} GB/s; peak memory "
    f"{format_bytes(result['peak_rss_bytes'])}, allowed {format_bytes(result['limit_bytes'])}."
  )
  print(json.dumps(result))
  return 0 if result["peak_rss_bytes"] <= result["limit_bytes"] else 1


def write_source(folder: pathlib.Path, config: LlamaConfig) -> int:
  """Random bf16 weights in shards of two layers; returns the bytes of the largest: a layer, the embedding or the head."""
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
  rng, groups = np.random.default_rng(0), {}
  for name, shape in expected_tensors(config).items():
    groups.setdefault(int(name.split(".")[2]) // 2 if ".layers." in name else -1, {})[name] = shape
  pool = (rng.standard_normal(1 << 22) / 64).astype(ml_dtypes.bfloat16)
  weight_map, largest = {}, 0
  for place, shapes in enumerate(groups.values()):
    file = f"model-{place + 1:05}-of-{len(groups):05}.safetensors"
    arrays = {name: np.resize(np.roll(pool, int(rng.integers(1 << 22))), shape) for name, shape in shapes.items()}
    save_file(arrays, folder / file)
    weight_map |= dict.fromkeys(arrays, file)
    layer = sum(array.nbytes for name, array in arrays.items() if ".layers.0." in name)
    tables = [array.nbytes for name, array in arrays.items() if ".layers." not in name]
    largest = max(largest, layer, *tables)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  return largest


if __name__ == "__main__":
  command.run(Command("measure_conversion", main, FLAGS))
