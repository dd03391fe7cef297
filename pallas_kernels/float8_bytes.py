"""float8 as bytes on a CPU: the one place that knows XLA:CPU's trouble with float8.

XLA:CPU cannot slice float8: it widens the whole array to float16 and slices that, and a bitcast at a program's border is
a copy. So in programs for a CPU, float8 arrays cross the border, and go through loops, as uint8:

    arguments(weights, target)          concrete arrays, as such a program takes them (no copy)
    program(step, target)               `step`, whose arguments and results are then uint8 instead of float8
    loop(body, carry, inputs, target)   a loop inside of it

For other targets all three change nothing. No program of ours has uint8 arrays that mean anything else.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import costs
from pallas_kernels.dispatch import Target, default_target


def to_bytes(x: jax.Array) -> jax.Array:
  """float8_e4m3fn as uint8; other dtypes as they are."""
  return jax.lax.bitcast_convert_type(x, jnp.uint8) if x.dtype == jnp.float8_e4m3fn else x


def from_bytes(x: jax.Array) -> jax.Array:
  """uint8 as float8_e4m3fn; other dtypes as they are."""
  return jax.lax.bitcast_convert_type(x, jnp.float8_e4m3fn) if x.dtype == jnp.uint8 else x


def program(function: Callable[..., Any], target: Target | None) -> Callable[..., Any]:
  """`function` as a program for `target`: on a CPU its float8 arguments and results are uint8 arrays."""
  if not _needs_bytes(target):
    return function

  def on_bytes(*arguments: Any) -> Any:
    return jax.tree.map(to_bytes, function(*jax.tree.map(from_bytes, arguments)))

  # The names that profiles and errors show.
  on_bytes.__name__ = getattr(getattr(function, "func", function), "__name__", "program")
  on_bytes.__signature__ = inspect.signature(function)
  return on_bytes


def loop[Carry](body: Callable[[Carry, Any], Carry], carry: Carry, inputs: Any, target: Target | None) -> Carry:
  """Folds `body` over the leading axis of the arrays in `inputs`: carry = body(carry, input) for each slice.

  A `lax.scan`. Costs that are recorded while `body` is traced count once for each slice.
  """
  pack, unpack = (to_bytes, from_bytes) if _needs_bytes(target) else (_unchanged, _unchanged)

  def step(packed: Any, inputs: Any) -> tuple[Any, None]:
    return jax.tree.map(pack, body(*jax.tree.map(unpack, (packed, inputs)))), None

  with costs.repeated(jax.tree.leaves(inputs)[0].shape[0]):
    packed, _ = jax.lax.scan(step, *jax.tree.map(pack, (carry, inputs)))
  return jax.tree.map(unpack, packed)


def arguments(arrays: tuple[jax.Array, ...], target: Target) -> tuple[jax.Array, ...]:
  """Concrete arrays as `program` takes them: on a CPU, float8 ones as uint8 over the same memory."""
  return tuple(map(view_as_bytes, arrays)) if _needs_bytes(target) else arrays


def view_as_bytes(x: jax.Array) -> jax.Array:
  """A concrete float8 array on CPU devices as uint8 over the same memory; other dtypes as they are."""
  if x.dtype != jnp.float8_e4m3fn:
    return x
  shards = [jax.device_put(np.asarray(s.data).view(np.uint8), s.device, may_alias=True) for s in x.addressable_shards]
  return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)


def _unchanged(x: jax.Array) -> jax.Array:
  return x


def _needs_bytes(target: Target | None) -> bool:
  return (target or default_target()).platform == "cpu"
