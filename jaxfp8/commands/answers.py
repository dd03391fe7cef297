"""Answers on stdout: of several prompts in their order, and of a conversation in the terminal. Knows no flags."""

import sys
from collections.abc import Sequence

from jaxfp8.errors import InputError
from jaxfp8.terminal import one_line, say

_MAX_LINE = 64 << 20  # characters of a line on stdin, as of --prompt_file


def encode_raw(tokenizer, text: str, max_tokens: int | None = None) -> list[int]:
  """The ids of a prompt without a chat template; a note on stderr if they begin with two BOS tokens."""
  ids = tokenizer.encode(text, max_tokens=max_tokens)
  if tokenizer.has_two_bos(ids):
    bos = tokenizer.token_text(tokenizer.bos_id)
    say(f"generate: the prompt begins with two BOS tokens: this model's tokenizer writes one. Leave out {bos!r}.")
  return ids


def answer(engine, requests: Sequence, prompts: Sequence[str], *, show: bool) -> list:
  """Runs all requests together and returns their completions in order; prints their text if `show` is set."""
  completions, printer = [None] * len(requests), _OrderedPrinter(prompts)
  for delta in engine.stream(requests):
    if show:
      printer.push(delta)
    if delta.completion:
      completions[delta.request_id] = delta.completion
  return completions


class _OrderedPrinter:
  """Prints answers one after the other: the first as its text comes, every other one when those before it are complete."""

  def __init__(self, prompts: Sequence[str]):
    self.prompts, self.complete = prompts, [False] * len(prompts)
    self.held_texts: list[list[str]] = [[] for _ in prompts]
    self.turn = -1

  def push(self, delta) -> None:
    self.held_texts[delta.request_id].append(delta.text)
    self.complete[delta.request_id] = delta.completion is not None
    if self.turn < 0:
      self._next()
    while self.turn < len(self.prompts):
      print("".join(self.held_texts[self.turn]), end="", flush=True)
      self.held_texts[self.turn] = []
      if not self.complete[self.turn]:
        return
      print(flush=True)
      self._next()

  def _next(self) -> None:
    self.turn += 1
    if len(self.prompts) > 1 and self.turn < len(self.prompts):
      print(f"[{self.turn + 1}] {self.prompts[self.turn]}", flush=True)


def converse(engine, tokenizer, params, *, chat: bool, system: Sequence[dict[str, str]]) -> list:
  """Reads lines from stdin and answers each, until the end of the input; returns the completions.

  chat: the whole conversation is the prompt of each answer. system: the messages that every conversation starts with.
  """
  from jaxfp8.serving import followers
  from jaxfp8.serving.engine import Request

  history, completions, first = list(system), [], True
  while True:
    if sys.stdin.isatty():
      print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline(_MAX_LINE)
    if len(line) == _MAX_LINE and not line.endswith("\n"):
      _skip_line()
      say(f"generate: a prompt may have {_MAX_LINE >> 20} million characters, and this line has more. Write a shorter one.")
      continue
    if first:
      line, first = line.removeprefix("\ufeff"), False
    if not line:
      followers.share(None)
      return completions
    if not line.strip():
      continue
    if not _is_text(line):
      say(f"generate: a prompt must be UTF-8 text; got {line.strip()[:40]!a}. Convert it to UTF-8.")
      continue
    turn = [*history, {"role": "user", "content": line.strip()}]
    try:
      context = engine.config.max_context
      prompt = tokenizer.chat(turn, max_tokens=context) if chat else encode_raw(tokenizer, line, context)
      requests = followers.share([Request(tuple(prompt), params)])
      (completion,) = answer(engine, requests or [], [line], show=True)
    except InputError as error:
      say(one_line(error) + (" The conversation starts anew." if len(history) > len(system) else ""))
      history = list(system)
      continue
    completions.append(completion)
    if chat:
      history = [*turn, {"role": "assistant", "content": completion.text}]


def _skip_line() -> None:
  """Reads the rest of a line that is too long."""
  while (part := sys.stdin.readline(1 << 20)) and not part.endswith("\n"):
    pass


def _is_text(line: str) -> bool:
  """Whether the bytes that this line was read from are UTF-8."""
  return not any("\udc80" <= character <= "\udcff" for character in line)
