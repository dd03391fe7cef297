"""The text of `jaxfp8 COMMAND --help`: usage, the module's docstring and the flags by topic, in at most 80 columns."""

import os
import re
import textwrap

from absl import flags

from jaxfp8.commands.command import Command

WIDTH = 79
_FLAG_COLUMNS = 26  # the help of a flag starts here
_VALUE_NAMES = {"int": "N", "float": "X", "string": "TEXT"}
_EVERY_COMMAND = (("--help", "Show this text."), ("--version", "Show the version of jaxfp8."))
_FOOTER = "In the names of flags, - and _ are alike: --max-new-tokens is --max_new_tokens."


def format_help(command: Command) -> str:
  """The whole text, without a newline at its end."""
  blocks = [_usage(command), reflow(command.description)]
  visible = [name for name in command.flags if not (command.flags[name].help or "").startswith("Internal:")]
  grouped = {name for topic in command.topics for name in topic.names}
  sections = [(topic.title, [name for name in topic.names if name in visible]) for topic in command.topics]
  sections.append(("Other flags" if command.topics else "Flags", [name for name in visible if name not in grouped]))
  for title, names in sections:
    lines = [entry for name in names for entry in _flag_lines(command.flags[name])]
    if title in ("Other flags", "Flags"):
      lines += [entry for name, text in _EVERY_COMMAND for entry in _two_columns(name, text)]
    blocks.append("\n".join([f"{title}:", *lines]))
  return "\n\n".join([*blocks, _FOOTER])


def reflow(text: str) -> str:
  """Fills paragraphs to WIDTH columns; indented lines (examples) stay as they are."""
  paragraphs: list[str] = []
  for block in text.split("\n\n"):
    indented = block.startswith("  ")
    paragraphs.append(block.rstrip() if indented else textwrap.fill(" ".join(block.split()), WIDTH, break_on_hyphens=False))
  return "\n\n".join(paragraphs)


def _usage(command: Command) -> str:
  words = [name.upper() if name in command.required else f"[{name.upper()}]" for name in command.positionals]
  return " ".join(["Usage: jaxfp8", command.name, *words, "[flags]"])


def _flag_lines(flag: flags.Flag) -> list[str]:
  text = re.sub(r"^<[^>]*>: |;\s+repeat this option to specify a list of values$", "", flag.help or "")  # absl's additions
  return _two_columns(f"--{flag.name}{_value_name(flag)}", text + _default(flag))


def _value_name(flag: flags.Flag) -> str:
  if flag.boolean:
    return ""
  if isinstance(flag, flags.EnumFlag):
    return " " + "|".join(flag.parser.enum_values or [])  # pyright: ignore[reportAttributeAccessIssue]
  if isinstance(flag, flags.MultiFlag):
    return " TEXT"
  if flag.flag_type() == "comma separated list of strings":
    return " A,B"
  return " " + _VALUE_NAMES.get(flag.flag_type(), "TEXT")


def _default(flag: flags.Flag) -> str:
  """The default in parentheses, unless the flag is off or empty without the user's word."""
  value = flag.default
  if value is None or value == "" or value is False or value == []:
    return ""
  if value is True:
    return f" (On; --no{flag.name} turns this off.)"
  text = ",".join(map(str, value)) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)
  home = os.path.expanduser("~")
  return f" ({'~' + text.removeprefix(home) if text.startswith(home + os.sep) else text})"


def _two_columns(left: str, right: str) -> list[str]:
  """The name and its help side by side, or one below the other when the name is long."""
  margin = " " * _FLAG_COLUMNS
  lines = textwrap.wrap(right, WIDTH - _FLAG_COLUMNS, break_on_hyphens=False) or [""]
  first = f"  {left}"
  if len(first) + 2 <= _FLAG_COLUMNS:
    return [f"{first:<{_FLAG_COLUMNS}}{lines[0]}", *(margin + line for line in lines[1:])]
  names = textwrap.wrap(left.replace("|", " | "), WIDTH - 2, initial_indent="  ", subsequent_indent="    ")
  return [*(line.replace(" | ", "|") for line in names), *(margin + line for line in lines)]
