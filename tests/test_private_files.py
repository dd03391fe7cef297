"""The cache holds programs: nothing is loaded that another user can have written, and nothing is written through a link."""

import grp
import os
import pathlib
import pickle
import pwd
import stat

import jax
import numpy as np
import pytest
from jax._src import compilation_cache
from jax.sharding import Mesh

from jaxfp8 import private_files, stored_files, unfinished
from jaxfp8.checkpoint import weights_cache
from jaxfp8.checkpoint.journal import Journal
from jaxfp8.commands import command
from jaxfp8.private_files import NotPrivate
from jaxfp8.recipe import Recipe
from jaxfp8.serving import program_cache
from pallas_kernels import tuned
from tests.helpers import commands

STRANGER = 12345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setattr(stored_files, "_said", set())
  return private_files.open_cache(tmp_path / "cache")


def mode(path):
  return stat.S_IMODE(os.lstat(path).st_mode)


def replace_by_link(path):
  path.rename(path.with_name("elsewhere"))
  path.symlink_to(path.with_name("elsewhere"))


def replace_by_pipe(path):
  path.unlink()
  os.mkfifo(path)


# What makes a file of the cache another user's: (the change, words of the sentence).
CHANGES = {
  "owner": pytest.param(lambda path: os.chown(path, STRANGER, STRANGER), "belongs to another user", marks=as_root),
  "mode": (lambda path: path.chmod(0o666), "other users can write to"),
  "group": (lambda path: (os.chown(path, -1, STRANGER), path.chmod(0o660)), "other users can write to"),
  "link": (replace_by_link, "is a link"),
  "pipe": (replace_by_pipe, "is no regular file"),
  "folder": (lambda path: path.parent.chmod(0o777), "other users can write to"),
  "its owner": pytest.param(lambda path: os.chown(path.parent, STRANGER, 0), "belongs to another user", marks=as_root),
  "the cache": (lambda path: path.parents[1].chmod(0o777), "other users can write to"),
}
CHANGES["group"] = pytest.param(*CHANGES["group"], marks=as_root)


@pytest.mark.parametrize(("change", "says"), CHANGES.values(), ids=CHANGES)
class TestAnotherUsersFile:
  def test_it_is_not_read(self, cache, capsys, change, says):
    path = cache / "programs" / "step"
    assert stored_files.write(path, b"content") and stored_files.read(path, "it is made again") == b"content"
    change(path)
    assert stored_files.read(path, "it is made again") is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cache: ") and says in line and line.endswith("; it is made again.")

  def test_no_program_is_unpickled(self, cache, change, says, monkeypatch):
    """The planted program has a right digest, and would leave a file behind."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    monkeypatch.setattr(program_cache, "_path", lambda key, mesh: cache / "programs" / "step")
    ran = cache.parent / "ran"
    stored_files.write(cache / "programs" / "step", pickle.dumps(Touch(ran)))
    change(cache / "programs" / "step")
    assert program_cache.load("key", mesh) is None and not ran.exists()
    os.chmod(cache, 0o700)
    os.chown(cache / "programs", os.geteuid(), -1)
    os.chmod(cache / "programs", 0o700)
    stored_files.write(cache / "programs" / "step", pickle.dumps(Touch(ran)))  # it takes the planted file's place
    assert program_cache.load("key", mesh) is None and ran.exists()  # it is loaded: the test would see that

  def test_jaxs_own_cache(self, cache, change, says, monkeypatch):
    monkeypatch.setattr(compilation_cache, "get_file_cache", compilation_cache.get_file_cache)
    program_cache.verify_jax_cache()
    jaxs, _ = compilation_cache.get_file_cache(str(cache / "programs"))
    jaxs.put("key", b"program")
    assert jaxs.get("key") == b"program"
    change(cache / "programs" / "key-cache")
    assert jaxs.get("key") is None

  def test_tile_sizes(self, cache, change, says, capsys):
    command.use_measured_tiles(str(cache))
    try:
      device = {"device_kind": "a GPU", "compute_capability": (9, 0), "num_sms": 8}
      path = tuned.write("fp8_matmul", device, [{"key": {"regime": "x"}, "sizes": {"stages": 3}}])
      assert mode(path) == 0o600 and mode(path.parent) == 0o700 and len(tuned._files(path.parent)) == 1
      tuned._files.cache_clear()
      change(path)
      assert tuned._files(path.parent) == ()
      assert says in capsys.readouterr().err
    finally:
      tuned.use_folder(None)


@as_root
def test_the_choices_of_xlas_autotuner(cache, monkeypatch, capsys):
  monkeypatch.setattr(compilation_cache, "get_file_cache", compilation_cache.get_file_cache)
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_enable_xla_caches")
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update("jax_compilation_cache_dir", str(cache / "programs"))
  try:
    private_files.make_folder(cache / "programs" / program_cache._AUTOTUNED)
    program_cache.verify_jax_cache()
    assert jax.config.jax_persistent_cache_enable_xla_caches == before[names[1]] != "none"
    os.chown(cache / "programs" / program_cache._AUTOTUNED, STRANGER, -1)
    program_cache.verify_jax_cache()
    assert jax.config.jax_persistent_cache_enable_xla_caches == "none"
    assert "belongs to another user" in capsys.readouterr().err
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


class Touch:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


def test_jaxs_own_cache_keeps_its_size(cache, monkeypatch):
  monkeypatch.setattr(compilation_cache, "get_file_cache", compilation_cache.get_file_cache)
  program_cache.verify_jax_cache()
  jaxs, _ = compilation_cache.get_file_cache(str(cache / "programs"))
  before = jax.config.jax_compilation_cache_max_size
  jax.config.update("jax_compilation_cache_max_size", 1000)
  try:
    for number in range(5):
      jaxs.put(str(number), bytes(300))
    jaxs.put("large", bytes(2000))
  finally:
    jax.config.update("jax_compilation_cache_max_size", before)
  assert [key for key in ("0", "1", "2", "3", "4", "large") if jaxs.get(key)] == ["3", "4"]


class TestModes:
  @pytest.mark.parametrize("umask", [0, 0o022, 0o277])
  def test_whatever_the_umask(self, tmp_path, umask):
    before = os.umask(umask)
    try:
      cache = private_files.open_cache(tmp_path / "deep" / "cache")
      stored_files.write(cache / "programs" / "step", b"content")
      private_files.open_lock(cache / "locks" / "a").close()
    finally:
      os.umask(before)
    found = {path.name: mode(path) for path in (tmp_path / "deep", *(tmp_path / "deep").rglob("*"))}
    assert found == dict.fromkeys(("deep", "cache", "programs", "locks"), 448) | {"step": 0o600, "a": 0o600}

  def test_an_earlier_versions_cache_is_closed(self, tmp_path):
    for name in ("cache/programs", "cache/tuned/fp8_matmul", "cache/checkpoints"):
      (tmp_path / name).mkdir(parents=True)
    (tmp_path / "cache" / "sources.json").write_text("{}")
    folders = [tmp_path / "cache", *(path for path in (tmp_path / "cache").rglob("*") if path.is_dir())]
    for wide in (0o777, 0o755):
      for folder in folders:
        folder.chmod(wide)
      private_files.open_cache(tmp_path / "cache")
      assert [mode(folder) for folder in folders] == [0o700] * len(folders)

  @pytest.mark.parametrize("wide", [0o1777, 0o755])
  def test_a_folder_for_more_than_a_cache_is_left_as_it_is(self, tmp_path, wide):
    for names in ((), ("programs", "letters.txt")):
      (tmp_path / "shared").mkdir(exist_ok=True)
      for name in names:
        (tmp_path / "shared" / name).mkdir()
      (tmp_path / "shared").chmod(wide)
      private_files.open_cache(tmp_path / "shared")
      assert mode(tmp_path / "shared") == wide

  def test_a_folder_that_others_can_write_to_is_refused_and_left_as_it_is(self, tmp_path):
    tmp_path.joinpath("letters.txt").touch()
    tmp_path.chmod(0o777)
    for cache in (tmp_path, tmp_path / "cache"):
      with pytest.raises(NotPrivate, match=r"other users can write to .* \(mode 777; chmod go-w closes it\)"):
        private_files.open_cache(cache)
    assert mode(tmp_path) == 0o777
    tmp_path.chmod(0o700)

  def test_files_that_an_earlier_version_left_open_to_others(self, cache, tmp_path):
    (cache / "locks").mkdir()
    (cache / "locks" / "a").touch()
    (cache / "locks" / "a").chmod(0o666)
    private_files.open_lock(cache / "locks" / "a").close()
    assert mode(cache / "locks" / "a") == 0o600
    before = os.umask(0)
    try:
      Journal.create(tmp_path / "a.journal", "work").close()
    finally:
      os.umask(before)
    assert mode(tmp_path / "a.journal") == 0o600
    assert Journal.take(tmp_path / "a.journal").work == "work"


class TestWay:
  def test_links_of_this_user_are_followed(self, cache, tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to(cache)
    assert private_files.open_cache(tmp_path / "a") == tmp_path / "a"
    stored_files.write(tmp_path / "a" / "programs" / "x", b"x")
    assert stored_files.read(cache / "programs" / "x", "") == b"x"
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError):
      private_files.open_cache(tmp_path / "circle")

  def test_a_link_may_lead_into_a_folder_and_out_again(self, tmp_path):
    (tmp_path / "far" / "below").mkdir(parents=True)
    (tmp_path / "near").symlink_to("far/below")
    (tmp_path / "link").symlink_to("near/..")  # far, not tmp_path
    private_files.require_folder(tmp_path / "link" / "below" / ".." / ".." / "far")
    (tmp_path / "far").chmod(0o777)
    with pytest.raises(NotPrivate, match=r"can write to /.*/far \("):
      private_files.require_folder(tmp_path / "link")

  @as_root
  @as_root
  def test_where_another_users_link_leads_nothing_is_changed(self, tmp_path):
    (theirs := tmp_path / "theirs").mkdir()
    (mine := tmp_path / "mine").mkdir()
    mine.chmod(0o2775)
    (theirs / "cache").symlink_to(mine)
    os.chown(theirs, STRANGER, STRANGER)
    os.chown(theirs / "cache", STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(private_files.NotPrivate):
      private_files.open_cache(theirs / "cache")
    assert stat.S_IMODE(mine.stat().st_mode) == 0o2775

  def test_a_group_is_shared_by_all_who_have_it_first(self, monkeypatch):
    """`useradd -g alice bob` writes bob nowhere but in his own line."""
    alice, bob = (pwd.struct_passwd((name, "x", uid, 1001, "", "", "")) for name, uid in (("alice", 1001), ("bob", 1002)))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: alice)
    monkeypatch.setattr(grp, "getgrgid", lambda _: grp.struct_group(("alice", "x", 1001, [])))
    for users, is_own in (([alice], True), ([alice, bob], False)):
      monkeypatch.setattr(pwd, "getpwall", lambda users=users: users)
      assert private_files._is_own_group.__wrapped__(1001, 1001) is is_own

  def test_the_default_is_absolute(self, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for variable, folder in (("here", "/home/me/.cache/jaxfp8"), ("", "/home/me/.cache/jaxfp8"), ("/c", "/c/jaxfp8")):
      monkeypatch.setenv("XDG_CACHE_HOME", variable)
      assert private_files.default_cache() == folder

  def test_another_users_link_is_refused(self, cache, tmp_path):
    (tmp_path / "link").symlink_to(cache)
    os.chown(tmp_path / "link", STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(NotPrivate, match="belongs to another user"):
      private_files.open_cache(tmp_path / "link")

  def test_the_group_of_this_user_alone_may_write(self, cache, monkeypatch):
    cache.chmod(0o770)
    monkeypatch.setattr(private_files, "_is_own_group", lambda gid, uid: True)
    private_files.require_folder(cache)
    monkeypatch.setattr(private_files, "_is_own_group", lambda gid, uid: False)
    with pytest.raises(NotPrivate):
      private_files.require_folder(cache)

  def test_a_command_goes_on_without_such_a_cache(self, tmp_path, capsys):
    tmp_path.joinpath("letters.txt").touch()
    tmp_path.chmod(0o777)
    assert command._usable_cache_dir(str(tmp_path)) == ""
    (line,) = capsys.readouterr().err.splitlines()
    assert "other users can write to" in line and "This run goes on without a cache" in line
    tmp_path.chmod(0o700)


class TestLinksInTheWay:
  """A link with the name of a file that is written leads to a file of this user, which must stay as it is."""

  @pytest.fixture
  def letter(self, tmp_path):
    path = tmp_path / "letter"
    path.write_text("private")
    yield path
    assert path.read_text() == "private"

  def test_a_lock(self, cache, letter):
    (cache / "locks").mkdir()
    (cache / "locks" / "a").symlink_to(letter)
    with pytest.raises(NotPrivate):
      private_files.open_lock(cache / "locks" / "a")

  def test_a_file_of_the_cache(self, cache, letter):
    (cache / "sources.json").symlink_to(letter)
    assert stored_files.write(cache / "sources.json", b"{}")
    assert not (cache / "sources.json").is_symlink()

  def test_a_journal(self, letter, tmp_path):
    (tmp_path / "a.journal").symlink_to(letter)
    os.mkfifo(tmp_path / "b.journal")
    assert Journal.take(tmp_path / "a.journal") is None and Journal.take(tmp_path / "b.journal") is None
    with pytest.raises(FileExistsError):
      Journal.create(tmp_path / "a.journal", "work")

  def test_a_leftover(self, letter, tmp_path):
    os.mkfifo(tmp_path / "out.writing-00000000")  # opening it would wait for a writer
    (tmp_path / "out.writing-11111111").symlink_to(letter)
    with unfinished.unfinished_folder(tmp_path / "out") as folder:
      (folder / "file").touch()
    assert (tmp_path / "out" / "file").exists()


class TestWeights:
  @pytest.fixture
  def convert(self, tmp_path, cache):
    chain = commands.write_chain(tmp_path / "chain")
    return lambda: weights_cache.cached_checkpoint(chain, Recipe(), cache)

  def test_other_weights_are_not_taken(self, convert, capsys):
    folder = convert().path
    assert {mode(path) for path in (folder, *folder.rglob("*"))} == {0o700, 0o600}
    data = next(path for path in folder.rglob("*") if path.parent.name == "d")
    for change in (lambda path: path.chmod(0o666), replace_by_link):
      change(data)
      assert convert().path == folder
      (line,) = capsys.readouterr().err.splitlines()
      assert line.startswith(f"cache: {folder} is damaged: ") and line.endswith("; the source is converted again.")
      data = next(path for path in folder.rglob("*") if path.parent.name == "d")
      assert mode(data) == 0o600 and not data.is_symlink() and convert().path == folder
      assert capsys.readouterr().err == ""

  def test_a_cache_that_others_can_change_is_not_used(self, convert, cache, capsys):
    (cache / "letters.txt").touch()
    cache.chmod(0o777)
    assert convert() is None
    assert "other users can write to" in capsys.readouterr().err
