"""One wrong bit in any stored file is noticed before use: a checkpoint is refused, the cache heals with one sentence."""

import dataclasses
import re
import shutil

import numpy as np
import pytest

from jaxfp8.checkpoint import weights_cache
from jaxfp8.checkpoint.convert import convert_checkpoint
from jaxfp8.checkpoint.load import load
from jaxfp8.checkpoint.manifest import DamagedCheckpoint
from jaxfp8.checkpoint.open import Checkpoint
from jaxfp8.checkpoint.stored_arrays import Range
from jaxfp8.errors import InputError
from jaxfp8.progress import Progress
from jaxfp8.recipe import Recipe
from jaxfp8.serving import startup
from tests.helpers import commands

TEXTS = {"jaxfp8.json", "tokenizer.json", "chat_template.jinja", "_METADATA", "manifest.ocdbt"}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def flip(path, offset, bit=0):
  data = bytearray(path.read_bytes())
  data[offset] ^= 1 << bit
  path.write_bytes(data)


def files_of(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file())


def data_of(folder) -> list:
  return sorted((path for path in files_of(folder) if path.parent.name == "d"), key=lambda path: -path.stat().st_size)


def damage_array(folder):
  """The embedding, which lies in one piece."""
  table = Checkpoint(folder).read_array("model.embed_tokens.weight[V,D]").tobytes()
  for path in data_of(folder):
    if table in path.read_bytes():
      flip(path, path.read_bytes().index(table) + 1000)


def contents(folder):
  """Everything that a run takes from a checkpoint."""
  source = Checkpoint(folder)
  return source.config, source.find_tokenizer(), {key: source.read_array(key).tobytes() for key in source.expected}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  folder = commands.write_chain(tmp_path_factory.mktemp("source") / "chain")
  (folder / "chat_template.jinja").write_text(TEMPLATE)
  return folder


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole") / "checkpoint"
  convert_checkpoint(source, folder)
  return folder


@pytest.fixture
def folder(whole, tmp_path):
  return shutil.copytree(whole, tmp_path / "copy")


def refused_or_the_same(folder, truth) -> bool:
  """Whether the folder is refused, in one sentence about it; else it must give what was written."""
  try:
    found = contents(folder)
  except InputError as error:
    assert str(folder) in str(error) and "\n" not in str(error) and "emove the folder" not in str(error)
    assert str(error).endswith(".") and isinstance(error, DamagedCheckpoint), error
    return True
  assert found == truth
  return False


def test_every_small_file_is_compared(folder, whole):
  truth = contents(whole)
  small = [path for path in files_of(folder) if path.parent.name != "d" and path.stat().st_size]
  assert {path.name for path in small} >= TEXTS
  for path in small:
    good, seed = path.read_bytes(), np.random.default_rng(len(path.name))
    for offset in sorted(seed.integers(0, len(good), 12)):
      flip(path, int(offset), int(seed.integers(8)))
      changes_space = path.name == "jaxfp8.json" and bytes([good[offset]]).isspace()
      assert refused_or_the_same(folder, truth) or changes_space, (path, offset)
      path.write_bytes(good)


def test_the_data_of_arrays_and_of_their_index_are_compared(folder, whole):
  """The arrays by our digests; the index, with the arrays' metadata, by the CRC of OCDBT."""
  truth = contents(whole)
  for path in data_of(folder):
    good, refusals = path.read_bytes(), 0
    for offset in range(0, len(good), max(1, len(good) // 12)):
      flip(path, offset, offset % 8)
      refusals += refused_or_the_same(folder, truth)
      path.write_bytes(good)
    assert refusals > 3 or b"\0" * 50 not in good  # parts of a file may hold an index that a newer one replaces


def test_a_part_of_an_array_is_compared_alone(tmp_path):
  """A process that reads other rows neither reads nor compares the damaged block."""
  from jaxfp8.checkpoint import block_digests, manifest

  key = "model.embed_tokens.weight[V,D]"
  with pytest.MonkeyPatch.context() as patch:
    for module in (block_digests, manifest):
      patch.setattr(module, "BLOCK_BYTES", 64 * 260 * 2)
    convert_checkpoint(commands.write_chain(tmp_path / "chain"), tmp_path / "out")
  checkpoint = Checkpoint(tmp_path / "out")
  table = checkpoint.read_array(key)
  shape = tuple(checkpoint.manifest.blocks[key]["shape"])
  assert shape[0] < 100 and checkpoint._arrays[key].chunk_layout.read_chunk.shape[1] <= 260
  damaged = table.copy()
  damaged[0, 0] += 1
  digests = checkpoint._blocks(key)
  last = Range(key, 0, 250, 255)
  bounds = digests.cover(last.axis, last.start, last.stop)
  assert digests.first_wrong(last._replace(start=bounds[0][0], stop=bounds[0][1]).cut(damaged), bounds) is None
  assert digests.first_wrong(damaged, ((0, 259), (0, 260)))[0][0] == 0
  for part in (last, Range(key, 1, 3, 200), Range(key, 0, 0, 259), Range(key, 1, 259, 260)):
    np.testing.assert_array_equal(checkpoint.read_ranges([part])[part], part.cut(table))


def test_an_earlier_versions_arrays_are_compared_whole(folder, whole):
  """It stored the SHA-256 of arrays, and no digests of blocks."""
  checkpoint, key = Checkpoint(folder), "model.embed_tokens.weight[V,D]"
  text = dataclasses.replace(checkpoint.manifest, blocks={}).to_json()
  (folder / "jaxfp8.json").write_text(text)
  part = Range(key, 0, 1, 3)
  np.testing.assert_array_equal(Checkpoint(folder).read_ranges([part])[part], part.cut(checkpoint.read_array(key)))
  damage_array(folder)
  with pytest.raises(DamagedCheckpoint, match=re.escape(key)):
    Checkpoint(folder).read_ranges([part])


# --- the cache ---


@pytest.fixture
def cached(source, tmp_path):
  """(the folder in the cache, a function that starts a run)."""
  options = startup.LoadOptions(checkpoint=str(source), cache_dir=str(tmp_path / "cache"))
  path = weights_cache.cached_checkpoint(source, Recipe(), tmp_path / "cache").path
  return path, lambda: startup.open_model(options, Progress(silent=True))


def leaves(loaded):
  import jax
  from flax import nnx

  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(nnx.state(loaded.model))]


def test_damage_in_the_cache_heals_with_one_sentence(cached, capsys):
  folder, start = cached
  truth = start()
  capsys.readouterr()
  for damage, reason in (
    (damage_array, r"model\.embed_tokens\.weight\[V,D\]\[.*\] is not what was written, since its digest differs"),
    (
      lambda folder: flip(folder / "tokenizer.json", 300),
      r"tokenizer\.json is not what was written.*",
    ),
    (lambda folder: flip(folder / "state" / "manifest.ocdbt", 30), r"state/manifest\.ocdbt is not what was written.*"),
    (lambda folder: flip(folder / "jaxfp8.json", 600), r".*jaxfp8.*"),
  ):
    damage(folder)
    healed = start()
    pattern = rf"cache: {re.escape(str(folder))} is damaged: {reason}; the source is converted again\.\n"
    assert re.fullmatch(pattern, capsys.readouterr().err)
    assert leaves(healed) == leaves(truth) and healed.tokenizer_files == truth.tokenizer_files
    assert list(folder.parent.iterdir()) == [folder]
    refused_or_the_same(folder, contents(folder))


def test_two_runs_that_find_the_same_damage_convert_once(cached, capsys):
  """The second finds a new manifest, and leaves the folder alone."""
  folder, start = cached
  damage_array(folder)
  second = Checkpoint(folder)
  start()
  text = (folder / "jaxfp8.json").read_text()
  capsys.readouterr()
  assert weights_cache.discard(second, "anything")
  assert capsys.readouterr().err == "" and (folder / "jaxfp8.json").read_text() == text


def test_a_damaged_cache_that_cannot_be_written_is_done_without(cached, capsys, monkeypatch):
  folder, start = cached
  truth = leaves(start())
  damage_array(folder)

  def read_only(*args):
    raise OSError(30, "Read-only file system")

  monkeypatch.setattr(weights_cache.os, "rename", read_only)
  monkeypatch.setattr(weights_cache.stored_files, "_said", set())
  capsys.readouterr()
  assert leaves(start()) == truth and folder.exists()
  assert capsys.readouterr().err.endswith("Read-only file system; this run goes on and keeps nothing for the next one.\n")


def test_a_users_own_checkpoint_is_refused_and_kept(folder, capsys):
  damage_array(folder)
  before = [(path, path.read_bytes()) for path in files_of(folder)]
  for open_it in (load, lambda path: startup.open_model(startup.LoadOptions(checkpoint=str(path)), Progress(silent=True))):
    with pytest.raises(InputError, match=r"copy is damaged: .*embed_tokens.* Convert its source again"):
      open_it(folder)
  assert [(path, path.read_bytes()) for path in files_of(folder)] == before
