"""Files under temporary names, and how an interrupted process removes them.

    with unfinished(remove):        # registered before the first file is created
      ...                           # `remove()` runs if the block raises, KeyboardInterrupt included
    write_atomically(path, data)    # a small file of the cache: whole, or as it was before
    with unfinished_folder(path) as temporary:    # a folder, which has its name at the end of the block

A command that Ctrl-C or SIGTERM ends calls `abandon_unfinished` from its first thread while another thread still writes, and
then leaves by `os._exit`. Refuses to know checkpoints.
"""

import atexit
import contextlib
import fcntl
import glob
import os
import pathlib
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator

_registering = threading.Lock()  # `abandon_unfinished` keeps it for ever: no write can begin afterwards
_unfinished: dict[object, Callable[[], None]] = {}


def register(owner: object, abandon: Callable[[], None]) -> None:
  """From now on `abandon()` is called if the process ends before `discard(owner)`. Call before creating the first file."""
  with _registering:
    _unfinished[owner] = abandon


def discard(owner: object) -> None:
  """The counterpart of `register`. Does nothing for an owner that is not registered."""
  _unfinished.pop(owner, None)


@contextlib.contextmanager
def unfinished(remove: Callable[[], None]) -> Iterator[None]:
  """Calls `remove()` if the block raises or the process is interrupted; `remove` must not mind files that do not exist."""
  owner = object()
  try:
    register(owner, remove)
    yield
  except BaseException:
    remove()
    raise
  finally:
    discard(owner)


@contextlib.contextmanager
def unfinished_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new folder beside `target`, which the end of the block renames to `target`; it is removed if the block raises.

  First removes what killed processes left beside `target`: a process that still writes holds a lock on its folder. Raises
  OSError.
  """
  target.parent.mkdir(parents=True, exist_ok=True)
  for folder in target.parent.glob(f"{glob.escape(target.name)}.writing-????????"):
    with _locked(folder) as is_ours:
      if is_ours:
        shutil.rmtree(folder, ignore_errors=True)
  temporary = target.with_name(f"{target.name}.writing-{secrets.token_hex(4)}")
  with unfinished(lambda: shutil.rmtree(temporary, ignore_errors=True)):
    temporary.mkdir()
    with _locked(temporary):
      yield temporary
      os.rename(temporary, target)


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[bool]:
  """Whether this process has the folder's lock during the block. The system releases it when a process ends."""
  try:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
  except OSError:  # it is gone, or no folder
    yield False
    return
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    yield False
  else:
    yield True
  finally:
    os.close(descriptor)


def abandon_unfinished() -> None:
  """Removes every unfinished file of this process, which must end now: no write can begin afterwards."""
  _registering.acquire(timeout=10)  # never released
  _abandon_all()


def _abandon_all() -> None:
  for abandon in list(_unfinished.values()):
    abandon()


atexit.register(_abandon_all)  # an `__exit__` that Ctrl-C interrupted in its first instruction has removed nothing


def write_atomically(path: pathlib.Path, data: bytes) -> None:
  """Replaces `path` by a file with this content, which this user alone can read and write, whatever the umask.

  Raises OSError; the file is then as it was, and no other is left.
  """
  temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
  with unfinished(lambda: temporary.unlink(missing_ok=True)):
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
      os.fchmod(file.fileno(), 0o600)
      file.write(data)
    os.replace(temporary, path)
