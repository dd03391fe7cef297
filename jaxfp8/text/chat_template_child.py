"""Renders chat templates in a child process, which `ChatTemplate` (chat_template.py) starts. No module imports this file.

A template is a program that came with downloaded weights. The sandbox denies the template access to Python's internals. The
process confines its loops and its memory: SIGALRM ends a render that takes longer than the first argument, in seconds.

Protocol: one JSON object per line. The child begins with {"ready": true}. It answers {"template", "variables", "messages"} with
{"texts"}, one for each list of messages (null for a later list that fails), or with {"error"} if the first list fails.
Environment and functions are those of transformers' `apply_chat_template` (utils/chat_template_utils.py).
"""

import contextlib
import datetime
import json
import random
import resource
import signal
import sys
from typing import ClassVar

import jinja2
import jinja2.ext
import jinja2.sandbox

_MEMORY_BYTES = 1 << 30
_MAX_TEXT = 32 << 20  # characters; a prompt of that length fits no model


class _Generation(jinja2.ext.Extension):
  """`{% generation %}` marks the assistant's words for training. Here the tag renders its body and does nothing else."""

  tags: ClassVar[set[str]] = {"generation"}

  def parse(self, parser):
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message):
  raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> jinja2.Environment:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = _tojson
  environment.globals["raise_exception"] = _raise_exception
  return environment


def _render(environment: jinja2.Environment, request: dict) -> dict:
  """All lists of messages see the same time and the same random numbers, so that their texts can be compared."""
  now, state, texts = datetime.datetime.now(), random.getstate(), []
  environment.globals["strftime_now"] = now.strftime
  for messages in request["messages"]:
    random.setstate(state)
    text, error = _render_one(environment, request["template"], {**request["variables"], "messages": messages})
    if error and not texts:
      return {"error": error}
    texts.append(None if error else text)
  return {"texts": texts}


def _render_one(environment: jinja2.Environment, template: str, variables: dict) -> tuple[str, str]:
  """(text, error); one of them is empty."""
  try:
    text = environment.from_string(template).render(**variables)
  except Exception as error:  # any exception here is an error of the template
    return "", f"{type(error).__name__}: {error}"[:500]
  return (text, "") if len(text) <= _MAX_TEXT else ("", f"it wrote {len(text)} characters")


def _main() -> None:
  seconds = float(sys.argv[1])
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C; this process ends when its stdin closes
  with contextlib.suppress(ValueError, OSError):  # some systems lack this limit; the time limit remains
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
  environment = _environment()
  print(json.dumps({"ready": True}), flush=True)
  for line in sys.stdin:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    answer = json.dumps(_render(environment, json.loads(line)))
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(answer, flush=True)


if __name__ == "__main__":
  _main()
