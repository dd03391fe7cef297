"""Where this program and its children look for modules and other programs: never in the working directory by accident.

    leave_working_directory()      at a door, before other modules are imported
    child_variables(variables)     the environment of a child that is started with -P
    find_program("nvidia-smi")     in the absolute folders of PATH

A working directory is often a stranger's: a download, a shared folder. Python puts it before its own modules with `-m`, and
for an empty entry of PYTHONPATH; an empty or relative entry of PATH means it too. A checkout stays on the path when jaxfp8
itself comes from it. Imports nothing but os and sys, which Python has loaded, until all is done.
"""

import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the folder that the package was imported from
_INSTALLED = ("site-packages", "dist-packages")


def leave_working_directory() -> None:
  """Takes the working directory off sys.path, PYTHONPATH and PATH, if this process is a command of jaxfp8.

  An entry that is written out stays, as does the folder that jaxfp8 comes from.
  """
  main = sys.modules.get("__main__")
  module = getattr(getattr(main, "__spec__", None), "name", "")  # of `python -m`
  if sys.argv[:1] == ["-m"]:  # Python is still looking for the module, in the package that it imports first
    module = next((name for flag, name in zip(sys.orig_argv, sys.orig_argv[1:], strict=False) if flag == "-m"), "")
  is_module = module.partition(".")[0] in ("jaxfp8", "tools")
  if not is_module and os.path.basename(getattr(main, "__file__", None) or "") != "jaxfp8":
    return
  unwanted = {sys.path[0]} if is_module and not sys.flags.safe_path and sys.path else set()
  if os.environ.get("PYTHONPATH", "") != os.pathsep.join(_python_path()):  # it has an empty entry
    unwanted.add(_working_directory())
    os.environ["PYTHONPATH"] = os.pathsep.join(_python_path())
  unwanted -= {*_python_path(), _ROOT}
  sys.path[:] = [entry for entry in sys.path if entry not in unwanted]
  if "PATH" in os.environ:
    os.environ["PATH"] = _absolute_path(os.environ["PATH"])


def child_variables(variables: dict[str, str]) -> dict[str, str]:
  """The variables of a child process that finds this very jaxfp8 without the working directory."""
  folders = _python_path(variables.get("PYTHONPATH", ""))
  if os.path.basename(_ROOT) not in _INSTALLED and _ROOT not in folders:
    folders.insert(0, _ROOT)
  path = {"PATH": _absolute_path(variables["PATH"])} if "PATH" in variables else {}
  return {**variables, **path, "PYTHONPATH": os.pathsep.join(folders)}


def find_program(name: str) -> str | None:
  """The path of a program, or None."""
  import shutil

  return shutil.which(name, path=_absolute_path(os.environ.get("PATH", os.defpath)))


def _python_path(value: str | None = None) -> list[str]:
  """The entries of PYTHONPATH that are written out."""
  value = os.environ.get("PYTHONPATH", "") if value is None else value
  return [entry for entry in value.split(os.pathsep) if entry]


def _absolute_path(value: str) -> str:
  """A PATH without empty and relative entries."""
  return os.pathsep.join(entry for entry in value.split(os.pathsep) if os.path.isabs(entry)) or os.defpath


def _working_directory() -> str:
  try:
    return os.getcwd()
  except OSError:  # it is gone
    return ""
