"""The one rich console: tables and bars with colors of the project's own, and content in which nothing acts.

A string is content: rich reads no markup, emoji names or escape sequences in it. Styles are arguments (`style="bold"`).
"""

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from jaxfp8.terminal import visible, without_filter


class _Console(Console):
  """Makes strings visible before they are laid out, and whatever else is content before it is written."""

  def render_str(self, text: str, *args: Any, **options: Any) -> Text:
    return super().render_str(visible(text), *args, **options)

  def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
    for segment in super().render(renderable, options):
      yield segment if segment.control else Segment(visible(segment.text), segment.style)


def console(*, stderr: bool = False, width: int | None = None) -> Console:
  """A console on stdout or stderr. width: the columns where that is no terminal."""
  stream = without_filter(sys.stderr if stderr else sys.stdout)
  return _Console(file=stream, markup=False, emoji=False, width=None if stream.isatty() else width)
