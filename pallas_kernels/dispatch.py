"""Which implementation of an operation runs on which target.

An implementation is a module in the operation's folder with one function named like the operation. It raises
NotImplementedError when it cannot do this call (dispatch then tries the next one) and ValueError when nobody could
(the caller's mistake, passed on). A forced implementation that cannot run is an error, never a silent substitute.
Refuses to know: shapes, and anything about models.
"""

import dataclasses
import functools
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Target:
  """What a program is compiled for: a CPU, or a GPU of one CUDA compute capability such as (9, 0)."""

  platform: str
  capability: tuple[int, int] | None = None

  @classmethod
  def of(cls, device: jax.Device) -> "Target":
    """The target that compiles for `device` (a real one or one of a deviceless topology)."""
    if device.platform == "cpu":
      return cls("cpu")
    capability = str(getattr(device, "compute_capability", "0.0"))
    major, _, minor = capability.partition(".")
    return cls("cuda", (int(major), int(minor.rstrip("af") or 0)))


@functools.cache
def default_target() -> Target:
  return Target.of(jax.devices()[0])


def run(package: str, operation: str, order: Sequence[str], implementation: str, target: Target, *args: Any, **kwargs: Any):
  """Calls the first implementation that can do this call.

  Args:
    package: dotted name of the operation's folder.
    order: implementations to try on this target, best first.
    implementation: "auto", or the name of one file in the folder, which is then the only one tried.

  Raises:
    ValueError: `implementation` is unknown, or was forced and cannot run here.
  """
  names = tuple(order) if implementation == "auto" else (implementation,)
  refusals = []
  for name in names:
    try:
      result = _function(package, operation, name)(*args, **kwargs)
    except NotImplementedError as refusal:
      refusals.append(f"{name}: {refusal}")
      continue
    if refusals:
      _say_once(f"{operation}: running {name!r} on {target.platform}, since {'; '.join(refusals)}.")
    return result
  raise ValueError(
    f'{operation}: implementation={implementation!r} cannot run here ({"; ".join(refusals)}). Pass implementation="auto".'
  )


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
