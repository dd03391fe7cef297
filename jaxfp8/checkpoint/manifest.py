"""jaxfp8.json, the manifest of a checkpoint of jaxfp8, and the folder that it describes. Imports no jax.

    FOLDER/                 an Orbax checkpoint: {key: array}, keys and shapes as in stored_arrays.py
      jaxfp8.json           format version, config, recipe, formats, provenance, digests, and the sizes of all other files
      tokenizer.json, chat_template.jinja

A folder is written under a temporary name (writer.py) and renamed when all of it is on the disk. Nothing in it is trusted. The
manifest holds its own SHA-256, the sizes of all files, and the SHA-256 of every small file: these are compared when the folder
is opened. It holds the digests of the arrays' blocks too, which open.py compares as it reads them.
"""

import dataclasses
import hashlib
import importlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxfp8 import regular_files
from jaxfp8.checkpoint import manifest_fields
from jaxfp8.checkpoint.block_digests import BLOCK_BYTES
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError, first_line
from jaxfp8.recipe import LayerFormat, Recipe

FORMAT_VERSION = 2
WRITING = ".writing-"  # in the name of a folder that is not finished
MANIFEST, TOKENIZER, TEMPLATE = "jaxfp8.json", "tokenizer.json", "chat_template.jinja"
_NEVER_HASHED = "d"  # OCDBT's folders of data: the digests of the arrays cover them


class DamagedCheckpoint(InputError):
  """A folder whose content is not what its manifest says. reason: a clause that names the file or the array.

  checkpoint: the opened `Checkpoint`; None if the folder could not be opened.
  """

  def __init__(self, folder: pathlib.Path, reason: str, checkpoint: Any = None):
    super().__init__(f"checkpoint: {folder} is damaged: {reason}. Convert its source again, or fetch the checkpoint again.")
    self.reason, self.checkpoint = reason, checkpoint


@dataclasses.dataclass(frozen=True)
class Manifest:
  """The content of jaxfp8.json, and the tokenizer beside it.

  provenance: free JSON: where the weights came from.
  exceptions: module -> "channel" or "block128" of matrices stored as float8 whatever `formats` says (see stored_arrays.py).
  static_scales: names of the stored scales of inputs, keys and values.
  files: bytes of every other file of the folder, by its path in it.
  checksums: sha256 of every array by its key, and of every small file by its path in the folder.
  blocks: the digests of every array's blocks by its key, as JSON (block_digests.py); empty for an earlier version's folder.
  text: the file as it was read; empty for a manifest that was not read from a file.
  """

  config: LlamaConfig
  recipe: Recipe
  formats: tuple[LayerFormat, ...]
  tokenizer: TokenizerFiles | None
  provenance: Mapping[str, Any]
  exceptions: Mapping[str, str] = dataclasses.field(default_factory=dict)
  static_scales: tuple[str, ...] = ()
  files: Mapping[str, int] = dataclasses.field(default_factory=dict)
  checksums: Mapping[str, str] = dataclasses.field(default_factory=dict)
  blocks: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  text: str = dataclasses.field(default="", repr=False)

  def to_json(self) -> str:
    """The text of jaxfp8.json."""
    tokenizer = self.tokenizer and {"special_tokens": self.tokenizer.special_tokens, "add_bos": self.tokenizer.add_bos}
    if tokenizer and self.tokenizer and self.tokenizer.special_in_chats:
      tokenizer["special_in_chats"] = True
    data = {
      "format_version": FORMAT_VERSION,
      "config": self.config.to_dict(),
      "recipe": dataclasses.asdict(self.recipe),
      "formats": [dataclasses.asdict(layer) for layer in self.formats],
      "tokenizer": tokenizer,
      "exceptions": dict(self.exceptions),
      "static_scales": list(self.static_scales),
      "provenance": dict(self.provenance),
      "files": dict(self.files),
      "checksums": dict(self.checksums),
      "blocks": dict(self.blocks),
    }
    return json.dumps(data | {"sha256": digest_of(data)}, indent=1)


def digest_of(data: Mapping[str, Any]) -> str:
  """sha256 of a manifest's JSON, without the entry that holds it."""
  return hashlib.sha256(json.dumps({k: v for k, v in data.items() if k != "sha256"}, sort_keys=True).encode()).hexdigest()


def is_checkpoint(folder: str | os.PathLike) -> bool:
  """Whether the folder holds a manifest, readable or not."""
  return (pathlib.Path(os.path.expanduser(folder)) / MANIFEST).is_file()


def require_checkpoint(folder: str | os.PathLike) -> None:
  """Raises InputError for a path that is no folder of jaxfp8 at all, rather than a damaged one."""
  if not is_checkpoint(folder):
    raise InputError(
      f"checkpoint: {folder} is no checkpoint of jaxfp8, since it holds no {MANIFEST}. Pass the output of `jaxfp8 convert`."
    )


def read_manifest(folder: str | os.PathLike) -> Manifest:
  """Reads jaxfp8.json and the tokenizer, each once, and compares their SHA-256.

  Raises DamagedCheckpoint, or InputError for a folder that a newer version wrote or that holds other than regular files.
  """
  folder = pathlib.Path(folder)
  try:
    regular_files.require_tree(folder)
    text = regular_files.read_text(folder / MANIFEST, within=folder)
    data = manifest_fields.parse(text)
    manifest_fields.check(data)
    version = data["format_version"]
    if ("sha256" in data or version >= 2) and data.get("sha256") != digest_of(data):
      raise DamagedCheckpoint(folder, f"the SHA-256 of {MANIFEST} is not the one stored in it")
    if version > FORMAT_VERSION:
      raise InputError(
        f"checkpoint: {folder} has format version {version}; this jaxfp8 reads up to {FORMAT_VERSION}. Install a newer jaxfp8."
      )
    checksums = dict(data.get("checksums", {}))
    return Manifest(
      *_model(data),
      data["tokenizer"] and _read_tokenizer(folder, data["tokenizer"], checksums),
      data["provenance"],
      dict(data.get("exceptions", {})),
      tuple(data.get("static_scales", ())),
      dict(data.get("files", {})),
      checksums,
      dict(data.get("blocks", {})),
      text,
    )
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
    if isinstance(error, InputError):
      raise
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    reason = f"it is no whole checkpoint of jaxfp8 ({kind}{first_line(error).rstrip('.')})"
    raise DamagedCheckpoint(folder, reason) from error


def _model(data: Mapping[str, Any]) -> tuple[LlamaConfig, Recipe, tuple[LayerFormat, ...]]:
  """The first three fields of a `Manifest`. Raises ValueError for values that are no model's."""
  try:
    config = LlamaConfig.from_dict(data["config"], source=MANIFEST)
    manifest_fields.check_layers(config.num_layers, data["formats"], data.get("static_scales", ()))
    return config, Recipe(**data["recipe"]), tuple(LayerFormat(**layer) for layer in data["formats"])
  except InputError as error:
    raise ValueError(str(error)) from error  # a clause of the sentence that names the folder


def _read_tokenizer(folder: pathlib.Path, settings: Mapping[str, Any], checksums: Mapping[str, str]) -> TokenizerFiles:
  def read(name: str) -> str:
    content = regular_files.read_bytes(folder / name, regular_files.TOKENIZER_BYTES, within=folder)
    _require_digest(folder, name, hashlib.sha256(content).hexdigest(), checksums)
    return content.decode("utf-8")

  return TokenizerFiles(
    tokenizer_json=read(TOKENIZER),
    chat_template=read(TEMPLATE) if (folder / TEMPLATE).exists() else None,
    special_tokens=settings["special_tokens"],
    add_bos=settings["add_bos"],
    special_in_chats=settings.get("special_in_chats", False),
  )


def _require_digest(folder: pathlib.Path, name: str, digest: str, checksums: Mapping[str, str]) -> None:
  if name in checksums and digest != checksums[name]:
    raise DamagedCheckpoint(folder, f"{name} is not what was written, since its SHA-256 differs")


def check_files(folder: pathlib.Path, manifest: Manifest) -> None:
  """Raises DamagedCheckpoint if a file is missing, has another size, or is small and has another SHA-256."""
  for name, expected in manifest.files.items():
    try:
      size = regular_files.require_regular(folder / name, within=folder).st_size
      if size != expected:
        raise DamagedCheckpoint(folder, f"{name} must have {expected:,} bytes and has {size:,}")
      if name in manifest.checksums and name not in (TOKENIZER, TEMPLATE):  # which `read_manifest` has compared
        _require_digest(folder, name, _file_digest(folder, name), manifest.checksums)
    except OSError as error:
      raise DamagedCheckpoint(folder, f"{name}: {os.strerror(error.errno or 0)}") from error


def file_digests(folder: pathlib.Path) -> dict[str, str]:
  """sha256 of the small files of a folder by their paths in it: of all but the manifest and the arrays' data."""
  names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
  small = [name for name in names if name.parent.name != _NEVER_HASHED and str(name) != MANIFEST]
  return {str(name): _file_digest(folder, name) for name in small}


def _file_digest(folder: pathlib.Path, name: str | pathlib.Path) -> str:
  with regular_files.open_file(folder / name, within=folder) as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def orbax() -> Any:
  """Orbax, which loads jax, imported where a checkpoint's arrays are read or written."""
  return importlib.import_module("orbax.checkpoint.experimental.v1")


def orbax_context(ocp: Any) -> Any:
  """The settings with which checkpoints are read and written; use as a context manager."""
  context = ocp.Context()
  context.array.saving.use_compression = False  # compression cuts the writing rate to a third
  context.memory.deepcopy_host_arrays = False  # saving blocks, so the arrays cannot change meanwhile
  context.array.saving.storage_options.chunk_byte_size = BLOCK_BYTES
  context.pytree.loading.partial_load = True
  return context
