"""A file of the cache is what was written, or counts as no file; the cache itself may be impossible."""

import errno

import pytest

from jaxfp8 import stored_files


@pytest.fixture
def path(tmp_path):
  return tmp_path / "below" / "file"


@pytest.fixture(autouse=True)
def unsaid(monkeypatch):
  monkeypatch.setattr(stored_files, "_said", set())


def test_the_content_comes_back(path, capsys):
  assert stored_files.read(path, "it is made again") is None
  assert stored_files.write(path, b"content") and stored_files.write(path, b"other\ncontent")
  assert stored_files.read(path, "it is made again") == b"other\ncontent"
  assert capsys.readouterr().err == ""


def test_every_bit_is_noticed(path, capsys):
  stored_files.write(path, b"content")
  whole = path.read_bytes()
  for bit in range(8 * len(whole)):
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    assert stored_files.read(path, "it is made again") is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cache: {path} is damaged") and line.endswith("; it is made again.")


@pytest.mark.parametrize("data", [b"", b"sha256 ", b"content"])
def test_short_files_and_those_of_an_earlier_version_are_noticed(path, capsys, data):
  path.parent.mkdir()
  path.write_bytes(data)
  assert stored_files.read(path, "it is made again") is None
  assert capsys.readouterr().err.endswith("; it is made again.\n")


def test_a_folder_that_cannot_be_written_is_said_once(path, capsys):
  path.parent.write_text("a file is in the way")
  assert not stored_files.write(path, b"content") and not stored_files.write(path, b"content")
  assert capsys.readouterr().err == (
    f"cache: cannot write {path.parent}: File exists; this run goes on and keeps nothing for the next one.\n"
  )


def test_a_full_disk_leaves_the_earlier_file(path, monkeypatch, capsys):
  stored_files.write(path, b"earlier")

  def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr("os.replace", full)
  assert not stored_files.write(path, b"later")
  monkeypatch.undo()
  assert stored_files.read(path, "it is made again") == b"earlier" and list(path.parent.iterdir()) == [path]
  assert "No space left on device" in capsys.readouterr().err
