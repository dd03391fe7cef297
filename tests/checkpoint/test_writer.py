"""A checkpoint appears whole or not at all."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from jaxfp8.checkpoint import convert, load
from jaxfp8.checkpoint.manifest import Manifest
from jaxfp8.checkpoint.save import save
from jaxfp8.checkpoint.writer import CheckpointWriter
from jaxfp8.errors import InputError
from jaxfp8.recipe import LayerFormat, Recipe
from tests.helpers import tiny_llamas, tiny_models
from tests.helpers.checkpoint_cases import CONFIGS, assert_same, model_of


def manifest_of(config, recipe) -> Manifest:
  formats = (LayerFormat.uniform(recipe.weights),) * config.num_layers
  return Manifest(config, recipe, formats, None, {})


class TestWriting:
  """A checkpoint is whole, or it does not exist, and nothing else is left behind."""

  def test_an_exception_leaves_nothing(self, tmp_path):
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path / "a", manifest_of(CONFIGS["untied"], Recipe())) as writer:
      writer.write({"x": np.ones(3, np.float32)})
      raise ZeroDivisionError
    assert not list(tmp_path.iterdir())

  def test_bad_weights_leave_nothing(self, tmp_path):
    class Broken(tiny_llamas.ArraySource):
      def read(self, name):
        if "layers.2" in name:
          raise InputError("weights must be finite")
        return super().read(name)

    source = Broken(CONFIGS["untied"], tiny_models.make_weights(CONFIGS["untied"]))
    with pytest.raises(InputError, match="finite"):
      convert.convert_checkpoint(source, tmp_path / "deep" / "a", Recipe())
    assert not list((tmp_path / "deep").iterdir())

  def test_an_existing_folder_is_kept(self, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "precious").write_text("x")
    with pytest.raises(InputError, match="exists already"):
      save(model_of("odd_tied", "f32"), tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a" / "precious").exists()

  def test_a_folder_that_cannot_be_written(self, tmp_path):
    """A file stands where a folder would have to be made (permissions do not stop root)."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write .*pass another folder or free space"):
      save(model_of("odd_tied", "f32"), tmp_path / "file" / "a")

  def test_a_full_disk(self, tmp_path, monkeypatch):
    """The system refuses while the last files are written."""

    def full(*args, **kwargs):
      raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"No space left on device\. Nothing was left behind"):
      save(model_of("odd_tied", "f32"), tmp_path / "a")
    assert not list(tmp_path.iterdir())

  def test_a_killed_process_leaves_no_checkpoint(self, tmp_path):
    """SIGKILL between two groups: what is left is not called by the checkpoint's name, and does not stop the next one."""
    script = f"""
      import os, signal, sys
      sys.path.insert(0, {str(pathlib.Path(__file__).parents[2])!r})
      import numpy as np
      from tests.checkpoint import test_writer as t
      writer = t.CheckpointWriter({str(tmp_path / "a")!r}, t.manifest_of(t.CONFIGS["odd_tied"], t.Recipe()))
      writer.__enter__().write({{"x": np.ones(1000, np.float32)}})
      os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, timeout=120)
    assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()[-2000:]
    assert not (tmp_path / "a").exists() and list(tmp_path.iterdir())
    save(model_of("odd_tied", "f32"), tmp_path / "a")
    assert_same(load.load(tmp_path / "a"), model_of("odd_tied", "f32"))
