"""Better float8 weights at the same size: how a matrix is rounded when it is known what will be multiplied with it.

    nearest   scale = amax / 448, each weight to the nearest float8 value (fp8.quantize)
    mse       the scale, of several below that, with the least squared error; each weight to the nearest
    gptq      column by column, each column's error made up for by the columns that are still to come (GPTQ, Frantar et al.,
              arXiv 2210.17323), with the same scales as nearest

GPTQ minimizes |X (W - Q)^T|^2 for inputs X [T, D] of calibration text, of which only H = X^T X [D, D] counts. Memory: a few
times one matrix and one H in float32. Refuses to know where X comes from (calibration.py).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxfp8.errors import InputError
from jaxfp8.model.fp8 import MAX, QArray, quantize, to_float8
from jaxfp8.recipe import BLOCK

_FLOAT8 = ml_dtypes.float8_e4m3fn
ROUNDINGS = ("nearest", "mse", "gptq")
DAMPING = 0.01  # added to H's diagonal, as a share of its mean: inputs that never occur would make H singular
_SHRINKS = tuple(2 ** (-step / 16) for step in range(17))  # of the amax scale; one octave, since float8 repeats itself then
_COLUMNS = 32  # whose errors are passed on within a block before the rest of the matrix hears of them


def check_rounding(rounding: str) -> None:
  """Raises InputError for an unknown name."""
  if rounding not in ROUNDINGS:
    raise InputError(f"rounding: must be one of {', '.join(ROUNDINGS)}; got {rounding!r}.")


def round_weights(w_FD: np.ndarray, granularity: str, rounding: str, inputs: "Inputs | None" = None) -> QArray:
  """w in float8 by `rounding`, numpy in, numpy out. `inputs` are for gptq alone."""
  check_rounding(rounding)
  w = np.asarray(w_FD, np.float32)
  if rounding == "gptq":
    if inputs is None or len(inputs.order) != w.shape[1]:
      raise InputError(f"rounding: gptq needs to know inputs of D={w.shape[1]}; got {inputs and len(inputs.order)}.")
    q = _gptq(w, inputs, granularity)
  else:
    q = _least_squares(w, granularity) if rounding == "mse" else _nearest(w, granularity)
  return jax.tree.map(np.asarray, q)


_nearest = jax.jit(quantize, static_argnums=1)


@functools.partial(jax.jit, static_argnums=1)
def _least_squares(w_FD: jax.Array, granularity: str) -> QArray:
  """Each scale chosen by itself. With fewer than all of a channel's values within +-448, the rest saturate."""
  plain = quantize(w_FD, granularity)

  def attempt(best, shrink):
    scale = plain.scale * shrink
    spread = _spread(scale, w_FD.shape)
    q = to_float8(w_FD * (1 / spread))
    error = _per_scale(jnp.square(w_FD - q.astype(jnp.float32) * spread), granularity)
    better = error < best[0]
    wide = _spread(better, w_FD.shape)
    return (jnp.where(better, error, best[0]), jnp.where(wide, q, best[1]), jnp.where(better, scale, best[2])), None

  start = jnp.full(plain.scale.shape, jnp.inf), plain.qvalue, plain.scale
  (_, q, scale), _ = jax.lax.scan(attempt, start, jnp.array(_SHRINKS, jnp.float32))
  return QArray(q, scale)


def _per_scale(error_FD: jax.Array, granularity: str) -> jax.Array:
  """Sums over what one scale covers, in the scale's shape."""
  if granularity == "tensor":
    return jnp.broadcast_to(jnp.sum(error_FD), error_FD.shape[:1])
  if granularity == "channel":
    return jnp.sum(error_FD, axis=1)
  F, D = error_FD.shape
  padded = jnp.pad(error_FD, ((0, -F % BLOCK), (0, -D % BLOCK)))
  return jnp.sum(padded.reshape(-(-F // BLOCK), BLOCK, -(-D // BLOCK), BLOCK), axis=(1, 3))


def _spread(scale, shape: tuple[int, ...]):
  """A scale [F] or [F / 128, D / 128], of jax or numpy, as an array [F, D]."""
  F, D = shape
  if scale.ndim == 1:
    return scale[:, None].repeat(D, axis=1)
  return scale.repeat(BLOCK, axis=0)[:F].repeat(BLOCK, axis=1)[:, :D]


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What GPTQ has to know of a matrix's inputs; matrices with one input share it.

  order: of the columns, by falling H[j, j]: what is multiplied with most is rounded while most can make up for it.
  factor: U, upper triangular in that order, with U^T U = (H + damping)^-1: row j says how column j's error is shared out.
  """

  order: np.ndarray
  factor: np.ndarray

  @classmethod
  def of(cls, hessian_DD: np.ndarray) -> "Inputs":
    """hessian_DD: H = X^T X, float32."""
    diagonal = np.diagonal(hessian_DD)
    order = np.argsort(-diagonal, kind="stable")
    damping = max(DAMPING * float(np.mean(diagonal)), float(np.finfo(np.float32).tiny))
    damped = hessian_DD[np.ix_(order, order)].astype(np.float64) + damping * np.eye(len(order))
    # H = L L^T gives H^-1 = (L^-1)^T L^-1; its own factor is wanted the other way round, so rows and columns are turned.
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    return cls(order, np.linalg.inv(lower)[::-1, ::-1].astype(np.float32))


def _gptq(w_FD: Any, inputs: Inputs, granularity: str) -> QArray:
  """In numpy on the host, with columns as rows: XLA:CPU's conversions to float8 would cost ten times the arithmetic."""
  scale: Any = np.asarray(_nearest(w_FD, granularity).scale)
  order, factor = inputs.order, inputs.factor
  w, spread = np.ascontiguousarray(w_FD.T[order]), _spread(scale, w_FD.shape).T[order]
  q = np.empty(w.shape, _FLOAT8)
  for start in range(0, len(w), _COLUMNS):
    block = w[start : start + _COLUMNS]
    stop = start + len(block)
    errors = np.empty_like(block)
    for j, (column, scale_F) in enumerate(zip(block, spread[start:stop], strict=True)):
      row = start + j
      q[row] = np.clip(column * (1 / scale_F), -MAX, MAX).astype(_FLOAT8)
      errors[j] = (column - q[row].astype(np.float32) * scale_F) / factor[row, row]
      block[j + 1 :] -= factor[row, row + 1 : stop, None] * errors[j]
    w[stop:] -= factor[start:stop, stop:].T @ errors
  rounded: Any = np.empty(w_FD.shape, _FLOAT8)  # a numpy array, as all of this QArray
  rounded[:, order] = q.T
  return QArray(rounded, scale)
