"""Better float8 weights at the same size: how a matrix is rounded when it is known what will be multiplied with it.

    nearest   scale = amax / 448, each weight to the nearest float8 value (fp8.quantize)
    mse       the scale, of several below that, with the least squared error; each weight to the nearest
    gptq      column by column, each column's error made up for by the columns that are still to come (GPTQ, Frantar et al.,
              arXiv 2210.17323), with the same scales as nearest

GPTQ minimizes |X (W - Q)^T|^2 for inputs X [T, D] of calibration text, of which only H = X^T X [D, D] counts. Memory: a few
times one matrix and one H in float32. Refuses to know where X comes from (calibration.py).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxfp8.config import BLOCK
from jaxfp8.errors import InputError
from jaxfp8.fp8 import QArray, quantize, to_float8

ROUNDINGS = ("nearest", "mse", "gptq")
DAMPING = 0.01  # added to H's diagonal, as a share of its mean: inputs that never occur would make H singular
_SHRINKS = tuple(2 ** (-step / 16) for step in range(17))  # of the amax scale; one octave, since float8 repeats itself then
_COLUMNS = 128  # whose errors are passed on within a block before the rest of the matrix hears of them


def check_rounding(rounding: str) -> None:
  """Raises InputError for an unknown name."""
  if rounding not in ROUNDINGS:
    raise InputError(f"rounding: must be one of {', '.join(ROUNDINGS)}; got {rounding!r}.")


def round_weights(w_FD: np.ndarray, granularity: str, rounding: str, hessian_DD: jax.Array | None = None) -> QArray:
  """w in float8 by `rounding`, on the default device; numpy in, numpy out. `hessian_DD` is X^T X, for gptq alone."""
  check_rounding(rounding)
  w = jnp.asarray(w_FD, jnp.float32)
  if rounding == "gptq":
    if hessian_DD is None or hessian_DD.shape != (w.shape[1],) * 2:
      raise InputError(f"rounding: gptq needs X^T X [D, D] with D={w.shape[1]}; got {getattr(hessian_DD, 'shape', None)}.")
    q = _gptq(w, jnp.asarray(hessian_DD, jnp.float32), granularity)
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


def _spread(scale: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """A scale [F] or [F / 128, D / 128] as an array [F, D]."""
  F, D = shape
  if scale.ndim == 1:
    return jnp.broadcast_to(scale[:, None], shape)
  return jnp.repeat(jnp.repeat(scale, BLOCK, axis=0)[:F], BLOCK, axis=1)[:, :D]


@functools.partial(jax.jit, static_argnums=2)
def _gptq(w_FD: jax.Array, hessian_DD: jax.Array, granularity: str) -> QArray:
  """Columns go in the order of falling H[j, j]: what is multiplied with most is rounded while most can make up for it."""
  F, D = w_FD.shape
  scale = quantize(w_FD, granularity).scale
  order = jnp.argsort(-jnp.diagonal(hessian_DD))
  factor = _inverse_factor(hessian_DD[order][:, order])
  pad = -D % _COLUMNS
  w = jnp.pad(w_FD[:, order], ((0, 0), (0, pad)))
  spread = jnp.pad(_spread(scale, w_FD.shape)[:, order], ((0, 0), (0, pad)), constant_values=1)
  factor = jnp.pad(factor, ((0, pad), (0, pad))) + jnp.diag(jnp.arange(D + pad) >= D).astype(jnp.float32)

  def round_block(block, carry):
    w, out = carry
    start = block * _COLUMNS
    values, scales = (jax.lax.dynamic_slice(x, (0, start), (F, _COLUMNS)) for x in (w, spread))
    rows = jax.lax.dynamic_slice(factor, (start, 0), (_COLUMNS, D + pad))
    inner = jax.lax.dynamic_slice(rows, (0, start), (_COLUMNS, _COLUMNS))

    def round_column(j, state):
      values, q, errors = state
      column = to_float8(values[:, j] * (1 / scales[:, j]))
      error = (values[:, j] - column.astype(jnp.float32) * scales[:, j]) / inner[j, j]
      ahead = jnp.where(jnp.arange(_COLUMNS) > j, inner[j], 0)
      return values - error[:, None] * ahead[None], q.at[:, j].set(column), errors.at[:, j].set(error)

    state = values, jnp.zeros(values.shape, out.dtype), jnp.zeros_like(values)
    _, q, errors = jax.lax.fori_loop(0, _COLUMNS, round_column, state)
    # All columns at once: those of this block and before are not read again.
    w = w - jax.lax.dot_general(errors, rows, (((1,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
    return w, jax.lax.dynamic_update_slice(out, q, (0, start))

  carry = w, jnp.zeros(w.shape, to_float8(w[:1, :1]).dtype)
  _, q = jax.lax.fori_loop(0, (D + pad) // _COLUMNS, round_block, carry)
  return QArray(jnp.zeros((F, D), q.dtype).at[:, order].set(q[:, :D]), scale)


def _inverse_factor(hessian: jax.Array) -> jax.Array:
  """U, upper triangular, with U^T U = (H + damping)^-1: row j says how column j's error is shared out."""
  diagonal = jnp.diagonal(hessian)
  damping = jnp.maximum(DAMPING * jnp.mean(diagonal), jnp.finfo(jnp.float32).tiny)
  damped = hessian + damping * jnp.eye(len(hessian))
  inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(damped), True), jnp.eye(len(hessian)))
  return jnp.linalg.cholesky((inverse + inverse.T) / 2).T
