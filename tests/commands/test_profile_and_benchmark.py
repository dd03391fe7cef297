"""--profile writes a trace, and `jaxfp8 benchmark` measures a tiny model in a process of its own."""

import gzip
import json
import subprocess
import sys

import pytest

from tests.helpers import commands

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
  return commands.write_chain(tmp_path_factory.mktemp("models") / "chain")


def jaxfp8(*arguments) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "jaxfp8", *map(str, arguments)]
  return subprocess.run(command, cwd=commands.ROOT, capture_output=True, text=True, timeout=240)


def _events(folder) -> set[str]:
  """Names of the events in the one trace of a folder."""
  (trace,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
  assert len(list(folder.glob("plugins/profile/*/*.xplane.pb"))) == 1
  with gzip.open(trace, "rt", encoding="utf-8") as file:
    return {event.get("name", "") for event in json.load(file)["traceEvents"]}


def test_generate_writes_a_trace(chain, tmp_path):
  sizes = ("--prompt=x", "--max-new-tokens=4", "--cache-dir=")
  ran = jaxfp8("generate", f"--checkpoint={chain}", *sizes, "--profile", tmp_path / "trace")
  assert ran.returncode == 0, ran.stderr
  assert len(_events(tmp_path / "trace")) > 10
  assert ran.stdout.startswith("aé") and "\n\n" not in ran.stdout


def test_a_profile_that_is_a_file(chain, tmp_path):
  (tmp_path / "file").write_text("")
  for command, arguments in (("generate", ["--prompt=x"]), ("benchmark", [])):
    ran = jaxfp8(command, *arguments, f"--checkpoint={chain}", f"--profile={tmp_path / 'file'}")
    assert ran.returncode == 1 and ran.stderr.startswith(f"{command}: --profile must name a folder"), ran.stderr


def test_benchmark_measures_and_writes_traces(chain, tmp_path):
  sizes = ("--weights=fp8", "--batch=1,2", "--prompt-tokens=3", "--new-tokens=4", "--repeats=1", "--no-start-up")
  ran = jaxfp8(
    "benchmark", f"--checkpoint={chain}", *sizes, "--json", f"--cache-dir={tmp_path}", f"--profile={tmp_path / 'trace'}"
  )
  assert ran.returncode == 0, ran.stderr
  rows = json.loads(ran.stdout)
  assert [(row["weights"], row["batch"]) for row in rows] == [("fp8", 1), ("fp8", 2)]
  assert all(row["decode_tok_s"] > 0 and row["peak_rss_bytes"] > 1 << 26 for row in rows)
  names = {path.name for path in (tmp_path / "trace").iterdir()}
  assert names == {f"{row['weights']}-batch-{row['batch']}-prompt-3" for row in rows}
  assert _events(tmp_path / "trace" / "fp8-batch-2-prompt-3")


def test_a_mistake_in_the_child_is_one_sentence(tmp_path):
  ran = jaxfp8("benchmark", f"--checkpoint={tmp_path / 'none'}", "--weights=fp8", "--no-start-up", "--cache-dir=")
  assert ran.returncode == 1 and ran.stdout == "" and len(ran.stderr.strip().splitlines()) == 1, ran.stderr
