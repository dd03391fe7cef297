"""`python -m tools.benchmark_peers`: the same work by jaxfp8, llama.cpp and transformers, in turn, on this machine.

Every round runs every system once at every batch size, each in a process and an environment of its own, so that a busy moment
hits all of them; the table gives medians over the rounds and the ratios of jaxfp8 in FP8 to the others. Weights are those of
one GGUF file: llama.cpp reads them as Q8_0 (embedding and head too, as its own tools do) and as BF16, transformers as bf16,
jaxfp8 as FP8 and bf16 (embedding and head in bf16). It is no test: environments need the network and gigabytes.
"""

import json
import pathlib
import statistics
import subprocess
import sys

from absl import flags
from rich.console import Console
from rich.table import Table

from jaxfp8.checkpoint import readers
from jaxfp8.commands import command
from jaxfp8.commands.command import Command
from jaxfp8.errors import InputError
from jaxfp8.units import format_rate

FLAGS = flags.FlagValues()
SYSTEMS = ("jaxfp8 fp8", "jaxfp8 bf16", "llama.cpp Q8_0", "llama.cpp BF16", "transformers bf16")
PACKAGES = {"llama.cpp": ["xllamacpp"], "transformers": ["torch", "transformers", "accelerate", "gguf"]}
WORKER = pathlib.Path(__file__).with_name("peer_worker.py")


def _define(kind, *args, **kwargs) -> None:
  kind(*args, flag_values=FLAGS, **kwargs)


_define(flags.DEFINE_string, "checkpoint", None, "A GGUF file; the default model if left out.")
_define(flags.DEFINE_list, "batch", ["1", "8"], "Sequences at once.")
_define(flags.DEFINE_integer, "prompt_tokens", 128, "Tokens of each prompt.")
_define(flags.DEFINE_integer, "new_tokens", 64, "Tokens generated for each sequence.")
_define(flags.DEFINE_integer, "rounds", 3, "Rounds; medians over them are reported.")
_define(flags.DEFINE_list, "systems", list(SYSTEMS), "Which systems, of " + ", ".join(SYSTEMS) + ".")
_define(flags.DEFINE_string, "llama_cpp_python", None, "A Python that has xllamacpp; made with uv in --cache_dir if left out.")
_define(flags.DEFINE_string, "transformers_python", None, "A Python with torch, transformers, accelerate and gguf; likewise.")
_define(flags.DEFINE_string, "cache_dir", command.DEFAULT_CACHE_DIR, "Where environments, weights and programs are kept.")


def main() -> int:
  unknown = [system for system in FLAGS.systems if system not in SYSTEMS]
  if unknown:
    raise InputError(f"benchmark_peers: --systems must be of {', '.join(SYSTEMS)}; got {unknown[0]!r}.")
  if not FLAGS.cache_dir:
    raise InputError("benchmark_peers: needs a --cache_dir for environments and weights.")
  source = pathlib.Path(FLAGS.checkpoint or readers.default_model())
  if source.suffix != ".gguf":
    raise InputError(f"benchmark_peers: --checkpoint must be a GGUF file, whose metadata llama.cpp needs; got {source}.")
  commands = {system: _command(system, source) for system in FLAGS.systems}
  results = [
    _run(system, command, batch) for _ in range(FLAGS.rounds) for batch in FLAGS.batch for system, command in commands.items()
  ]
  _print(results)
  print(json.dumps(results))
  return 0


def _command(system: str, source: pathlib.Path) -> list[str]:
  """Python and worker and model file of one system."""
  peer, kind = system.split()
  if peer == "jaxfp8":
    return [sys.executable, str(WORKER), system, str(source)]
  python = FLAGS.llama_cpp_python if peer == "llama.cpp" else FLAGS.transformers_python
  model = source if peer == "transformers" else _requantized(source, kind)
  return [python or _environment(peer), str(WORKER), system, str(model)]


def _environment(peer: str) -> str:
  folder = pathlib.Path(FLAGS.cache_dir).expanduser() / "peers" / peer
  python = folder / "bin" / "python"
  try:
    if not python.exists():
      print(f"Making an environment for {peer}.", file=sys.stderr)
      subprocess.run(["uv", "venv", "--quiet", "--python", "3.12", str(folder)], check=True)
    # Nothing to do for a whole one; one whose making was cut off is completed.
    subprocess.run(["uv", "pip", "install", "--quiet", "--python", str(python), *PACKAGES[peer]], check=True)
  except (OSError, subprocess.CalledProcessError) as error:
    raise InputError(f"benchmark_peers: cannot make an environment for {peer}: {error}. Pass --*_python.") from error
  return str(python)


def _requantized(source: pathlib.Path, kind: str) -> pathlib.Path:
  """The source's weights as a GGUF file with matrices in Q8_0 or BF16 and norms in F32, its metadata kept."""
  import gguf
  import numpy as np

  path = pathlib.Path(FLAGS.cache_dir).expanduser() / "peers" / f"{source.stem}.{kind}.gguf"
  if path.exists():
    return path
  path.parent.mkdir(parents=True, exist_ok=True)
  reader, temporary = gguf.GGUFReader(source), path.with_suffix(".writing")
  writer = gguf.GGUFWriter(temporary, reader.get_field("general.architecture").contents())
  for name, field in reader.fields.items():
    if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
      continue
    item = field.types[-1] if len(field.types) > 1 else None
    writer.add_key_value(name, field.contents(), field.types[0], sub_type=item)
  target = gguf.GGMLQuantizationType[kind]
  for tensor in reader.tensors:
    values = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
    if values.ndim == 1:
      writer.add_tensor(tensor.name, values)
    else:
      writer.add_tensor(tensor.name, gguf.quants.quantize(values, target), raw_dtype=target)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  temporary.rename(path)
  return path


def _run(system: str, command: list[str], batch: str) -> dict:
  sizes = [batch, str(FLAGS.prompt_tokens), str(FLAGS.new_tokens), FLAGS.cache_dir]
  done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False)
  lines = [line for line in done.stdout.splitlines() if line.startswith('{"system"')]
  if not lines:
    raise InputError(f"benchmark_peers: {system} at batch {batch} failed: {(done.stderr or done.stdout).strip()[-400:]}")
  print(lines[0], file=sys.stderr)
  return json.loads(lines[0])


def _print(results: list[dict]) -> None:
  def median(system, batch, rate):
    return statistics.median(r[rate] for r in results if (r["system"], r["batch"]) == (system, int(batch)))

  table = Table(title=f"tokens/s of all sequences, prompts of {FLAGS.prompt_tokens} tokens, medians of {FLAGS.rounds} rounds")
  for name in ("batch", "system", "prefill", "decode", "jaxfp8 fp8 to it: prefill", "decode"):
    table.add_column(name, justify="left" if name == "system" else "right")
  for batch in FLAGS.batch:
    for system in FLAGS.systems:
      rates = [median(system, batch, rate) for rate in ("prefill_tok_s", "decode_tok_s")]
      ours = (
        [median(SYSTEMS[0], batch, rate) for rate in ("prefill_tok_s", "decode_tok_s")] if SYSTEMS[0] in FLAGS.systems else []
      )
      ratios = [f"{mine / theirs:.2f}" for mine, theirs in zip(ours, rates, strict=False)]
      table.add_row(batch, system, *map(format_rate, rates), *(ratios or ["", ""]))
  Console(width=110).print(table)


if __name__ == "__main__":
  command.run(Command("benchmark_peers", main, FLAGS))
