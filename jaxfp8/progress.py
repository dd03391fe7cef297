"""Progress on stderr: a bar on a terminal; elsewhere one line for each stage that took more than half a second."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.progress import (
  BarColumn,
  DownloadColumn,
  SpinnerColumn,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
  TransferSpeedColumn,
)
from rich.progress import Progress as Bar

from jaxfp8.console import console
from jaxfp8.terminal import make_visible, say, visible


class Progress:
  """A context manager around slow work. Nothing else may print to stderr meanwhile."""

  def __init__(self, silent: bool = False, rate: bool = False):
    """silent: show nothing. rate: also show GB/s and the time left, for stages that count bytes."""
    self._silent = silent
    self._console = console(stderr=True)
    columns = (
      SpinnerColumn(),
      TextColumn("{task.description}", markup=False),
      BarColumn(),
      DownloadColumn(),
      TimeElapsedColumn(),
    )
    if rate:
      columns = (*columns, TransferSpeedColumn(), TimeRemainingColumn())
    self._bar = Bar(*columns, console=self._console, transient=True) if self._console.is_terminal and not silent else None

  def __enter__(self) -> "Progress":
    if self._bar:
      self._bar.start()
      sys.stderr = make_visible(sys.stderr)  # rich would obey what is printed above the bar; `stop` puts the old one back
    return self

  def __exit__(self, *error) -> None:
    if self._bar:
      self._bar.stop()

  @contextlib.contextmanager
  def task(self, title: str) -> Iterator[Callable[[int, int], None]]:
    """One stage. Yields a function (bytes done, bytes in total) that moves the bar."""
    start = time.perf_counter()
    task = self._bar.add_task(visible(title), total=None) if self._bar else None

    def report(done: int, total: int) -> None:
      if self._bar and task is not None:
        self._bar.update(task, completed=done, total=total)

    try:
      yield report
    finally:
      if self._bar and task is not None:
        self._bar.remove_task(task)
    if not self._bar and not self._silent and (seconds := time.perf_counter() - start) > 0.5:
      say(f"{title} took {seconds:.1f} s.")
