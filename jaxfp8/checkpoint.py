"""jaxfp8's own checkpoints as models: `save`, and `load_checkpoint` for any mesh, a few merged weights at a time.

The folder itself, and how it is written, is checkpoint_folder.py's business; which key holds what is layout.py's.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfp8 import layout
from jaxfp8.checkpoint_folder import Manifest, check_files, damaged, orbax, orbax_context, read_manifest
from jaxfp8.checkpoint_writer import CheckpointWriter
from jaxfp8.config import LlamaConfig
from jaxfp8.dims import MESH_AXES
from jaxfp8.errors import InputError
from jaxfp8.mesh import MeshShape
from jaxfp8.model import Llama
from jaxfp8.text import TokenizerFiles

_READ_BYTES = 64 << 20  # of weights read together, so that few bytes are in memory twice


def save(model: Llama, folder: str | os.PathLike, tokenizer: TokenizerFiles | None = None) -> None:
  """Writes a model that holds arrays as a checkpoint. Raises InputError for a model cut or padded for several devices."""
  if model.shape.tensor != 1:
    raise InputError(f"save: the model must be loaded with tensor=1; got tensor={model.shape.tensor}. Load it again.")
  manifest = Manifest(model.config, model.recipe, tuple(model.formats), tokenizer, {"source": "jaxfp8.save"})
  with CheckpointWriter(folder, manifest) as writer:
    arrays = {layout.EMBEDDING: model.embedding, layout.FINAL_NORM: model.final_norm.weight}
    if not model.config.tied_embeddings:
      arrays[layout.HEAD] = model.head.weight
    writer.write({key: np.asarray(weight.get_value()) for key, weight in arrays.items()})
    for layer in range(model.config.num_layers):
      writer.write(layout.split_layer(model, layer))


def load_checkpoint(
  folder: str | os.PathLike,
  *,
  activations: str | None = None,
  kv: str | None = None,
  mesh: Mesh | None = None,
  implementation: str = "auto",
) -> Llama:
  """Loads a checkpoint of jaxfp8 as a model with arrays.

  Args:
    activations, kv: replace what the checkpoint's recipe says.
    mesh: from `make_mesh`; weights are merged, padded, replicated and cut for it. None: one array on the default device.
    implementation: which kernels (see pallas_kernels).

  Raises:
    InputError: no checkpoint there, a damaged one, or a mesh that this model cannot be cut over.
  """
  manifest = read_manifest(folder)
  recipe = dataclasses.replace(
    manifest.recipe, activations=activations or manifest.recipe.activations, kv=kv or manifest.recipe.kv
  )
  model = abstract_model(manifest.config, recipe, manifest.formats, mesh, implementation)
  reader = CheckpointReader(pathlib.Path(folder), manifest)
  return fill(model, layout.widened(reader.read, manifest.exceptions, layout.NUMPY_DTYPES[manifest.recipe.stream]), mesh)


def abstract_model(config, recipe, formats, mesh: Mesh | None, implementation: str = "auto") -> Llama:
  """A Llama of shapes for `mesh`."""
  return Llama(config, recipe, formats=formats, shape=mesh_shape(mesh), implementation=implementation)


def fill(model: Llama, read, mesh: Mesh | None) -> Llama:
  """Puts arrays into an abstract model, a few weights at a time. `read(keys)` gives {key: numpy array}."""
  for parts in _grouped(layout.parts(model)):
    arrays = read(tuple(key for part in parts for key in part.keys))
    for part in parts:
      value, partition = part.build(arrays), part.weight.get_metadata("partition")
      part.weight.set_value(jax.tree.map(lambda leaf, spec: _place(leaf, spec, mesh), value, partition))
  return model


def _grouped(parts: Iterable[layout.Part]) -> Iterator[list[layout.Part]]:
  """Weights to read together: each call of Orbax costs a tenth of a second, so small ones go in one."""
  group, size = [], 0
  for part in parts:
    leaves = jax.tree.leaves(part.weight.get_value())
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    if group and size + num_bytes > _READ_BYTES:
      yield group
      group, size = [], 0
    group.append(part)
    size += num_bytes
  if group:
    yield group


def make_mesh(config: LlamaConfig, tensor: int = 1, data: int = 1) -> Mesh:
  """The mesh ("data", "kv", "group") for this model over the first tensor * data devices.

  Raises InputError if the heads cannot be cut so, or there are too few devices.
  """
  shape = MeshShape.for_model(config, tensor, data)
  devices = jax.devices()
  if shape.num_devices > len(devices):
    raise InputError(
      f"mesh: tensor={tensor} times data={data} needs {shape.num_devices} devices; {len(devices)} are here. Use fewer."
    )
  grid = np.array(devices[: shape.num_devices]).reshape(shape.data, shape.kv, shape.group)
  return Mesh(grid, MESH_AXES)


def mesh_shape(mesh: Mesh | None) -> MeshShape:
  return MeshShape() if mesh is None else MeshShape(*(mesh.shape[axis] for axis in MESH_AXES))


def _place(array: np.ndarray, spec: PartitionSpec, mesh: Mesh | None) -> jax.Array:
  return jax.device_put(array, NamedSharding(mesh, spec) if mesh is not None else None)


class CheckpointReader:
  """Arrays of one checkpoint by key, checked against what its manifest promises."""

  def __init__(self, folder: pathlib.Path, manifest: Manifest):
    self.folder = folder
    check_files(folder)
    groups = layout.checkpoint_arrays(
      manifest.config, manifest.recipe, manifest.formats, manifest.exceptions, manifest.static_scales
    )
    self.expected = {key: value for group in groups for key, value in group.items()}
    self._ocp = orbax()
    try:
      with orbax_context(self._ocp):
        stored = self._ocp.metadata(folder).metadata
    except Exception as error:  # Orbax raises many kinds for a damaged folder
      raise damaged(self.folder, error) from error
    if not stored:
      raise damaged(self.folder, "Orbax finds no arrays")
    for key, (shape, dtype) in self.expected.items():
      # Orbax casts silently on restore, so dtypes are compared with the metadata first.
      found = (tuple(stored[key].shape), np.dtype(stored[key].dtype)) if key in stored else "nothing"
      if found != (shape, dtype):
        raise damaged(self.folder, f"{key} must be {dtype} {shape}; the folder has {found}")

  def read(self, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    target = {key: np.broadcast_to(np.zeros((), self.expected[key][1]), self.expected[key][0]) for key in keys}
    try:
      with orbax_context(self._ocp):
        return self._ocp.load(self.folder, target)
    except Exception as error:
      raise damaged(self.folder, error) from error
