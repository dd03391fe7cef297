"""What a device is: memory, bandwidth, peaks, links. Imports no jax and knows no model.

    configs/devices/NAME.toml or a TOML of one's own  ->  load_device  ->  DeviceSpec
    "cpu", this machine                               ->  measure_cpu  ->  DeviceSpec, measured

Every number in the TOML files stands beside its source, and what was only estimated says so there. Peaks are dense
(no sparsity) and bandwidths are the maker's figures, so that a time computed from them is a floor, never a forecast.
"""

import concurrent.futures
import dataclasses
import importlib.util
import json
import math
import pathlib
import platform
import time
from typing import Any

import numpy as np

from jaxfp8 import host_memory, stored_files
from jaxfp8.config import configs_folder, find_config, read_toml
from jaxfp8.errors import InputError

CPU = "cpu"
READ_BYTES = 512 * 2**20
MATMUL_SIZE = 1024
_MAY_BE_ZERO = ("system_bytes", "runtime_bytes", "launch_seconds", "link_latency_seconds", "network_latency_seconds")


@dataclasses.dataclass(frozen=True)
class DeviceSpec:
  """One device as the roofline sees it. Bandwidths are bytes/s, rates FLOP/s, times seconds, memory bytes.

  memory_bytes: what the driver reports; system_bytes: what others use of a unified memory; runtime_bytes: what CUDA,
    loaded programs and NCCL take.
  fp8_flops: None for a device without FP8 units: FP8 weights then save bytes only and are multiplied in bf16.
  link_*: what joins `link_devices` devices of one host, per device and direction; network_* joins further ones.
    Latencies are those of one small all-reduce; link_reduces says that the switch adds up what passes through it.
  launch_seconds: the shortest time between two dependent kernels of one captured graph.
  The chip's fields (SMs to accelerated_features) describe the target for compiling without the device; they are 0 on a CPU.
    accelerated_features: compile for sm_90a and the like, as Mosaic GPU needs from compute capability 9.0 on.
  """

  name: str
  title: str
  memory_bytes: int
  bandwidth: float
  bf16_flops: float
  f32_flops: float
  fp8_flops: float | None = None
  unified_memory: bool = False
  system_bytes: int = 0
  runtime_bytes: int = 0
  link_bandwidth: float = 25e9
  link_latency_seconds: float = 0.0
  link_devices: int = 1
  link_reduces: bool = False
  network_bandwidth: float = 25e9
  network_latency_seconds: float = 0.0
  launch_seconds: float = 0.0
  num_sms: int = 0
  shared_memory_per_sm_bytes: int = 0
  shared_memory_per_block_bytes: int = 0
  threads_per_sm: int = 0
  fp32_units_per_sm: int = 0
  l2_bytes: int = 0
  clock_ghz: float = 0.0
  compute_capability: tuple[int, int] = (0, 0)
  accelerated_features: bool = False
  sources: tuple[tuple[str, str], ...] = ()

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type not in (int, float, float | None) or value is None:
        continue
      zero_allowed = field.name in _MAY_BE_ZERO or field.name in _CHIP_FIELDS
      number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
      if not number or value < 0 or (value == 0 and not zero_allowed):
        raise InputError(
          f"devices: {field.name} of {self.name!r} must be a positive number; got {value!r}. Compare configs/devices/h100.toml."
        )

  @property
  def usable_bytes(self) -> int:
    """What is left for a model: memory less the system's and the runtime's share."""
    return max(0, self.memory_bytes - self.system_bytes - self.runtime_bytes)

  def flops(self, dtype: str) -> float:
    """FLOP/s of matrix products in "fp8", "bf16" or "f32"; fp8 without FP8 units runs at the bf16 rate."""
    if dtype == "fp8":
      return self.fp8_flops or self.bf16_flops
    return {"bf16": self.bf16_flops, "f32": self.f32_flops}[dtype]


_CHIP_FIELDS = (
  "num_sms",
  "shared_memory_per_sm_bytes",
  "shared_memory_per_block_bytes",
  "threads_per_sm",
  "fp32_units_per_sm",
  "l2_bytes",
  "clock_ghz",
)


def device_names() -> tuple[str, ...]:
  """The devices of configs/devices/, and "cpu" for this machine."""
  return (*sorted(path.stem for path in (configs_folder() / "devices").glob("*.toml")), CPU)


def have_compiler() -> bool:
  """Whether programs can be compiled for NVIDIA GPUs here: the `cuda` extra is installed."""
  return importlib.util.find_spec("jax_cuda13_plugin") is not None


def load_device(name_or_path: str, cache_dir: str = "") -> DeviceSpec:
  """A name from configs/devices/, the path of a TOML of one's own, or "cpu" (measured; see `measure_cpu` for cache_dir).

  Raises InputError for an unknown name (with near names) and for a file that does not hold a device.
  """
  if name_or_path == CPU:
    return measure_cpu(cache_dir)
  path = pathlib.Path(name_or_path) if name_or_path.endswith(".toml") else find_config("devices", name_or_path)
  fields = read_toml(path)
  sources = fields.pop("sources", {})
  capability = fields.pop("compute_capability", (0, 0))
  try:
    return DeviceSpec(
      name=fields.pop("name", path.stem),
      title=fields.pop("title", path.stem),
      compute_capability=(int(capability[0]), int(capability[1])),
      sources=tuple((key, str(text)) for key, text in dict(sources).items()),
      **fields,
    )
  except (TypeError, ValueError, IndexError) as error:
    if isinstance(error, InputError):
      raise
    raise InputError(
      f"devices: {path} does not hold the fields of a DeviceSpec: {error}. Compare configs/devices/h100.toml."
    ) from error


def measure_cpu(cache_dir: str = "", again: bool = False) -> DeviceSpec:
  """This machine's CPU: memory from the system, bandwidth and FLOP/s measured in about a second.

  Bandwidth: the best of five reads of 512 MB of int64 by numpy's maximum, one thread a core (a reduction with no
  arithmetic to speak of: with every core reading, memory is the limit). FLOP/s: the best of four float32 products of
  1024 x 1024 by numpy's BLAS; the bf16 rate is that times what the instruction set adds (8 with AMX, 2 with AVX512-BF16),
  an upper bound and not a measurement.

  The two measured rates are kept in `cache_dir`/cpu-HOST.json (key: CPU model and core count) and read from there the
  next time; an empty cache_dir measures every time, and `again` replaces what is kept, which may be from a busy moment. The
  memory in use by others is read afresh.
  """
  flags, model = _cpu_facts()
  cores = host_memory.usable_cores()
  key = f"{model}, {cores} cores"
  path = pathlib.Path(cache_dir).expanduser() / f"cpu-{platform.node() or 'host'}.json" if cache_dir else None
  rates = _read_rates(path, key) if path and not again else None
  if rates is None:
    rates = {"bandwidth": _measure_bandwidth(cores), "f32_flops": _measure_f32_flops()}
    if path:
      stored_files.write(path, json.dumps({"key": key, **rates}).encode())
  faster = 8.0 if "amx_bf16" in flags else 2.0 if "avx512_bf16" in flags else 1.0
  total, available = host_memory.memory_bytes()
  return DeviceSpec(
    name=CPU,
    title=f"this machine: {key}",
    memory_bytes=total,
    bandwidth=rates["bandwidth"],
    bf16_flops=rates["f32_flops"] * faster,
    f32_flops=rates["f32_flops"],
    unified_memory=True,
    system_bytes=total - available,
    runtime_bytes=700_000_000,
    sources=(
      ("bandwidth", "measured: best of five reads of 512 MB by numpy, one thread a core"),
      ("flops", "measured: best of four float32 products of 1024 x 1024 by numpy; bf16 by instruction set, an upper bound"),
      ("system_bytes", "memory that other programs hold now"),
      ("runtime_bytes", "jax, flax and orbax take 336 MB, the CUDA plugin 350 MB more where it is installed (measured)"),
    ),
  )


def _cpu_facts() -> tuple[frozenset[str], str]:
  """(instruction-set flags, model name) from /proc/cpuinfo; empty where there is no such file."""
  flags: frozenset[str] = frozenset()
  model = platform.processor() or platform.machine()
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text()
  except OSError:
    return flags, model
  for line in text.split("\n\n", 1)[0].splitlines():
    name, _, value = line.partition(":")
    if name.strip() in ("flags", "Features"):
      flags = frozenset(value.split())
    elif name.strip() == "model name":
      model = value.strip()
  return flags, model


def _measure_bandwidth(cores: int) -> float:
  data = np.empty(READ_BYTES // 8, np.int64)
  parts = np.array_split(data, cores)
  with concurrent.futures.ThreadPoolExecutor(cores) as pool:
    list(pool.map(lambda part: part.fill(1), parts))  # the first touch maps the pages; it is not timed
    return READ_BYTES / _best_seconds(lambda: list(pool.map(np.max, parts)), 5)


def _measure_f32_flops() -> float:
  matrix = np.ones((MATMUL_SIZE, MATMUL_SIZE), np.float32)
  return 2.0 * MATMUL_SIZE**3 / _best_seconds(lambda: matrix @ matrix, 4)


def _best_seconds(run, repeats: int) -> float:
  best = math.inf
  for _ in range(repeats):
    start = time.perf_counter()
    run()
    best = min(best, time.perf_counter() - start)
  return best


def _read_rates(path: pathlib.Path, key: str) -> dict[str, float] | None:
  """The cached rates, or None where there are none, they are another machine's, or the file is damaged or another user's."""
  try:
    stored: Any = json.loads(stored_files.read(path, "the CPU is measured again") or b"")
    rates = {name: float(stored[name]) for name in ("bandwidth", "f32_flops")}
  except (ValueError, KeyError, TypeError):
    return None
  sane = all(math.isfinite(rate) and rate > 0 for rate in rates.values())
  return rates if sane and stored.get("key") == key else None
