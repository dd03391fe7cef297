"""The folder of a checkpoint of jaxfp8: what lies in it, and how it comes to be there whole or not at all.

    FOLDER/                 an Orbax checkpoint: {key: array}, keys and layouts as layout.py says
      jaxfp8.json           format version, config, recipe, formats, provenance, and the sizes of all other files
      tokenizer.json, chat_template.jinja

It is written group by group under a temporary name beside it and renamed when everything is on the disk. The sizes tell a
folder that lost something before Orbax stumbles over it; bytes that changed in place are not noticed.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import secrets
import shutil
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxfp8.config import LlamaConfig, Recipe
from jaxfp8.errors import InputError
from jaxfp8.layers import LayerFormat
from jaxfp8.text import TokenizerFiles

FORMAT_VERSION = 1
WRITING = ".writing-"  # in the name of a folder that is not finished
MANIFEST, _TOKENIZER, _TEMPLATE = "jaxfp8.json", "tokenizer.json", "chat_template.jinja"
_CHUNK_BYTES = 8 << 20  # what is read at least of an array: a host reads only its part of a matrix
_PATIENCE = 10.0  # seconds that `abandon_unfinished` waits for a write under way
_unfinished: "weakref.WeakSet[CheckpointWriter]" = weakref.WeakSet()


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a checkpoint is. `provenance` is free JSON: where the numbers came from."""

  config: LlamaConfig
  recipe: Recipe
  formats: tuple[LayerFormat, ...]
  tokenizer: TokenizerFiles | None
  provenance: Mapping[str, Any]

  def to_json(self, files: Mapping[str, int]) -> str:
    """`files`: bytes of each file of the folder, by its path in it."""
    text = self.tokenizer and {"special_tokens": self.tokenizer.special_tokens, "add_bos": self.tokenizer.add_bos}
    return json.dumps(
      {
        "format_version": FORMAT_VERSION,
        "config": self.config.to_dict(),
        "recipe": dataclasses.asdict(self.recipe),
        "formats": [dataclasses.asdict(layer) for layer in self.formats],
        "tokenizer": text,
        "provenance": dict(self.provenance),
        "files": dict(files),
      },
      indent=1,
    )


def is_checkpoint(folder: str | os.PathLike) -> bool:
  return (pathlib.Path(folder) / MANIFEST).is_file()


def read_manifest(folder: str | os.PathLike) -> Manifest:
  """Raises InputError when the folder is no checkpoint of jaxfp8, or one of a newer version."""
  folder = pathlib.Path(folder)
  path = folder / MANIFEST
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


def check_files(folder: str | os.PathLike) -> None:
  """Raises InputError when a file that was written is missing or has another size. Costs a look at each, whatever its size."""
  folder = pathlib.Path(folder)
  try:
    files = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("files", {}))
  except (OSError, ValueError, TypeError, AttributeError) as error:
    raise damaged(folder, error) from error
  for name, size in files.items():
    try:
      found = (folder / name).stat().st_size
    except OSError as error:
      raise damaged(folder, f"{name}: {os.strerror(error.errno)}") from error
    if found != size:
      raise damaged(folder, f"{name} must have {size:,} bytes and has {found:,}")


def damaged(folder: pathlib.Path, why: object) -> InputError:
  sentence = str(why).split("\n", 1)[0][:300]
  return InputError(f"checkpoint: {folder} is damaged ({sentence}). Remove the folder and convert again.")


class CheckpointWriter:
  """Writes a checkpoint group by group; use as a context manager.

  Leaving normally makes `folder` appear whole; leaving by an exception removes what was written.
  Raises InputError if `folder` exists already or the disk refuses.
  """

  def __init__(self, folder: str | os.PathLike, manifest: Manifest):
    self.folder, self.manifest = pathlib.Path(folder), manifest
    # No leading dot: Orbax 0.12.8 would then silently finalize nothing. Random: process ids repeat in containers.
    self._temporary = self.folder.with_name(f"{self.folder.name}{WRITING}{secrets.token_hex(4)}")
    self._busy = threading.Lock()  # held while Orbax writes

  def __enter__(self) -> "CheckpointWriter":
    if self.folder.exists():
      raise self._exists()
    try:
      self.folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise _disk_error(self.folder, error) from error
    _unfinished.add(self)
    return self

  def write(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Adds arrays under keys that are not there yet."""
    ocp = orbax()
    try:
      with self._busy, orbax_context(ocp):
        ocp.partial.save(self._temporary, dict(arrays))
    except OSError as error:
      raise _disk_error(self.folder, error) from error

  def abandon(self) -> None:
    """From another thread: waits for the write under way, removes everything, and lets no further write begin."""
    self._busy.acquire(timeout=_PATIENCE)  # and never released
    self._clean()

  def __exit__(self, kind, error, traceback) -> None:
    try:
      if kind is None:
        with self._busy:
          self._finish()
    except OSError as failure:
      raise (self._exists() if self.folder.exists() else _disk_error(self.folder, failure)) from failure
    finally:
      self._clean()
      _unfinished.discard(self)

  def _finish(self) -> None:
    ocp = orbax()
    with orbax_context(ocp):
      ocp.partial.finalize(self._temporary)
    texts = {}
    if self.manifest.tokenizer:
      texts[_TOKENIZER] = self.manifest.tokenizer.tokenizer_json
      if self.manifest.tokenizer.chat_template is not None:
        texts[_TEMPLATE] = self.manifest.tokenizer.chat_template
    for name, text in texts.items():
      (self._temporary / name).write_text(text, encoding="utf-8")
    files = {str(path.relative_to(self._temporary)): path.stat().st_size for path in _files(self._temporary)}
    (self._temporary / MANIFEST).write_text(self.manifest.to_json(files), encoding="utf-8")
    _sync_tree(self._temporary)
    os.rename(self._temporary, self.folder)
    _sync(self.folder.parent)

  def _exists(self) -> InputError:
    return InputError(f"checkpoint: {self.folder} exists already. Pass another folder, or remove it first.")

  def _clean(self) -> None:
    """Repeats: what Orbax still has under way when it is interrupted makes its folders again."""
    for _ in range(20):
      left = [path for path in self.folder.parent.iterdir() if path.name.startswith(self._temporary.name)]
      if not left:
        return
      for path in left:
        shutil.rmtree(path, ignore_errors=True)
      time.sleep(0.05)


def abandon_unfinished() -> None:
  """For a program that must end now: removes what this process has half written. Nothing can be written afterwards."""
  for writer in list(_unfinished):
    writer.abandon()


def orbax():
  return importlib.import_module("orbax.checkpoint.experimental.v1")


def orbax_context(ocp):
  context = ocp.Context()
  context.array.saving.use_compression = False  # compressed, weights are written at a third of the rate
  context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
  context.pytree.loading.partial_load = True
  return context


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path for path in folder.rglob("*") if path.is_file())


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
