"""The roofline against numbers that do not come from it: published byte counts, sums by hand, the abstract model itself."""

import dataclasses
import math

import jax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxfp8.checkpoint import load, readers
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.mesh import ONE_DEVICE, MeshShape, possible_tensors
from jaxfp8.model import kv_cache
from jaxfp8.model.llama import Llama
from jaxfp8.planning.devices import DeviceSpec, load_device
from jaxfp8.planning.published import expected_fractions, published_measurements
from jaxfp8.planning.roofline import StepTimes, bound, decode_step, explain, kv_bytes_per_token, prefill_step
from jaxfp8.planning.weight_bytes import weight_bytes
from jaxfp8.recipe import Recipe

FP8 = Recipe(weights="fp8", activations="fp8", kv="fp8")
BF16 = Recipe(weights="bf16", activations="bf16", kv="bf16")
MODELS = (
  "llama-3.1-8b",
  "llama-3.1-70b",
  "llama-3.1-405b",
  "llama-3.2-1b",
  "llama-3.2-3b",
  "llama-3.3-70b",
  "smollm2-135m",
  "tiny",
)

# Parameters of the published checkpoints (the sum over model.safetensors.index.json, or the model card's exact count).
PARAMETERS = {
  "llama-3.1-8b": 8_030_261_248,
  "llama-3.1-70b": 70_553_706_496,
  "llama-3.1-405b": 405_853_388_800,
  "llama-3.2-1b": 1_235_814_400,
  "llama-3.2-3b": 3_212_749_824,
  "llama-3.3-70b": 70_553_706_496,
  "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_bf16_bytes_are_those_of_the_published_checkpoint(name):
  config = LlamaConfig.from_name(name)
  weights = weight_bytes(config, BF16)
  # Two bytes a parameter, but for the norms, which jaxfp8 keeps in float32.
  norms = (2 * config.num_layers + 1) * config.d_model
  assert weights.stored == 2 * (PARAMETERS[name] - norms) + 4 * norms


def test_70b_with_a_bf16_head_streams_70_55_gb_a_token():
  weights = weight_bytes(LlamaConfig.from_name("llama-3.1-70b"), FP8)
  # By hand: 80 layers of 8192 x (8192 + 2048 + 8192) + 3 x 8192 x 28672 bytes, and a head of 128256 x 8192 x 2 bytes.
  assert weights.matrices == 80 * (8192 * 18432 + 3 * 8192 * 28672) + 128256 * 8192 * 2 == 70_552_387_584
  assert weights.scales == 80 * 4 * (10240 + 8192 + 2 * 28672 + 8192)
  assert weights.norms == 161 * 8192 * 4
  assert weights.streamed == weights.matrices + weights.scales + weights.norms
  assert weights.stored - weights.streamed == 128256 * 8192 * 2
  cost = decode_step(LlamaConfig.from_name("llama-3.1-70b"), FP8, [1])
  assert cost.weight_read_bytes == weights.streamed + 8192 * 2  # and one row of the embedding


def test_70b_over_eight_devices_holds_8_82_gb_each():
  config = LlamaConfig.from_name("llama-3.1-70b")
  weights = weight_bytes(config, FP8, MeshShape.for_model(config, 8))
  assert round(weights.matrices / 1e9, 2) == 8.82


def _local_bytes(leaves, specs, sizes) -> int:
  """Bytes on one device: each dimension divided by the mesh axes it is cut over."""
  total = 0
  for leaf, spec in zip(leaves, specs, strict=True):
    shape = list(leaf.shape)
    for dim, axes in enumerate(spec):
      for axis in (axes,) if isinstance(axes, str) else (axes or ()):
        assert shape[dim] % sizes[axis] == 0
        shape[dim] //= sizes[axis]
    total += math.prod(shape) * leaf.dtype.itemsize
  return total


CUTS = [
  (name, tensor) for name in MODELS for tensor in (1, 2, 3, 8, 9, 16) if tensor in possible_tensors(LlamaConfig.from_name(name))
]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block128", "bf16", "f32"])
@pytest.mark.parametrize(("name", "tensor"), CUTS)
def test_bytes_are_those_of_the_abstract_model(name, granularity, tensor):
  config = LlamaConfig.from_name(name)
  recipe = Recipe(granularity=granularity) if granularity not in ("bf16", "f32") else Recipe(weights=granularity)
  mesh = MeshShape.for_model(config, tensor)
  try:
    llama = Llama(config, recipe, shape=mesh)
  except InputError:
    with pytest.raises(InputError, match="block128"):
      weight_bytes(config, recipe, mesh)
    return
  sizes = {"data": 1, "kv": mesh.kv, "group": mesh.group}
  weights = weight_bytes(config, recipe, mesh)
  assert weights.stored == _local_bytes(jax.tree.leaves(nnx.state(llama)), llama.partitions(), sizes)


def test_bytes_are_those_of_the_real_model_and_its_pool():
  source = readers.open_source(readers.default_model())
  for recipe in (Recipe(kv="fp8"), Recipe(granularity="block128", kv="bf16")):
    llama = load.load_source(source, recipe)
    assert weight_bytes(source.config, recipe).stored == sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(llama)))
    pool = kv_cache.KVCache.init(source.config, num_pages=2, dtype=recipe.kv)
    assert 2 * pool.page_size * kv_bytes_per_token(source.config, recipe) == sum(leaf.nbytes for leaf in jax.tree.leaves(pool))


@pytest.mark.parametrize("kv", ["fp8", "bf16", "f32"])
@pytest.mark.parametrize("tensor", [1, 2, 8])
def test_kv_bytes_are_those_of_the_pool(kv, tensor):
  config = LlamaConfig.from_name("llama-3.1-8b")
  mesh = MeshShape.for_model(config, tensor)
  pool = kv_cache.KVCache.abstract(config, num_pages=3, dtype=kv)
  sizes = {"data": 1, "kv": mesh.kv, "group": mesh.group}
  specs = jax.tree.leaves(pool.specs(), is_leaf=lambda node: isinstance(node, PartitionSpec))
  local = _local_bytes(jax.tree.leaves(pool), specs, sizes)
  assert 3 * pool.page_size * kv_bytes_per_token(config, dataclasses.replace(FP8, kv=kv), mesh) == local


def test_kv_bytes_published():
  config = LlamaConfig.from_name("llama-3.1-70b")
  assert kv_bytes_per_token(config, BF16) == 320 * 1024
  assert kv_bytes_per_token(config, FP8) == 160 * 1024 + 80 * 8 * 2 * 4
  wide = LlamaConfig.from_name("llama-3.1-405b")
  # Over 16 devices the 8 KV heads are held twice: each device has one head, as over 8.
  assert kv_bytes_per_token(wide, FP8, MeshShape.for_model(wide, 16)) == kv_bytes_per_token(
    wide, FP8, MeshShape.for_model(wide, 8)
  )


def test_decode_counts_by_hand():
  """tiny: D=64 F=128 L=2 N=4 K=2 H=64 V=256, two sequences of 10 and 30 tokens."""
  config = LlamaConfig.from_name("tiny")
  cost = decode_step(config, FP8, [10, 30])
  assert cost.num_tokens == 2
  kv = 2 * 2 * (2 * 64 + 8)  # L K (K and V of H bytes, two float32 scales)
  assert (cost.kv_read_bytes, cost.kv_written_bytes) == (40 * kv, 2 * kv)
  parameters = 2 * 64 * (2 * 4 * 64 + 2 * 2 * 64 + 3 * 128)  # q and o, k and v, gate, up and down
  attention = 4 * 4 * 64 * 2 * 40
  assert cost.flops["fp8"] == 2 * 2 * parameters + attention
  assert cost.flops["bf16"] == 2 * 2 * 256 * 64
  assert cost.all_reduce_bytes == 0 and cost.num_collectives == 0
  cut = decode_step(config, FP8, [10, 30], MeshShape(kv=2))
  assert cut.all_reduce_bytes == 5 * 2 * 64 * 2  # two a layer and the embedding's, two rows of bf16
  assert cut.kv_read_bytes == cost.kv_read_bytes // 2
  spread = decode_step(config, FP8, [10, 30, 20], MeshShape(data=2))
  assert spread.kv_read_bytes == 40 * kv  # 30 and 10 on the busier device, 20 on the other


def test_prefill_counts_by_hand():
  config = LlamaConfig.from_name("tiny")
  kv = 2 * 2 * (2 * 64 + 8)
  cost = prefill_step(config, FP8, 3, context=4, num_sequences=2)
  assert cost.num_tokens == 6
  assert cost.kv_written_bytes == 6 * kv and cost.kv_read_bytes == 2 * 7 * kv
  pairs = 2 * (5 + 6 + 7)
  parameters = 2 * 64 * (2 * 4 * 64 + 2 * 2 * 64 + 3 * 128)
  assert cost.flops["fp8"] == 2 * 6 * parameters + 4 * 4 * 64 * 2 * pairs
  assert cost.flops["bf16"] == 2 * 2 * 256 * 64  # the head only where a token is sampled
  # In pieces: weights once a piece, earlier pieces read again from the cache.
  long = prefill_step(config, FP8, 5000)
  weights = weight_bytes(config, FP8)
  assert long.weight_read_bytes == 3 * (weights.streamed - weights.head) + weights.head + 5000 * 64 * 2
  assert long.kv_read_bytes == (2048 + 4096 + 5000) * kv
  assert long.launches == 3 * (12 * 2 + 8)
  assert prefill_step(config, FP8, 5000, mesh=MeshShape(kv=2)).num_collectives == 3 * (2 * 2 + 2)
  assert prefill_step(config, FP8, 10, num_sequences=3, mesh=MeshShape(data=2)).num_tokens == 20


def test_checking_drafted_tokens_reads_once_and_computes_for_each():
  config = LlamaConfig.from_name("tiny")
  one, five = decode_step(config, FP8, [10, 30]), decode_step(config, FP8, [10, 30], query_tokens=5)
  assert five.kv_read_bytes == one.kv_read_bytes and five.kv_written_bytes == 5 * one.kv_written_bytes
  assert {dtype: amount / 5 for dtype, amount in five.flops.items()} == one.flops
  assert five.weight_read_bytes - one.weight_read_bytes == 8 * 64 * 2  # eight more rows of the embedding


def test_prefill_of_70b_needs_137_gflop_a_token():
  cost = prefill_step(LlamaConfig.from_name("llama-3.1-70b"), FP8, 2048)
  attention = 4 * 64 * 128 * 80 * 2048 * 2049 // 2
  assert (cost.flops["fp8"] - attention) / 2048 == pytest.approx(2 * 68.45e9, rel=1e-4)


# Ceilings of Llama-3.1-70B FP8 at batch 1 from the table of public peaks (70.55 GB over the bandwidth).
@pytest.mark.parametrize(
  ("device", "tensor", "tokens"),
  [("a100-80", 1, 28.9), ("h100", 1, 47.5), ("h200", 1, 68.0), ("b200", 1, 113), ("gb10", 1, 3.87), ("rtx-pro-6000", 1, 25.4)],
)
def test_published_ceilings(device, tensor, tokens):
  config = LlamaConfig.from_name("llama-3.1-70b")
  times = bound(decode_step(config, FP8, [1], MeshShape.for_model(config, tensor)), load_device(device))
  assert 1 / times.step == pytest.approx(tokens, rel=0.004)
  assert times.bound_by == "weights"


@pytest.mark.parametrize("row", published_measurements(), ids=lambda row: row.who)
def test_no_public_measurement_lies_above_our_ceiling(row):
  assert 0.2 < row.fraction < 1
  if row.tok_s is not None:
    assert row.tok_s < row.ceiling_tok_s


def test_published_shares():
  """gpt-fast states the bandwidth it reached: 1,254 GB/s of 2,039 on one A100."""
  row = next(row for row in published_measurements() if row.who == "gpt-fast, Llama-3.1-70B int8")
  assert row.fraction == pytest.approx(1254 / 2039, rel=0.01)
  low, high, rows = expected_fractions("h100", 1)
  assert low <= row.fraction <= high and all(other.tensor == 1 for other in rows)
  assert {row.device for row in expected_fractions("cpu", 1)[2]} == {"cpu"}
  # Systems cut over several devices are compared with those of the same width, or the nearest one.
  for tensor, like in ((2, {2}), (3, {4}), (8, {8}), (16, {8})):
    assert {row.tensor for row in expected_fractions("h100", tensor)[2]} == like


# Public totals whose batch or hardware is not fully known lie below the most generous reading of them, too.
@pytest.mark.parametrize(
  ("model_name", "device", "tensor", "batch", "context", "tok_s"),
  [
    ("llama-3.3-70b", "h100", 2, 80, 5250, 921),  # NIM 1.8 at its best concurrency; 80 such sequences fit
    ("llama-3.1-70b", "h100", 4, 1, 1, 75.4),  # NIM 1.3, four H100 likely
    ("llama-3.1-70b", "h100", 4, 200, 1000, 5856),
  ],
)
def test_public_throughput_lies_below_our_ceiling(model_name, device, tensor, batch, context, tok_s):
  config = LlamaConfig.from_name(model_name)
  cost = decode_step(config, FP8, [context] * batch, MeshShape.for_model(config, tensor))
  assert tok_s < batch / bound(cost, load_device(device)).step


def _device(**changes) -> DeviceSpec:
  fields = {"memory_bytes": 10**12, "bandwidth": 1e9, "bf16_flops": 1e12, "f32_flops": 1e11, "fp8_flops": 2e12}
  return DeviceSpec(**({"name": "made-up", "title": "made up"} | fields | changes))


def test_bound_times_by_hand():
  config = LlamaConfig.from_name("tiny")
  cost = decode_step(config, FP8, [100] * 4, MeshShape(kv=2))
  device = _device(link_bandwidth=1e6, link_latency_seconds=1e-3, link_devices=2, launch_seconds=1e-5)
  times = bound(cost, device)
  assert times.weights == cost.weight_read_bytes / 1e9
  assert times.kv == (cost.kv_read_bytes + cost.kv_written_bytes) / 1e9
  assert times.flops == pytest.approx(cost.flops["fp8"] / 2e12 + cost.flops["bf16"] / 1e12)
  assert times.launches == pytest.approx((12 * 2 + 8) * 1e-5)
  assert times.collectives == pytest.approx(5 * 4 * 64 * 2 / 1e6 + 6 * 1e-3)  # 2 (n - 1) / n is 1 for two devices
  # Without FP8 units the same FLOPs run at the bf16 rate.
  assert bound(cost, _device(fp8_flops=None)).flops == pytest.approx(sum(cost.flops.values()) / 1e12)


@pytest.mark.parametrize(("tensor", "ring", "switch"), [(2, 1, 1), (4, 3 / 2, 5 / 4), (8, 7 / 4, 9 / 8)])
def test_a_switch_that_adds_up_carries_less(tensor, ring, switch):
  config = LlamaConfig.from_name("llama-3.1-70b")
  cost = decode_step(config, FP8, [1] * 4, MeshShape.for_model(config, tensor))
  device = _device(link_bandwidth=1e9, link_devices=8)
  assert bound(cost, device).collectives == pytest.approx(ring * cost.all_reduce_bytes / 1e9)
  device = dataclasses.replace(device, link_reduces=True)
  assert bound(cost, device).collectives == pytest.approx(switch * cost.all_reduce_bytes / 1e9)


def test_all_reduces_between_hosts_pay_the_network():
  config = LlamaConfig.from_name("llama-3.1-405b")
  cost = decode_step(config, FP8, [1], MeshShape.for_model(config, 16))
  device = _device(link_bandwidth=1e9, link_devices=8, network_bandwidth=1e8, network_latency_seconds=1e-3)
  wire = 2 * 7 / 8 * cost.all_reduce_bytes / 1e9 + 2 * 1 / 2 * cost.all_reduce_bytes / 8 / 1e8
  assert bound(cost, device).collectives == pytest.approx(wire + cost.num_collectives * 1e-3)


@pytest.mark.parametrize(
  ("times", "step", "by"),
  [
    (StepTimes(3, 2, 1, 0, 1), 5, "weights"),
    (StepTimes(2, 3, 1, 0, 1), 5, "kv"),
    (StepTimes(2, 2, 5, 1, 1), 6, "flops"),
    (StepTimes(2, 2, 1, 1, 5), 6, "launches"),
    (StepTimes(2, 2, 3, 9, 1), 13, "collectives"),
  ],
)
def test_step_and_what_bounds_it(times, step, by):
  assert (times.step, times.bound_by) == (step, by)


def test_explain_names_rate_share_and_bound():
  config = LlamaConfig.from_name("llama-3.1-70b")
  sentence = explain(decode_step(config, FP8, [1]), load_device("gb10"), 1 / 3)
  # 70.58 GB in a third of a second is 212 GB/s, 78 % of 273.
  assert "70.6 GB in 333 ms: 212 GB/s, about 78 % of the 273 GB/s" in sentence
  assert "reading the weights bounds it" in sentence and sentence.count(".") <= 4


@pytest.mark.parametrize(("tensor", "kv", "group"), [(1, 1, 1), (2, 2, 1), (8, 8, 1), (16, 8, 2), (64, 8, 8)])
def test_mesh_shapes(tensor, kv, group):
  assert MeshShape.for_model(LlamaConfig.from_name("llama-3.1-70b"), tensor) == MeshShape(1, kv, group)


def test_impossible_meshes_say_what_is_possible():
  config = LlamaConfig.from_name("smollm2-135m")  # 9 query and 3 KV heads
  assert possible_tensors(config) == (1, 3, 9)
  with pytest.raises(InputError, match="possible are 1, 3, 9"):
    MeshShape.for_model(config, 2)
  for tensor, data in ((0, 1), (1, -2)):
    with pytest.raises(InputError, match="at least 1"):
      MeshShape.for_model(config, tensor, data)


@pytest.mark.parametrize("lengths", [[], [0], [5, -1]])
def test_lengths_are_checked(lengths):
  with pytest.raises(InputError, match="positive length"):
    decode_step(LlamaConfig.from_name("tiny"), FP8, lengths)


@pytest.mark.parametrize(("tokens", "context", "sequences"), [(0, 0, 1), (1, -1, 1), (1, 0, 0)])
def test_prefill_sizes_are_checked(tokens, context, sequences):
  with pytest.raises(InputError, match="at least one token"):
    prefill_step(LlamaConfig.from_name("tiny"), FP8, tokens, context, num_sequences=sequences, mesh=ONE_DEVICE)
