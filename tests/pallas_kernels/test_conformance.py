"""The check of kernels on a device's first use: it passes what is right, names what is wrong, and remembers."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.recipe import Recipe
from jaxfp8.serving.limits import EngineLimits
from jaxfp8.serving.steps import CompiledSteps
from jaxfp8.sharding import make_mesh
from pallas_kernels import Target, conformance, dispatch, interpret
from pallas_kernels.conformance import CHECKS, Check, KernelError, Outcome
from pallas_kernels.fp8_matmul import sm90
from tests.helpers import tiny_llamas

GPU = Target("cuda", (9, 0), 8)
HOPPER = Target("cuda", (9, 0), 132, "NVIDIA H100")
MATMUL = CHECKS[0]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_right_kernels_pass(check):
  """In interpret mode, with races detected."""
  with interpret.running():
    outcome = conformance.run_one(check, "interpret", GPU)
  assert outcome.passed, outcome.sentence()


def test_every_kernel_of_a_hopper_has_a_check():
  have = {(check.operation, conformance.kernel_of(check.operation, HOPPER)) for check in CHECKS}
  assert have == {
    ("fp8_matmul", "sm90"),
    ("paged_attention", "sm90"),
    ("residual_norm", "sm90"),
    ("rope_write", "sm90"),
    ("silu_multiply", "sm90"),
  }
  assert conformance.kernel_of("page_write", HOPPER) is None
  kernels = {operation for operation in dispatch.OPERATIONS if conformance.kernel_of(operation, HOPPER)}
  assert kernels == {check.operation for check in CHECKS}


@pytest.mark.parametrize("place", [2, 3], ids=["channel scales", "token scales"])
def test_a_wrong_kernel_is_named(monkeypatch, place):
  """A kernel that takes a scale for 1."""

  def forgets(*arguments, **options):
    arguments = [jnp.ones_like(x) if i == place else x for i, x in enumerate(arguments)]
    return kernel(*arguments, **options)

  kernel = sm90.fp8_matmul
  monkeypatch.setattr(sm90, "fp8_matmul", forgets)
  with interpret.running():
    outcome = conformance.run_one(MATMUL, "interpret", GPU)
  assert not outcome.passed and not outcome.failure and outcome.error > 10 * outcome.limit
  named = r"on this NVIDIA H100 .*fp8_matmul \(W8A8, 3 tokens\): the kernel 'interpret' is off by"
  with pytest.raises(KernelError, match=named):
    conformance.require_passed([outcome], "NVIDIA H100")


def test_a_kernel_that_cannot_be_launched_is_named(monkeypatch):
  def fail(*_, **__):
    raise RuntimeError("CUDA_ERROR_INVALID_VALUE: the launch failed")

  monkeypatch.setattr(sm90, "fp8_matmul", fail)
  outcome = conformance.run_one(MATMUL, "interpret", GPU)
  assert not outcome.passed and "RuntimeError: CUDA_ERROR_INVALID_VALUE" in outcome.failure
  with pytest.raises(KernelError, match=r"fails: RuntimeError.*Go on with --implementation=xla"):
    conformance.require_passed([outcome], "NVIDIA H100")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_never_passes(bad):
  def call(x, implementation, target):
    return x if implementation == "xla" else x.at[0, 0].set(bad)

  check = Check("a check", "residual_norm", call, lambda: (np.ones((2, 3), np.float32),), 1e9)
  assert not conformance.run_one(check, "sm90", GPU).passed


@dataclasses.dataclass(frozen=True)
class FakeGpu:
  """As much of a JAX device as first use asks."""

  device_kind: str = "NVIDIA H100 80GB HBM3"
  driver: str = "cuda 13.0"
  platform: str = "gpu"
  compute_capability: str = "9.0"
  core_count: int = 132
  process_index: int = 0

  @property
  def client(self):
    return types.SimpleNamespace(platform_version=self.driver)


@pytest.fixture
def first_use(monkeypatch):
  """Counts runs of the checks on fake devices; what they give is in `outcomes`."""
  state = types.SimpleNamespace(runs=0, outcomes=[Outcome("a check", "sm90", 0.001, 0.01)])

  def run(target):
    state.runs += 1
    return state.outcomes

  monkeypatch.setattr(conformance, "run", run)
  monkeypatch.setattr(conformance.jax, "devices", lambda: [FakeGpu(), FakeGpu(driver="cuda 13.1"), FakeGpu("NVIDIA H200")])
  monkeypatch.setattr(conformance.jax, "default_device", lambda _: interpret.contextlib.nullcontext())
  conformance._require.cache_clear()
  yield state
  conformance._require.cache_clear()


def test_success_is_remembered_by_device_and_driver(first_use, tmp_path):
  folder = tmp_path / "programs"
  for device, runs in ((FakeGpu(), 1), (FakeGpu(), 1), (FakeGpu(driver="cuda 13.1"), 2), (FakeGpu("NVIDIA H200"), 3)):
    conformance.require(device, folder)
    assert first_use.runs == runs
  conformance._require.cache_clear()  # as in the next process
  conformance.require(FakeGpu(), folder)
  assert first_use.runs == 3
  assert [path.read_text() for path in folder.iterdir()] == ["a check sm90 0.001\n"] * 3


def test_without_a_folder_it_is_once_a_process(first_use):
  for _ in range(3):
    conformance.require(FakeGpu())
  assert first_use.runs == 1


def test_changed_kernels_are_checked_again(first_use, tmp_path, monkeypatch):
  conformance.require(FakeGpu(), tmp_path)
  package = tmp_path / "pallas_kernels"
  package.mkdir()
  (package / "sm90.py").write_text("changed")
  monkeypatch.setattr(conformance, "__file__", str(package / "conformance.py"))
  conformance._require.cache_clear()
  conformance.require(FakeGpu(), tmp_path)
  assert first_use.runs == 2


def test_failure_is_not_remembered(first_use, tmp_path):
  first_use.outcomes = [Outcome("a check", "sm90", 0.5, 0.01)]
  for _ in range(2):
    with pytest.raises(KernelError, match=r"a check: the kernel 'sm90' is off by 0\.5, where 0\.01 is allowed"):
      conformance.require(FakeGpu(), tmp_path)
  assert first_use.runs == 2 and not list(tmp_path.iterdir())


def test_an_unwritable_folder_is_no_error(first_use, tmp_path):
  (tmp_path / "file").write_text("")
  conformance.require(FakeGpu(), tmp_path / "file" / "programs")


def test_nothing_happens_for_a_cpu_or_an_absent_device(first_use):
  conformance.require(jax.local_devices()[0])
  conformance.require(FakeGpu("a GPU that is only compiled for"))
  assert first_use.runs == 0


@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_steps_ask_before_they_compile(monkeypatch, implementation):
  def fail(device, folder, **files):
    raise KernelError("the kernel is wrong")

  config = LlamaConfig.from_name("tiny")
  model = tiny_llamas.load(config, Recipe(weights="f32", kv="f32", activations="f32"), implementation=implementation)
  monkeypatch.setattr(conformance, "require", fail)
  steps = CompiledSteps(model, make_mesh(config), EngineLimits(num_pages=2, max_sequences=2, max_pages=2))
  if implementation == "auto":
    with pytest.raises(InputError, match="the kernel is wrong"):
      steps.compile("decode", 2)
  else:
    steps.compile("decode", 2)
