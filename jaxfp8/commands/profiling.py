"""The --profile flag: a trace of jax.profiler for XProf, TensorBoard and Perfetto."""

import contextlib
import pathlib
from collections.abc import Iterator

from jaxfp8.errors import InputError

HELP = "Folder for a jax.profiler trace of the computation, for XProf and Perfetto."


def check_folder(command: str, folder: str | None) -> None:
  """Raises InputError for a --profile that is no folder. An empty value is none."""
  if folder and pathlib.Path(folder).exists() and not pathlib.Path(folder).is_dir():
    raise InputError(f"{command}: --profile must name a folder; {folder} is a file. Pass another.")


@contextlib.contextmanager
def write_trace(folder: str | pathlib.Path | None) -> Iterator[None]:
  """Traces the block into folder/plugins/profile/<time>/, also as perfetto_trace.json.gz. Does nothing without a folder."""
  if not folder:
    yield
    return
  import jax

  with jax.profiler.trace(str(pathlib.Path(folder).absolute()), create_perfetto_trace=True):
    yield
