"""How long a program's kernels run on a GPU: by the device's own events where they can be had, else by this machine's clock.

    DeviceTimer   CUPTI, as jax.experimental.mosaic.gpu.profiler drives it: every kernel's name and time, launches not counted
    WallTimer     from the call until the result is there, launches counted

A program computes one operation on several copies of its arguments, so that weights do not come from the L2 cache.
"""

import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

COPY = re.compile(r"copy|memcpy|memset", re.IGNORECASE)  # pools that are not donated are copied first: not the operation's


@dataclasses.dataclass(frozen=True)
class Timing:
  """Median seconds of one call. kernels: name -> seconds of one call, where the device told; method: "device" or "wall"."""

  seconds: float
  method: str
  kernels: dict[str, float] = dataclasses.field(default_factory=dict)
  note: str = ""


@dataclasses.dataclass(frozen=True)
class WallTimer:
  """run(program, arguments) until its results are there; the first run, which compiles, is not counted."""

  iterations: int = 10
  clock: Callable[[], float] = time.perf_counter

  def __call__(self, program: Callable, arguments: Sequence[Any], calls: int = 1) -> Timing:
    import jax

    jax.block_until_ready(program(*arguments))
    seconds = []
    for _ in range(self.iterations):
      start = self.clock()
      jax.block_until_ready(program(*arguments))
      seconds.append(self.clock() - start)
    return Timing(statistics.median(seconds) / calls, "wall")


@dataclasses.dataclass(frozen=True)
class DeviceTimer:
  """By CUPTI. Where it cannot measure, the wall clock does, and the Timing's note says why.

  measure: as profiler.measure of jax 0.12.0.1: (f, aggregate=False, iterations=n) -> a function that returns (result, for each
    iteration a list of (kernel, milliseconds)), or None for the times where no kernel ran.
  """

  iterations: int = 10
  measure: Callable | None = None
  otherwise: WallTimer = WallTimer()

  def __call__(self, program: Callable, arguments: Sequence[Any], calls: int = 1) -> Timing:
    try:
      _, runs = self._measure()(program, aggregate=False, iterations=self.iterations)(*arguments)
    except Exception as error:  # of many kinds where CUPTI is absent or taken; a program that fails does so again by the clock
      return self._by_clock(program, arguments, calls, " ".join(str(error).split())[:200])
    if not runs:
      return self._by_clock(program, arguments, calls, "CUPTI saw no kernel")
    runs = [runs] if isinstance(runs[0], tuple) else runs  # one iteration comes without its list
    totals = [sum(ms for name, ms in run if not COPY.search(name)) for run in runs]
    middle = sorted(range(len(runs)), key=lambda i: totals[i])[len(runs) // 2]
    kernels: dict[str, float] = {}
    for name, ms in runs[middle]:
      kernels[name] = kernels.get(name, 0.0) + ms * 1e-3 / calls
    return Timing(totals[middle] * 1e-3 / calls, "device", kernels)

  def _measure(self) -> Callable:
    if self.measure is not None:
      return self.measure
    from jax.experimental.mosaic.gpu import profiler

    return profiler.measure

  def _by_clock(self, program, arguments, calls, why: str) -> Timing:
    return dataclasses.replace(self.otherwise(program, arguments, calls), note=f"wall clock, since {why}")
