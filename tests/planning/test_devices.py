"""Devices: the files are whole and sourced, their numbers agree with public ones, and this machine is measured sanely."""

import json
import platform

import pytest

from jaxfp8 import stored_files
from jaxfp8.config import configs_folder, read_toml
from jaxfp8.errors import InputError
from jaxfp8.planning import devices
from jaxfp8.planning.devices import DeviceSpec, device_names, load_device, measure_cpu

GPUS = tuple(name for name in device_names() if name != "cpu")


def test_every_device_that_is_promised_is_there():
  assert set(GPUS) >= {
    "a100-40",
    "a100-80",
    "l40s",
    "rtx-6000-ada",
    "rtx-4090",
    "h100",
    "h200",
    "gh200",
    "b200",
    "b300",
    "gb10",
    "rtx-pro-6000",
  }


@pytest.mark.parametrize("name", GPUS)
def test_every_number_has_a_source(name):
  fields = read_toml(configs_folder() / "devices" / f"{name}.toml")
  sources = set(fields.pop("sources"))
  assert {"memory_bytes", "runtime_bytes", "system_bytes", "bandwidth", "flops", "chip", "link", "network", "launch"} <= sources
  # Nothing is a field that no source speaks of.
  spoken_for = ("flops", "link_", "network_", "launch_", "memory", "runtime", "system", "bandwidth", "unified", "title")
  chip = ("sm", "l2_", "clock", "compute_capability", "accelerated")
  assert all(any(word in field for word in spoken_for + chip) for field in fields)


# (memory GB as sold, GB/s, dense bf16 TFLOPS, dense FP8 TFLOPS or None, SMs, compute capability), from the public table of
# peaks; memory as the driver reports it may be less than sold by up to a twelfth (ECC, the driver's share) or count GiB.
PUBLIC = {
  "a100-40": (40, 1555, 312, None, 108, (8, 0)),
  "a100-80": (80, 2039, 312, None, 108, (8, 0)),
  "h100": (80, 3350, 989, 1979, 132, (9, 0)),
  "h200": (141, 4800, 989, 1979, 132, (9, 0)),
  "gh200": (96, 4000, 989, 1979, 132, (9, 0)),
  "b200": (180, 8000, 2250, 4500, 148, (10, 0)),
  "b300": (288, 8000, 2250, 4500, 158, (10, 3)),
  "l40s": (48, 864, 362, 733, 142, (8, 9)),
  "rtx-6000-ada": (48, 960, 364, 728, 142, (8, 9)),
  "rtx-4090": (24, 1008, 165.2, 330.3, 128, (8, 9)),
  "rtx-pro-6000": (96, 1792, 500, 1000, 188, (12, 0)),
  "gb10": (128, 273, 125, 250, 48, (12, 1)),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_numbers_agree_with_the_public_table(name):
  memory, bandwidth, bf16, fp8, sms, capability = PUBLIC[name]
  spec = load_device(name)
  assert memory * 1e9 * 0.985 <= spec.memory_bytes <= memory * 2**30
  assert spec.bandwidth == pytest.approx(bandwidth * 1e9, rel=0.002)
  assert spec.bf16_flops == pytest.approx(bf16 * 1e12, rel=0.01)
  assert (spec.fp8_flops is None) == (fp8 is None)
  if fp8:
    assert spec.fp8_flops == pytest.approx(fp8 * 1e12, rel=0.01)
    assert spec.flops("fp8") == spec.fp8_flops
  else:
    assert spec.flops("fp8") == spec.bf16_flops
  assert (spec.num_sms, spec.compute_capability) == (sms, capability)
  assert spec.f32_flops == pytest.approx(spec.bf16_flops / 2, rel=0.03)  # TF32 runs at half the rate of bf16


@pytest.mark.parametrize("name", GPUS)
def test_chips_are_as_their_compute_capability_says(name):
  spec = load_device(name)
  big = spec.compute_capability[0] in (9, 10)
  per_block = 232448 if big else 166912 if spec.compute_capability == (8, 0) else 101376
  assert spec.shared_memory_per_block_bytes == per_block == spec.shared_memory_per_sm_bytes - 1024
  assert spec.threads_per_sm == (2048 if big or spec.compute_capability == (8, 0) else 1536)
  assert spec.accelerated_features == (spec.compute_capability[0] >= 9)


def test_only_unified_memory_is_shared_with_the_system():
  for spec in map(load_device, GPUS):
    assert spec.unified_memory == (spec.name == "gb10") == (spec.system_bytes > 0)
    assert spec.usable_bytes == spec.memory_bytes - spec.system_bytes - spec.runtime_bytes


def test_a_device_of_ones_own(tmp_path):
  path = tmp_path / "mine.toml"
  path.write_text('title = "Mine"\nmemory_bytes = 1_000\nbandwidth = 5e9\nbf16_flops = 1e12\nf32_flops = 1e11\n')
  spec = load_device(str(path))
  assert (spec.name, spec.title, spec.bandwidth, spec.fp8_flops) == ("mine", "Mine", 5e9, None)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("memory_bytes = 1", "does not hold the fields"),
    ("memory_bytes = -1\nbandwidth = 1.0\nbf16_flops = 1.0\nf32_flops = 1.0", "memory_bytes.*positive.*-1"),
    ('memory_bytes = "1"\nbandwidth = 1.0\nbf16_flops = 1.0\nf32_flops = 1.0', "memory_bytes.*positive"),
    ("memory_bytes = 1\nbandwidth = nan\nbf16_flops = 1.0\nf32_flops = 1.0", "bandwidth.*positive.*nan"),
    ("memory_bytes = 1\nbandwidth = 0\nbf16_flops = 1.0\nf32_flops = 1.0", "bandwidth.*positive.*0"),
    ("memory_bytes = 1\nbandwidth = 1.0\nbf16_flops = 1.0\nf32_flops = 1.0\nwheels = 4", "wheels"),
    ("memory_bytes = 1\nbandwidth = 1.0\nbf16_flops = 1.0\nf32_flops = 1.0\ncompute_capability = [9]", "does not hold"),
    ("memory_bytes = ", "cannot read"),
  ],
)
def test_damaged_device_files_are_refused(tmp_path, text, message):
  path = tmp_path / "bad.toml"
  path.write_text(text)
  with pytest.raises(InputError, match=message):
    load_device(str(path))


def test_unknown_names_get_near_ones():
  with pytest.raises(InputError, match=r"no device named 'h10'.*h100"):
    load_device("h10")
  with pytest.raises(InputError, match="cannot read"):
    load_device("absent.toml")


@pytest.fixture
def counted(monkeypatch):
  """Replaces the two measurements by given rates and counts them."""
  calls = []
  monkeypatch.setattr(devices, "_measure_bandwidth", lambda cores: calls.append(cores) or 20e9)
  monkeypatch.setattr(devices, "_measure_f32_flops", lambda: 1e11)
  return calls


def test_cpu_rates_are_measured_once_and_cached(tmp_path, counted):
  folder = tmp_path / "deep" / "cache"
  first, second = measure_cpu(str(folder)), load_device("cpu", str(folder))
  assert len(counted) == 1 and first.bandwidth == second.bandwidth == 20e9
  assert [path.name for path in folder.iterdir()] == [f"cpu-{platform.node()}.json"]
  assert first.unified_memory and first.name == "cpu" and first.fp8_flops is None
  assert 0 < first.system_bytes < first.memory_bytes and first.bf16_flops >= first.f32_flops == 1e11
  measure_cpu("")
  assert len(counted) == 2
  measure_cpu(str(folder), again=True)
  measure_cpu(str(folder))
  assert len(counted) == 3


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": "x"}', None, "negative", "other machine"])
def test_a_damaged_cache_is_measured_again(tmp_path, counted, damage):
  measure_cpu(str(tmp_path))
  path = tmp_path / f"cpu-{platform.node()}.json"
  stored = json.loads(stored_files.read(path, ""))
  if damage == "negative":
    damage = json.dumps(stored | {"bandwidth": -1})
  if damage == "other machine":
    damage = json.dumps(stored | {"key": "a cray"})
  stored_files.write(path, (damage if damage is not None else "\0").encode())
  assert measure_cpu(str(tmp_path)).bandwidth == 20e9
  assert len(counted) == 2 and json.loads(stored_files.read(path, "")) == stored


def test_an_unwritable_cache_is_no_error(tmp_path, counted):
  (tmp_path / "file").write_text("")
  assert measure_cpu(str(tmp_path / "file" / "cache")).bandwidth == 20e9


def test_this_machine_is_measured_sanely():
  spec = measure_cpu("")
  # From a phone to a server with twelve channels of DDR5 and 128 cores.
  assert 1e9 < spec.bandwidth < 1.5e12
  assert 1e9 < spec.f32_flops < 2e13


def test_bad_fields_are_named():
  with pytest.raises(InputError, match="link_devices of 'x'"):
    DeviceSpec("x", "x", 1, 1.0, 1.0, 1.0, link_devices=0)
