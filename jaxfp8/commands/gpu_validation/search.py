"""Looks for better tile sizes than the formula's: from the formula on, one size at a time, as long as something gets faster.

    case -> start (the formula's sizes), choices -> descend -> Found -> entries for pallas_kernels/tuned.py

Both regimes of a skinny matrix must cut D alike, so they are searched one after the other: few tokens choose, many follow.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pallas_kernels import tuned
from pallas_kernels.cases import AttentionCase, MatmulCase
from pallas_kernels.dispatch import Target
from pallas_kernels.fp8_matmul import tiling as matmul_tiling
from pallas_kernels.paged_attention import tiling as attention_tiling

WORTH = 0.98  # a time must be at most this share of the best so far: less is noise
Sizes = dict[str, int]


def never() -> bool:
  return False


@dataclasses.dataclass(frozen=True)
class Found:
  """The best sizes of one call, beside the formula's. seconds are infinite where nothing could be measured."""

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
  """Changes one size at a time to whatever is fastest. `seconds` gives infinity for sizes that cannot be, and `repair` makes
  sizes possible by changing what depends on the one that was changed."""
  known = {tuple(start.items()): seconds(start)}
  best, best_seconds = start, known[tuple(start.items())]
  improved = True
  while improved and not out_of_time():
    improved = False
    for name, values in choices.items():
      for value in values:
        sizes = repair({**best, name: value})
        key = tuple(sizes.items())
        if key in known or out_of_time():
          continue
        known[key] = seconds(sizes)
        if known[key] <= WORTH * best_seconds:
          best, best_seconds, improved = sizes, known[key], True
  return Found(best, best_seconds, start, known[tuple(start.items())], len(known))


def sizes_of(case, target: Target) -> Sizes:
  """The sizes that a call has now, as measured entries name them."""
  tiling = tiling_of(case, target)
  names = ["stages", "splits"]
  if isinstance(case, MatmulCase):
    names += ["rows", "depth"] + ([] if case.skinny else ["tokens"])
  elif case.T is not None:
    names.append("tokens")
  return {name: getattr(tiling, name) for name in names}


def tiling_of(case, target: Target):
  if isinstance(case, MatmulCase):
    form = matmul_tiling.form_of(*case.arguments()[:3])
    return matmul_tiling.choose_tiling(case.T, case.F, case.D, form, target)
  q, k, _, table, *_ = case.arguments()
  shapes = q.shape[0], case.N, case.K, case.H, case.C, *table.shape
  return attention_tiling.choose_tiling(*shapes, case.T is None, k.dtype, target)


def key_of(case) -> dict[str, Any]:
  if isinstance(case, MatmulCase):
    return matmul_tiling.key_of(case.T, case.F, case.D, matmul_tiling.form_of(*case.arguments()[:3]))
  q, k, _, table, *_ = case.arguments()
  shapes = q.shape[0], case.N, case.K, case.H, case.C, *table.shape
  return attention_tiling.key_of(*shapes, case.T is None, k.dtype)


def is_possible(case, sizes: Sizes, target: Target) -> bool:
  """Whether a kernel can work with these sizes; what the tiling refuses is not tried."""
  try:
    with tuned.trying(case.kernel, sizes):
      tiling_of(case, target)
  except ValueError:
    return False
  return True


def choices_of(case, start: Sizes) -> dict[str, list[int]]:
  """Values to try of each size, the most promising size first."""
  stages = [2, 3, 4, 5, 6, 8] + ([12, 16] if isinstance(case, MatmulCase) else [])
  if isinstance(case, AttentionCase):
    splits = sorted({max(1, start["splits"] * n // 4) for n in (1, 2, 3, 6, 8, 12)} | {1})
    tokens = {} if case.T is None else {"tokens": [1, 2, 4, 8, 16]}
    return {"splits": splits, "stages": stages, **tokens}
  depths = {"depth": [64, 128, 256, 512], "rows": [64, 128]}
  if not case.skinny:
    return {"tokens": [32, 48, 64, 96, 128], **depths, "stages": stages}
  steps = case.D // start["depth"]
  splits = [n for n in range(1, steps + 1) if steps % n == 0]
  near = sorted(splits, key=lambda n: abs(math.log(n / start["splits"])))[:6]
  return {"splits": near, **depths, "stages": stages}


def search(case, target: Target, seconds: Callable[[Any, Sizes], float], out_of_time=never) -> Iterator[tuple[Any, Found]]:
  """(call, what was found) for each entry that the case gives: both skinny regimes of a matrix, or the case itself.

  seconds(case, sizes): the time of a call. Entries are worth writing if all together are faster than the formula.
  """

  def time(case):
    return lambda sizes: seconds(case, sizes) if is_possible(case, sizes, target) else math.inf

  def look(case, start, choices):
    return descend(start, choices, time(case), out_of_time, lambda sizes: fitting(case, sizes, target))

  if not (isinstance(case, MatmulCase) and case.skinny):
    start = sizes_of(case, target)
    yield case, look(case, start, choices_of(case, start))
    return
  few, many = (dataclasses.replace(case, T=tokens) for tokens in (16, matmul_tiling.MAX_SKINNY))
  start = sizes_of(few, target)
  found = look(few, start, choices_of(few, start))
  yield few, found
  formula = sizes_of(many, target)
  start = fitting(many, formula | {"splits": found.sizes["splits"]}, target)
  follows = look(many, start, {name: values for name, values in choices_of(many, start).items() if name != "splits"})
  yield many, dataclasses.replace(follows, formula=formula, formula_seconds=time(many)(formula))


def fitting(case, sizes: Sizes, target: Target) -> Sizes:
  """`sizes` with the number of stages that is possible and nearest below theirs, or else above: deeper stages take more room,
  and a part of D may have fewer steps than the ring had stages. As they are where no number helps."""
  for stages in (*range(sizes["stages"], 0, -1), *range(sizes["stages"] + 1, 17)):
    if is_possible(case, sizes | {"stages": stages}, target):
      return sizes | {"stages": stages}
  return sizes


def entries_of(results: list[tuple[Any, Found]]) -> list[dict[str, Any]]:
  """Entries for tuned.py; none unless they are faster than the formula, taken together."""
  if not results or any(math.isinf(found.seconds) for _, found in results):
    return []
  if sum(found.seconds for _, found in results) > WORTH * sum(found.formula_seconds for _, found in results):
    return []
  return [
    {"key": key_of(case), "sizes": found.sizes, "seconds": found.seconds, "formula_seconds": found.formula_seconds}
    for case, found in results
  ]
