"""Decisions that rest on measured quality: which matrices stay bf16, and whether a checkpoint is good enough.

    keep_expressions(source, ["auto:4"], ..)   ->  expressions for `keep_bf16`: the four costliest matrices
    judge(source, folder, chunks, limits)      ->  plain values for a manifest, with what is beyond the limits
    gate(source, chunks, limits, ..)           ->  the same as a `check` for `convert_checkpoint`, which fails beyond the limits

All hold models against the source's weights in float32 over held-out text (quality.py), so the whole model is in memory
twice. Refuses to know text and flags.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxfp8.checkpoint import load, stored_arrays
from jaxfp8.checkpoint.quantized_source import source_granularity
from jaxfp8.checkpoint.readers import Source
from jaxfp8.errors import InputError
from jaxfp8.quantization import quality
from jaxfp8.recipe import Recipe

PLAIN = Recipe("f32", "channel", "f32", "f32")
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class GateLimits:
  """What a recipe may cost; None is no limit. The estimates themselves count, not their intervals."""

  max_kl: float | None = 0.04
  max_perplexity_ratio: float | None = None
  min_top1: float | None = None

  def failures(self, name: str, measured: dict[str, Any]) -> list[str]:
    """One sentence for each figure of `measured` (a Quality as plain values) beyond its limit; a NaN is beyond every limit."""
    limits = (
      ("kl", "KL divergence", self.max_kl, 1),
      ("perplexity_ratio", "perplexity ratio", self.max_perplexity_ratio, 1),
      ("top1", "top-1 agreement", self.min_top1, -1),
    )
    return [
      f"{name}: {title} must be at {'most' if sign > 0 else 'least'} {limit:g}; got {measured[key]['value']:.4g}."
      for key, title, limit, sign in limits
      if limit is not None and not sign * measured[key]["value"] <= sign * limit
    ]


def judge(
  source: Source, folder: str | os.PathLike, chunks: np.ndarray, limits: GateLimits | None = None, name: str | None = None
) -> dict[str, Any]:
  """What the checkpoint in `folder` costs against `source`, in its own recipe: plain values to store and print.

  Args:
    source: what the checkpoint was made from.
    chunks: held-out text, from `quality.cut_chunks`.
    name: who speaks in the sentences; None: the folder.

  Returns {"perplexity", "perplexity_ratio", "kl", "top1"}, each {"value", "low", "high"}, with "positions" and "failures", a
  sentence for each limit that is not met.
  """
  reference = quality.Reference(load.load_source(source, PLAIN), chunks)
  measured = dataclasses.asdict(quality.Quality.of(reference.score(load.load(folder)), reference.nll))
  failures = (limits or GateLimits()).failures(name or str(folder), measured)
  return {**measured, "positions": int(chunks[:, 1:].size), "failures": failures}


def gate(
  source: Source, chunks: np.ndarray, limits: GateLimits | None = None, text: str = "held-out text"
) -> Callable[[pathlib.Path], dict[str, Any]]:
  """A `check` for `convert_checkpoint` and `calibrate`: {"quality": what `judge` finds in the checkpoint as it was written}.

  With it are stored the limits and `text`, the words for what the chunks are of. The check raises InputError beyond a limit.
  """
  limits = limits or GateLimits()

  def check(folder: pathlib.Path) -> dict[str, Any]:
    measured = judge(source, folder, chunks, limits, "gate")
    if measured["failures"]:
      raise InputError(
        f"{' '.join(measured['failures'])} No checkpoint was made. Keep costly matrices in bf16 (keep_bf16=auto:N), use "
        "another recipe or raise the limit."
      )
    return {"quality": {**measured, "limits": dataclasses.asdict(limits), "text": text}}

  return check


def matrix_costs(
  source: Source, granularity: str, chunks: np.ndarray, progress: Progress | None = None
) -> list[dict[str, Any]]:
  """What float8 costs in each merged matrix alone, all else in float32: {"layer", "matrix", "kl", ..} each, in order.

  Raises InputError for a source that holds float8 already: it would seem to cost nothing.
  """
  if source_granularity(source):
    raise InputError(
      f"quality: what float8 costs in each matrix is measured on weights that are not float8 yet; {source.path} holds float8. "
      "Pass what it was made from, or name matrices by expressions."
    )
  base = load.load_source(source, PLAIN)
  quantized = load.load_source(source, dataclasses.replace(PLAIN, weights="fp8", granularity=granularity))
  reference, lines = quality.Reference(base, chunks), []
  for layer in range(source.config.num_layers):
    for matrix in quality.MATRICES:
      scores = reference.score(quality.with_layers(base, quantized, [layer], [matrix]))
      lines.append({"layer": layer, "matrix": matrix, **dataclasses.asdict(quality.Quality.of(scores, reference.nll))})
      if progress:
        progress(len(lines), source.config.num_layers * len(quality.MATRICES))
  return lines


def costliest(costs: Sequence[dict[str, Any]], count: int) -> list[str]:
  """Expressions for `keep_bf16` that match the `count` matrices with the largest KL divergence, costliest first."""
  ranked = sorted(costs, key=lambda line: -line["kl"]["value"])[:count]
  return [_expression(line["layer"], line["matrix"]) for line in ranked]


def keep_expressions(
  source: Source, keep_bf16: Sequence[str], granularity: str, chunks: np.ndarray, progress: Progress | None = None
) -> list[str]:
  """`keep_bf16` with every "auto:N" replaced by what `costliest` finds. Raises InputError for an N that is no whole number."""
  counts = [parse_auto(source, wish) for wish in keep_bf16]
  costs = matrix_costs(source, granularity, chunks, progress) if any(counts) else []
  pairs = zip(keep_bf16, counts, strict=True)
  return [e for wish, count in pairs for e in ([wish] if count is None else costliest(costs, count))]


def is_auto(wish: str) -> bool:
  """Whether it is "auto:N" and no expression."""
  return wish.startswith("auto:")


def parse_auto(source: Source, wish: str) -> int | None:
  """N of "auto:N", None for an expression. Raises InputError for an N that the model has not."""
  if not is_auto(wish):
    return None
  most = source.config.num_layers * len(quality.MATRICES)
  if not wish[5:].isdecimal() or not 1 <= int(wish[5:]) <= most:
    raise InputError(f"quality: keep_bf16=auto:N needs N from 1 to {most}, the matrices of this model; got {wish!r}.")
  return int(wish[5:])


def _expression(layer: int, merged: str) -> str:
  return "^(" + "|".join(re.escape(module) for module in stored_arrays.merged_modules(layer)[merged]) + ")$"
