"""Two processes with four CPU devices each, over Gloo on loopback, against one process with one device; and how runs end."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from flax import nnx

from jaxfp8.checkpoint import weights_cache
from jaxfp8.checkpoint.open import open_checkpoint
from jaxfp8.checkpoint.save import save
from jaxfp8.child_process import INTERRUPTED
from jaxfp8.commands import command
from jaxfp8.commands import generate as generate_command
from jaxfp8.distributed import environment, processes
from jaxfp8.distributed.detection import detect
from jaxfp8.errors import InputError
from jaxfp8.model.sampling import SamplingParams
from jaxfp8.recipe import Recipe
from jaxfp8.serving.engine import Engine, Request
from jaxfp8.serving.limits import EngineLimits
from tests.helpers import commands, tiny_llamas, tiny_models

pytestmark = pytest.mark.process

# Eight devices cut it into kv = 4 and group = 2; V = 103 and F = 91 divide by nothing.
CONFIG = dataclasses.replace(
  tiny_models.make_config("gqa_9_3_untied"), num_heads=8, num_kv_heads=4, d_model=64, num_layers=2, name="hosts"
)
LIMITS = EngineLimits(num_pages=8, max_sequences=2, max_pages=4, prefill_sizes=(48,), decode_sizes=(2,))
MESHES = {"tensor 4, data 2": (4, 2)}
LETTERS = len(commands.CHAIN.encode())


def requests() -> list[Request]:
  ways = ({}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.7, "top_k": 9, "top_p": 0.8})
  return [
    Request(tuple(tiny_models.make_tokens(CONFIG, 20 + 30 * i, i).tolist()), SamplingParams(max_new_tokens=8, **way))
    for i, way in enumerate(ways)
  ]


def free_port() -> int:
  with socket.socket() as listening:
    listening.bind(("127.0.0.1", 0))
    return listening.getsockname()[1]


def two(make) -> tuple[commands.Ran, commands.Ran]:
  """Two processes at once; `make(process)` starts one."""
  processes = [make(0), make(1)]
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    return tuple(pool.map(commands.end, processes))


def generate(port: int, process: int, *args: str, heartbeat: int = 20, **options) -> subprocess.Popen:
  where = ["--coordinator", f"127.0.0.1:{port}", "--num_processes", "2", "--process_id", str(process)]
  return commands.start(*where, "--heartbeat_seconds", str(heartbeat), *args, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  return tiny_models.write_hf_folder(tmp_path_factory.mktemp("hosts") / "hf", CONFIG, tiny_models.make_weights(CONFIG))


@pytest.fixture(scope="module")
def flags(folder, tmp_path_factory) -> list[str]:
  cache = tmp_path_factory.mktemp("cache")
  return ["--checkpoint", str(folder), "--weights", "f32", "--raw", "--max_new_tokens", "12", "--cache_dir", str(cache)]


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> list[str]:
  """Flags for a model that answers with one text again and again."""
  root = tmp_path_factory.mktemp("endless")
  folder = commands.write_chain(root / "endless", endless=True, max_context=1 << 14)
  return ["--checkpoint", str(folder), "--weights", "f32", "--cache_dir", str(root / "cache")]


GREETING = "[Gloo] Rank 0 is connected to 7 peer ranks. Expected number of connected peer ranks is : 7"


def text_of(ran: commands.Ran) -> list[str]:
  """Standard error without what Gloo says."""
  return [line for line in ran.err.splitlines() if line and not line.startswith("[Gloo]") and not is_torn_gloo(line)]


def is_torn_gloo(line: str) -> bool:
  """Whether a line holds nothing but words of Gloo's greeting: its threads write into each other's lines."""
  return all(word in GREETING.split() or word.isdigit() for word in line.split())


class TestLibrary:
  def test_an_engine_over_two_processes(self, tmp_path):
    """Greedy and sampled tokens of one device; each process holds its parts only; what differs is refused in both."""
    model = tiny_llamas.load(CONFIG)
    save(model, tmp_path / "ours")
    want = [list(completion.token_ids) for completion in Engine(model, limits=LIMITS).generate(requests())]
    port = free_port()

    def start(process: int) -> subprocess.Popen:
      command = [sys.executable, "tests/helpers/hosts_worker.py", str(port), str(process), str(tmp_path / "ours")]
      env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": "."}
      return subprocess.Popen(
        command, cwd=commands.ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
      )

    ran = two(start)
    assert [process.code for process in ran] == [0, 0], ran[0].err + ran[1].err
    results = [json.loads(process.out.splitlines()[-1]) for process in ran]
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    for result in results:
      assert result["devices"] == 8
      for name in MESHES:
        assert result[name] == want, name
        assert result[f"processes of {name}"] == [0] * 4 + [1] * 4
      assert 1 < result["local bytes of tensor 4, data 2"] / whole < 1.25, "a copy, with what is padded or in every device"
      assert 0.5 < result["local bytes of tensor 8"] / whole < 0.75
      assert 0.5 < result["rows and columns of tensor 8"] / _rows_and_columns() < 0.75, "what is read is what is held"
      assert "must be a multiple of the 2 processes" in result["uneven"]
      assert "2 processes have 4 each" in result["too many"]
      assert "every process must have the same requests" in result["other requests"]
      assert result["least"] == 1000


class TestCommand:
  def test_the_first_process_answers(self, flags):
    """The prompt is given to process 0 alone; with --json, where Gloo's own words must not stand in between."""
    port, prompts = free_port(), ["--prompt", "Hello", "--prompt", "abc def"]
    alone = commands.run(*flags, *prompts, "--json")
    first, second = two(
      lambda process: generate(port, process, *flags, "--tensor", "8", *(["--json", *prompts] if process == 0 else ["--json"]))
    )
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert (second.out, text_of(second)) == ("", [])
    want, got = (json.loads(ran.out)["completions"] for ran in (alone, first))
    assert len(got) == 2
    for a, b in zip(want, got, strict=True):
      assert (a["token_ids"], a["text"]) == (b["token_ids"], b["text"])

  def test_a_conversation_as_slurm_starts_it(self, endless, tmp_path):
    """--interactive, with the processes' places in the variables of a SLURM step, and two copies of the model."""
    job = str(free_port() - (65535 - 2**12 + 1) + 2**12)  # JAX computes the port of the coordinator from the job's number
    step = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    flags = [*endless, "--interactive", "--max_new_tokens", str(2 * LETTERS), "--tensor", "2", "--data", "2"]

    def start(process: int) -> subprocess.Popen:
      env = step | {"SLURM_PROCID": str(process), "SLURM_LOCALID": str(process)}
      return commands.start(*flags, env=env, stdin=_pipe("x\n\ny\n") if process == 0 else subprocess.DEVNULL)

    first, second = two(start)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert (first.out, second.out) == (f"{2 * commands.CHAIN}\n" * 2, "")

  @pytest.mark.parametrize("source", ["folder", "absent"])
  def test_only_the_first_task_of_a_step_converts(self, folder, tmp_path, source):
    """The others wait for it, and succeed or fail with it."""
    job = str(free_port() - (65535 - 2**12 + 1) + 2**12)
    step = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "2"}
    path = folder if source == "folder" else tmp_path / "absent"
    script = "import sys; from jaxfp8.commands import command, convert; command.run(convert.COMMAND, sys.argv[1:])"

    def start(process: int) -> subprocess.Popen:
      env = step | {"SLURM_PROCID": str(process), "SLURM_LOCALID": str(process)}
      return commands.start(str(path), str(tmp_path / "out"), script=script, env=env)

    first, second = two(start)
    if source == "absent":
      assert (first.code, second.code) == (1, 1) and not (tmp_path / "out").exists()
      assert second.err == f"process 0: {first.err}" and first.err.count("\n") == 1 and "absent" in first.err
      return
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert json.loads(first.out.splitlines()[-1])["output"] and open_checkpoint(tmp_path / "out")
    assert second.out == "" and "task 0 of this SLURM step has done the work" in second.err

  @pytest.mark.parametrize(
    ("zero", "one", "sentence"),
    [
      ([], ["--kv_cache", "fp8"], "every process must have the same --kv_cache; process 0 has None, process 1 has 'fp8'"),
      (["--prompt_file", "/nowhere"], [], "cannot read --prompt_file=/nowhere"),
      ([], ["--checkpoint", "OTHER"], "every process must have the same checkpoint; process 0 has"),
    ],
  )
  def test_one_that_differs_or_fails_ends_both(self, flags, tmp_path, zero, one, sentence):
    port = free_port()
    if "OTHER" in one:  # the same shapes, other numbers
      one = [one[0], str(tiny_models.write_hf_folder(tmp_path / "other", CONFIG, tiny_models.make_weights(CONFIG, 1)))]
    ran = two(lambda process: generate(port, process, *flags, "--prompt", "x", "--tensor", "8", *(one if process else zero)))
    for process in ran:
      assert process.code == 1
      assert process.out == ""
      said = [line for line in text_of(process) if " took " not in line]
      assert len(said) == 1 and sentence in said[0], process.err

  @pytest.mark.parametrize(
    ("which", "number", "says"),
    [
      (0, signal.SIGKILL, "hosts: process 0 is gone"),
      (1, signal.SIGKILL, "hosts: process 1 is gone"),
      (0, signal.SIGINT, "process 0: Stopped."),
      (1, signal.SIGTERM, "process 1: Stopped."),
    ],
  )
  def test_a_process_that_ends_takes_the_others_along(self, endless, tmp_path, which, number, says):
    """In the middle of an answer, killed or stopped: the other one says so at once. What was printed before is there."""
    port, args = free_port(), [*endless, "--prompt", "x", "--max_new_tokens", "60000", "--tensor", "2"]
    heartbeat = 60
    with open(tmp_path / "out", "w") as out:
      processes = [generate(port, 0, *args, heartbeat=heartbeat, stdout=out), generate(port, 1, *args, heartbeat=heartbeat)]
    printed = commands.wait_until(lambda: (text := (tmp_path / "out").read_bytes()) and len(text) > 60 and text)
    processes[which].send_signal(number)
    at = time.monotonic()
    ran = [commands.end(process) for process in processes]
    assert time.monotonic() - at < 10, "long before the heartbeat notices"
    other = ran[1 - which]
    assert other.code == 1
    # Where the coordinator is killed, JAX's client logs its own end before the process ends.
    said = [line for line in text_of(other) if not re.match(r"[EF]\d{4} ", line) and " took " not in line]
    assert any(line.startswith(says) for line in said), other.err
    assert len(said) == 1 or (which, number) == (0, signal.SIGKILL), other.err
    assert (tmp_path / "out").read_bytes().startswith(printed)
    assert printed.startswith(commands.CHAIN.encode() * 2)
    if number != signal.SIGKILL:
      assert ran[which].code == {signal.SIGTERM: command.TERMINATED, signal.SIGINT: INTERRUPTED}[number]
      assert text_of(ran[which])[-1:] == ["Stopped."], "its report goes where the answer goes"


class TestPlace:
  @pytest.mark.parametrize(
    ("fields", "message"),
    [
      (("here:99", None, 0), "needs --num_processes and --process_id"),
      (("here:99", 2, 2), "--process_id must be from 0 to 1"),
      (("here:99", 2, -1), "--process_id must be from 0 to 1"),
      (("here:99", 0, 0), "--num_processes must be at least 1"),
      ((None, 2, None), "belong to --coordinator"),
      ((None, None, 1), "belong to --coordinator"),
      ((None, None, None, 0), "--heartbeat_seconds must be from 1 to"),
      ((None, None, None, 20, 0), "--start_seconds must be from 1 to"),
    ],
  )
  def test_impossible_places(self, fields, message):
    with pytest.raises(InputError, match=f"^hosts: .*{message}"):
      environment.ProcessPlace(*fields)

  def test_what_slurm_and_kubernetes_say(self, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "KUBERNETES_", "JOB_COMPLETION"))]:
      monkeypatch.delenv(name)
    assert not environment.ProcessPlace().is_one_of_many
    assert environment.ProcessPlace("h:1", 2, 0).is_one_of_many and environment.ProcessPlace("auto").is_one_of_many
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert not environment.ProcessPlace().is_one_of_many, "any pod has that"
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    assert environment.ProcessPlace().is_one_of_many
    monkeypatch.delenv("JOB_COMPLETION_INDEX")
    for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID"):
      monkeypatch.setenv(f"SLURM_{name}", "8")
    assert environment.ProcessPlace().is_one_of_many
    assert not environment.ProcessPlace(num_processes=1).is_one_of_many
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # a shell on a node of a larger job
    assert not environment.ProcessPlace().is_one_of_many

  def test_a_pod_without_the_package_of_kubernetes(self, monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
      monkeypatch.delenv(name)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    with pytest.raises(InputError, match=r"pip install kubernetes.*--num_processes 1 if there are no others"):
      detect(environment.ProcessPlace())
    assert detect(place := environment.ProcessPlace("h:1", 2, 0)) == (place, None)

  def test_what_slurm_says_must_be_numbers(self, monkeypatch):
    for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID"):
      monkeypatch.setenv(f"SLURM_{name}", "8")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8(x2)")
    with pytest.raises(InputError, match=r"SLURM_STEP_NUM_TASKS must be a number; got '8\(x2\)'"):
      _ = environment.ProcessPlace().is_one_of_many

  def test_nothing_to_detect(self, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "KUBERNETES_", "OMPI_"))]:
      monkeypatch.delenv(name)
    with pytest.raises(InputError, match="neither SLURM nor Kubernetes"):
      detect(environment.ProcessPlace("auto"))


def test_the_page_names_flags_that_exist():
  page = (commands.ROOT / "docs" / "multi-host.md").read_text(encoding="utf-8")
  python_lines = [line for line in page.splitlines() if "srun" not in line and "SBATCH" not in line]
  named = set(re.findall(r"--([a-z_]{3,})", "\n".join(python_lines)))
  assert (
    {"coordinator", "num_processes", "process_id", "heartbeat_seconds", "tensor", "data"}
    <= named
    <= set(generate_command.FLAGS)
  )


class TestOneProcess:
  def test_everything_is_the_identity(self):
    assert (processes.count(), processes.index(), processes.is_first()) == (1, 0, True)
    assert processes.gather(5) == [5] and processes.broadcast([1]) == [1] and processes.least(7) == 7
    processes.require_same({"a": 1})
    processes.leave(0)  # nothing to leave
    with pytest.raises(InputError, match="mine"), processes.together():
      raise InputError("mine")

  def test_versions_are_compared(self, monkeypatch):
    """Two processes with another jaxfp8 or jax, as the first one sees them."""
    mine = processes.software()
    monkeypatch.setattr(processes, "gather", lambda facts: [facts, {"version": "jaxfp8 0.0.1 (123) with jax 0.1"}])
    with pytest.raises(InputError, match=r"the same version; process 0 has 'jaxfp8 .* with jax .*process 1 has 'jaxfp8 0.0.1"):
      processes.require_same(mine)

  def test_fingerprints(self, tmp_path):
    """The same numbers elsewhere are the same; one changed weight at the end of a file is not."""
    weights = tiny_models.make_weights(CONFIG)
    for name in ("a", "b"):
      tiny_models.write_hf_folder(tmp_path / name, CONFIG, weights)
    weights["lm_head.weight"][-1, -1] += 1
    tiny_models.write_hf_folder(tmp_path / "c", CONFIG, weights)
    a, b, c = (weights_cache.fingerprint(open_checkpoint(tmp_path / name)) for name in "abc")
    assert a == b != c
    converted = [
      weights_cache.fingerprint(weights_cache.cached_checkpoint(tmp_path / name, Recipe("bf16"), tmp_path / f"cache-{name}"))
      for name in "abc"
    ]
    assert converted[0] == converted[1] != converted[2]


def _rows_and_columns() -> int:
  """Of everything in the checkpoint, as it would be read whole."""
  c = CONFIG
  heads, kv_heads, norms = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, 2 * c.d_model
  layer = heads + 2 * kv_heads + heads + 3 * c.d_ff + norms
  return 2 * c.vocab_size + c.d_model + c.num_layers * layer


def _pipe(text: str) -> int:
  read, write = os.pipe()
  os.write(write, text.encode())
  os.close(write)
  return read
