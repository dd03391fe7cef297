"""The common part of all figures. Paths are checked before a computation starts; matplotlib is imported for drawing only."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from jaxfp8.errors import InputError

SUFFIXES = (".png", ".svg", ".pdf")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
MARKERS = "osD^vP*X"


def check_plot_path(path: str) -> None:
  """Raises InputError for a suffix that is no format of figures, and for a folder that does not exist."""
  if pathlib.Path(path).suffix.lower() not in SUFFIXES:
    raise InputError(f"plot: a plot must end in {', '.join(SUFFIXES)}; got {path!r}. Pass for example --plot=plot.png.")
  if not pathlib.Path(path).absolute().parent.is_dir():
    raise InputError(f"plot: the folder of --plot={path} does not exist. Make it, or pass another path.")


def new_figure(width: float, height: float):
  """An empty matplotlib Figure; width and height in inches. Raises InputError without matplotlib."""
  try:
    with _in_the_root():
      from matplotlib.backends.backend_agg import FigureCanvasAgg
      from matplotlib.figure import Figure
  except ImportError as error:
    raise InputError("plot: --plot needs matplotlib, which is not installed. Run: pip install 'jaxfp8[plot]'.") from error
  figure = Figure(figsize=(width, height), layout="constrained")
  FigureCanvasAgg(figure)
  return figure


@contextlib.contextmanager
def _in_the_root() -> Iterator[None]:
  """With / as the working directory: matplotlib reads a file matplotlibrc where it is imported, and some versions run it."""
  here = os.open(".", os.O_RDONLY)
  try:
    os.chdir("/")
    yield
  finally:
    os.fchdir(here)
    os.close(here)


def save_figure(figure, path: str) -> None:
  """Writes a figure as png, svg or pdf, by the suffix of `path`. Raises InputError if the file cannot be written."""
  try:
    figure.savefig(path, dpi=130)
  except OSError as error:
    raise InputError(f"plot: cannot write {path}: {error.strerror}. Pass another path.") from error
