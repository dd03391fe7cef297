"""A conversion that is killed at any moment of its end goes on behind the last group: nothing is quantized again."""

import json
import os
import shutil
import threading

import numpy as np
import pytest

from jaxfp8.checkpoint import convert, writer
from jaxfp8.checkpoint.block_digests import block_shape, blocks_of
from jaxfp8.checkpoint.journal import Journal
from jaxfp8.checkpoint.manifest import WRITING
from jaxfp8.checkpoint.open import Checkpoint
from jaxfp8.checkpoint.quantized_source import QuantizedSource
from jaxfp8.errors import InputError
from jaxfp8.recipe import Recipe
from tests.helpers import tiny_models

CONFIG = tiny_models.make_config("one_layer_head_10")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp("source") / "model"
  return tiny_models.write_hf_folder(folder, CONFIG, tiny_models.make_weights(CONFIG))


def contents(folder):
  checkpoint = Checkpoint(folder)
  return {key: checkpoint.read_array(key).tobytes() for key in checkpoint.expected}


@pytest.fixture
def quantized(monkeypatch):
  """The keys of the arrays that are read from the source."""
  keys, read = [], QuantizedSource.read
  monkeypatch.setattr(QuantizedSource, "read", lambda self, names: keys.extend(names) or read(self, names))
  return keys


def snapshots_of_the_end(source, folder, snapshots) -> int:
  """Converts, and copies the folder's parent before changes from the last group on: what a kill at that moment leaves.

  The first call of each kind at each place is such a change. Returns the number of copies.
  """
  seen, lock, armed = set(), threading.RLock(), []

  def before(name):
    function = getattr(os, name)

    def wrapped(path, *args, **kwargs):
      with lock:  # one change at a time, so that a copy is what the disk held at one moment
        inside = str(path).startswith(str(folder.parent))
        place = (name, os.path.basename(path).partition(WRITING)[2][8:] or os.path.basename(path)[:6]) if inside else None
        if armed and inside and place not in seen:
          seen.add(place)
          shutil.copytree(folder.parent, snapshots / str(len(seen)))
        return function(path, *args, **kwargs)

    return wrapped

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(convert, "_WRITE_BYTES", 5_000)  # several groups
    for name in ("rename", "link", "rmdir"):
      patch.setattr(os, name, before(name))
    finish = writer.CheckpointWriter._finish
    patch.setattr(writer.CheckpointWriter, "_finish", lambda self: armed.append(True) or finish(self))
    convert.convert_checkpoint(source, folder)
  return len(seen)


def test_killed_at_any_moment_of_the_end(source, tmp_path, quantized, capsys):
  folder, snapshots = tmp_path / "work" / "out", tmp_path / "snapshots"
  folder.parent.mkdir()
  snapshots.mkdir()
  count = snapshots_of_the_end(source, folder, snapshots)
  truth, unfinished = contents(folder), 0
  assert count >= 6
  for snapshot in sorted(snapshots.iterdir(), key=lambda path: int(path.name)):
    quantized.clear()
    output = snapshot / "out"
    unfinished += not output.exists()
    convert.convert_checkpoint(source, output, resume=True)
    assert quantized == [] and contents(output) == truth, snapshot
    assert [path.name for path in snapshot.iterdir()] == ["out"]
    assert capsys.readouterr().err == ""
  assert 0 < unfinished < count  # the last moments: the folder has its name, and its journal remains


def killed_before_the_end(source, folder, monkeypatch):
  """The leftover of a conversion whose groups are all on the disk."""

  def killed(self):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(convert, "_WRITE_BYTES", 5_000)
    patch.setattr(writer.CheckpointWriter, "_finish", killed)
    with pytest.raises(KeyboardInterrupt):
      convert.convert_checkpoint(source, folder, resume=True)
  (journal,) = folder.parent.glob("*.journal")
  return journal


def test_a_damaged_journal_loses_only_what_follows(source, tmp_path, quantized, monkeypatch):
  folder = tmp_path / "out"
  journal = killed_before_the_end(source, folder, monkeypatch)
  lines = journal.read_bytes().splitlines(keepends=True)
  assert len(lines) >= 4
  damaged = bytearray(lines[2])
  damaged[damaged.index(b'"sums": {"') + 60] ^= 1
  journal.write_bytes(lines[0] + lines[1] + bytes(damaged) + b"".join(lines[3:]))
  quantized.clear()
  convert.convert_checkpoint(source, folder, resume=True)
  known = set(json.loads(lines[1])["sums"])
  assert set(quantized) == set(Checkpoint(folder).expected) - known
  convert.convert_checkpoint(source, tmp_path / "truth")
  assert contents(folder) == contents(tmp_path / "truth")


def test_a_journal_goes_on_after_a_line_that_a_kill_cut_short(tmp_path):
  path = tmp_path / "a.journal"
  journal = Journal.create(path, "work")
  journal.note_group("one", {"a": "1" * 64}, {})
  journal.close()
  path.write_bytes(path.read_bytes() + b'{"group": "tw')
  again = Journal.take(path)
  assert again.work == "work" and list(again.groups) == ["one"]
  assert Journal.take(path) is None  # its writer lives
  again.note_group("three", {"b": "2" * 64}, {})
  again.close()
  assert list(Journal.take(path).groups) == ["one", "three"]


@pytest.mark.parametrize("reason", ["other options", "lost groups", "no readable journal"])
def test_a_leftover_that_cannot_be_continued_is_removed_with_a_sentence(source, tmp_path, monkeypatch, capsys, reason):
  folder, recipe = tmp_path / "out", Recipe()
  journal = killed_before_the_end(source, folder, monkeypatch)
  if reason == "other options":
    recipe = Recipe("bf16")
  elif reason == "lost groups":
    shutil.rmtree(sorted(journal.with_suffix(".partial_save").iterdir())[-1])
  else:
    journal.write_bytes(b"{")
  convert.convert_checkpoint(source, folder, recipe, resume=True)
  assert reason in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_without_hard_links(source, tmp_path, monkeypatch):
  def refuse(*args):
    raise PermissionError(1, "Operation not permitted")

  monkeypatch.setattr(os, "link", refuse)
  convert.convert_checkpoint(source, tmp_path / "out")
  assert [path.name for path in tmp_path.iterdir()] == ["out"] and contents(tmp_path / "out")


def test_another_conversions_result_is_not_taken_for_this_one(source, tmp_path, monkeypatch):
  folder = tmp_path / "out"
  killed_before_the_end(source, folder, monkeypatch)
  folder.mkdir()
  with pytest.raises(InputError, match="exists already"):
    convert.convert_checkpoint(source, folder, resume=True)
  assert list(folder.iterdir()) == []


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 7), (4096, 14336), (128256, 512), (9_000_001,), (3, 5_000_003)])
def test_blocks_cover_an_array(shape):
  array = np.zeros(shape, np.uint8)
  block = block_shape(shape, 1)
  assert np.prod(block) <= 8 << 20
  digests = blocks_of(array)
  whole = tuple((0, size) for size in shape)
  assert digests.first_wrong(array, whole) is None
  if array.size:
    array[tuple(size - 1 for size in shape)] = 1
    assert all(stop == size for (_, stop), size in zip(digests.first_wrong(array, whole), shape, strict=True))
  assert type(digests).from_json(shape, json.loads(json.dumps(digests.to_json()))) == digests
