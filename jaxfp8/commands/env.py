"""Shows the facts that a bug report needs: versions, CPU, GPU and driver, memory, and the cache folder.

    jaxfp8 env
    jaxfp8 env --json

Checks that a JAX for the GPU of this machine is installed; a finding is one sentence at the end. The command reads files and
package metadata, and loads no jax. A fact that cannot be read is shown as unknown.
"""

import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
import sys

from absl import flags

from jaxfp8 import host_memory, search_path
from jaxfp8.commands import command
from jaxfp8.commands.command import Command, Topic
from jaxfp8.terminal import show, show_json
from jaxfp8.units import format_bytes

PACKAGES = ("jaxfp8", "jax", "jaxlib", "flax", "orbax-checkpoint", "ml_dtypes", "numpy", "tokenizers")
# The packages through which JAX runs on NVIDIA GPUs, one for each major version of CUDA.
CUDA_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
VARIABLES = ("JAX_PLATFORMS", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES", "XDG_CACHE_HOME", "LD_LIBRARY_PATH")
_VALUES = {name: os.environ[name] for name in VARIABLES if name in os.environ}  # before `run` chooses the platform
_NVIDIA_SMI_SECONDS = 10
_UNKNOWN = "unknown"

FLAGS = flags.FlagValues()
_execution = Topic("Execution", FLAGS)
_execution(flags.DEFINE_string, "cache_dir", command.DEFAULT_CACHE_DIR, "The cache folder whose size is shown.")


def main() -> int:
  """Prints the facts and the findings; returns 1 when there is a finding."""
  facts = collect(FLAGS.cache_dir)
  if FLAGS.json:
    show_json(facts)
  else:
    show(format_facts(facts))
  return int(bool(facts["findings"]))


def collect(cache_dir: str) -> dict:
  """All facts as plain values. Never fails on something that is missing."""
  packages = {name: _version(name) for name in (*PACKAGES, *CUDA_PLUGINS)}
  memory, available = host_memory.memory_bytes()
  facts = {
    "packages": {name: version for name, version in packages.items() if version or name not in CUDA_PLUGINS},
    "python": platform.python_version(),
    "executable": sys.executable,
    "os": platform.platform(),
    "cpu": _cpu_name(),
    "cores": host_memory.usable_cores(),
    "memory_bytes": memory,
    "available_memory_bytes": available,
    "gpus": gpus(),
    "driver": driver_version(),
    "cache_dir": cache_dir,
    "cache_bytes": folder_bytes(cache_dir),
    "variables": _VALUES,
  }
  return {**facts, "findings": find_problems(facts)}


def find_problems(facts: dict) -> list[str]:
  """One sentence for each problem of the installation, with the way out."""
  has_gpu = bool(facts["gpus"] or facts["driver"])
  plugins = [name for name in CUDA_PLUGINS if facts["packages"].get(name)]
  findings: list[str] = []
  if facts["packages"].get("jax") is None:
    findings.append("JAX is not installed. Install jaxfp8 again.")
  if has_gpu and not plugins:
    findings.append('This machine has an NVIDIA GPU, and JAX for it is not installed. Run pip install "jaxfp8[cuda]".')
  if has_gpu and facts["variables"].get("JAX_PLATFORMS") == "cpu":
    findings.append("This machine has an NVIDIA GPU, and JAX_PLATFORMS=cpu keeps JAX from using it. Unset the variable.")
  jax_version = facts["packages"].get("jax")
  findings += [
    f"{name} is version {facts['packages'][name]} and jax is version {jax_version}. Install equal versions."
    for name in ("jaxlib", *plugins)
    if jax_version and facts["packages"].get(name) not in (None, jax_version)
  ]
  return findings


def gpus() -> list[dict]:
  """Name, memory and compute capability of each GPU: from nvidia-smi, or the names from the driver's files."""
  rows = _nvidia_smi("name,memory.total,compute_cap,driver_version")
  if rows:
    return [dict(zip(("name", "memory", "compute_capability"), row, strict=False)) for row in rows]
  names: list[dict] = []
  for path in sorted(pathlib.Path("/proc/driver/nvidia/gpus").glob("*/information")):
    match = re.search(r"Model:\s*(.+)", _read(path))
    names.append({"name": match[1].strip() if match else _UNKNOWN})
  return names


def driver_version() -> str | None:
  """The version of the NVIDIA driver; None on a machine without one."""
  match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _read(pathlib.Path("/proc/driver/nvidia/version")))
  if match:
    return match[1]
  rows = _nvidia_smi("driver_version")
  return rows[0][0] if rows else None


def _nvidia_smi(fields: str) -> list[list[str]]:
  program = search_path.find_program("nvidia-smi")
  if not program:
    return []
  try:
    ended = subprocess.run(
      [program, f"--query-gpu={fields}", "--format=csv,noheader"],
      capture_output=True,
      text=True,
      timeout=_NVIDIA_SMI_SECONDS,
      check=False,
    )
  except (OSError, subprocess.SubprocessError):
    return []
  lines = ended.stdout.splitlines() if ended.returncode == 0 else []
  return [[cell.strip() for cell in line.split(",")] for line in lines if line.strip()]


def folder_bytes(folder: str) -> int | None:
  """Bytes of all files in a folder; None for a folder that does not exist."""
  if not folder or not os.path.isdir(folder):
    return None
  total = 0
  for parent, _, names in os.walk(folder):
    for name in names:
      try:
        total += os.lstat(os.path.join(parent, name)).st_size
      except OSError:  # another process has removed the file
        continue
  return total


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _cpu_name() -> str:
  match = re.search(r"^model name\s*:\s*(.+)$", _read(pathlib.Path("/proc/cpuinfo")), re.MULTILINE)
  return match[1].strip() if match else platform.processor() or platform.machine() or _UNKNOWN


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8", errors="replace")
  except OSError:
    return ""


def format_facts(facts: dict) -> str:
  """One line a fact; the findings stand at the end."""
  memory, available = facts["memory_bytes"], facts["available_memory_bytes"]
  gpu_lines = [", ".join(str(value) for value in gpu.values()) for gpu in facts["gpus"]] or ["none"]
  size = facts["cache_bytes"]
  rows = [
    *((name, version or "not installed") for name, version in facts["packages"].items()),
    ("Python", f"{facts['python']} ({facts['executable']})"),
    ("OS", facts["os"]),
    ("CPU", f"{facts['cpu']}, {facts['cores'] or _UNKNOWN} cores"),
    ("memory", f"{format_bytes(memory)}, {format_bytes(available or 0)} available" if memory else _UNKNOWN),
    *(("GPU", line) for line in gpu_lines),
    ("driver", facts["driver"] or "none"),
    ("cache", f"{facts['cache_dir'] or 'none'} ({'no folder' if size is None else format_bytes(size)})"),
    *((f"${name}", value) for name, value in facts["variables"].items()),
  ]
  lines = [f"{name:<18}{value}" for name, value in rows]
  return "\n".join([*lines, "", *(facts["findings"] or ["No problem found."])])


COMMAND = Command("env", main, FLAGS, topics=(_execution,), json_help="Print one JSON object.", uses_devices=False)


if __name__ == "__main__":
  command.run(COMMAND)
