"""Running `python -m jaxfp8.generate` in tests, in this process or its own, and tiny checkpoints whose answers are known.

Commands run in a folder of their own, whose name has a space, and get relative paths: what a user types.
"""

import atexit
import contextlib
import dataclasses
import functools
import io
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags
from jax.experimental.compilation_cache import compilation_cache
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxfp8.commands import command, generate
from jaxfp8.config import LlamaConfig
from tests.helpers import tiny_models

ROOT = pathlib.Path(__file__).parents[2]
CHAIN = "aéω世🌍!"  # one to four bytes a character, and no byte twice
_END = 258


@dataclasses.dataclass
class Ran:
  code: int
  out: str
  err: str


@functools.cache
def elsewhere() -> pathlib.Path:
  """The working directory of commands: empty, far from the checkout, and gone with this process."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="jaxfp8 elsewhere "))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return folder


def relative(argument: object) -> str:
  """An argument of a command whose absolute path, if it is one, is written from `elsewhere()`."""
  flag, equals, value = str(argument).rpartition("=")
  path = pathlib.PurePath(value)
  temporary = pathlib.PurePath(tempfile.gettempdir())
  if not path.is_absolute() or not path.is_relative_to(temporary) or path == temporary:
    return str(argument)
  return f"{flag}{equals}{os.path.relpath(path, elsewhere())}"


def forget_flags(values: flags.FlagValues) -> None:
  """Every flag as if no command line had been parsed."""
  for name in values:
    values[name].unparse()
  values.unparse_flags()


def run_here(monkeypatch, capsys, *args: str, stdin: bytes = b"") -> Ran:
  """`generate` with these arguments, in this process."""
  forget_flags(generate.FLAGS)
  monkeypatch.chdir(elsewhere())
  monkeypatch.setattr(sys, "argv", ["generate", *map(relative, args)])
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
  capsys.readouterr()
  try:
    command.run(generate.COMMAND)
  except SystemExit as end:
    code = end.code
  out, err = capsys.readouterr()
  return Ran(code, out, err)


def start(
  *args: str, script: str | None = None, terminal: str | None = None, env: dict[str, str] | None = None, **popen
) -> subprocess.Popen:
  """The command (or a script) as a process of its own, with one CPU device unless it asks for more.

  terminal: the device that it runs at, as its controlling terminal.
  """
  variables = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  variables |= {"PYTHONPATH": str(ROOT)} | (env or {})
  arguments = map(str, args) if script else map(relative, args)
  command = [sys.executable, *(["-c", script] if script else ["-m", "jaxfp8.generate"]), *arguments]
  options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
  if terminal:  # the first one that the leader of a session opens becomes the controlling one
    command = ["sh", "-c", 'exec "$@" <>"$0" >&0 2>&0', terminal, *command]
    options |= {"stdout": None, "stderr": None, "start_new_session": True}
  with _default_interrupt():
    return subprocess.Popen(command, cwd=elsewhere(), env=variables, **(options | popen))


@contextlib.contextmanager
def _default_interrupt() -> Iterator[None]:
  """Processes that start here get SIGINT's default action, also where the shell has this one ignore it (nohup, `&`)."""
  before = signal.getsignal(signal.SIGINT)
  if before is not signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
    yield
    return
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)


def end(process: subprocess.Popen) -> Ran:
  try:
    out, err = process.communicate(timeout=120)
  finally:
    process.kill()
  return Ran(process.returncode, out, err)


def run(*args: str, **options) -> Ran:
  return end(start(*args, **options))


def wait_until(condition, seconds: float = 60.0):
  """What `condition()` gives once it is true."""
  until = time.monotonic() + seconds
  while not (value := condition()):
    assert time.monotonic() < until, "waited in vain"
    time.sleep(0.02)
  return value


@contextlib.contextmanager
def compiled_programs_restored() -> Iterator[None]:
  """The command turns JAX's compilation cache on for its whole process, which here runs other tests too."""
  names = [
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
  ]
  before = {name: getattr(jax.config, name) for name in names}
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def write_chain(folder: pathlib.Path, text: str = CHAIN, *, endless: bool = False, max_context: int = 256) -> pathlib.Path:
  """A model that answers each byte of `text` with the next one and the last with the end, or with the first if `endless`.

  Attention and MLP add nothing, the embedding is one-hot, and the head is the table of successors. Any other token
  (so a prompt that is not in the text) is answered with the text from its start.
  """
  config = LlamaConfig(
    name="chain", vocab_size=259, d_model=260, d_ff=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    max_context=max_context, bos_id=257, eos_ids=(_END,),
  )  # fmt: skip
  symbols = byte_symbols()
  ids = list(text.encode())
  successor = np.full(config.vocab_size, ids[0])
  successor[ids] = [*ids[1:], ids[0] if endless else _END]
  weights = tiny_models.make_weights(config)
  for name, weight in weights.items():
    if name.endswith(("o_proj.weight", "down_proj.weight")):
      weight[:] = 0
    if "norm" in name:
      weight[:] = 1
  weights["model.embed_tokens.weight"] = np.eye(config.vocab_size, config.d_model, dtype=np.float32)
  head = np.zeros((config.vocab_size, config.d_model), np.float32)
  head[successor, np.arange(config.vocab_size)] = 1
  weights["lm_head.weight"] = head
  tiny_models.write_hf_folder(folder, config, weights)
  vocab = {symbols[byte]: byte for byte in range(256)} | {"<unk>": 256, "<s>": 257, "</s>": _END}
  tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
  tokenizer.save(str(folder / "tokenizer.json"))
  return folder


def byte_symbols() -> list[str]:
  """The character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = iter(range(256, 512))
  return [chr(byte if byte in printable else next(others)) for byte in range(256)]
