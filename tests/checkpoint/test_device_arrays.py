"""Loading: nothing is read twice, nothing is held twice, and every way into a device gives the same arrays."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxfp8.checkpoint import convert, device_arrays, load, stored_arrays
from jaxfp8.checkpoint.open import Checkpoint
from jaxfp8.recipe import LayerFormat
from jaxfp8.sharding import make_mesh
from tests.helpers import checkpoint_cases, tiny_llamas
from tools import measure_loading

WEIGHTS, BESIDE = 400e6, 256 << 20  # bytes; 120 to 200 MiB were seen beside the weights


def test_memory_beside_the_weights(tmp_path):
  """A checkpoint of 0.4 GB over four devices, in a process of its own; `python -m tools.measure_loading` does 4 GB."""
  measure_loading.write(tmp_path / "a", 12, d_model=2048, d_ff=4096, num_heads=16)
  found = measure_loading.measure(tmp_path / "a", 4)
  assert found["weight_bytes"] > WEIGHTS
  assert found["peak_bytes"] < found["weight_bytes"] + BESIDE
  assert found["read_bytes"] < 1.02 * found["weight_bytes"]


@pytest.mark.parametrize(
  ("config", "recipe", "tensor"),
  [("odd_tied", "channel", 4), ("untied", "f32", 3), ("groups_of_blocks", "block128", 6), ("untied", "channel", None)],
)
@pytest.mark.parametrize("platforms", [("cpu",), ()], ids=["host memory", "sent and written"])
def test_small_jobs(config, recipe, tensor, platforms, monkeypatch, tmp_path):
  """A layer or a few rows at a time, by both ways into a device, from a checkpoint: the arrays of one job a weight."""
  config, recipe = checkpoint_cases.CONFIGS[config], checkpoint_cases.RECIPES[recipe]
  source = tiny_llamas.source(config)
  convert.convert_checkpoint(source, tmp_path / "a", recipe)
  mesh = make_mesh(config, tensor) if tensor else None
  want = load.load_source(source, recipe, mesh=mesh)
  monkeypatch.setattr(device_arrays, "_JOB_BYTES", 3000)
  monkeypatch.setattr(device_arrays, "_HOST_PLATFORMS", platforms)
  reads, read = [], Checkpoint.read_ranges
  monkeypatch.setattr(Checkpoint, "read_ranges", lambda self, ranges: reads.append(arrays := read(self, ranges)) or arrays)
  model = load.load(tmp_path / "a", mesh=mesh)
  for a, b in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(want)), strict=True):
    assert a.sharding == b.sharding and a.dtype == b.dtype and a.committed == b.committed
    for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
      assert x.device == y.device
      np.testing.assert_array_equal(*(np.ascontiguousarray(np.asarray(s.data)).view(np.uint8) for s in (x, y)))
  assert len(reads) > 10
  total = sum(array.nbytes for arrays in reads for array in arrays.values())
  groups = stored_arrays.checkpoint_arrays(config, recipe, (LayerFormat.uniform(recipe.weights),) * config.num_layers)
  stored = sum(int(np.prod(shape)) * dtype.itemsize for group in groups for shape, dtype in group.values())
  assert total == stored, "everything once"
