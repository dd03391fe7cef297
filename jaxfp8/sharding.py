"""How a model is cut over devices: the mesh, and the only collectives that the model knows.

    make_mesh(config, tensor, data)  ->  Mesh ("data", "kv", "group")  ->  mesh_shape(mesh): MeshShape

Every step runs over such a mesh, even if all its axes are 1. Sequences and pages are cut over data, KV heads over kv, query
heads over (kv, group), F and V over both. K and V are replicated over group, so `tensor` may exceed the number of KV heads.
The collectives take mesh axes; with axes None they are identities, so that the model runs with no mesh.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.mesh import MeshShape

DATA, KV, GROUP = "data", "kv", "group"
TENSOR = (KV, GROUP)
MESH_AXES = (DATA, KV, GROUP)

Axes = tuple[str, ...] | None


def make_mesh(config: LlamaConfig, tensor: int = 1, data: int = 1) -> Mesh:
  """The mesh ("data", "kv", "group") for this model over tensor * data devices, equally many of every process.

  Neighbours along group, then kv, belong to one process as far as possible: then each copy of the model sends least over the
  network. Raises InputError if the heads cannot be cut so, there are too few devices, or a process would have no part.
  """
  shape = MeshShape.for_model(config, tensor, data)
  by_process: dict[int, list[Any]] = {}  # devices
  for device in jax.devices():
    by_process.setdefault(device.process_index, []).append(device)
  share, rest = divmod(shape.num_devices, len(by_process))
  if rest:
    raise InputError(
      f"mesh: tensor={tensor} times data={data} must be a multiple of the {len(by_process)} processes. Use other sizes."
    )
  fewest = min(map(len, by_process.values()))
  if share > fewest:
    available = f"{fewest} are here" if len(by_process) == 1 else f"{len(by_process)} processes have {fewest} each"
    raise InputError(f"mesh: tensor={tensor} times data={data} needs {shape.num_devices} devices; {available}. Use fewer.")
  chosen = [device for process in sorted(by_process) for device in by_process[process][:share]]
  return Mesh(np.array(chosen).reshape(shape.data, shape.kv, shape.group), MESH_AXES)


def mesh_shape(mesh: Mesh | None) -> MeshShape:
  """The sizes of a mesh from `make_mesh`; None is one device."""
  return MeshShape() if mesh is None else MeshShape(*(mesh.shape[axis] for axis in MESH_AXES))


def abstract_array(shape: Sequence[int], dtype: Any) -> Any:
  """A `jax.ShapeDtypeStruct`, typed as Any: abstract models, caches and batches hold such a leaf in place of an array."""
  return jax.ShapeDtypeStruct(tuple(shape), dtype)


def sum_over(x: jax.Array, axes: Axes) -> jax.Array:
  """All-reduce: the sum of every device's x."""
  return x if axes is None else jax.lax.psum(x, axes)


def scatter_over(x: jax.Array, axes: Axes) -> jax.Array:
  """Reduce-scatter: this device's rows (axis 0) of the sum of every device's x. `concatenate_over` joins them again."""
  return x if axes is None else jax.lax.psum_scatter(x, axes, scatter_dimension=0, tiled=True)


def max_over(x: jax.Array, axes: Axes) -> jax.Array:
  """All-reduce: the elementwise maximum of every device's x."""
  return x if axes is None else jax.lax.pmax(x, axes)


def index_over(axes: Axes) -> jax.Array | int:
  """This device's index along mesh axes; 0 if axes is None."""
  return 0 if axes is None else jax.lax.axis_index(axes)


def gather_over(x: jax.Array, axes: Axes) -> jax.Array:
  """All-gather: every device's x, stacked along a new leading axis."""
  return x[None] if axes is None else jax.lax.all_gather(x, axes)


def concatenate_over(x: jax.Array, axes: Axes) -> jax.Array:
  """All-gather: every device's x, joined along axis 0."""
  return x if axes is None or jax.lax.axis_size(axes) == 1 else jax.lax.all_gather(x, axes, tiled=True)
