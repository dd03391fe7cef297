"""`jaxfp8 COMMAND`: the names of the commands, each with its module. A command's module is imported only when it is called."""

import difflib
import importlib
import sys
from typing import NoReturn

from jaxfp8.commands import command, streams
from jaxfp8.errors import InputError
from jaxfp8.terminal import show

# Name: (module in jaxfp8.commands, one line for `jaxfp8 --help`).
COMMANDS = {
  "generate": ("generate", "Answer prompts."),
  "chat": ("chat", "Talk with a model in the terminal."),
  "plan": ("plan", "Will a model fit on a GPU, and how fast can it be?"),
  "convert": ("convert", "Quantize a checkpoint once and write it for jaxfp8."),
  "inspect": ("inspect", "Show the content of a checkpoint of jaxfp8."),
  "export": ("export", "Write a checkpoint for vLLM and transformers."),
  "calibrate": ("calibrate", "Find static scales from text and write them."),
  "evaluate": ("evaluate", "Measure the loss of quality by quantization."),
  "benchmark": ("benchmark", "Measure the speed of this machine."),
  "compile": ("compile", "Compile kernels or a model for an absent GPU."),
  "validate-gpu": ("validate_gpu", "Check and tune the kernels on the GPU that is here."),
  "env": ("env", "Show versions and hardware for a bug report."),
}
_HINT = "Run `jaxfp8 --help` for the list of commands."


def main() -> None:
  """Runs the command that the first argument names, and exits with its code."""
  streams.start_again_in_utf8()
  name, *arguments = sys.argv[1:] or ["--help"]
  if name in ("--help", "-h", "-help", "help"):
    command.end_with(lambda: show(help_text()), "jaxfp8")
  if name in ("--version", "-version"):
    command.end_with(command.print_version, "jaxfp8")
  name = name.replace("_", "-")
  if name not in COMMANDS:
    command.end_with(lambda: _refuse(name), "jaxfp8")
  module = importlib.import_module(f"jaxfp8.commands.{COMMANDS[name][0]}")
  command.run(module.COMMAND, arguments)


def help_text() -> str:
  width = max(map(len, COMMANDS)) + 2
  lines = [f"  {name:<{width}}{summary}" for name, (_, summary) in COMMANDS.items()]
  return "\n".join(
    [
      "Usage: jaxfp8 COMMAND [arguments] [flags]",
      "",
      "Llama in float8, in pure JAX.",
      "",
      *lines,
      "",
      "Run `jaxfp8 COMMAND --help` for the flags of a command.",
    ]
  )


def _refuse(name: str) -> NoReturn:
  near = difflib.get_close_matches(name, COMMANDS, n=3, cutoff=0.5) or [
    command_name for command_name in COMMANDS if command_name.startswith(name[:2])
  ]
  suggestion = f" Did you mean {' or '.join(near)}?" if near else ""
  raise InputError(f"jaxfp8: there is no command {name!r}.{suggestion} {_HINT}")
