"""Files and folders that no other user can have written: those of the cache, which holds programs.

    open_cache(cache_dir)    makes the folder, mode 0700, and takes from other users what an earlier version let them do there
    read_bytes(path)         a regular file of this user, in folders that nobody else can change
    write_bytes(path, data)  mode 0600; open_lock(path) likewise
    require_tree(folder)     the same rule for a folder with all that is in it; close_tree(folder) gives it these modes

The rule for a file: it belongs to this user, and nobody else can write to it. The rule for each folder from / down to the
file, and for each link on the way: it belongs to this user or to the system (root, or the owner of /), and nobody else can
write to it. A sticky folder, such as /tmp, may be written by all: there nobody can rename what is another user's. A group may
write that has this user alone (Ubuntu's umask 002 with a group per user). A file is opened without following a link, and the
opened file is judged, so that no other file can take its place meanwhile. What breaks the rule is a `NotPrivate`.
"""

import contextlib
import errno
import functools
import grp
import os
import pathlib
import pwd
import stat
from typing import BinaryIO

from jaxfp8.unfinished import write_atomically

FOLDER_MODE, FILE_MODE = 0o700, 0o600
_FOLDERS = ("checkpoints", "locks", "programs", "tuned")  # of a cache
_BEGINNINGS = (*_FOLDERS, "sources.json", "cpu-")  # of the names in a cache


class NotPrivate(OSError):
  """A file or folder that another user can have written or can change; the text says which, and the reason."""


def default_cache() -> str:
  """The cache folder of a user who names none: in XDG_CACHE_HOME, whose specification ignores a relative path, or ~/.cache."""
  caches = os.environ.get("XDG_CACHE_HOME", "")
  return os.path.join(caches if os.path.isabs(caches) else os.path.expanduser("~/.cache"), "jaxfp8")


def open_cache(cache_dir: str | os.PathLike) -> pathlib.Path:
  """The absolute path of the cache folder, which exists afterwards. Raises NotPrivate, or OSError if it cannot be made.

  A folder that an earlier version made with a wider mode gets 0700: this user's folder that holds nothing but a cache.
  """
  cache = pathlib.Path(os.path.abspath(pathlib.Path(cache_dir).expanduser()))
  _make(cache)
  if not cache.is_symlink() and _is_only_cache(cache):
    require_folder(cache.parent)  # or another user's link might lead to any folder
    for folder in (cache, *(cache / name for name in _FOLDERS), *cache.glob("tuned/*")):
      _close(folder)
  require_folder(cache)
  return cache


def read_bytes(path: pathlib.Path) -> bytes:
  """Raises NotPrivate, or OSError for a file that cannot be read."""
  require_folder(path.parent)
  with os.fdopen(_open(path, os.O_RDONLY), "rb") as file:
    return file.read()


def write_bytes(path: pathlib.Path, data: bytes) -> None:
  """Replaces `path` by a file with this content and the mode 0600. Raises NotPrivate, or OSError."""
  make_folder(path.parent)
  write_atomically(path, data)


def open_lock(path: pathlib.Path) -> BinaryIO:
  """The file of a lock, which is made if it is missing, and whose content stays. Raises NotPrivate, or OSError.

  An earlier version's file may be open to others: it gets the mode 0600, since nobody reads it.
  """
  make_folder(path.parent)
  return os.fdopen(_open(path, os.O_RDWR | os.O_CREAT, close=True), "r+b")


def open_own(path: pathlib.Path) -> BinaryIO:
  """Opens a regular file of this user, in any folder, to read and write it. Raises NotPrivate, or OSError."""
  return os.fdopen(_open(path, os.O_RDWR), "r+b")


def make_folder(folder: pathlib.Path) -> None:
  """Makes a folder and its missing parents, mode 0700, if it is missing. Raises NotPrivate, or OSError."""
  _make(folder)
  require_folder(folder)


def require_folder(folder: pathlib.Path) -> None:
  """Raises NotPrivate if another user can change what the path leads to; OSError if it leads to nothing."""
  os.path.realpath(folder, strict=True)  # which ends at links in a circle
  at, parts = pathlib.Path("/"), list(reversed(folder.absolute().parts))
  while parts:
    if (part := parts.pop()) == "..":
      at = at.parent
      continue
    info = os.lstat(at / part)
    if info.st_uid not in (0, os.geteuid(), os.stat("/").st_uid):
      raise NotPrivate(f"{at / part} belongs to another user (uid {info.st_uid})")
    if stat.S_ISLNK(info.st_mode):
      parts += reversed(pathlib.PurePath(os.readlink(at / part)).parts)
    elif _others_write(info) and not info.st_mode & stat.S_ISVTX:
      raise NotPrivate(f"other users can write to {at / part} (mode {stat.S_IMODE(info.st_mode):o}; chmod go-w closes it)")
    else:
      at = at / part  # a part "/" is the root again


def require_tree(folder: pathlib.Path) -> None:
  """Raises NotPrivate unless all in the folder are regular files and folders of this user, which nobody else can write to."""
  require_folder(folder)
  _require_own(folder, os.lstat(folder))
  for root, folders, files in os.walk(folder):
    for name in (*folders, *files):
      path = pathlib.Path(root, name)
      _require_own(path, info := os.lstat(path))
      if not (stat.S_ISDIR(info.st_mode) or stat.S_ISREG(info.st_mode)):
        raise NotPrivate(f"{path} is neither a file nor a folder")


def close_tree(folder: pathlib.Path) -> None:
  """Gives the folder and all in it, which this process has just written, the modes 0700 and 0600. Raises OSError."""
  for root, _, files in os.walk(folder):
    os.chmod(root, FOLDER_MODE)
    for name in files:
      os.chmod(os.path.join(root, name), FILE_MODE)


def _make(folder: pathlib.Path) -> None:
  for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
    with contextlib.suppress(FileExistsError):  # another process was first
      missing.mkdir(FOLDER_MODE)
      missing.chmod(FOLDER_MODE)  # whatever the umask
  if not folder.is_dir():
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))


def _is_only_cache(cache: pathlib.Path) -> bool:
  """Whether a cache is all that the folder is for. /tmp, a home, or an empty folder that is closed already is left as it is."""
  names, mode = [path.name for path in cache.iterdir()], cache.stat().st_mode
  is_open = bool(mode & (stat.S_IWGRP | stat.S_IWOTH)) and not mode & stat.S_ISVTX
  return all(name.startswith(_BEGINNINGS) for name in names) and (bool(names) or is_open)


def _close(folder: pathlib.Path) -> None:
  """Gives a folder of this user the mode 0700; leaves everything else, which a check refuses later, as it is."""
  with contextlib.suppress(OSError):
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
      if os.fstat(descriptor).st_uid == os.geteuid():
        os.fchmod(descriptor, FOLDER_MODE)
    finally:
      os.close(descriptor)


def _open(path: pathlib.Path, flags: int, *, close: bool = False) -> int:
  """The descriptor of a regular file of this user; does not wait for the writer of a pipe. close: give it the mode 0600."""
  try:
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, FILE_MODE)
  except OSError as error:
    if error.errno == errno.ELOOP:
      raise NotPrivate(f"{path} is a link") from error
    raise
  try:
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
      raise NotPrivate(f"{path} is no regular file")
    if close and info.st_uid == os.geteuid():
      os.fchmod(descriptor, FILE_MODE)
      info = os.fstat(descriptor)
    _require_own(path, info)
  except BaseException:
    os.close(descriptor)
    raise
  return descriptor


def _require_own(path: pathlib.Path, info: os.stat_result) -> None:
  if info.st_uid != os.geteuid():
    raise NotPrivate(f"{path} belongs to another user (uid {info.st_uid})")
  if _others_write(info):
    raise NotPrivate(f"other users can write to {path} (mode {stat.S_IMODE(info.st_mode):o})")


def _others_write(info: os.stat_result) -> bool:
  if info.st_mode & stat.S_IWOTH:
    return True
  return bool(info.st_mode & stat.S_IWGRP) and not _is_own_group(info.st_gid, os.geteuid())


@functools.cache
def _is_own_group(gid: int, uid: int) -> bool:
  """Whether a group has this user alone: the group of the user's name, which no other user is known to have."""
  try:
    user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
  except KeyError:
    return False
  is_named_alike = (user.pw_gid, user.pw_name) == (gid, group.gr_name) and set(group.gr_mem) <= {user.pw_name}
  return is_named_alike and not any(other.pw_gid == gid and other.pw_uid != uid for other in pwd.getpwall())
