"""Finds the checkpoint that a path means, or says what is there instead. Opens files only for their first bytes.

a folder with config.json             ->  the folder
a folder of the Hub's cache           ->  its snapshot of refs/main
a .gguf file, or the only one around  ->  the file; `gguf_parts` gives all parts of a model that is cut into several
"""

import os
import pathlib
import re

from jaxfp8 import regular_files
from jaxfp8.checkpoint.readers.file_kinds import UNFINISHED, describe
from jaxfp8.errors import InputError

CONFIG, ADAPTER = "config.json", "adapter_config.json"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_BESIDE_MODELS = ("mmproj", "imatrix")  # in the names of GGUF files that are no models and stand beside them
_REVISION_BYTES = 1000
_ROOTS = ("models--", "datasets--", "spaces--")
# What a folder without config.json and GGUF holds: (glob, sentence). The first that matches is said.
_FOREIGN = (
  (
    ADAPTER,
    "a LoRA adapter. Merge it into its model (merge_and_unload of peft), save, and pass that folder",
  ),
  (
    "consolidated*.pth",
    "Meta's own format (consolidated.*.pth, params.json). Pass the Hugging Face version of the model, or convert it with "
    "convert_llama_weights_to_hf.py of transformers",
  ),
  (
    "consolidated*.safetensors",
    "Mistral's own format (consolidated.safetensors, params.json). Pass the Hugging Face version of the model",
  ),
  ("*.onnx", "an ONNX model. Pass the Hugging Face folder or a GGUF file of the model"),
  ("onnx/*.onnx", "an ONNX model. Pass the Hugging Face folder or a GGUF file of the model"),
  ("*.mlmodelc", "a Core ML model. Pass the Hugging Face folder or a GGUF file of the model"),
  ("openvino_model.xml", "an OpenVINO model. Pass the Hugging Face folder or a GGUF file of the model"),
  ("*.engine", "a TensorRT engine. Pass the Hugging Face folder or a GGUF file of the model"),
  ("*.nemo", "a NeMo model. Pass the Hugging Face version of the model"),
  ("*.h5", "TensorFlow weights. Save the model again as safetensors"),
  ("*.msgpack", "Flax weights. Save the model again as safetensors"),
  ("model*.safetensors", "safetensors files. Fetch config.json too"),
  ("*.bin", "PyTorch weights (*.bin). Save the model again as safetensors, with save_pretrained of transformers"),
  ("*.pt", "PyTorch weights (*.pt). Save the model again as safetensors, with save_pretrained of transformers"),
  ("*.pth", "PyTorch weights (*.pth). Save the model again as safetensors, with save_pretrained of transformers"),
  ("original/consolidated*.pth", "Meta's own format in original/. Pass the Hugging Face version of the model"),
)
_WAY_OUT = "Pass a Hugging Face folder or a GGUF file."


def locate(path: str | os.PathLike) -> pathlib.Path:
  """A Hugging Face folder or a GGUF file (the first part of one in parts). Raises InputError for everything else."""
  path = absolute(path)
  if not path.exists():
    raise InputError(f"readers: there is no checkpoint at {path}{unfinished(path)}. {_WAY_OUT}")
  if path.is_dir():
    return _in_folder(path)
  kind = describe(path)
  if kind.name == "gguf" or path.suffix == ".gguf":
    return gguf_parts(path)[0]
  if path.name in (CONFIG, ADAPTER) or path.name.endswith(".index.json"):
    raise InputError(f"readers: {path} is a file of a checkpoint, and a checkpoint is a folder or a .gguf. Pass {path.parent}.")
  raise InputError(f"readers: a file must be a .gguf; got {path}: {kind.sentence}")


def absolute(path: str | os.PathLike) -> pathlib.Path:
  """The path without `~` and not relative. Links stay, since the Hub's cache is made of them."""
  try:
    return pathlib.Path(path).expanduser().absolute()
  except RuntimeError:  # `~name` of a user who does not exist is a name like others
    return pathlib.Path(path).absolute()


def gguf_parts(path: pathlib.Path) -> list[pathlib.Path]:
  """All parts of the GGUF model that `path` is a part of, by their names; [path] for a name that is not that of a part.

  Raises InputError, naming it, for a part that is missing, and for a link of one that leads neither into the folder nor to the
  place of the named part.
  """
  match = _PART.fullmatch(path.name)
  if match is None:
    return [path]
  number, count = int(match["number"]), int(match["count"])
  if not 1 <= number <= count:
    raise InputError(f"readers: {path} is named part {number} of {count}. Give the file its published name.")
  parts = []
  for index in range(1, count + 1):
    part = path.with_name(f"{match['stem']}-{index:05}-of-{count:05}.gguf")
    if not part.exists():
      raise InputError(f"readers: part {index} of {count}, {part}, is missing{unfinished(part)}. Fetch it, beside the others.")
    regular_files.require_link(part, path.parent, pathlib.Path(os.path.realpath(path)).parent)
    parts.append(part)
  return parts


def _in_folder(folder: pathlib.Path) -> pathlib.Path:
  """What `locate` returns for a folder."""
  has_config = (folder / CONFIG).exists() or (folder / CONFIG).is_symlink()
  if has_config and (any(folder.glob("*.safetensors*")) or not any(folder.glob("*.gguf"))):
    return folder  # a folder with GGUF files may have a config.json for the Hub's pages
  if (folder / "snapshots").is_dir():
    return _in_folder(_snapshot(folder))
  models = _gguf_models(folder)
  if len(models) == 1:
    regular_files.require_link(models[0], folder)
    return models[0]
  if models:
    names = ", ".join(model.name for model in models[:5])
    raise InputError(f"readers: {folder} holds {len(models)} GGUF files. Pass one of them: {names}.")
  raise InputError(f"readers: {folder} has neither {CONFIG} nor a .gguf file{_instead(folder)}.")


def _gguf_models(folder: pathlib.Path) -> list[pathlib.Path]:
  """The GGUF models of a folder: each file, and the first part of each model in parts."""
  files = [file for file in sorted(folder.glob("*.gguf")) if not any(word in file.name.lower() for word in _BESIDE_MODELS)]
  return list(dict.fromkeys(gguf_parts(file)[0] for file in files)) or sorted(folder.glob("*.gguf"))


def _snapshot(folder: pathlib.Path) -> pathlib.Path:
  """The snapshot of a folder of the Hub's cache, `models--ORGANIZATION--NAME`, that refs/main names, or the only one."""
  snapshots = sorted(entry for entry in (folder / "snapshots").iterdir() if entry.is_dir())
  main = folder / "refs" / "main"
  content = regular_files.read_bytes(main, _REVISION_BYTES, within=folder) if main.is_file() else b""
  revision = content.decode(errors="replace").strip()
  for snapshot in snapshots:
    if snapshot.name == revision or len(snapshots) == 1:
      return snapshot
  names = ", ".join(str(snapshot) for snapshot in snapshots[:3])
  raise InputError(
    f"readers: {folder} is a folder of the Hub's cache, and it holds "
    + (f"{len(snapshots)} snapshots, of which refs/main names none. Pass one: {names}." if names else "no snapshot. Fetch it.")
  )


def _instead(folder: pathlib.Path) -> str:
  """What a folder holds that is no checkpoint, as the end of a sentence."""
  try:
    entries = sorted(folder.iterdir())
  except OSError as error:
    return f" that can be read: {os.strerror(error.errno or 0)}. {_WAY_OUT[:-1]}"
  if not entries:
    return f"; it is empty. {_WAY_OUT[:-1]}"
  if unfinished := [entry for entry in entries if entry.suffix in UNFINISHED]:
    return f"; {unfinished[0].name} is an unfinished download. Finish or repeat the download"
  if found := foreign(folder):
    return found
  inner = [entry for entry in entries if entry.is_dir() and _looks_like_checkpoint(entry)]
  if inner:
    return f"; its folders {', '.join(entry.name for entry in inner[:5])} look like checkpoints. Pass one of them"
  return f". {_WAY_OUT[:-1]}"


def foreign(folder: pathlib.Path) -> str:
  """The weights of another kind that a folder holds, as the end of a sentence; "" if it holds none that are known."""
  for pattern, what in _FOREIGN:
    if any(folder.glob(pattern)):
      return f"; it holds {what}"
  return ""


def _looks_like_checkpoint(folder: pathlib.Path) -> bool:
  if folder.name.startswith(_ROOTS):
    return folder.name.startswith(_ROOTS[0])
  return any((folder / name).exists() for name in (CONFIG, "jaxfp8.json")) or any(folder.glob("*.gguf"))


def unfinished(path: pathlib.Path) -> str:
  """A half sentence about an unfinished download of `path` beside it."""
  for ending in UNFINISHED:
    if (beside := path.with_name(path.name + ending)).exists():
      return f"; {beside.name} is an unfinished download of it"
  return ""
