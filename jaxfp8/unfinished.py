"""Files under temporary names, and how an interrupted process removes them.

    with unfinished(remove):        # registered before the first file is created
      ...                           # `remove()` runs if the block raises, KeyboardInterrupt included
    write_atomically(path, data)    # a small file: whole, or as it was before

A command that Ctrl-C or SIGTERM ends calls `abandon_unfinished` from its first thread while another thread still writes, and
then leaves by `os._exit`. Refuses to know checkpoints.
"""

import atexit
import contextlib
import os
import pathlib
import secrets
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


def abandon_unfinished() -> None:
  """Removes every unfinished file of this process, which must end now: no write can begin afterwards."""
  _registering.acquire(timeout=10)  # never released
  _abandon_all()


def _abandon_all() -> None:
  for abandon in list(_unfinished.values()):
    abandon()


atexit.register(_abandon_all)  # an `__exit__` that Ctrl-C interrupted in its first instruction has removed nothing


def write_atomically(path: pathlib.Path, data: bytes) -> None:
  """Replaces `path` by a file with this content. Raises OSError; the file is then as it was, and no other is left."""
  temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
  with unfinished(lambda: temporary.unlink(missing_ok=True)):
    temporary.write_bytes(data)
    os.replace(temporary, path)
