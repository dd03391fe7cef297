"""Checkpoints and a cache that an earlier version wrote are read as that version read them (goldens/README.md says how)."""

import hashlib
import json
import pathlib
import tarfile

import jax
import numpy as np
import pytest
from flax import nnx

from jaxfp8.checkpoint import load, weights_cache
from jaxfp8.checkpoint.convert import convert_checkpoint
from jaxfp8.checkpoint.open import open_checkpoint
from jaxfp8.recipe import Recipe

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "checkpoints"
EXPECTED = json.loads((GOLDENS / "expected.json").read_text())


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> pathlib.Path:
  """The folders that the earlier version wrote: a source, checkpoints and a cache."""
  folder = tmp_path_factory.mktemp("stored")
  with tarfile.open(GOLDENS / "checkpoints.tar.xz") as archive:
    archive.extractall(folder, filter="data")
  return folder


def digests(model) -> list[str]:
  return sorted(
    hashlib.sha256(f"{x.shape} {x.dtype}".encode() + np.ascontiguousarray(x).reshape(-1).view(np.uint8).tobytes()).hexdigest()
    for x in map(np.asarray, jax.tree.leaves(nnx.state(model)))
  )


@pytest.mark.parametrize("name", ["channel", "block128", "static"])
def test_arrays_are_the_same(stored, name):
  model = load.load(stored / name)
  assert digests(model) == EXPECTED["arrays"][name]
  assert model.recipe.activations.is_static == (name == "static")


def test_the_block128_checkpoint_has_every_kind_of_exception(stored):
  exceptions = open_checkpoint(stored / "block128").manifest.exceptions
  assert set(exceptions.values()) == {"channel", "block128"} and "lm_head" in exceptions


def shape_of(value):
  """A JSON value without its leaves, but for the names of its keys."""
  return {key: shape_of(inner) for key, inner in value.items()} if isinstance(value, dict) else type(value).__name__


def test_a_manifest_has_the_same_keys(stored, tmp_path):
  convert_checkpoint(stored / "source", tmp_path / "channel", Recipe("fp8", "channel"))
  before, now = (json.loads((folder / "channel" / "jaxfp8.json").read_text()) for folder in (stored, tmp_path))
  arrays = {key for key in before["checksums"] if "[" in key}
  assert {key: before["checksums"][key] for key in arrays} == {key: now["checksums"][key] for key in arrays}
  for manifest in (before, now):
    manifest["files"] = {name: size for name, size in manifest["files"].items() if "/" not in name}  # Orbax's are random
  now["checksums"] = {name: now["checksums"][name] for name in before["checksums"]}  # those of Orbax's files are new
  assert set(now.pop("blocks")) == arrays
  assert list(before) == list(now) and shape_of(before) == shape_of(now)
  assert before["recipe"] == now["recipe"] and before["formats"] == now["formats"] and before["config"] == now["config"]


def test_a_cache_is_used(stored, monkeypatch):
  """Under its name of now: a cache that earlier readers made, which took other tokens from some files, is not found."""
  (old,) = (stored / "cache" / "checkpoints").iterdir()
  old.rename(old.with_name(EXPECTED["cache_folders"]["fp8 channel"]))
  monkeypatch.setattr(weights_cache.convert, "convert_checkpoint", None)
  checkpoint = weights_cache.cached_checkpoint(stored / "source", Recipe(), stored / "cache")
  assert checkpoint.path.name == EXPECTED["cache_folders"]["fp8 channel"]
  assert digests(load.load(checkpoint)) == EXPECTED["arrays"]["channel"]


@pytest.mark.parametrize("recipe", EXPECTED["cache_folders"])
def test_names_in_the_cache(stored, tmp_path, recipe):
  digest = weights_cache._content_digest(weights_cache.readers.source_files(stored / "source"), tmp_path)
  name = weights_cache.folder_name(stored / "source", digest, Recipe(*recipe.split()))
  assert name == EXPECTED["cache_folders"][recipe]


def test_fingerprints(stored):
  assert weights_cache.fingerprint(open_checkpoint(stored / "source")) == EXPECTED["fingerprints"]["source"]
  assert weights_cache.fingerprint(open_checkpoint(stored / "channel")) == EXPECTED["fingerprints"]["channel"]
  (cached,) = (stored / "cache" / "checkpoints").iterdir()
  assert weights_cache.fingerprint(open_checkpoint(cached)) == EXPECTED["fingerprints"]["cache"]
