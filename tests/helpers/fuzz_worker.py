"""Opens mutated checkpoints in a process with little memory and a clock: `python tests/fuzz_worker.py KIND START STOP FOLDER`.

Before each case its seed is printed, so that who started this sees which one killed it; then a line "bad SEED: why" where a
case ended in anything but success or one InputError, opened a file outside its folder, or took much memory.
"""

import contextlib
import copy
import json
import pathlib
import resource
import shutil
import signal
import struct
import sys
import traceback
from collections.abc import Callable

import gguf
import numpy as np

SECONDS = 20  # a case takes milliseconds; on a busy machine the clock must not be what fails
ADDRESS_SPACE = 512 << 20  # beyond what the libraries take: a length that is believed shows as a MemoryError or an abort
GROWTH = 48 << 20  # of resident memory in one case; the files are under 1 MB
MAX_MESSAGE = 2000
INDEX = "model.safetensors.index.json"
HUGE = (2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
ODD_VALUES = (
  None, True, -1, 0, 1, 3, 2**31, 2**63, 2**64, 10**30, 0.5, -1e308, float("nan"), float("inf"), "", "x", "x" * 5000, "\ud800",
  "../x", [], {}, [[[]]], [None] * 50, {"a": {"b": 1}}, [2**40], ["a", 1], {"content": 7},
)  # fmt: skip
TRAVERSALS = (
  "../outside.safetensors", "/etc/passwd", "..", ".", "", "a/../../outside.safetensors", "..\\outside.safetensors", "\x00",
  "sub/model.safetensors", "./model-00001-of-00002.safetensors", "//etc/hostname", "~/.netrc", "x" * 5000,
)  # fmt: skip
TEMPLATES = (
  "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
  "{% set x = namespace(s='x') %}{% for a in range(60) %}{% set x.s = x.s + x.s %}{% endfor %}",
  "{{ ''.__class__.__mro__[1].__subclasses__() }}",
  "{{ messages[0].content * 10**9 }}",
  "{% include '/etc/passwd' %}",
  "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
  "{% for",
  "{{ raise_exception('no') }}",
)


def mutate_bytes(data: bytes, rng: np.random.Generator) -> bytes:
  """Truncated, flipped, overwritten by huge numbers, zeroed, with something inserted or left out; mostly in the header."""
  data = bytearray(data)
  how = int(rng.integers(7))
  near = int(rng.integers(max(1, min(len(data), 4096 if rng.random() < 0.8 else len(data)))))
  size = int(rng.integers(1, 64))
  if how == 0:
    return bytes(data[: rng.integers(len(data))])
  if how == 1:
    for place in rng.integers(near + 1, size=rng.integers(1, 9)):
      data[place] ^= 1 << int(rng.integers(8))
  elif how == 2:
    width, value = (4, "<I") if rng.random() < 0.4 else (8, "<Q")
    data[near : near + width] = struct.pack(value, HUGE[rng.integers(len(HUGE))] % 2 ** (8 * width))
  elif how == 3:
    data[near : near + size] = bytes(size)
  elif how == 4:
    data[near:near] = rng.bytes(size)
  elif how == 5:
    del data[near : near + size]
  else:
    data[near : near + size] = rng.bytes(size)
  return bytes(data)


def mutate_value(value, rng: np.random.Generator):
  """One place of a JSON document changed: replaced by something odd, removed, or said twice."""
  parent, key = value, None
  places = []

  def walk(node):
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in items:
      places.append((node, name))
      walk(child)

  walk(value)
  parent, key = places[rng.integers(len(places))]
  how = rng.random()
  if how < 0.7:
    parent[key] = copy.deepcopy(ODD_VALUES[rng.integers(len(ODD_VALUES))])
  elif how < 0.85:
    del parent[key]
  elif isinstance(parent, dict):
    parent[str(rng.integers(100))] = copy.deepcopy(parent[key])
  else:
    parent.insert(0, copy.deepcopy(parent[key]))
  return value


def mutate_json(path: pathlib.Path, rng: np.random.Generator) -> None:
  if rng.random() < 0.3:
    path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    return
  value = json.loads(path.read_text())
  for _ in range(rng.integers(1, 4)):
    if value:
      value = mutate_value(value, rng)
  if rng.random() < 0.02:
    path.write_text("[" * 100000)
  else:
    path.write_text(json.dumps(value))


def mutate_safetensors(folder: pathlib.Path, rng: np.random.Generator) -> None:
  path = sorted(folder.glob("*.safetensors"))[rng.integers(2)]
  data = path.read_bytes()
  if rng.random() < 0.5:
    path.write_bytes(mutate_bytes(data, rng))
    return
  size = struct.unpack("<Q", data[:8])[0]
  header = json.loads(data[8 : 8 + size])
  text = mutate_places(header, rng) if rng.random() < 0.4 else json.dumps(mutate_value(header, rng))
  path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + data[8 + size :])


def mutate_places(header: dict, rng: np.random.Generator) -> str:
  """A safetensors header with tensors that overlap, begin at an odd byte, stand under a prefix, or are named twice."""
  names = [name for name in header if name != "__metadata__"]
  first, second = (names[i] for i in rng.permutation(len(names))[:2])
  how = rng.integers(4)
  if how == 0:
    header[first]["data_offsets"] = header[second]["data_offsets"]
  elif how == 1:
    header[first]["data_offsets"] = [offset + 1 for offset in header[first]["data_offsets"]]
  elif how == 2:
    prefix = ("module.", "_orig_mod.", "base_model.model.", "model.")[rng.integers(4)]
    moved = names if rng.random() < 0.5 else [first]
    return json.dumps({prefix + name if name in moved else name: entry for name, entry in header.items()})
  else:
    return said_twice(json.dumps(header), first, header[second])
  return json.dumps(header)


def said_twice(text: str, key: str, value) -> str:
  """A JSON object with a second entry of the same key."""
  return f"{text[:-1]}, {json.dumps(key)}: {json.dumps(value)}}}"


def mutate_index(folder: pathlib.Path, rng: np.random.Generator) -> None:
  path = folder / INDEX
  if rng.random() < 0.5:
    mutate_json(path, rng)
    return
  index = json.loads(path.read_text())
  shard_of = index["weight_map"]
  names, target = list(shard_of), TRAVERSALS[rng.integers(len(TRAVERSALS))]
  # All of the first shard, of which a good copy lies outside: then nothing but the place is wrong.
  whole = [name for name in names if shard_of[name] == shard_of[names[0]]]
  for name in whole if rng.random() < 0.5 else [names[rng.integers(len(names))]]:
    shard_of[name] = target
  path.write_text(json.dumps(index))


def mutate_config(folder: pathlib.Path, rng: np.random.Generator) -> None:
  path = folder / "config.json"
  if rng.random() < 0.15:  # two spellings that may contradict each other, and keys that are there twice
    config = json.loads(path.read_text())
    ropes = ({"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 2.0}, None, {})
    config["rope_parameters"], config["rope_scaling"] = (ropes[i] for i in rng.integers(len(ropes), size=2))
    names = list(config)
    text = json.dumps(config)
    path.write_text(said_twice(text, names[rng.integers(len(names))], 7) if rng.random() < 0.5 else text)
    return
  mutate_json(folder / ("config.json" if rng.random() < 0.9 else "generation_config.json"), rng)


def mutate_tokenizer(folder: pathlib.Path, rng: np.random.Generator) -> None:
  mutate_json(folder / ("tokenizer.json" if rng.random() < 0.75 else "tokenizer_config.json"), rng)


def mutate_gguf(folder: pathlib.Path, rng: np.random.Generator) -> None:
  path = folder / "m.gguf"
  data = path.read_bytes()
  if rng.random() < 0.2:  # a tensor where another lies, or at an odd byte; or a file that says it is a part
    tensors = gguf.GGUFReader(path).tensors
    offsets = [int(tensor.field.parts[-1][0]) for tensor in tensors]
    one, other = rng.integers(len(offsets), size=2)
    entry = tensors[one].name.encode()
    place = data.index(struct.pack("<Q", len(entry)) + entry) + 8 + len(entry) + 4 + 8 * len(tensors[one].shape) + 4
    assert struct.unpack_from("<Q", data, place)[0] == offsets[one]
    wrong = offsets[other] if rng.random() < 0.5 else offsets[one] + int(rng.integers(1, 64))
    path.write_bytes(data[:place] + struct.pack("<Q", wrong) + data[place + 8 :])
    return
  if rng.random() < 0.05:
    path.rename(folder / "m-00001-of-00002.gguf")
    return
  path.write_bytes(mutate_bytes(data, rng))


DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "I64", "F64", "BOOL", "F4", "X")


def mutate_float8(folder: pathlib.Path, rng: np.random.Generator) -> None:
  """Scales that are missing or of odd shapes and dtypes, dtypes swapped, config changed, a file that is a link to outside."""
  how = rng.random()
  path = folder / "model.safetensors"
  if how < 0.15:
    mutate_json(folder / ("config.json" if rng.random() < 0.6 else "hf_quant_config.json"), rng)
    return
  if how < 0.2:
    target = ("/etc/passwd", "/dev/zero", "../outside.safetensors", str(path), "/")[rng.integers(5)]
    victim = (path, folder / "config.json", folder / "hf_quant_config.json")[rng.integers(3)]
    victim.unlink()
    victim.symlink_to(target)
    return
  data = path.read_bytes()
  size = struct.unpack("<Q", data[:8])[0]
  header, names = json.loads(data[8 : 8 + size]), []
  for _ in range(rng.integers(1, 4)):
    names = [name for name in header if ("scale" in name) == (rng.random() < 0.7) and name != "__metadata__"]
    name = names[rng.integers(len(names))]
    entry = header[name]
    what = rng.integers(6)
    if what == 0:
      del header[name]
    elif what == 1:
      entry["dtype"] = DTYPES[rng.integers(len(DTYPES))]
    elif what == 2:
      count = int(np.prod(entry["shape"]))
      entry["shape"] = [[count], [count, 1], [1, count], [], [0], [count, 1, 1], [1] * 60, [2**40, 2**40]][rng.integers(8)]
    elif what == 3:
      other = header[names[rng.integers(len(names))]]
      entry["dtype"], other["dtype"] = other["dtype"], entry["dtype"]
    elif what == 4:
      header[name.replace("weight_scale", ("weight_scale_inv", "scale", "weight_zero_point")[rng.integers(3)])] = header.pop(
        name
      )
    else:
      place = 8 + size + entry["data_offsets"][0]
      data = data[:place] + rng.bytes(8) + data[place + 8 :]
  header = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])


MUTATE: dict[str, Callable[[pathlib.Path, np.random.Generator], None]] = {
  "safetensors": mutate_safetensors,
  "index": mutate_index,
  "config": mutate_config,
  "tokenizer": mutate_tokenizer,
  "gguf": mutate_gguf,
  "float8": mutate_float8,
}


def open_everything(folder: pathlib.Path, with_chat: bool) -> None:
  """What a command does with a checkpoint before it computes; then every weight."""
  from jaxfp8.checkpoint import readers
  from jaxfp8.text.tokenizer import Tokenizer

  readers.read_config(folder)
  source = readers.open_source(folder)
  for path in source.files():
    if folder not in path.resolve().parents:
      raise AssertionError(f"it reads {path}")
  tokenizer = Tokenizer(source.tokenizer)
  tokenizer.decode(tokenizer.encode("Hello, world 123"))
  if with_chat and tokenizer.has_chat_template:
    tokenizer.chat([{"role": "user", "content": "hi"}])
  for name in source.names():
    if source.read(name).shape != source.shape(name):
      raise AssertionError(f"{name} has another shape than promised")
    if source.granularity(name):
      source.read_scale(name)
  for name in source.static_scales():
    source.read_static(name)


def watch_files(folder: pathlib.Path) -> list[str]:
  """Collects what Python opens outside `folder`, besides its own modules."""
  allowed = (str(folder), sys.prefix, sys.base_prefix, str(pathlib.Path(__file__).parents[2]), "/proc/", "/dev/null")
  outside: list[str] = []

  def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
      path = args[0] if isinstance(args[0], str) else args[0].decode(errors="replace")
      if not path.startswith(allowed):
        outside.append(path)

  sys.addaudithook(hook)
  return outside


def peak() -> int:
  """Most memory that was resident since the last reset."""
  with open("/proc/self/status") as file:
    return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def reset_peak() -> None:
  with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
    file.write("5")


def main(kind: str, start: int, stop: int, scratch: pathlib.Path) -> None:
  from jaxfp8.errors import InputError

  base, folder = scratch / (kind if kind in ("gguf", "float8") else "folder"), scratch / f"case-{kind}"
  shutil.copytree(base, folder)
  open_everything(folder, with_chat=True)  # what is imported late is imported now
  with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, resource.RLIM_INFINITY))
  outside = watch_files(folder)
  for seed in range(start, stop):
    print(f"case {seed}", flush=True)
    shutil.rmtree(folder)
    shutil.copytree(base, folder)
    MUTATE[kind](folder, np.random.default_rng([seed, *kind.encode()]))
    outside.clear()
    reset_peak()
    before = peak()
    signal.alarm(SECONDS)
    try:
      open_everything(folder, with_chat=kind == "tokenizer" and seed % 25 == 0)
    except InputError as error:
      if not 20 < len(str(error)) < MAX_MESSAGE:
        print(f"bad {seed}: a message of {len(str(error))} characters: {str(error)[:200]!r}")
    except BaseException:
      print(f"bad {seed}: " + " | ".join(traceback.format_exc().strip().splitlines()[-7:]))
    signal.alarm(0)
    if outside:
      print(f"bad {seed}: it opened {outside[:3]}")
    if peak() - before > GROWTH:
      print(f"bad {seed}: resident memory grew by {(peak() - before) >> 20} MB")


if __name__ == "__main__":
  sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
  main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4]))
  print("end")
