"""The digest that program keys hold changes with every file of both packages."""

import pathlib
import shutil

import pytest

from jaxfp8 import source_digest
from jaxfp8.serving import program_cache

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = sorted({path.parent for package in source_digest.PACKAGES for path in (ROOT / package).rglob("*.py")})


@pytest.fixture
def copied(tmp_path):
  for package in source_digest.PACKAGES:
    shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
  return tmp_path


def test_a_copy_has_the_same_digest(copied):
  assert source_digest.source_digest(copied) == source_digest.source_digest()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_edit_in_any_folder_changes_the_digest(copied, folder):
  before = source_digest.source_digest(copied)
  for path in sorted((copied / folder.relative_to(ROOT)).glob("*.py")):
    path.write_text(path.read_text(encoding="utf-8") + "#", encoding="utf-8")
    after = source_digest.source_digest(copied)
    assert after != before, path
    before = after


def test_a_moved_file_changes_the_digest(copied):
  before = source_digest.source_digest(copied)
  (copied / "jaxfp8" / "units.py").rename(copied / "jaxfp8" / "planning" / "units.py")
  assert source_digest.source_digest(copied) != before


def test_no_source_is_an_error(tmp_path):
  with pytest.raises(FileNotFoundError, match="no Python files in"):
    source_digest.source_digest(tmp_path)


def test_the_program_cache_asks_for_it(monkeypatch):
  """A program stored before an edit has another key after it."""
  program_cache._environment.cache_clear()
  before = program_cache._environment()
  monkeypatch.setattr(program_cache, "source_digest", lambda: "another")
  program_cache._environment.cache_clear()
  assert program_cache._environment() != before
  program_cache._environment.cache_clear()
