"""Every kernel and regime compiled for GPUs that are not here: no spills, the right instructions, enough bytes in flight.

One child process (see jaxfp8/inspection/deviceless.py) compiles everything for the devices with one target, whose programs are
the same. Without the `cuda` extra the tests are skipped; where CI=true that is a failure, so that nobody loses them unnoticed.
"""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxfp8.errors import InputError
from jaxfp8.inspection import deviceless
from jaxfp8.planning.devices import device_names, load_device
from pallas_kernels import dispatch
from pallas_kernels.cases import CASES

pytestmark = pytest.mark.compile

DEVICES = ("h100", "h200")
LATENCY_SECONDS = 700e-9
LEAST_IN_FLIGHT = 32 * 1024
MISSING = 'the CUDA compiler is not installed: pip install "jaxfp8[cuda]"'


def compiled(device):
  return _compiled(deviceless.kernel_target(load_device(device)))


@functools.cache
def _compiled(target):
  device = next(name for name in DEVICES if deviceless.kernel_target(load_device(name)) == target)
  if not deviceless.have_compiler():
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(MISSING)
  return deviceless.compile_cases(device, [case.name for case in CASES])


def reports_of(device, case) -> list[deviceless.KernelReport]:
  """Of the kernels of one call: one, and for decode's attention a second, which joins its parts."""
  result = compiled(device)[case.name]
  assert not isinstance(result, str), result
  assert len(result) == case.num_kernels
  return result


each = pytest.mark.parametrize(
  ("device", "case"), [(device, case) for device in DEVICES for case in CASES], ids=lambda x: getattr(x, "name", x)
)


@each
@pytest.mark.timeout(900)
def test_no_spills_and_within_limits(device, case):
  spec = load_device(device)
  for report in reports_of(device, case):
    check_limits(report, spec)


def check_limits(report, spec):
  assert (report.spill_bytes, report.stack_bytes) == (0, 0)
  assert not report.count("LDL|STL")
  assert report.warnings == ()  # a C75xx here would say that wgmma was serialized
  assert report.target == "sm_90a"
  assert report.smem_bytes <= spec.shared_memory_per_block_bytes
  assert report.ctas_per_sm(spec) >= 1


@each
def test_instructions(device, case):
  report, *joining = reports_of(device, case)
  for small in joining if case.uses_tensor_cores else (report,):
    assert not small.count(r"[QH]G?MMA|UTMALDG|LDS\.[US]")  # loads, stores and shuffles
  if case.uses_tensor_cores:
    check_tensor_cores(report, case)


def check_tensor_cores(report, case):
  assert not report.count("HMMA|QMMA|IMMA"), "the tensor cores of older GPUs"
  assert report.count("UTMALDG") >= 2
  assert not report.count(r"LDS\.[US](8|16)"), "shared memory read in pieces"
  if case.number_format == "fp8":
    assert report.count("QGMMA")
    assert not report.count("HGMMA")
  else:
    assert report.count("HGMMA")
    assert not report.count("QGMMA")
  assert bool(report.count(r"F2FP\.F16\.E4M3\.UNPACK_B")) == case.widens


@each
def test_bytes_in_flight(device, case):
  """Little's law: bandwidth times latency, shared by the SMs; a matrix smaller than that is under way as a whole."""
  if not case.is_skinny:
    return
  (report, *_), spec = reports_of(device, case), load_device(device)
  flight = case.flight(deviceless.kernel_target(spec))
  in_flight = flight.per_sm(report.ctas_per_sm(spec), spec.num_sms)
  needed = max(LEAST_IN_FLIGHT, spec.bandwidth * LATENCY_SECONDS / spec.num_sms)
  assert in_flight >= min(needed, flight.total_bytes / spec.num_sms)


def test_an_abort_loses_only_its_own_case(monkeypatch):
  """A child that dies in the second case: the first and third still have reports, the second its last words."""
  runs = []

  def child(device, names, timeout_s):
    runs.append(tuple(names))
    return {name: [] for name in names[: names.index("b")]} if "b" in names and len(names) > 1 else _alone(names[0])

  def _alone(name):
    return {"b": "LLVM ERROR"} if name == "b" else {name: []}

  monkeypatch.setattr(deviceless, "_child", child)
  assert deviceless.compile_cases("h100", ["a", "b", "c"]) == {"a": [], "b": "LLVM ERROR", "c": []}
  assert runs == [("a", "b", "c"), ("b",), ("c",)]


def test_a_real_abort_keeps_what_was_done(monkeypatch, tmp_path):
  """A child that is killed while it compiles: what it had written is kept, and the victim alone has its last words."""
  line = '{"name": "%s", "reports": [], "error": ""}'
  script = tmp_path / "python"  # reads {"device", "folder", "names"} from stdin
  script.write_text(
    "#!/bin/sh\nread request\n"
    """for name in $(echo "$request" | sed 's/.*"names": .\\(.*\\)].*/\\1/; s/[",]/ /g'); do\n"""
    '  if [ $name = b ]; then echo "LLVM ERROR: Cannot select" >&2; kill -ABRT $$; fi\n'
    f"  printf '{line}\\n' $name\ndone\n"
  )
  script.chmod(0o755)
  monkeypatch.setattr("sys.executable", str(script))
  results = deviceless.compile_cases("h100", ["a", "b", "c"], 20)
  assert results["a"] == results["c"] == [] and "LLVM ERROR: Cannot select" in results["b"]


@pytest.mark.parametrize("name", ["a100-80", "b200", "gb10"])
def test_a_gpu_without_kernels_is_said(name):
  """In one sentence, and nothing is compiled."""
  ran = subprocess.run(
    [sys.executable, "-m", "tools.compile_deviceless", f"--device={name}"], capture_output=True, text=True, timeout=120
  )
  capability = ".".join(map(str, load_device(name).compute_capability))
  said = f"compile: {name}: there are no kernels for a GPU of compute capability {capability} yet: every operation is"
  assert (ran.returncode, ran.stdout) == (1, "") and ran.stderr.startswith(said) and ran.stderr.count("\n") == 1


def test_every_device_of_the_planner_stands_in_the_table():
  """What runs where is said in one place, for all of them."""
  specs = [load_device(name) for name in device_names() if name != "cpu"]
  assert {spec.compute_capability for spec in specs} <= set(dispatch.KERNELS)
  for spec in specs:
    target = deviceless.kernel_target(spec)
    kernels = dispatch.KERNELS[target.capability]
    for operation in dispatch.OPERATIONS:
      order = dispatch.order(operation, target)
      assert order[-1] == "xla" and set(order[:-1]) <= set(kernels)
  names = {path.parent.name for path in pathlib.Path(dispatch.__file__).parent.glob("*/api.py")}
  assert set(dispatch.OPERATIONS.values()) == names


def test_no_gpu_no_target():
  with pytest.raises(InputError, match="none"):
    deviceless.target_config(load_device("cpu"))


def test_a_program_over_eight_devices_compiles():
  """Not a kernel: the mesh, the sharding and one all-reduce."""
  if not deviceless.have_compiler():
    pytest.skip(MISSING)
  spec = load_device("h100")
  mesh = deviceless.absent_mesh(spec, (1, 8), ("data", "kv"))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("kv"))
  x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharding)
  program = deviceless.compile_for(lambda x: jnp.sum(x, axis=0), (x,), spec, mesh=mesh)
  assert "all-reduce" in program.as_text()
