"""Which implementation of an operation runs on which target.

An implementation is a file in the operation's folder with a function named like the operation. The function raises
NotImplementedError for a call that it cannot do (the next implementation is then tried) and ValueError for a mistake of the
caller. A forced implementation that cannot run is an error, never a silent substitute; this holds too for an operation
without a kernel of the forced name. One name forces the kernels of a whole model, since every operation that a model calls has
a file of that name. `page_write` has no kernel: models write pages by `rope_write`, and a direct call runs xla.py on a GPU.
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

HOPPER_SMS = 132  # multiprocessors of an H100 or H200 SXM, for a Target that does not give its number
HOPPER_SHARED_BYTES = 232448  # shared memory that one SM can give to CTAs: 227 kB


@dataclasses.dataclass(frozen=True)
class Target:
  """The platform that a program is compiled for: a CPU, or a GPU of one CUDA compute capability such as (9, 0).

  num_sms: the GPU's number of multiprocessors, which decides how kernels cut their work; None if unknown.
  kind: the GPU's name as the driver gives it, which selects measured tile sizes (tuned.py); None if unknown.
  """

  platform: str
  capability: tuple[int, int] | None = None
  num_sms: int | None = None
  kind: str | None = None

  @classmethod
  def of(cls, device: Any) -> "Target":
    """The target that compiles for `device` (a real one or one of a deviceless topology)."""
    if device.platform == "cpu":
      return cls("cpu")
    capability = str(getattr(device, "compute_capability", "0.0"))
    major, _, minor = capability.partition(".")
    sms, kind = getattr(device, "core_count", None), getattr(device, "device_kind", None)
    return cls("cuda", (int(major), int(minor.rstrip("af") or 0)), sms, kind)


# The operations, and the folder of this package that each is in.
OPERATIONS = {
  "fp8_matmul": "fp8_matmul",
  "paged_attention": "paged_attention",
  "residual_norm": "fused",
  "rope_write": "fused",
  "silu_multiply": "fused",
  "page_write": "fused",
}
# The kernel files for each compute capability, best first. Every operation also has an xla.py, which runs where no kernel does.
# Kernels for another GPU get their name here, and nowhere else, when they get their files.
KERNELS: dict[tuple[int, int], tuple[str, ...]] = {
  (8, 0): (),  # A100: no FP8 units
  (8, 9): (),  # L40S, RTX 6000 Ada, RTX 4090
  (9, 0): ("sm90",),  # H100, H200, GH200
  (10, 0): (),  # B200
  (10, 3): (),  # B300
  (12, 0): (),  # RTX PRO 6000
  (12, 1): (),  # GB10
}
EVERYWHERE = ("cpu", "interpret", "reference", "xla")  # implementations that need no particular GPU


@functools.cache
def default_target() -> Target:
  return Target.of(jax.devices()[0])


def implementations() -> tuple[str, ...]:
  """The names that can be forced: those of KERNELS, and those that run everywhere."""
  return tuple(sorted({*EVERYWHERE, *(name for kernels in KERNELS.values() for name in kernels)}))


def order(operation: str, target: Target) -> tuple[str, ...]:
  """The implementations of `operation` to try on `target`, best first."""
  if target.platform == "cpu":
    return ("cpu",)
  kernels = KERNELS.get(target.capability or (0, 0), ())
  return tuple(name for name in (*kernels, "xla") if _function(operation, name))


def run(operation: str, implementation: str, target: Target, *args: Any, **kwargs: Any):
  """Calls the first implementation of `operation` that can do this call.

  Args:
    operation: a key of OPERATIONS.
    implementation: "auto", or the only implementation to try, one of `implementations()`. "interpret" runs what a GPU would
      run, in Mosaic's interpret mode.

  Raises:
    ValueError: `implementation` is unknown, the operation does not have it, or it was forced and cannot run here.
  """
  if implementation == "interpret":
    from pallas_kernels import interpret  # private modules of JAX, which only tests need

    target = interpret.played_gpu(target)
    with interpret.mode():
      return _first(operation, order(operation, target), target, args, kwargs)
  if implementation != "auto":
    return _forced(operation, implementation, target, args, kwargs)
  if target.platform != "cpu" and not KERNELS.get(target.capability or (0, 0)):
    _say_once(f"{without_kernels(target.capability)}, which is slower.")
  return _first(operation, order(operation, target), target, args, kwargs)


def _first(operation: str, names: tuple[str, ...], target: Target, args, kwargs):
  """The result of the first of `names` that does not refuse the call."""
  refusals: list[str] = []
  for name in names:
    try:
      result = _call(operation, name, target, args, kwargs)
    except NotImplementedError as refusal:
      refusals.append(f"{name}: {refusal}")
      continue
    if refusals:
      _say_once(f"{operation}: running {name!r} on {target.platform}, since {'; '.join(refusals)}.")
    return result
  raise _cannot_run(operation, "auto", refusals)


def _forced(operation: str, name: str, target: Target, args, kwargs):
  if name not in implementations():
    raise ValueError(
      f"{operation}: there is no implementation named {name!r}; there are {', '.join(implementations())}. "
      'Pass implementation="auto" for the best one.'
    )
  try:
    return _call(operation, name, target, args, kwargs)
  except NotImplementedError as refusal:
    raise _cannot_run(operation, name, [f"{name}: {refusal}"]) from refusal


def _cannot_run(operation: str, implementation: str, refusals: list[str]) -> ValueError:
  return ValueError(
    f'{operation}: implementation={implementation!r} cannot run here ({"; ".join(refusals)}). Pass implementation="auto".'
  )


def _call(operation: str, name: str, target: Target, args, kwargs):
  """The result of one implementation. Raises NotImplementedError where it cannot do this call."""
  capabilities = [capability for capability, kernels in KERNELS.items() if name in kernels]
  if capabilities and target.capability not in capabilities:
    words = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
    raise NotImplementedError(f"{name} needs a GPU of compute capability {words}; the target is {target}")
  function = _function(operation, name)
  if function is None:
    raise NotImplementedError(f"{operation} has no kernel of this name")
  function = functools.partial(function, target=target)
  if capabilities:
    function = _without_derivative(operation, name, function)
  return function(*args, **kwargs)


def without_kernels(capability: tuple[int, int] | None) -> str:
  """A clause for messages about a GPU without kernels."""
  name = "this GPU" if capability is None else f"a GPU of compute capability {capability[0]}.{capability[1]}"
  return f"there are no kernels for {name} yet: every operation is plain XLA there"


def _without_derivative(operation: str, name: str, function: Callable) -> Callable:
  """`function`, with a ValueError instead of an internal error of JAX when it is differentiated."""

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


def _function(operation: str, name: str) -> Callable | None:
  """The function of `operation` in the file `name`.py of its folder; None without such a file or function."""
  module = f"{__package__}.{OPERATIONS[operation]}.{name}"
  if importlib.util.find_spec(module) is None:
    return None
  return getattr(importlib.import_module(module), operation, None)


@functools.cache
def _say_once(sentence: str) -> None:
  print(f"jaxfp8: {sentence}", file=sys.stderr)
