"""Folders of files that are being written: removed, copied by links, and named in a glob. Imports no jax."""

import os
import pathlib
import re
import shutil
import time

from jaxfp8.checkpoint.journal import SUFFIX


def remove(parent: pathlib.Path, name: str) -> None:
  """Removes every file whose name begins with `name`. Repeats, since an interrupted Orbax may create its folders again."""
  for _ in range(20):
    left = [path for path in parent.iterdir() if path.name.startswith(name)] if parent.is_dir() else []
    if not left:
      return
    for path in sorted(left, key=lambda path: path.name.endswith(SUFFIX)):  # the journal last: a kill leaves no nameless rest
      if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
      else:
        path.unlink(missing_ok=True)
    time.sleep(0.05)


def link_tree(folder: pathlib.Path, copy: pathlib.Path) -> bool:
  """Copies a folder of Orbax: data by hard links, since nobody changes them. False, and no copy, on a disk without links."""
  try:
    for root, _, names in os.walk(folder):
      target = copy / pathlib.Path(root).relative_to(folder)
      target.mkdir(parents=True)
      for name in names:
        (os.link if target.name == "d" else shutil.copy2)(pathlib.Path(root) / name, target / name)
  except OSError:
    shutil.rmtree(copy, ignore_errors=True)
    return False
  return True


def glob_escape(name: str) -> str:
  return re.sub(r"([*?[])", r"[\1]", name)
