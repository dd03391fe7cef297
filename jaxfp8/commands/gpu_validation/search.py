"""Looks for better tile sizes than the formula's: coordinate descent from the formula's, as long as a change is faster.

    case -> start (the formula's sizes), choices -> descend -> Found -> entries for pallas_kernels/tuned.py

Both regimes of a skinny matrix must cut D alike, so they are searched one after the other: few tokens choose the splits.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pallas_kernels import tuned
from pallas_kernels.case import TunableCase
from pallas_kernels.dispatch import Target

WORTH = 0.98  # a time must be at most this share of the best so far: less is noise
Sizes = dict[str, int]


def never() -> bool:
  return False


@dataclasses.dataclass(frozen=True)
class Found:
  """The best sizes of one call, beside the formula's. seconds: infinite if nothing could be measured."""

  sizes: Sizes
  seconds: float
  formula: Sizes
  formula_seconds: float
  tried: int

  @property
  def is_better(self) -> bool:
    return self.seconds <= WORTH * self.formula_seconds


def descend(
  start: Sizes,
  choices: Mapping[str, list[int]],
  seconds: Callable[[Sizes], float],
  out_of_time: Callable[[], bool] = never,
  repair: Callable[[Sizes], Sizes] = dict,
) -> Found:
  """Changes one size at a time to its fastest value.

  `seconds` gives infinity for impossible sizes. `repair` makes sizes possible by changing those that depend on the changed one.
  """
  timed = {tuple(start.items()): seconds(start)}
  best, best_seconds = start, timed[tuple(start.items())]
  improved = True
  while improved and not out_of_time():
    improved = False
    for name, values in choices.items():
      for value in values:
        sizes = repair({**best, name: value})
        key = tuple(sizes.items())
        if key in timed or out_of_time():
          continue
        timed[key] = seconds(sizes)
        if timed[key] <= WORTH * best_seconds:
          best, best_seconds, improved = sizes, timed[key], True
  return Found(best, best_seconds, start, timed[tuple(start.items())], len(timed))


def is_possible(case: TunableCase, sizes: Sizes, target: Target) -> bool:
  """Whether the kernel can work with these sizes, that is, whether its tiling accepts them."""
  try:
    with tuned.trying(case.operation, sizes):
      case.tiling(target)
  except ValueError:
    return False
  return True


def search(
  case: TunableCase, target: Target, seconds: Callable[[TunableCase, Sizes], float], out_of_time: Callable[[], bool] = never
) -> Iterator[tuple[TunableCase, Found]]:
  """Yields (call, its best sizes) for each entry that the case gives: one for each of its regimes.

  seconds(case, sizes): the time of a call. The first regime chooses the splits, and the others follow it. Entries are worth
  writing if all together are faster than the formula.
  """

  def time(case: TunableCase) -> Callable[[Sizes], float]:
    return lambda sizes: seconds(case, sizes) if is_possible(case, sizes, target) else math.inf

  def look(case: TunableCase, start: Sizes, choices: Mapping[str, list[int]]) -> Found:
    return descend(start, choices, time(case), out_of_time, lambda sizes: fitting(case, sizes, target))

  first, *followers = case.regimes()
  start = first.sizes(target)
  best = look(first, start, first.choices(start))
  yield first, best
  for follower in followers:
    formula = follower.sizes(target)
    start = fitting(follower, formula | {"splits": best.sizes["splits"]}, target)
    choices = {name: values for name, values in follower.choices(start).items() if name != "splits"}
    result = look(follower, start, choices)
    yield follower, dataclasses.replace(result, formula=formula, formula_seconds=time(follower)(formula))


def fitting(case: TunableCase, sizes: Sizes, target: Target) -> Sizes:
  """`sizes` with the nearest possible number of stages, below theirs first: deeper stages take more room, and a split of D may
  have fewer steps than the ring had stages. Unchanged if no number of stages makes them possible."""
  for stages in (*range(sizes["stages"], 0, -1), *range(sizes["stages"] + 1, 17)):
    if is_possible(case, sizes | {"stages": stages}, target):
      return sizes | {"stages": stages}
  return sizes


def entries_of(results: list[tuple[TunableCase, Found]]) -> list[dict[str, Any]]:
  """Entries for tuned.py; none unless all together are faster than the formula."""
  if not results or any(math.isinf(found.seconds) for _, found in results):
    return []
  if sum(found.seconds for _, found in results) > WORTH * sum(found.formula_seconds for _, found in results):
    return []
  return [
    {"key": case.tuning_key(), "sizes": found.sizes, "seconds": found.seconds, "formula_seconds": found.formula_seconds}
    for case, found in results
  ]
