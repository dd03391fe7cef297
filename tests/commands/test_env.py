"""`jaxfp8 env`: facts from made-up machines, and that nothing that is missing makes it fail."""

import json
import subprocess
import sys

import pytest

from jaxfp8.commands import env
from tests.helpers import commands

FACTS = {
  "packages": {"jax": "0.12.0.1", "jaxlib": "0.12.0.1", "jax-cuda13-plugin": "0.12.0.1"},
  "gpus": [{"name": "NVIDIA H100"}],
  "driver": "595.1",
  "variables": {},
}


def test_it_prints_this_machine(tmp_path):
  (tmp_path / "programs").mkdir()
  (tmp_path / "programs" / "one").write_bytes(bytes(1000))
  command = [sys.executable, "-m", "jaxfp8", "env", "--json", f"--cache-dir={tmp_path}"]
  ran = subprocess.run(command, cwd=commands.ROOT, capture_output=True, text=True, timeout=60)
  facts = json.loads(ran.stdout)
  assert facts["packages"]["jax"] and facts["python"] and facts["cores"] >= 1 and facts["memory_bytes"] > 1 << 28
  assert facts["cache_bytes"] == 1000
  assert ran.returncode == bool(facts["findings"]) and not ran.stderr


def test_nothing_that_is_missing_makes_it_fail(monkeypatch, tmp_path):
  monkeypatch.setattr(env.pathlib.Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
  monkeypatch.setattr(env.importlib.metadata, "version", _not_installed)
  monkeypatch.setenv("PATH", str(tmp_path))
  facts = env.collect(str(tmp_path / "none"))
  assert facts["memory_bytes"] == facts["available_memory_bytes"] > 0  # the system says how many pages there are
  assert facts["cache_bytes"] is None and not facts["gpus"] and facts["driver"] is None
  text = env.format_facts(facts)
  assert "jax               not installed" in text and text.endswith("JAX is not installed. Install jaxfp8 again.")


def _not_installed(name):
  raise env.importlib.metadata.PackageNotFoundError(name)


def test_gpus_come_from_nvidia_smi(monkeypatch, tmp_path):
  program = tmp_path / "nvidia-smi"
  program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559 MiB, 9.0, 595.10'\n")
  program.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
  assert env.gpus() == [{"name": "NVIDIA H100 80GB HBM3", "memory": "81559 MiB", "compute_capability": "9.0"}]
  program.write_text("#!/bin/sh\nexit 9\n")
  assert isinstance(env.gpus(), list)


@pytest.mark.parametrize(
  ("changes", "finding"),
  [
    ({}, None),
    ({"packages": {"jax": "1", "jaxlib": "1"}}, 'JAX for it is not installed. Run pip install "jaxfp8[cuda]"'),
    ({"packages": {"jax": "1", "jaxlib": "1"}, "gpus": [], "driver": None}, None),
    ({"variables": {"JAX_PLATFORMS": "cpu"}}, "JAX_PLATFORMS=cpu keeps JAX from using it"),
    ({"packages": {"jax": "1", "jaxlib": "2", "jax-cuda13-plugin": "1"}}, "jaxlib is version 2 and jax is version 1"),
    ({"packages": {"jax": "1", "jaxlib": "1", "jax-cuda12-plugin": "2"}}, "jax-cuda12-plugin is version 2"),
  ],
)
def test_findings(changes, finding):
  findings = env.find_problems(FACTS | changes)
  assert findings == [] if finding is None else len(findings) == 1 and finding in findings[0]
