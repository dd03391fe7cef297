"""A model's chat template: messages in, text out. A misbehaving template raises InputError and harms nothing else.

The template runs in a child process (chat_template_child.py), which starts with the first chat and lives as long as the
`ChatTemplate`. The start takes 0.1 to 0.3 s, a chat then less than a millisecond. Refuses to know tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from jaxfp8.child_process import Child
from jaxfp8.errors import InputError
from jaxfp8.text.confined import Confined, Ended

_WAY_OUT = "Pass --raw, or a checkpoint with a working template."


def not_plain(error: Exception) -> InputError:
  """The error about messages that are no plain JSON."""
  reason = "they are nested too deeply" if isinstance(error, RecursionError) else error
  return InputError(f"chat: messages must hold text and plain values: {reason}. Pass role and content as strings.")


class ChatTemplate:
  """Renders one Jinja template. Thread safe. seconds: the time limit of one render."""

  def __init__(self, template: str, special_tokens: Mapping[str, str], seconds: float = 2.0):
    self._template = template
    self._special_tokens = dict(special_tokens)
    self._seconds = seconds
    self._child = Confined(Child.CHAT_TEMPLATE, "chat", str(seconds))

  def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
    """The prompt's text. Raises InputError as `render_all` does."""
    return cast(str, self.render_all([messages], add_generation_prompt)[0])

  def render_all(self, variants: Sequence[Sequence[Mapping[str, Any]]], add_generation_prompt: bool = True) -> list[Any]:
    """The text of each list of messages, at one time and with one seed; None for a list, but the first, that fails.

    Raises InputError if the template raises, is not Jinja or exceeds its time or memory, or if messages are not plain JSON.
    """
    variables = {
      **self._special_tokens,
      "tools": None,
      "documents": None,
      "add_generation_prompt": add_generation_prompt,
    }
    try:
      lists = [[dict(message) for message in messages] for messages in variants]
      answer = self._child.ask({"template": self._template, "variables": variables, "messages": lists})
    except (TypeError, ValueError, RecursionError) as error:
      if isinstance(error, InputError):
        raise
      raise not_plain(error) from error
    except Ended:
      limits = f"{self._seconds:g} s and 1 GB"
      raise InputError(f"chat: the model's chat template did not end within {limits}. {_WAY_OUT}") from None
    if "error" in answer:
      raise InputError(f"chat: the model's chat template failed: {answer['error']}. {_WAY_OUT}")
    return answer["texts"]
