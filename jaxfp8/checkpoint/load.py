"""jaxfp8's own checkpoints as models: `save`, and `load_checkpoint` for any mesh, where a process reads only its parts.

The folder itself, and how it is written, is checkpoint_folder.py's business; which key holds what is layout.py's.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterable

import numpy as np
from jax.sharding import Mesh

from jaxfp8.checkpoint import layout, static_scales
from jaxfp8.checkpoint.dequantize_on_read import widened
from jaxfp8.checkpoint.device_arrays import Range, fill
from jaxfp8.checkpoint.manifest import Manifest, check_files, damaged, orbax, orbax_context, read_manifest
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.checkpoint.writer import CheckpointWriter
from jaxfp8.errors import InputError
from jaxfp8.model.llama import Llama
from jaxfp8.sharding import mesh_shape


def save(model: Llama, folder: str | os.PathLike, tokenizer: TokenizerFiles | None = None) -> None:
  """Writes a model that holds arrays as a checkpoint. Raises InputError for a model cut or padded for several devices."""
  if model.shape.tensor != 1:
    raise InputError(f"save: the model must be loaded with tensor=1; got tensor={model.shape.tensor}. Load it again.")
  names = tuple(key.partition("[")[0] for key in static_scales.wanted(model))
  about = {"source": "jaxfp8.save"}
  manifest = Manifest(model.config, model.recipe, tuple(model.formats), tokenizer, about, static_scales=names)
  with CheckpointWriter(folder, manifest) as writer:
    arrays = {layout.EMBEDDING: model.embedding, layout.FINAL_NORM: model.final_norm.weight}
    if not model.config.tied_embeddings:
      arrays[layout.HEAD] = model.head.weight
    writer.write({key: np.asarray(weight.get_value()) for key, weight in arrays.items()})
    for layer in range(model.config.num_layers):
      writer.write(layout.split_layer(model, layer) | static_scales.split_layer(model, layer))


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
  static_scales.require(static_scales.wanted(model), reader.expected, folder)
  read = widened(reader.read, manifest.exceptions, reader.expected, recipe.stream.dtype)
  return static_scales.fill(fill(model, read, mesh), reader.read_array, mesh)


def abstract_model(config, recipe, formats, mesh: Mesh | None, implementation: str = "auto") -> Llama:
  """A Llama of shapes for `mesh`."""
  return Llama(config, recipe, formats=formats, shape=mesh_shape(mesh), implementation=implementation)


class CheckpointReader:
  """Arrays of one checkpoint by key, checked against what its manifest promises."""

  def __init__(self, folder: pathlib.Path, manifest: Manifest):
    self.folder = folder
    check_files(folder)
    groups = layout.checkpoint_arrays(
      manifest.config, manifest.recipe, manifest.formats, manifest.exceptions, manifest.static_scales
    )
    self.expected = {key: value for group in groups for key, value in group.items()}
    import tensorstore

    # A Zarr 3 array for each key in an OCDBT store; the name of its folder is Orbax's business.
    self._store = next((path.parent for path in folder.glob("*/manifest.ocdbt")), folder)
    self._context = tensorstore.Context()  # shared by all arrays, so that the index is read once
    ocp = orbax()
    try:
      with orbax_context(ocp):
        stored = ocp.metadata(folder).metadata
    except Exception as error:  # Orbax raises many kinds for a damaged folder
      raise damaged(self.folder, error) from error
    if not stored:
      raise damaged(self.folder, "Orbax finds no arrays")
    for key, (shape, dtype) in self.expected.items():
      found = (tuple(stored[key].shape), np.dtype(stored[key].dtype)) if key in stored else "nothing"
      if found != (shape, dtype):
        raise damaged(self.folder, f"{key} must be {dtype} {shape}; the folder has {found}")

  def read(self, ranges: Iterable[Range]) -> dict[Range, np.ndarray]:
    """All at once: Tensorstore reads in parallel, and of each array only the chunks that the range touches."""
    import tensorstore

    try:
      opened = {where: self._open(tensorstore, where.key) for where in ranges}
      under_way = {where: where.cut(array.result()).read() for where, array in opened.items()}
      return {where: array.result() for where, array in under_way.items()}
    except Exception as error:  # Tensorstore raises ValueError for whatever is not right
      raise damaged(self.folder, error) from error

  def read_array(self, key: str) -> np.ndarray:
    import tensorstore

    try:
      return np.asarray(self._open(tensorstore, key).result().read().result())
    except Exception as error:
      raise damaged(self.folder, error) from error

  def _open(self, tensorstore, key: str):
    store = {"driver": "ocdbt", "base": f"file://{self._store.resolve()}/", "path": f"{key}/"}
    return tensorstore.open({"driver": "zarr3", "kvstore": store}, open=True, context=self._context)
