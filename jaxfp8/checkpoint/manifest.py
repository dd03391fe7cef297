"""The folder of a checkpoint of jaxfp8: what lies in it, and how it comes to be there whole or not at all.

    FOLDER/                 an Orbax checkpoint: {key: array}, keys and layouts as layout.py says
      jaxfp8.json           format version, config, recipe, formats, provenance, checksums, and the sizes of all other files
      tokenizer.json, chat_template.jinja

It is written group by group under a temporary name beside it (checkpoint_writer.py) and renamed when everything is on the
disk. The sizes tell a folder that lost something before Orbax stumbles over it; `tools.inspect_checkpoint --verify` compares
the checksums.
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
_CHUNK_BYTES = 8 << 20  # what is read at least of an array: a host reads only its part of a matrix


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a checkpoint is.

  provenance: free JSON: where the numbers came from.
  exceptions: module -> "channel" or "block128" of matrices stored as float8 whatever `formats` says (see layout.py).
  static_scales: names of the scales of inputs, keys and values that are stored.
  """

  config: LlamaConfig
  recipe: Recipe
  formats: tuple[LayerFormat, ...]
  tokenizer: TokenizerFiles | None
  provenance: Mapping[str, Any]
  exceptions: Mapping[str, str] = dataclasses.field(default_factory=dict)
  static_scales: tuple[str, ...] = ()

  def to_json(self, files: Mapping[str, int], checksums: Mapping[str, str]) -> str:
    """`files`: bytes of each file of the folder, by its path in it. `checksums`: sha256 of each array and text file."""
    text = self.tokenizer and {"special_tokens": self.tokenizer.special_tokens, "add_bos": self.tokenizer.add_bos}
    data = {
      "format_version": FORMAT_VERSION,
      "config": self.config.to_dict(),
      "recipe": dataclasses.asdict(self.recipe),
      "formats": [dataclasses.asdict(layer) for layer in self.formats],
      "tokenizer": text,
      "exceptions": dict(self.exceptions),
      "static_scales": list(self.static_scales),
      "provenance": dict(self.provenance),
      "files": dict(files),
      "checksums": dict(checksums),
    }
    return json.dumps(data | {"sha256": digest_of(data)}, indent=1)


def digest_of(data: Mapping[str, Any]) -> str:
  """sha256 of a manifest's content, without the entry that holds it."""
  return hashlib.sha256(json.dumps({k: v for k, v in data.items() if k != "sha256"}, sort_keys=True).encode()).hexdigest()


def read_raw(folder: str | os.PathLike) -> dict[str, Any]:
  """The manifest as JSON. Raises InputError as `read_manifest` does."""
  read_manifest(folder)
  return json.loads((pathlib.Path(folder) / MANIFEST).read_text(encoding="utf-8"))


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
    template = folder / TEMPLATE
    tokenizer = text and TokenizerFiles(
      tokenizer_json=(folder / TOKENIZER).read_text(encoding="utf-8"),
      chat_template=template.read_text(encoding="utf-8") if template.exists() else None,
      special_tokens=text["special_tokens"],
      add_bos=text["add_bos"],
    )
    formats = tuple(LayerFormat(**layer) for layer in data["formats"])
    return Manifest(
      LlamaConfig.from_dict(data["config"]),
      Recipe(**data["recipe"]),
      formats,
      tokenizer,
      data["provenance"],
      dict(data.get("exceptions", {})),
      tuple(data.get("static_scales", ())),
    )
  except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
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


def orbax():
  return importlib.import_module("orbax.checkpoint.experimental.v1")


def orbax_context(ocp):
  context = ocp.Context()
  context.array.saving.use_compression = False  # compressed, weights are written at a third of the rate
  context.memory.deepcopy_host_arrays = False  # saving blocks, so nobody changes them meanwhile
  context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
  context.pytree.loading.partial_load = True
  return context
