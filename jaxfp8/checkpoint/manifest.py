"""jaxfp8.json, the manifest of a checkpoint of jaxfp8, and the folder that it describes. Imports no jax.

    FOLDER/                 an Orbax checkpoint: {key: array}, keys and shapes as in stored_arrays.py
      jaxfp8.json           format version, config, recipe, formats, provenance, checksums, and the sizes of all other files
      tokenizer.json, chat_template.jinja

A folder is written under a temporary name (writer.py) and renamed when all of it is on the disk. The sizes reveal a folder that
has lost data before Orbax stumbles over it; `jaxfp8 inspect --verify` compares the checksums.
"""

import dataclasses
import hashlib
import importlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.recipe import LayerFormat, Recipe

FORMAT_VERSION = 2
WRITING = ".writing-"  # in the name of a folder that is not finished
MANIFEST, TOKENIZER, TEMPLATE = "jaxfp8.json", "tokenizer.json", "chat_template.jinja"
_CHUNK_BYTES = 8 << 20  # the smallest part of an array that can be read: a process reads only its shards of a matrix


@dataclasses.dataclass(frozen=True)
class Manifest:
  """The content of jaxfp8.json, and the tokenizer beside it.

  provenance: free JSON: where the weights came from.
  exceptions: module -> "channel" or "block128" of matrices stored as float8 whatever `formats` says (see stored_arrays.py).
  static_scales: names of the stored scales of inputs, keys and values.
  files: bytes of every other file of the folder, by its path in it.
  checksums: sha256 of every array by its key, and of every text file by its name.
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
    }
    return json.dumps(data | {"sha256": digest_of(data)}, indent=1)


def digest_of(data: Mapping[str, Any]) -> str:
  """sha256 of a manifest's JSON, without the entry that holds it."""
  return hashlib.sha256(json.dumps({k: v for k, v in data.items() if k != "sha256"}, sort_keys=True).encode()).hexdigest()


def is_checkpoint(folder: str | os.PathLike) -> bool:
  """Whether the folder holds a manifest, readable or not."""
  return (pathlib.Path(os.path.expanduser(folder)) / MANIFEST).is_file()


def read_manifest(folder: str | os.PathLike) -> Manifest:
  """Reads jaxfp8.json and the tokenizer, each once.

  Raises InputError for a folder that is no checkpoint of jaxfp8, or one of a newer version.
  """
  folder = pathlib.Path(folder)
  try:
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    data = json.loads(text)
    version = data["format_version"]
    if version > FORMAT_VERSION:
      raise InputError(
        f"checkpoint: {folder} has format version {version}; this jaxfp8 reads up to {FORMAT_VERSION}. Install a newer jaxfp8."
      )
    return Manifest(
      LlamaConfig.from_dict(data["config"]),
      Recipe(**data["recipe"]),
      tuple(LayerFormat(**layer) for layer in data["formats"]),
      data["tokenizer"] and _read_tokenizer(folder, data["tokenizer"]),
      data["provenance"],
      dict(data.get("exceptions", {})),
      tuple(data.get("static_scales", ())),
      dict(data.get("files", {})),
      dict(data.get("checksums", {})),
      text,
    )
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    if isinstance(error, InputError):
      raise
    raise InputError(
      f"checkpoint: {folder} is no whole checkpoint of jaxfp8 ({type(error).__name__}: {error}). Convert it again."
    ) from error


def _read_tokenizer(folder: pathlib.Path, settings: Mapping[str, Any]) -> TokenizerFiles:
  template = folder / TEMPLATE
  return TokenizerFiles(
    tokenizer_json=(folder / TOKENIZER).read_text(encoding="utf-8"),
    chat_template=template.read_text(encoding="utf-8") if template.exists() else None,
    special_tokens=settings["special_tokens"],
    add_bos=settings["add_bos"],
    special_in_chats=settings.get("special_in_chats", False),
  )


def check_files(folder: pathlib.Path, manifest: Manifest) -> None:
  """Raises InputError if a file of the manifest is missing or has another size. Reads no content."""
  for name, expected in manifest.files.items():
    try:
      size = (folder / name).stat().st_size
    except OSError as error:
      raise damaged(folder, f"{name}: {os.strerror(error.errno or 0)}") from error
    if size != expected:
      raise damaged(folder, f"{name} must have {expected:,} bytes and has {size:,}")


def damaged(folder: pathlib.Path, reason: object) -> InputError:
  """The error for a folder whose content is not what its manifest says."""
  sentence = str(reason).split("\n", 1)[0][:300]
  return InputError(f"checkpoint: {folder} is damaged ({sentence}). Remove the folder and convert again.")


def orbax() -> Any:
  """Orbax, which loads jax, imported where a checkpoint's arrays are read or written."""
  return importlib.import_module("orbax.checkpoint.experimental.v1")


def orbax_context(ocp: Any) -> Any:
  """The settings with which checkpoints are read and written; use as a context manager."""
  context = ocp.Context()
  context.array.saving.use_compression = False  # compression cuts the writing rate to a third
  context.memory.deepcopy_host_arrays = False  # saving blocks, so the arrays cannot change meanwhile
  context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
  context.pytree.loading.partial_load = True
  return context
