"""An interruption at any point leaves no file under a temporary name, in a library call and in a command."""

import fcntl
import os
import pathlib
import signal

import numpy as np
import pytest

from jaxfp8 import unfinished
from jaxfp8.checkpoint import export, weights_cache
from jaxfp8.checkpoint.convert import convert_checkpoint
from jaxfp8.checkpoint.journal import Journal
from jaxfp8.checkpoint.writer import CheckpointWriter
from jaxfp8.commands import command
from jaxfp8.recipe import Recipe
from tests.helpers import commands, tiny_models

pytestmark = pytest.mark.process

CONFIG = tiny_models.make_config("mha_tied")


@pytest.fixture
def source(tmp_path):
  return tiny_models.write_hf_folder(tmp_path / "source", CONFIG, tiny_models.make_weights(CONFIG))


def interrupt(*args, **kwargs):
  raise KeyboardInterrupt


class TestLibrary:
  """KeyboardInterrupt is raised where Ctrl-C would raise it."""

  @pytest.mark.parametrize("point", ["before the journal has its lock", "in the journal's first line", "in a write"])
  def test_a_conversion(self, source, tmp_path, monkeypatch, point):
    match point:
      case "before the journal has its lock":
        monkeypatch.setattr(fcntl, "flock", interrupt)
      case "in the journal's first line":
        monkeypatch.setattr(Journal, "_note", interrupt)
      case "in a write":
        monkeypatch.setattr(CheckpointWriter, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
      convert_checkpoint(source, tmp_path / "out" / "a", Recipe())
    assert list((tmp_path / "out").iterdir()) == []
    assert not unfinished._unfinished

  @pytest.mark.parametrize("point", ["_write_tensors", "_write_json", "sync_tree"])
  def test_an_export(self, source, tmp_path, monkeypatch, point):
    convert_checkpoint(source, tmp_path / "ours", Recipe())
    monkeypatch.setattr(export, point, interrupt)
    with pytest.raises(KeyboardInterrupt):
      export.export_checkpoint(tmp_path / "ours", tmp_path / "out" / "a")
    assert list((tmp_path / "out").iterdir()) == []

  def test_the_list_of_sources(self, source, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
      weights_cache.cached_checkpoint(source, Recipe(), tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []

  def test_a_journal_that_another_writer_removed(self, source, tmp_path, monkeypatch):
    """Another writer may take a journal that has no lock yet for a dead one's."""
    flock, removed = fcntl.flock, []

    def raced(file, how):
      if not removed:
        removed.append(pathlib.Path(file.name))
        removed[0].unlink()
      return flock(file, how)

    monkeypatch.setattr(fcntl, "flock", raced)
    journals = []
    note = Journal._note
    monkeypatch.setattr(Journal, "_note", lambda self, entry: journals.append(str(self.path)) or note(self, entry))
    convert_checkpoint(source, tmp_path / "out", Recipe())
    assert removed and str(removed[0]) not in journals
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


# Stops at one point of a conversion, says so, and goes on when the signal has come: argv is source, output, point.
STOPPED = """
import os, sys, time
from absl import flags
from jaxfp8 import unfinished
from jaxfp8.checkpoint import journal, writer
from jaxfp8.checkpoint.convert import convert_checkpoint
from jaxfp8.commands import command

asked, abandon, leave = [], unfinished.abandon_unfinished, os._exit

def stop_here(function):
  def stopped(*args):
    print("here", flush=True)
    while not asked:
      time.sleep(0.01)
    time.sleep(0.3)  # the first thread is now in the middle of its cleaning
    return function(*args)
  return stopped

unfinished.abandon_unfinished = lambda: asked.append(True) or abandon()
os._exit = lambda code: time.sleep(0.6) or leave(code)  # time for the other thread to create files
if sys.argv[3] == "journal":
  journal.Journal._note = stop_here(journal.Journal._note)
elif sys.argv[3] == "enter":
  writer.CheckpointWriter.__enter__ = stop_here(writer.CheckpointWriter.__enter__)
else:
  writer.CheckpointWriter.write = stop_here(writer.CheckpointWriter.write)
main = lambda: convert_checkpoint(*sys.argv[1:3]) and None
command.run(command.Command("stopped", main, flags.FlagValues()), [])
"""


@pytest.mark.process
@pytest.mark.parametrize("point", ["enter", "journal", "write"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, command.INTERRUPTED), (signal.SIGTERM, command.TERMINATED)])
def test_a_command(source, tmp_path, point, number, code):
  process = commands.start(source, tmp_path / "out" / "a", point, script=STOPPED)
  assert process.stdout.readline() == "here\n"
  process.send_signal(number)
  ran = commands.end(process)
  assert (ran.code, ran.err) == (code, "Stopped.\n")
  assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_processes_hear_ctrl_c_whatever_the_shell_ignores():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    process = commands.start(script="import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)")
    assert commands.end(process).out == "True\n"
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGINT, before)


def test_a_small_file_is_whole_or_as_before(tmp_path):
  path = tmp_path / "file"
  unfinished.write_atomically(path, b"old")
  with pytest.raises(TypeError):
    unfinished.write_atomically(path, np)
  assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
