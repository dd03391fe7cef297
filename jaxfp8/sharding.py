"""How a model is cut over devices, and the only collective that the model knows.

Every step runs over a mesh with the axes ("data", "kv", "group"), even when all are 1. Sequences and pages are cut over data,
KV heads over kv, query heads over (kv, group), F and V over both. K and V are replicated over group, so that `tensor` may
exceed the number of KV heads.
"""

import jax

DATA, KV, GROUP = "data", "kv", "group"
TENSOR = (KV, GROUP)
MESH_AXES = (DATA, KV, GROUP)


Axes = tuple[str, ...] | None


def sum_over(x: jax.Array, axes: Axes) -> jax.Array:
  """All-reduce over mesh axes; the identity where axes is None, so that the model runs with no mesh."""
  return x if axes is None else jax.lax.psum(x, axes)


def scatter_over(x: jax.Array, axes: Axes) -> jax.Array:
  """Sums over mesh axes, and leaves each device its part of the rows; `concatenate_over` puts them together again."""
  return x if axes is None else jax.lax.psum_scatter(x, axes, scatter_dimension=0, tiled=True)


def max_over(x: jax.Array, axes: Axes) -> jax.Array:
  return x if axes is None else jax.lax.pmax(x, axes)


def index_over(axes: Axes) -> jax.Array | int:
  """This device's place along mesh axes, 0 where axes is None."""
  return 0 if axes is None else jax.lax.axis_index(axes)


def gather_over(x: jax.Array, axes: Axes) -> jax.Array:
  """Every device's x stacked along a new leading axis."""
  return x[None] if axes is None else jax.lax.all_gather(x, axes)


def concatenate_over(x: jax.Array, axes: Axes) -> jax.Array:
  """Every device's x joined along the first axis."""
  return x if axes is None or jax.lax.axis_size(axes) == 1 else jax.lax.all_gather(x, axes, tiled=True)
