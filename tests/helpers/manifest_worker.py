"""Opens copies of a checkpoint with one wrong value in its manifest, journal or metadata, in bounded memory and time.

    python -m tests.helpers.manifest_worker FOLDER SCRATCH

Prints a line "bad ..." for whatever is no short InputError, and "end" at the end.
"""

import copy
import json
import pathlib
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import Any

ADDRESS_SPACE = 1 << 30  # bytes above those of the process with its libraries
SECONDS = 20
BIG = int("9" * 4000)
VALUES: tuple[Any, ...] = (
  None, True, "x\x1b[2J", -1, 1.5, 10**18, BIG, float("nan"), float("inf"), [], [[]], {}, {"x": {}},
  ["model.layers.99999.mlp.up_proj.input_scale"], {"x": -1},
)  # fmt: skip
OPTIONAL = tuple(f"without {field}" for field in ("exceptions", "static_scales", "files", "checksums", "blocks", "sha256"))
NAMES = ("../outside", "/etc/passwd", "", ".", "a/../../outside", "x\0y", "./jaxfp8.json")
FILES = ("d", "link", "absent", "a" * 5000)


def places(data: Any, path: tuple = ()) -> Iterator[tuple]:
  """The path of every value, and of no more than two entries of each list or object below the first level."""
  items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
  for index, (key, value) in enumerate(items):
    if len(path) == 0 or index < 2 or path in (("config",), ("recipe",), ("config", "rope")):
      yield (*path, key)
      yield from places(value, (*path, key))


def changed(data: dict, path: tuple, value: Any) -> dict:
  data = copy.deepcopy(data)
  inner = data
  for key in path[:-1]:
    inner = inner[key]
  inner[path[-1]] = value
  return data


def cases(data: dict) -> Iterator[tuple[str, str]]:
  """(name, text of jaxfp8.json), with the right SHA-256 wherever there is one."""
  from jaxfp8.checkpoint.manifest import digest_of

  def text(changed_data: Any) -> str:
    return json.dumps(changed_data | {"sha256": digest_of(changed_data)})

  for path in places(data):
    if path[0] == "sha256":
      continue
    for value in VALUES:
      yield f"{path} = {str(value)[:30]!r}", text(changed(data, path, value))
  for name in NAMES:
    for field, value in (("files", 5), ("checksums", "0" * 64), ("blocks", {"shape": [1], "xxh3_64": ""})):
      yield f"{field}[{name[:20]!r}]", text(changed(data, (field, name), value))
  for name in FILES:
    yield f"files[{name[:20]!r}]", text(changed(data, ("files", name), 5))
  for field in data:
    yield f"without {field}", text({key: value for key, value in data.items() if key not in (field, "sha256")})
  whole = json.dumps(data)
  yield "5,000 digits", whole.replace('"num_layers": ', '"num_layers": ' + "9" * 5000)
  yield "deep", '{"provenance": ' + "[" * 10**5 + "]" * 10**5 + "}"
  yield "deeper than printed", text(changed(data, ("provenance",), json.loads('{"a":' * 200 + "1" + "}" * 200)))
  yield "twice", whole[:-1] + ', "config": {}}'
  yield "twice, inside", whole.replace('"num_layers": ', '"num_layers": 1, "num_layers": ')
  claims = changed(data, ("config", "vocab_size"), 2**31 - 1)
  yield "2^31 rows", text(claims)
  yield (
    "65,536 layers",
    text(changed(changed(data, ("config", "num_layers"), 65536), ("formats",), data["formats"][:1] * 65536)),
  )


def main(folder: pathlib.Path, scratch: pathlib.Path) -> None:
  from jaxfp8.checkpoint.open import Checkpoint
  from jaxfp8.errors import InputError
  from jaxfp8.text.tokenizer import Tokenizer

  def use(path: pathlib.Path) -> None:
    source = Checkpoint(path)
    _ = source.expected
    if source.find_tokenizer():
      Tokenizer(source.tokenizer)
    key = next(iter(source.expected))
    source.read_array(key)

  shutil.copytree(folder, scratch)
  (scratch.parent / "outside").write_text("12345")
  use(scratch)
  with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, resource.RLIM_INFINITY))
  data = json.loads((folder / "jaxfp8.json").read_text())
  count = 0
  for name, text in cases(data):
    count += 1
    (scratch / "jaxfp8.json").write_text(text)
    if "['link']" in name:
      (scratch / "link").symlink_to("../outside")
    signal.alarm(SECONDS)
    try:
      use(scratch)
      if not name.startswith(("(", *OPTIONAL)):
        print(f"bad {name}: it was opened")
    except InputError as error:
      if not 20 < len(str(error)) < 2100 or "\n" in str(error):
        print(f"bad {name}: {str(error)[:200]!r}")
    except BaseException:
      print(f"bad {name}: " + " | ".join(traceback.format_exc().strip().splitlines()[-5:])[:600])
    signal.alarm(0)
    (scratch / "link").unlink(missing_ok=True)
  print(f"{count} cases\nend")


if __name__ == "__main__":
  sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
  main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
