"""Programs compiled for an absent GPU, and reports on their machine code.

    load_device("h100") -> target_config -> topology -> mesh -> compile_for(function, arguments) -> Compiled
    MOSAIC_GPU_DUMP_TO=folder while compiling -> read_dumps(folder) -> [KernelReport]: registers, spills, opcodes
    compile_cases("h100", names) -> the same in child processes, with a time limit

An instruction that the target lacks makes LLVM abort the whole process. `compile_cases` therefore compiles in child processes:
one for all kernels, and after an abort one for each remaining kernel. Needs the `cuda` extra (jax's CUDA plugin, nvdisasm) and
no GPU. Refuses to know what kernels compute, and times: no program here has run on a device.
"""

import collections
import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pallas_kernels
from jaxfp8 import child_process
from jaxfp8.errors import InputError
from jaxfp8.planning.devices import DeviceSpec, have_compiler, load_device

DUMP_VARIABLE = "MOSAIC_GPU_DUMP_TO"
REGISTERS_PER_SM = 65536
RESERVED_SMEM = 1024  # bytes of each CTA's shared memory that the hardware reserves (CUDA programming guide, from 8.0 on)
HARMLESS = frozenset({"C7504"})  # setmaxnreg is ignored in relocatable code, and nvJitLink takes only such code


@dataclasses.dataclass(frozen=True)
class KernelReport:
  """One compiled Mosaic kernel.

  registers: of a thread. threads: of a CTA. *_bytes: of a CTA (smem) or a thread (spill, stack). warnings: codes of ptxas.
  opcodes: the number of instructions in the machine code by opcode; not the number that runs.
  """

  kernel: str
  device: str
  target: str
  registers: int
  threads: int
  spill_bytes: int
  stack_bytes: int
  smem_bytes: int
  warnings: tuple[str, ...]
  opcodes: dict[str, int]

  def count(self, pattern: str) -> int:
    """The number of instructions with an opcode whose beginning matches the regular expression."""
    return sum(number for opcode, number in self.opcodes.items() if re.match(pattern, opcode))

  def ctas_per_sm(self, spec: DeviceSpec) -> int:
    """The number of CTAs that fit one SM, by registers (allocated to a warp in units of 256), shared memory and threads."""
    registers = -(-self.registers // 8) * 8 * self.threads
    smem = -(-self.smem_bytes // 128) * 128 + RESERVED_SMEM
    return min(REGISTERS_PER_SM // registers, spec.shared_memory_per_sm_bytes // smem, spec.threads_per_sm // self.threads)


def target_config(spec: DeviceSpec) -> str:
  """XLA's description of a GPU, a protocol buffer as text (stream_executor's GpuTargetConfigProto).

  Raises InputError for a device that is no GPU.
  """
  major, minor = spec.compute_capability
  if not spec.num_sms:
    raise InputError(f"deviceless: programs are compiled for GPUs; {spec.name!r} is none. Try h100.")
  extension = "feature_extension: ACCELERATED_FEATURES" if spec.accelerated_features else ""
  return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {spec.shared_memory_per_sm_bytes}
  shared_memory_per_block_optin: {spec.shared_memory_per_block_bytes}
  threads_per_core_limit: {spec.threads_per_sm} core_count: {spec.num_sms} fpus_per_core: {spec.fp32_units_per_sm}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {int(spec.bandwidth)} l2_cache_size: {spec.l2_bytes} clock_rate_ghz: {spec.clock_ghz}
  device_memory_size: {spec.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
  registers_per_core_limit: {REGISTERS_PER_SM} registers_per_block_limit: {REGISTERS_PER_SM}
  device_vendor: "NVIDIA Corporation" name: "{spec.title}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0" device_address_bits: 64
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{spec.title}"
"""


def topology(spec: DeviceSpec, num_devices: int = 1, num_hosts: int = 1) -> topologies.TopologyDescription:
  """`num_devices` absent GPUs in all, equally many on each host.

  Raises InputError if they do not divide over the hosts, or the CUDA compiler is not installed.
  """
  if num_devices % num_hosts:
    raise InputError(f"deviceless: num_devices must divide over {num_hosts} hosts; got {num_devices}.")
  if not have_compiler():
    raise InputError('deviceless: the CUDA compiler is not installed. Install the extra: pip install "jaxfp8[cuda]".')
  layout = f"1x{num_hosts}x{num_devices // num_hosts}"
  return topologies.get_topology_desc(platform="cuda", target_config=target_config(spec), topology=layout)


def absent_mesh(spec: DeviceSpec, shape: Sequence[int] = (1,), names: Sequence[str] = ("x",), num_hosts: int = 1) -> Mesh:
  """A mesh of absent devices, to lower and compile for."""
  size = functools.reduce(lambda product, n: product * n, shape, 1)
  return topologies.make_mesh(topology(spec, size, num_hosts), tuple(shape), tuple(names))


def kernel_target(spec: DeviceSpec) -> pallas_kernels.Target:
  """The target by which dispatch chooses kernels for this device."""
  return pallas_kernels.Target("cuda", spec.compute_capability, spec.num_sms)


@contextlib.contextmanager
def lowering_for(spec: DeviceSpec):
  """A context in which the Python half of Mosaic lowers for `spec`, with the shared memory of `spec` as its limit.

  Without a GPU, Mosaic takes every target for an sm_90 with 227 KB: it would emit TMA for an A100, which aborts LLVM, and
  accept 160 KB for a GB10. Uses private names of jax 0.12.0.1.
  """
  from jax.experimental.mosaic.gpu import core, utils

  infer_arch = utils._infer_arch
  utils._infer_arch = lambda: spec.compute_capability
  try:
    with core.artificial_shared_memory_limit(spec.shared_memory_per_block_bytes):
      yield
  finally:
    utils._infer_arch = infer_arch


def compile_for(
  function: Callable, arguments: Any, spec: DeviceSpec, *, mesh: Mesh | None = None, donate_argnums: Sequence[int] = ()
) -> jax.stages.Compiled:
  """Compiles function(*arguments) for `spec`.

  arguments: ShapeDtypeStructs or arrays. Those with a sharding keep it, the others are replicated. mesh: None is one device.
  LLVM may abort the process: see the module's docstring.
  """
  mesh = mesh or absent_mesh(spec)
  replicated = NamedSharding(mesh, PartitionSpec())

  def with_sharding(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or replicated)

  abstract = jax.tree.map(with_sharding, tuple(arguments))
  with lowering_for(spec):
    traced = jax.jit(function, donate_argnums=tuple(donate_argnums)).trace(*abstract)
    return traced.lower(lowering_platforms=("cuda",)).compile()


def read_dumps(folder: str | os.PathLike, kernel: str = "", device: str = "") -> list[KernelReport]:
  """Reports on the kernels with dumps in `folder`, in the order of compilation.

  The dumps are written while the environment variable MOSAIC_GPU_DUMP_TO names the folder. kernel, device: names in the
  reports.
  Raises InputError if nvdisasm is missing.
  """

  def in_order(pattern):
    return sorted(pathlib.Path(folder).glob(pattern), key=lambda path: (len(path.name), path.name))

  # Each half of the compiler numbers kernels by itself, so names need not agree; the order does.
  pairs = zip(in_order("*.ptxas"), in_order("*.resources.txt"), strict=True)
  return [_read_dump(path, resources, kernel or path.stem, device) for path, resources in pairs]


def _read_dump(path: pathlib.Path, resources: pathlib.Path, kernel: str, device: str) -> KernelReport:
  log = path.read_bytes().replace(b"\0", b"").decode(errors="replace")
  sass = path.with_suffix(".sass_ctrl")
  if not sass.exists():
    raise InputError(f"deviceless: there is no machine code beside {path.name}; nvdisasm is missing. Install the `cuda` extra.")
  code = sass.read_text()
  ptx = path.with_suffix(".ptx").read_text()
  stack, stores, loads = _match(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log).groups()
  opcodes = collections.Counter(m.group(1) for m in re.finditer(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code))
  threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx)
  return KernelReport(
    kernel=kernel,
    device=device,
    target=_match(r"\.target\s+(\w+)", code).group(1),
    registers=int(_match(r"Used (\d+) registers", log).group(1)),
    threads=int(threads.group(1)) if threads else 0,
    spill_bytes=int(stores) + int(loads),
    stack_bytes=int(stack),
    smem_bytes=_shared_memory(resources.read_text()),
    warnings=tuple(sorted(set(re.findall(r"\bC7\d+", log)) - HARMLESS)),
    opcodes=dict(sorted(opcodes.items())),
  )


def _match(pattern: str, text: str) -> re.Match[str]:
  """The first match. Raises InputError without a match: the compiler's output then has an unknown form."""
  match = re.search(pattern, text)
  if match is None:
    raise InputError(
      f"deviceless: the compiler's output has no line like {pattern!r}. Install the CUDA packages of pyproject.toml."
    )
  return match


def _shared_memory(resources: str) -> int:
  """Bytes of the buffers, and eight bytes for every barrier."""
  barriers = re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", resources)
  return int(_match(r"smem_scratch_bytes=(\d+)", resources).group(1)) + 8 * sum(int(n) * int(m) for n, m in barriers)


def compile_cases(device: str, names: Sequence[str], timeout_s: float = 300) -> dict[str, list[KernelReport] | str]:
  """Compiles the named cases of `pallas_kernels.cases` for `device` in child processes.

  timeout_s: of one child process, in seconds. Returns for each name the reports on its kernels, or the text of the error.
  """
  results = _child(device, names, timeout_s)
  for name in names:
    if name not in results:  # the child died in an earlier case, or in this one
      results |= _child(device, [name], timeout_s)
    results.setdefault(name, f"the compiler aborted or took more than {timeout_s:.0f} s")
  return {name: results[name] for name in names}


def _child(device: str, names: Sequence[str], timeout_s: float) -> dict[str, list[KernelReport] | str]:
  """Runs this module as a child process and returns the results of the cases that the child finished."""
  quiet = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
  with tempfile.TemporaryDirectory() as folder:
    request = {"device": device, "folder": folder, "names": list(names)}
    reply = child_process.ask(child_process.Child.COMPILED_CASES, request, variables=quiet, timeout_s=timeout_s)
  results: dict[str, list[KernelReport] | str] = {}
  for record in reply.answers:
    reports = [KernelReport(**{**report, "warnings": tuple(report["warnings"])}) for report in record["reports"]]
    results[record["name"]] = record["error"] or reports
  failure = f"took more than {timeout_s:.0f} s" if reply.timed_out else reply.failure
  if failure and len(names) == 1:
    results.setdefault(names[0], failure)
  return results


def _compile_cases_here(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """The child process: compiles case by case and answers each at once, so that an abort loses only the current case."""
  from pallas_kernels import cases

  device = request["device"]
  spec = load_device(device)
  target, mesh = kernel_target(spec), absent_mesh(spec)
  for number, name in enumerate(request["names"]):
    dumps = pathlib.Path(request["folder"]) / str(number)
    dumps.mkdir()
    os.environ[DUMP_VARIABLE] = str(dumps)
    record: dict[str, Any] = {"name": name, "reports": [], "error": ""}
    try:
      case = cases.by_name(name)
      compile_for(functools.partial(case.call, target=target), case.arguments(), spec, mesh=mesh)
      record["reports"] = [dataclasses.asdict(report) for report in read_dumps(dumps, name, device)]
    except Exception:
      record["error"] = traceback.format_exc()[-1500:]
    yield record
    for path in dumps.iterdir():
      path.unlink()


if __name__ == "__main__":
  child_process.serve(_compile_cases_here)
