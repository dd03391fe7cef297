"""`python -m tools.measure_loading`: how much of a host's memory loading takes beside the weights themselves.

Writes a synthetic checkpoint of --gigabytes (layers as wide as those of an 8B Llama, random bytes), loads it in a process of
its own over --tensor CPU devices, and prints that process's peak memory over what it had before loading, beside the bytes of
the weights. A CPU device's memory is the host's, so 1.00 is the least there can be. The last line is one JSON object.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import flags

from jaxfp8.checkpoint import stored_arrays
from jaxfp8.commands import command
from jaxfp8.commands.command import Command
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.recipe import LayerFormat, Precision, Recipe

FLAGS = flags.FlagValues()
flags.DEFINE_float("gigabytes", 4.0, "Size of the checkpoint.", flag_values=FLAGS)
flags.DEFINE_integer("tensor", 4, "CPU devices that the model is cut over.", flag_values=FLAGS)
flags.DEFINE_string("folder", None, "Keep the checkpoint here, or use it; None: a temporary one.", flag_values=FLAGS)
flags.DEFINE_string("worker", None, "Internal: load this checkpoint in this process.", flag_values=FLAGS)
_LAYER_BYTES, _TABLE_BYTES = 218_112_000, 268_435_456  # of one layer of an 8B Llama in float8; of embedding and head here


def main() -> int:
  if FLAGS.worker:
    print(json.dumps(load(FLAGS.worker, FLAGS.tensor)))
    return 0
  if FLAGS.gigabytes <= 0:
    raise InputError(f"measure_loading: --gigabytes must be positive; got {FLAGS.gigabytes}.")
  folder = pathlib.Path(FLAGS.folder or tempfile.mkdtemp(prefix="jaxfp8-loading-")) / "checkpoint"
  try:
    if not folder.exists():
      start = time.perf_counter()
      write(folder, max(1, round((FLAGS.gigabytes * 1e9 - _TABLE_BYTES) / _LAYER_BYTES)))
      print(f"writing   {time.perf_counter() - start:.1f} s")
    result = measure(folder, FLAGS.tensor)
  finally:
    if not FLAGS.folder:
      shutil.rmtree(folder.parent, ignore_errors=True)
  print(
    f"weights   {result['weight_bytes'] / 1e9:.3f} GB over {FLAGS.tensor} devices\n"
    f"loading   {result['seconds']:.1f} s, {result['read_bytes'] / 1e9:.3f} GB read by the process\n"
    f"peak      {result['peak_bytes'] / 1e9:.3f} GB over the {result['before_bytes'] / 1e9:.3f} GB before it, "
    f"{result['peak_bytes'] / result['weight_bytes']:.3f} of the weights"
  )
  print(json.dumps(result))
  return 0


def write(folder: pathlib.Path, num_layers: int, **sizes) -> None:
  """A checkpoint of random float8 bytes. `sizes` replace an 8B Llama's."""
  from jaxfp8.checkpoint.manifest import Manifest
  from jaxfp8.checkpoint.writer import CheckpointWriter

  sizes = {"vocab_size": 16384, "eos_ids": (2,), "bos_id": 1} | sizes
  config = dataclasses.replace(LlamaConfig.from_name("llama-3.1-8b"), num_layers=num_layers, **sizes)
  recipe, formats = Recipe("fp8", "channel"), (LayerFormat.uniform("fp8"),) * num_layers
  rng = np.random.default_rng(0)

  def values(shape, dtype):
    if dtype == Precision.FP8.dtype:
      return rng.integers(0, 0x70, shape, np.uint8).view(dtype)  # finite ones
    return np.full(shape, 0.01, np.float32).astype(dtype)

  with CheckpointWriter(folder, Manifest(config, recipe, formats, None, {"source": "tools.measure_loading"})) as writer:
    for group in stored_arrays.checkpoint_arrays(config, recipe, formats):
      writer.write({key: values(*what) for key, what in group.items()})


def measure(folder: pathlib.Path, tensor: int) -> dict:
  """`load` in a process of its own."""
  env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={tensor}"}
  command = [sys.executable, "-m", "tools.measure_loading", "--worker", str(folder), "--tensor", str(tensor)]
  ran = subprocess.run(command, env=env, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent.parent)
  if ran.returncode:
    raise InputError(f"measure_loading: the process that loads ended with {ran.returncode}: {ran.stderr.strip()[-500:]}")
  return json.loads(ran.stdout.splitlines()[-1])


def load(folder: str, tensor: int) -> dict:
  """Loads a checkpoint here; bytes of this process's own memory (the peak is the highest that the system has seen)."""
  import jax
  from flax import nnx

  from jaxfp8.checkpoint.load import load as load_model
  from jaxfp8.checkpoint.open import Checkpoint
  from jaxfp8.sharding import make_mesh

  checkpoint = Checkpoint(folder)
  mesh = make_mesh(checkpoint.config, tensor)
  np.asarray(jax.jit(lambda x: x + 1)(np.ones(4)))  # what a first program takes is no weight
  before, read_before, start = _status("VmRSS"), _read_bytes(), time.perf_counter()
  with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
    file.write("5")  # the highest mark starts anew
  model = load_model(checkpoint, mesh=mesh)
  leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
  return {
    "weight_bytes": sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards),
    "before_bytes": before,
    "peak_bytes": _status("VmHWM") - before,
    "read_bytes": _read_bytes() - read_before,
    "seconds": time.perf_counter() - start,
  }


def _status(name: str) -> int:
  return int(re.search(rf"{name}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024


def _read_bytes() -> int:
  return int(re.search(r"rchar: (\d+)", pathlib.Path("/proc/self/io").read_text())[1])


if __name__ == "__main__":
  command.run(Command("measure_loading", main, FLAGS))
