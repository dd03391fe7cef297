"""float8 as bytes, where XLA:CPU would otherwise widen it.

XLA:CPU cannot slice float8: it widens the whole array to float16 and slices that, and a bitcast at a program's border is
a copy. So on a CPU float8 arrays enter programs, and go through loops inside them, as uint8. On a GPU nothing is changed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import Target, default_target


def to_bytes(x: jax.Array) -> jax.Array:
  """float8_e4m3fn as uint8; other dtypes as they are."""
  return jax.lax.bitcast_convert_type(x, jnp.uint8) if x.dtype == jnp.float8_e4m3fn else x


def from_bytes(x: jax.Array) -> jax.Array:
  """uint8 as float8_e4m3fn; other dtypes as they are."""
  return jax.lax.bitcast_convert_type(x, jnp.float8_e4m3fn) if x.dtype == jnp.uint8 else x


def loop_views(target: Target | None) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
  """(pack, unpack) for the trees that a program takes or a loop carries, when compiled for `target`."""
  if (target or default_target()).platform != "cpu":
    return (lambda tree: tree), (lambda tree: tree)
  return (lambda tree: jax.tree.map(to_bytes, tree)), (lambda tree: jax.tree.map(from_bytes, tree))


def view_as_bytes(x: jax.Array) -> jax.Array:
  """A concrete float8 array on CPU devices as uint8 over the same memory; other dtypes as they are."""
  if x.dtype != jnp.float8_e4m3fn:
    return x
  parts = [jax.device_put(np.asarray(s.data).view(np.uint8), s.device, may_alias=True) for s in x.addressable_shards]
  return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)
