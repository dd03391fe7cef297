"""The memory of a machine and of the control groups of a container."""

import os

import pytest

from jaxfp8 import host_memory

GB = 1 << 30


@pytest.fixture
def machine(monkeypatch, tmp_path):
  """Writes files below /proc and /sys/fs/cgroup of a made-up machine with 64 GB, 32 of them available."""
  monkeypatch.setattr(host_memory, "_PROC", tmp_path / "proc")
  monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path / "cgroup")
  monkeypatch.setattr(os, "sysconf", lambda name: 64 * GB if name == "SC_PHYS_PAGES" else 1)

  def write(name, text):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

  write("proc/meminfo", f"MemTotal: {64 * GB // 1024} kB\nMemAvailable:   {32 * GB // 1024} kB\n")
  return write


def test_a_machine_without_limits(machine):
  machine("proc/self/cgroup", "0::/user.slice\n")
  machine("cgroup/user.slice/memory.max", "max\n")
  assert host_memory.memory_bytes() == (64 * GB, 32 * GB)


def test_version_2_takes_the_least_of_the_nested_groups(machine):
  machine("proc/self/cgroup", "0::/pod/container\n")
  machine("cgroup/pod/container/memory.max", "max\n")
  machine("cgroup/pod/memory.max", f"{8 * GB}\n")
  machine("cgroup/pod/memory.current", f"{5 * GB}\n")
  machine("cgroup/pod/memory.stat", f"anon 1\ninactive_file {2 * GB}\n")
  assert host_memory.memory_bytes() == (8 * GB, 5 * GB)


def test_version_1_where_the_container_sees_its_group_as_the_root(machine):
  machine("proc/self/cgroup", "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n")
  machine("cgroup/memory/memory.limit_in_bytes", f"{4 * GB}\n")
  machine("cgroup/memory/memory.usage_in_bytes", f"{1 * GB}\n")
  assert host_memory.memory_bytes() == (4 * GB, 3 * GB)


def test_the_huge_number_of_version_1_is_no_limit(machine):
  machine("proc/self/cgroup", "4:memory:/\n")
  machine("cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
  assert host_memory.memory_bytes() == (64 * GB, 32 * GB)


def test_a_machine_without_proc(machine, monkeypatch, tmp_path):
  monkeypatch.setattr(host_memory, "_PROC", tmp_path / "nothing")
  monkeypatch.delattr(os, "sched_getaffinity", raising=False)
  assert host_memory.memory_bytes() == (64 * GB, 64 * GB)
  assert host_memory.peak_bytes() > 10 << 20
  assert host_memory.usable_cores() == os.cpu_count()
