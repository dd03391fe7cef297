"""Which implementation of an operation runs on which target.

An implementation is a module in the operation's folder with one function named like the operation. It raises
NotImplementedError when it cannot do this call (dispatch then tries the next one) and ValueError when nobody could
(the caller's mistake, passed on). A forced implementation that cannot run is an error, never a silent substitute.
Refuses to know: shapes, and anything about models.
"""

import dataclasses
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import jax

HOPPER_SMS = 132  # of an H100 or H200 SXM, where a Target does not say


@dataclasses.dataclass(frozen=True)
class Target:
  """What a program is compiled for: a CPU, or a GPU of one CUDA compute capability such as (9, 0).

  num_sms: how many multiprocessors the GPU has, which decides how kernels cut their work; None where it is not known.
  kind: its name as the driver says it, which chooses between measured tile sizes (tuned.py).
  """

  platform: str
  capability: tuple[int, int] | None = None
  num_sms: int | None = None
  kind: str | None = None

  @classmethod
  def of(cls, device: jax.Device) -> "Target":
    """The target that compiles for `device` (a real one or one of a deviceless topology)."""
    if device.platform == "cpu":
      return cls("cpu")
    capability = str(getattr(device, "compute_capability", "0.0"))
    major, _, minor = capability.partition(".")
    sms, kind = getattr(device, "core_count", None), getattr(device, "device_kind", None)
    return cls("cuda", (int(major), int(minor.rstrip("af") or 0)), sms, kind)


OPERATIONS = ("fp8_matmul", "paged_attention", "fused", "page_write")  # this package's folders
# What runs where: kernel files by compute capability, best first. After them, and wherever there are none, comes xla.py, which
# every operation has. Another GPU's kernels get their names here, and nowhere else, when they get their files.
KERNELS = {
  (8, 0): (),  # A100: no FP8 units
  (8, 9): (),  # L40S, RTX 6000 Ada, RTX 4090
  (9, 0): ("wgmma", "mosaic"),  # H100, H200, GH200
  (10, 0): (),  # B200
  (10, 3): (),  # B300
  (12, 0): (),  # RTX PRO 6000
  (12, 1): (),  # GB10
}


@functools.cache
def default_target() -> Target:
  return Target.of(jax.devices()[0])


def order(package: str, target: Target) -> tuple[str, ...]:
  """The implementations to try on `target`, best first, of those that the operation's folder has."""
  if target.platform == "cpu":
    return ("cpu",)
  kernels = KERNELS.get(target.capability or (0, 0), ())
  return tuple(name for name in (*kernels, "xla") if importlib.util.find_spec(f"{package}.{name}"))


def run(package: str, operation: str, implementation: str, target: Target, *args: Any, **kwargs: Any):
  """Calls the first implementation that can do this call.

  Args:
    package: dotted name of the operation's folder.
    implementation: "auto", or the name of one file in the folder, which is then the only one tried.

  Raises:
    ValueError: `implementation` is unknown, or was forced and cannot run here.
  """
  names = order(package, target) if implementation == "auto" else (implementation,)
  if implementation == "auto" and target.platform != "cpu" and not KERNELS.get(target.capability):
    _say_once(f"{without_kernels(target.capability)}, which is slower.")
  refusals = []
  for name in names:
    try:
      _require(operation, name, target)
      function = functools.partial(_function(package, operation, name), target=target)
      if _needs(name):
        function = _without_derivative(operation, name, function)
      result = function(*args, **kwargs)
    except NotImplementedError as refusal:
      refusals.append(f"{name}: {refusal}")
      continue
    if refusals:
      _say_once(f"{operation}: running {name!r} on {target.platform}, since {'; '.join(refusals)}.")
    return result
  raise ValueError(
    f'{operation}: implementation={implementation!r} cannot run here ({"; ".join(refusals)}). Pass implementation="auto".'
  )


def without_kernels(capability: tuple[int, int] | None) -> str:
  """What runs on a GPU that KERNELS has nothing for."""
  name = "this GPU" if capability is None else f"a GPU of compute capability {capability[0]}.{capability[1]}"
  return f"there are no kernels for {name} yet: every operation is plain XLA there"


def _needs(name: str) -> list[tuple[int, int]]:
  """Where an implementation can run; empty: anywhere."""
  return [capability for capability, kernels in KERNELS.items() if name in kernels]


def _require(operation: str, name: str, target: Target) -> None:
  needed = _needs(name)
  if needed and target.capability not in needed:
    words = ", ".join(f"{major}.{minor}" for major, minor in needed)
    raise NotImplementedError(f"{name} needs a GPU of compute capability {words}; the target is {target}")


def _without_derivative(operation: str, name: str, function: Callable) -> Callable:
  """A kernel, with a sentence instead of JAX's internal error where somebody differentiates it."""

  @jax.custom_jvp
  def same(arrays):
    return arrays

  @same.defjvp
  def _(primals, tangents):
    raise ValueError(f'{operation}: {name!r} has no derivative. Pass implementation="reference" to differentiate.')

  def call(*args, **kwargs):
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = iter(same([leaf for leaf in leaves if isinstance(leaf, jax.Array)]))
    args, kwargs = tree.unflatten([next(arrays) if isinstance(leaf, jax.Array) else leaf for leaf in leaves])
    return function(*args, **kwargs)

  return call


def _function(package: str, operation: str, name: str):
  try:
    module = importlib.import_module(f"{package}.{name}")
    return getattr(module, operation)
  except (ModuleNotFoundError, AttributeError) as error:
    raise ValueError(
      f'{operation}: there is no implementation named {name!r}. Pass implementation="auto" or "reference".'
    ) from error


@functools.cache
def _say_once(sentence: str) -> None:
  print(f"jaxfp8: {sentence}", file=sys.stderr)
