"""The memory of the machine that this process may use: the machine's own, or less where a container's control group says so.

Both versions of control groups are read, and every group above this process's own. Where a file is absent, as on macOS, that
limit does not exist. Loads no jax.
"""

import contextlib
import os
import pathlib
import re
import resource
import sys
from collections.abc import Iterator

_PROC = pathlib.Path("/proc")
_CGROUPS = pathlib.Path("/sys/fs/cgroup")
# (file of the limit, file of the use, line of memory.stat with what the system can take back)
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def memory_bytes() -> tuple[int, int]:
  """(total, available now), in bytes. Without /proc/meminfo everything counts as available."""
  total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  match = re.search(r"^MemAvailable:\s*(\d+) kB", _read(_PROC / "meminfo"), re.MULTILINE)
  available = min(total, int(match[1]) * 1024) if match else total
  for limit, used in _limits():
    total, available = min(total, limit), min(available, max(0, limit - used))
  return total, available


def _limits() -> Iterator[tuple[int, int]]:
  """(limit, use that the system cannot take back) in bytes of each control group that this process is in."""
  for line in _read(_PROC / "self" / "cgroup").splitlines() or ["0::/"]:
    _, controllers, path = [*line.split(":", 2), "", ""][:3]
    if not controllers:
      yield from _limits_below(_CGROUPS, path, _V2)
    elif "memory" in controllers.split(","):
      yield from _limits_below(_CGROUPS / "memory", path, _V1)


def _limits_below(root: pathlib.Path, path: str, names: tuple[str, str, str]) -> Iterator[tuple[int, int]]:
  """Of the group and all groups above it. A container often sees its own group as the root, and its path is not there."""
  group = root / path.lstrip("/")
  for folder in (group, *group.parents):
    limit_file, use_file, cache_line = names
    limit = _read(folder / limit_file).strip()
    if limit.isdecimal():  # "max" is no limit; neither is the huge number of version 1, which min() ignores
      match = re.search(rf"^{cache_line} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
      used = _read(folder / use_file).strip()
      yield int(limit), max(0, (int(used) if used.isdecimal() else 0) - (int(match[1]) if match else 0))
    if folder == root:
      return


def peak_bytes() -> int:
  """The peak resident memory of this process, in bytes.

  Without /proc, getrusage gives the peak, which includes the memory of the parent when it started this process.
  """
  match = re.search(r"^VmHWM:\s*(\d+) kB", _read(_PROC / "self" / "status"), re.MULTILINE)
  if match:
    return int(match[1]) * 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def usable_cores() -> int:
  """The cores that this process may run on."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(path: pathlib.Path) -> str:
  with contextlib.suppress(OSError):
    return path.read_text(encoding="utf-8", errors="replace")
  return ""
