"""Pipes, devices, files without end and links that lead astray: each is one sentence, and no byte of it is read."""

import ast
import json
import os
import pathlib
import resource

import gguf
import pytest

from jaxfp8 import regular_files
from jaxfp8.checkpoint import convert, export, manifest, readers, weights_cache
from jaxfp8.checkpoint.open import Checkpoint
from jaxfp8.commands import evaluate, prompt_files
from jaxfp8.config import read_toml
from jaxfp8.errors import InputError
from jaxfp8.recipe import Recipe
from tests.helpers import commands, tiny_models
from tests.helpers.gguf_files import write_gguf

pytestmark = pytest.mark.timeout(30)  # a pipe that is opened waits for ever
FILES = ["config.json", "generation_config.json", "hf_quant_config.json", "model.safetensors", "model.safetensors.index.json"]
FILES += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
SECRET = "-----BEGIN A PRIVATE KEY-----"


@pytest.fixture(autouse=True)
def bounded_memory():
  """4 GB of addresses more than now: a device without end would fill them."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  before = resource.getrlimit(resource.RLIMIT_AS)
  resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 30), before[1]))
  yield
  resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def folder(tmp_path):
  return commands.write_chain(tmp_path / "model")


@pytest.fixture
def secret(tmp_path):
  path = tmp_path / "private" / "key"
  path.parent.mkdir()
  path.write_text(SECRET)
  return path


def refused(call, *arguments):
  with pytest.raises(InputError) as error:
    call(*arguments)
  text = str(error.value)
  assert "\n" not in text and text.endswith("."), text
  return text


def pipe(path):
  os.mkfifo(path)


def device(path):
  path.symlink_to("/dev/zero")


def folder_there(path):
  path.mkdir()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("make", "says"), [(pipe, "a named pipe"), (device, "/dev/zero"), (folder_there, "a folder")])
def test_a_special_file_in_a_models_folder(folder, tmp_path, name, make, says):
  (folder / name).unlink(missing_ok=True)
  make(folder / name)
  for call in (
    readers.open_source,
    readers.source_files,
    lambda path: weights_cache.cached_checkpoint(path, Recipe(), tmp_path / "cache"),
  ):
    text = refused(call, folder)
    assert name in text and says in text, text


@pytest.mark.parametrize("name", FILES)
def test_a_link_to_a_private_file(folder, secret, tmp_path, name):
  (folder / name).unlink(missing_ok=True)
  (folder / name).symlink_to(secret)
  for call in (
    readers.open_source,
    lambda path: weights_cache.cached_checkpoint(path, Recipe(), tmp_path / "cache"),
    lambda path: convert.convert_checkpoint(path, tmp_path / "out"),
  ):
    text = refused(call, folder)
    assert f"{folder / name} leads to {secret}. Copy the file into the folder, or pass the folder that holds it." in text
  files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink() and path != secret]
  assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_links_in_a_circle(folder):
  (folder / "model.safetensors").unlink()
  (folder / "model.safetensors").symlink_to("model.safetensors")
  (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
  for call in (readers.open_source, readers.source_files):
    refused(call, folder)


def test_links_into_the_folder_and_to_the_folder_are_followed(folder, tmp_path):
  (folder / "below").mkdir()
  (folder / "config.json").rename(folder / "below" / "c")
  (folder / "config.json").symlink_to("below/c")
  (tmp_path / "link").symlink_to(folder)
  assert readers.open_source(tmp_path / "link").config.name == "model"
  assert readers.read_config(tmp_path / "link" / "config.json").num_layers == 1


def test_only_the_blobs_of_the_own_hub_cache(folder, tmp_path):
  mine, other = tmp_path / "models--o--m", tmp_path / "models--o--private"
  snapshot = mine / "snapshots" / "aaaa"
  for place in (snapshot, mine / "blobs", other / "blobs"):
    place.mkdir(parents=True)
  for path in list(folder.iterdir()):
    path.rename(mine / "blobs" / path.name)
    (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
  _ = readers.open_source(snapshot).tokenizer
  (mine / "blobs" / "tokenizer.json").rename(other / "blobs" / "tokenizer.json")
  (snapshot / "tokenizer.json").unlink()
  (snapshot / "tokenizer.json").symlink_to("../../../models--o--private/blobs/tokenizer.json")
  assert "leads to" in refused(readers.open_source, snapshot)
  (mine / "refs").mkdir()
  (mine / "refs" / "main").symlink_to("/dev/zero")
  (mine / "snapshots" / "bbbb").mkdir()
  assert "holds 2 snapshots" in refused(readers.open_source, mine)


LIMITS = {name: regular_files.TEXT_BYTES for name in FILES if name != "model.safetensors"}
LIMITS["tokenizer.json"] = regular_files.TOKENIZER_BYTES


@pytest.mark.parametrize("name", LIMITS)
def test_a_text_of_gigabytes_is_refused_by_its_size(folder, name):
  (folder / name).touch()
  os.truncate(folder / name, LIMITS[name] + 1)  # sparse
  text = refused(lambda: readers.open_source(folder).tokenizer)
  assert f"{name} has more than {LIMITS[name]:,} bytes" in text


class TestGguf:
  @pytest.fixture
  def model(self, tmp_path):
    config = tiny_models.make_config("one_layer_head_10")
    (tmp_path / "far").mkdir()
    return write_gguf(tmp_path / "far" / "m.gguf", config, tiny_models.make_weights(config), gguf.GGMLQuantizationType.F32)

  def test_a_link_that_is_named_is_followed_and_one_that_is_found_is_not(self, model, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "m.gguf").symlink_to(model)
    assert readers.open_source(tmp_path / "folder" / "m.gguf").config.num_layers == 1
    assert "leads to" in refused(readers.open_source, tmp_path / "folder")

  def test_parts_beside_a_named_link(self, model, tmp_path, secret):
    (tmp_path / "folder").mkdir()
    one, two = (tmp_path / "folder" / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    one.symlink_to(model)
    two.symlink_to(model)
    assert "leads to" not in refused(readers.open_source, one)  # two equal parts are no model
    two.unlink()
    two.symlink_to(secret)
    assert f"{two} leads to {secret}" in refused(readers.open_source, one)


class TestOurs:
  @pytest.fixture
  def ours(self, folder, tmp_path):
    convert.convert_checkpoint(folder, tmp_path / "ours", Recipe())
    return tmp_path / "ours"

  def test_what_is_in_the_folder(self, ours, secret, tmp_path):
    for name, make, says in (
      ("d/pipe", pipe, "a named pipe"),
      ("state", pipe, "a named pipe"),
      ("key", lambda path: path.symlink_to(secret), "leads to"),
      ("zero", device, "leads to /dev/zero"),
    ):
      place = ours / name
      place.parent.mkdir(exist_ok=True)
      if place.exists():
        place.rename(tmp_path / "state")
      make(place)
      assert says in refused(Checkpoint, ours) and says in refused(lambda: export.export_checkpoint(ours, tmp_path / "out"))
      place.unlink()
      if name == "state":
        (tmp_path / "state").rename(place)
    Checkpoint(ours)

  @pytest.mark.parametrize("name", ["/dev/zero", "../private/key", "link"])
  def test_a_manifest_that_names_other_files(self, ours, secret, name):
    path = ours / manifest.MANIFEST
    data = json.loads(path.read_text())
    data["files"][name] = 0
    data["checksums"][name] = "0" * 64
    path.write_text(json.dumps(data | {"sha256": manifest.digest_of(data)}))
    (ours / "link").symlink_to(secret)
    assert "leads to" in refused(Checkpoint, ours)

  @pytest.mark.parametrize("name", [manifest.MANIFEST, manifest.TEMPLATE, manifest.TOKENIZER])
  def test_a_text_of_gigabytes(self, ours, name):
    (ours / name).touch()
    os.truncate(ours / name, regular_files.TOKENIZER_BYTES + 1)
    assert f"{name} has more than" in refused(Checkpoint, ours)


def test_files_that_a_user_names(tmp_path):
  pipe(tmp_path / "pipe.toml")
  (tmp_path / "large.toml").touch()
  os.truncate(tmp_path / "large.toml", regular_files.CORPUS_BYTES + 1)
  for path in (tmp_path / "pipe.toml", "/dev/zero"):
    assert "must be a regular file" in refused(read_toml, path) and "must be a regular file" in refused(
      evaluate.read_text, path
    )
  assert "has more than" in refused(read_toml, tmp_path / "large.toml")
  assert "has more than" in refused(evaluate.read_text, tmp_path / "large.toml")
  (tmp_path / "text").write_bytes(b"a\r\nb\n")
  (tmp_path / "link").symlink_to("text")
  assert evaluate.read_text(str(tmp_path / "link"))[0] == "a\nb\n"


def test_a_prompt_may_come_from_a_pipe():
  """As `--prompt_file <(...)` does."""
  read, write = os.pipe()
  os.write(write, b"a prompt")
  os.close(write)
  assert prompt_files.read(f"/dev/fd/{read}") == "a prompt"
  os.close(read)


# Files of this machine or of the checkpoint that is being written: (module, call).
OWN_FILES = {("planning/devices.py", "read_text"), ("checkpoint/writer.py", "os.open")}
OWN_FILES |= {("checkpoint/journal.py", name) for name in ("open", "os.open")}


def test_every_reader_opens_files_here():
  root, found = commands.ROOT / "jaxfp8", set()
  for path in [
    root / "config.py",
    *(p for room in ("checkpoint", "planning", "quantization", "text") for p in (root / room).rglob("*.py")),
  ]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if not isinstance(node, ast.Call):
        continue
      match node.func:
        case ast.Name("open") | ast.Attribute(ast.Name("io" | "codecs" | "gzip"), "open"):
          found.add((str(path.relative_to(root)), "open"))
        case ast.Attribute(ast.Name("os"), "open"):
          found.add((str(path.relative_to(root)), "os.open"))
        case ast.Attribute(ast.Name("np" | "numpy"), ("load" | "memmap" | "fromfile" | "loadtxt") as name):
          found.add((str(path.relative_to(root)), name))
        case ast.Attribute(ast.Name("regular_files" | "private_files"), _):
          pass
        case ast.Attribute(_, ("read_text" | "read_bytes" | "open" | "load_file" | "from_file") as name):
          if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "tensorstore"):
            found.add((str(path.relative_to(root)), name))
  assert found == OWN_FILES
