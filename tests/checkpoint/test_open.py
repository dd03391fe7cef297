"""A checkpoint that lost something, or is not what its manifest says, is refused in one sentence that names it."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from jaxfp8.checkpoint import load
from jaxfp8.checkpoint.export import export_checkpoint
from jaxfp8.checkpoint.manifest import digest_of, orbax, orbax_context
from jaxfp8.checkpoint.open import Checkpoint
from jaxfp8.checkpoint.save import save
from jaxfp8.errors import InputError
from tests.helpers.checkpoint_cases import assert_same, model_of


class TestDamage:
  """Each damage is one InputError of one sentence or two that names the folder."""

  @pytest.fixture(scope="class")
  @classmethod
  def whole(cls, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "whole"
    save(model_of("odd_tied", "channel"), folder)
    return folder

  @pytest.fixture
  def folder(self, whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")

  @staticmethod
  def refused(folder, *words):
    with pytest.raises(InputError) as caught:
      load.load(Checkpoint(folder))
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message and len(message) < 700
    assert all(word in message for word in words), message

  @staticmethod
  def edit(folder, change):
    path = folder / "jaxfp8.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data | {"sha256": digest_of(data)}))

  def test_the_copy_itself_is_fine(self, folder):
    assert_same(load.load(Checkpoint(folder)), model_of("odd_tied", "channel"))

  def test_no_checkpoint(self, tmp_path):
    self.refused(tmp_path, "no whole checkpoint")

  @pytest.mark.parametrize("name", ["absent", "."])
  def test_a_folder_of_something_else_is_not_called_damaged(self, tmp_path, name):
    with pytest.raises(InputError, match=r"is no checkpoint of jaxfp8, since it holds no jaxfp8\.json"):
      export_checkpoint(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()

  def test_a_newer_format(self, folder):
    self.edit(folder, lambda data: data.update(format_version=99))
    self.refused(folder, "format version 99", "Install a newer jaxfp8")

  @pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1}', '{"format_version": "x"}', "\udcff"])
  def test_a_broken_manifest(self, folder, text):
    (folder / "jaxfp8.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    self.refused(folder, "no whole checkpoint")

  def test_an_unknown_field(self, folder):
    self.edit(folder, lambda data: data["config"].update(experts=8))
    with pytest.raises(InputError, match="experts"):
      load.load(Checkpoint(folder))

  def test_another_shape(self, folder):
    self.edit(folder, lambda data: data["config"].update(d_ff=90))
    self.refused(folder, "is damaged", "(90, 52)", "(91, 52)")

  def test_another_dtype(self, folder):
    """Orbax alone would cast float8 to bf16 without a word."""

    def change(data):
      data["recipe"]["weights"] = "bf16"
      data["formats"] = [dict.fromkeys(("qkv", "o", "gate_up", "down"), "bf16")] * 2

    self.edit(folder, change)
    self.refused(folder, "is damaged", "bfloat16", "float8_e4m3fn")

  def test_a_missing_array(self, folder):
    self.edit(folder, lambda data: data["config"].update(tied_embeddings=False))
    self.refused(folder, "lm_head.weight[V,D]", "absent")

  @pytest.mark.parametrize("damage", ["remove", "truncate", "empty"])
  def test_a_damaged_file(self, folder, damage):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "jaxfp8.json"]
    largest = max(files, key=lambda path: path.stat().st_size)
    if damage == "remove":
      largest.unlink()
    else:
      largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2] if damage == "truncate" else b"")
    self.refused(folder, "is damaged", "Convert its source again, or fetch the checkpoint again.")

  def test_orbax_does_cast(self, tmp_path):
    """The trap that dtypes are compared for. If this fails, Orbax has learnt to refuse, and the comparison may go."""
    ocp = orbax()
    with orbax_context(ocp):
      ocp.partial.save(tmp_path / "x", {"w": np.ones((4, 4), ml_dtypes.float8_e4m3fn)})
      ocp.partial.finalize(tmp_path / "x")
      loaded = ocp.load(tmp_path / "x", {"w": np.zeros((4, 4), ml_dtypes.bfloat16)})
    assert loaded["w"].dtype == ml_dtypes.bfloat16
