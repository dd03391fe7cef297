"""Random weights for any config: experiments on shapes, speed and numerics that need no checkpoint."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxfp8.model.fp8 import QArray, to_float8
from jaxfp8.model.llama import Llama

_DEVIATION = 64.0  # standard deviation of the float8 values: 448 is seven deviations away, and few values are subnormal


def random_weights(model: Llama, key: jax.Array) -> Llama:
  """A copy of `model` with random weights on the default device; weights that `model` holds are ignored.

  Matrices are normal with variance 1 / inputs, in their own dtypes (float8 ones with equal scales). Norms and static scales
  are ones.
  """
  graph, state = nnx.split(model)
  state = nnx.to_flat_state(state)
  likes = tuple((path, jax.tree.map(_shape_of, variable.get_value())) for path, variable in state)
  filled = [(path, variable.replace(value)) for (path, variable), value in zip(state, _draw(likes, key), strict=True)]
  return nnx.merge(graph, nnx.from_flat_state(filled))


def _shape_of(leaf) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _draw(likes: tuple, key: jax.Array) -> list:
  return [
    _random(path, like, weight_key) for (path, like), weight_key in zip(likes, jax.random.split(key, len(likes)), strict=True)
  ]


def _random(path: tuple, like, key: jax.Array):
  if any("norm" in str(part) or "_scale" in str(part) for part in path):
    return jnp.ones(like.shape, like.dtype)
  deviation = 1 / math.sqrt(like.shape[-1])
  if isinstance(like, QArray):
    scale = jnp.full(like.scale.shape, deviation / _DEVIATION, jnp.float32)
    return QArray(to_float8(_DEVIATION * jax.random.normal(key, like.qvalue.shape)), scale)
  return (deviation * jax.random.normal(key, like.shape)).astype(like.dtype)
