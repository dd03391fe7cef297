"""jaxfp8's own checkpoints: an Orbax folder of flat arrays, with what is not an array beside them.

    FOLDER/                 an Orbax checkpoint: {key: array}, keys and layouts as layout.py says
      jaxfp8.json           format version, config, recipe, formats, provenance
      tokenizer.json, chat_template.jinja

A checkpoint is written group by group under a temporary name and renamed when everything is on the disk: it is whole or
it does not exist. `load_checkpoint` builds the arrays of a model for any mesh, one merged weight at a time.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfp8 import layout
from jaxfp8.config import LlamaConfig, Recipe
from jaxfp8.dims import MESH_AXES
from jaxfp8.errors import InputError
from jaxfp8.layers import LayerFormat
from jaxfp8.mesh import MeshShape
from jaxfp8.model import Llama
from jaxfp8.text import TokenizerFiles

FORMAT_VERSION = 1
_READ_BYTES = 64 << 20  # of weights read together, so that few bytes are in memory twice
_MANIFEST, _TOKENIZER, _TEMPLATE = "jaxfp8.json", "tokenizer.json", "chat_template.jinja"


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a checkpoint is. `provenance` is free JSON: where the numbers came from."""

  config: LlamaConfig
  recipe: Recipe
  formats: tuple[LayerFormat, ...]
  tokenizer: TokenizerFiles | None
  provenance: Mapping[str, Any]

  def to_json(self) -> str:
    text = self.tokenizer and {"special_tokens": self.tokenizer.special_tokens, "add_bos": self.tokenizer.add_bos}
    return json.dumps(
      {
        "format_version": FORMAT_VERSION,
        "config": self.config.to_dict(),
        "recipe": dataclasses.asdict(self.recipe),
        "formats": [dataclasses.asdict(layer) for layer in self.formats],
        "tokenizer": text,
        "provenance": dict(self.provenance),
      },
      indent=1,
    )


def is_checkpoint(folder: str | os.PathLike) -> bool:
  return (pathlib.Path(folder) / _MANIFEST).is_file()


def read_manifest(folder: str | os.PathLike) -> Manifest:
  """Raises InputError when the folder is no checkpoint of jaxfp8, or one of a newer version."""
  folder = pathlib.Path(folder)
  path = folder / _MANIFEST
  try:
    data = json.loads(path.read_text(encoding="utf-8"))
    version = data["format_version"]
    if version > FORMAT_VERSION:
      raise InputError(
        f"checkpoint: {folder} has format version {version}; this jaxfp8 reads up to {FORMAT_VERSION}. Install a newer jaxfp8."
      )
    text = data["tokenizer"]
    template = folder / _TEMPLATE
    tokenizer = text and TokenizerFiles(
      tokenizer_json=(folder / _TOKENIZER).read_text(encoding="utf-8"),
      chat_template=template.read_text(encoding="utf-8") if template.exists() else None,
      special_tokens=text["special_tokens"],
      add_bos=text["add_bos"],
    )
    formats = tuple(LayerFormat(**layer) for layer in data["formats"])
    return Manifest(LlamaConfig.from_dict(data["config"]), Recipe(**data["recipe"]), formats, tokenizer, data["provenance"])
  except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
    raise InputError(
      f"checkpoint: {folder} is no whole checkpoint of jaxfp8 ({type(error).__name__}: {error}). Convert it again."
    ) from error


class CheckpointWriter:
  """Writes a checkpoint group by group; use as a context manager.

  Leaving normally makes `folder` appear whole; leaving by an exception removes what was written.
  Raises InputError if `folder` exists already or the disk refuses.
  """

  def __init__(self, folder: str | os.PathLike, manifest: Manifest):
    self.folder, self.manifest = pathlib.Path(folder), manifest
    # No leading dot: Orbax 0.12.8 would then silently finalize nothing.
    self._temporary = self.folder.with_name(f"{self.folder.name}.writing-{os.getpid()}")

  def __enter__(self) -> "CheckpointWriter":
    if self.folder.exists():
      raise InputError(f"checkpoint: {self.folder} exists already. Pass another folder, or remove it first.")
    try:
      self.folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise _disk_error(self.folder, error) from error
    self._clean()
    return self

  def write(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Adds arrays under keys that are not there yet."""
    ocp = _orbax()
    try:
      with _context(ocp):
        ocp.partial.save(self._temporary, dict(arrays))
    except OSError as error:
      raise _disk_error(self.folder, error) from error

  def __exit__(self, kind, error, traceback) -> None:
    if kind is None:
      try:
        self._finish()
      except OSError as failure:
        self._clean()
        raise _disk_error(self.folder, failure) from failure
    else:
      self._clean()

  def _finish(self) -> None:
    ocp = _orbax()
    with _context(ocp):
      ocp.partial.finalize(self._temporary)
    files = {_MANIFEST: self.manifest.to_json()}
    if self.manifest.tokenizer:
      files[_TOKENIZER] = self.manifest.tokenizer.tokenizer_json
      if self.manifest.tokenizer.chat_template is not None:
        files[_TEMPLATE] = self.manifest.tokenizer.chat_template
    for name, text in files.items():
      (self._temporary / name).write_text(text, encoding="utf-8")
    _sync_tree(self._temporary)
    os.rename(self._temporary, self.folder)
    _sync(self.folder.parent)

  def _clean(self) -> None:
    for path in self._temporary.parent.glob(self._temporary.name + "*"):
      shutil.rmtree(path, ignore_errors=True)


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
  reader = _Reader(pathlib.Path(folder), manifest)
  return fill(model, reader.read, mesh)


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


class _Reader:
  """Arrays of one checkpoint by key, checked against what its manifest promises."""

  def __init__(self, folder: pathlib.Path, manifest: Manifest):
    self.folder = folder
    groups = layout.checkpoint_arrays(manifest.config, manifest.recipe, manifest.formats)
    self.expected = {key: value for group in groups for key, value in group.items()}
    self._ocp = _orbax()
    try:
      with _context(self._ocp):
        stored = self._ocp.metadata(folder).metadata
    except Exception as error:  # Orbax raises many kinds for a damaged folder
      raise self._damaged(error) from error
    for key, (shape, dtype) in self.expected.items():
      # Orbax casts silently on restore, so dtypes are compared with the metadata first.
      found = (tuple(stored[key].shape), np.dtype(stored[key].dtype)) if key in stored else "nothing"
      if found != (shape, dtype):
        raise self._damaged(f"{key} must be {dtype} {shape}; the folder has {found}")

  def read(self, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    target = {key: np.broadcast_to(np.zeros((), self.expected[key][1]), self.expected[key][0]) for key in keys}
    try:
      with _context(self._ocp):
        return self._ocp.load(self.folder, target)
    except Exception as error:
      raise self._damaged(error) from error

  def _damaged(self, why) -> InputError:
    sentence = str(why).split("\n", 1)[0][:300]
    return InputError(f"checkpoint: {self.folder} is damaged ({sentence}). Remove the folder and convert again.")


def _orbax():
  return importlib.import_module("orbax.checkpoint.experimental.v1")


def _context(ocp):
  context = ocp.Context()
  context.array.saving.use_compression = False  # compressed, weights are written at a third of the rate
  context.pytree.loading.partial_load = True
  return context


def _sync_tree(folder: pathlib.Path) -> None:
  for root, _, names in os.walk(folder):
    for name in names:
      _sync(pathlib.Path(root) / name)
    _sync(pathlib.Path(root))


def _sync(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _disk_error(folder: pathlib.Path, error: OSError) -> InputError:
  reason = os.strerror(error.errno) if error.errno else str(error)
  return InputError(f"checkpoint: cannot write {folder}: {reason}. Nothing was left behind; pass another folder or free space.")
