"""The planner as a function and as a command: sums done by hand, public speeds, consistency, and every kind of bad input."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from absl import flags

from jaxfp8.checkpoint.manifest import Manifest
from jaxfp8.commands import plan as command
from jaxfp8.config import LlamaConfig, configs_folder
from jaxfp8.errors import InputError
from jaxfp8.planning.advice import Speculation
from jaxfp8.planning.devices import device_names, load_device
from jaxfp8.planning.planner import plan_deployment
from jaxfp8.planning.plots import plot_plan
from jaxfp8.planning.report import shortfall_sentence
from jaxfp8.recipe import LayerFormat, Recipe
from jaxfp8.units import format_bytes, format_rate, format_seconds, format_share
from tools import make_docs

SPARK = ("--model=llama-3.1-70b", "--device=gb10")
GB10_BYTES = 128_000_000_000 - 6_000_000_000 - 800_000_000 - 3_840_000_000  # less system, runtime and 3 % reserve


def _run(*args: str) -> int:
  """The command in this process; what it prints is on capsys. Raises what command.run turns into text."""
  command.FLAGS.unparse_flags()
  command.COMMAND.parse(args)
  return command.main()


def _json(capsys, *args: str) -> dict:
  _run(*args, "--json")
  return json.loads(capsys.readouterr().out)


def _process(*args: str) -> subprocess.CompletedProcess:
  environment = os.environ | {"PYTHONPATH": str(configs_folder().parent)}
  return subprocess.run(
    [sys.executable, "-m", "jaxfp8.plan", *args], capture_output=True, text=True, env=environment, timeout=60
  )


def test_the_question_of_the_title(capsys):
  result = _json(capsys, *SPARK, "--observed=3.0", "--observed_batch=1")
  assert result["fits"] is True
  assert (
    result["weights_bytes"] == 70_552_387_584 + 26_869_760 + 5_275_648 + 2_101_346_304
  )  # matrices, scales, norms, embedding
  assert result["kv_bytes_per_token"] == 160 * 1024 + 80 * 8 * 2 * 4
  assert result["observed_fraction"] == pytest.approx(3.0 * 70.55 / 273, rel=0.002)
  assert result["verdict"].startswith("3.0 tok/s is 78 % of the 3.87 tok/s that 273 GB/s allow")
  assert result["verdict"].endswith("this is the hardware, not a fault.")
  assert [batch["batch"] for batch in result["batches"]] == [1, 8, 32]
  keys = {"batch", "decode_ceiling_tok_s", "total_ceiling_tok_s", "prefill_ceiling_tok_s", "ttft_floor_s", "bound_by"}
  assert all(keys <= set(batch) for batch in result["batches"])
  one = result["batches"][0]
  assert one["decode_ceiling_tok_s"] == pytest.approx(273e9 / (70.585e9 + 8193 * 168960), rel=1e-4)
  assert one["bound_by"] == "weights"


def test_json_is_the_function(capsys):
  plan = plan_deployment("llama-3.1-70b", "gb10", observed=3.0)
  assert _json(capsys, *SPARK, "--observed=3.0") == json.loads(json.dumps(plan.to_json()))
  with pytest.raises(dataclasses.FrozenInstanceError):
    plan.fits = False


def test_memory_adds_up_and_pages_are_rounded():
  plan = plan_deployment("llama-3.1-70b", "gb10", batches=[3], context=100)
  memory = plan.memory
  page = 64 * plan.kv_bytes_per_token
  assert memory.kv == 3 * 2 * page  # 100 tokens take two pages
  parts = (memory.weights, memory.kv, memory.temporaries, memory.reserve, memory.runtime, memory.system, memory.free)
  assert sum(parts) == memory.total == 128_000_000_000
  pages = (GB10_BYTES - memory.weights - memory.temporaries) // page
  assert plan.max_kv_tokens == pages * 64
  assert dict(plan.sequences)[100] == pages // 2
  wide = plan_deployment("llama-3.1-70b", "gb10", batches=[3], context=100, page_tokens=128)
  assert wide.memory.kv == 3 * 128 * plan.kv_bytes_per_token


@pytest.mark.parametrize("device", ["gb10", "h100", "rtx-pro-6000"])
def test_what_is_said_to_fit_fits_and_one_more_does_not(device):
  plan = plan_deployment("llama-3.1-70b", device, batches=[1], context=5000)
  most = dict(plan.sequences)[5000]
  assert plan_deployment("llama-3.1-70b", device, batches=[most], context=5000).fits
  more = plan_deployment("llama-3.1-70b", device, batches=[most + 1], context=5000)
  assert not more.fits and more.smallest_change == f"pass --batch={most}"
  assert more.memory.free == -more.shortfall_bytes < 0


@pytest.mark.parametrize(
  ("model", "device", "changes"),
  [
    ("llama-3.1-70b", "h100", {"kv_cache": "bf16", "batches": [4]}),  # an FP8 cache is enough
    ("llama-3.1-70b", "h100", {"batches": [32]}),  # fewer sequences
    ("llama-3.1-70b", "h100", {"context": 131072, "batches": [1]}),  # a shorter context
    ("llama-3.1-70b", "gb10", {"weights": "bf16", "batches": [1]}),  # FP8 weights
    ("llama-3.1-405b", "h100", {"batches": [1]}),  # more devices
    ("llama-3.1-405b", "rtx-4090", {"weights": "bf16", "batches": [1]}),  # another device, several of them
    ("llama-3.1-70b", "rtx-4090", {"batches": [1]}),
  ],
)
def test_the_smallest_change_makes_it_fit(model, device, changes):
  plan = plan_deployment(model, device, **changes)
  assert not plan.fits
  words = dict(word.removeprefix("--").split("=") for word in plan.smallest_change.removeprefix("pass ").split())
  names = {"batch": "batches"}
  values = {names.get(key, key): int(value) if value.isdigit() else value for key, value in words.items()}
  if "batches" in values:
    values["batches"] = [values["batches"]]
  device = values.pop("device", device)
  after = plan_deployment(model, device, **(changes | values))
  assert after.fits
  sentence = shortfall_sentence(plan)
  assert f"{plan.shortfall_bytes:,} bytes" in sentence and plan.smallest_change in sentence and sentence.count("\n") == 0


def test_nothing_helps():
  plan = plan_deployment(dataclasses.replace(LlamaConfig.from_name("llama-3.1-405b"), num_layers=5000), "h100", batches=[1])
  assert "smaller model" in plan.smallest_change


def test_replicas_share_nothing():
  one = plan_deployment("llama-3.1-8b", "h100", batches=[8], tensor=2)
  four = plan_deployment("llama-3.1-8b", "h100", batches=[32], tensor=2, data=4)
  assert four.deployment.mesh.num_devices == 8
  assert four.memory == one.memory and four.max_kv_tokens == 4 * one.max_kv_tokens
  assert four.batches[0].total_ceiling_tok_s == pytest.approx(4 * one.batches[0].total_ceiling_tok_s)
  assert four.batches[0].decode_ceiling_tok_s == pytest.approx(one.batches[0].decode_ceiling_tok_s)
  assert [count for _, count in four.sequences] == [4 * count for _, count in one.sequences]
  # Nine sequences over four replicas: one replica has three of them.
  odd, even = (plan_deployment("llama-3.1-8b", "h100", batches=[size], data=4) for size in (9, 12))
  assert odd.memory == even.memory and odd.batches[0].step_floor_s == even.batches[0].step_floor_s


def test_prompts_that_arrive_together_wait_for_each_other():
  one, eight = plan_deployment("llama-3.1-8b", "h100", batches=[1, 8], prompt=2048).batches
  linears, attention = 2 * 6.98e9 * 2048, 4 * 32 * 128 * 32 * 2048 * 2049 / 2
  assert one.ttft_floor_s == pytest.approx((linears + attention) / 1978.9e12, rel=0.002)
  assert eight.ttft_floor_s == pytest.approx(8 * one.ttft_floor_s, rel=1e-3)
  assert eight.prefill_ceiling_tok_s == pytest.approx(8 * 2048 / eight.ttft_floor_s)


@pytest.mark.parametrize(
  ("given", "tensor", "data"),
  [({"count": 8}, 8, 1), ({"count": 8, "data": 2}, 4, 2), ({"count": 8, "tensor": 2}, 2, 4), ({"tensor": 4}, 4, 1), ({}, 1, 1)],
)
def test_the_mesh_follows_from_what_is_given(given, tensor, data):
  mesh = plan_deployment("llama-3.1-8b", "h100", **given).deployment.mesh
  assert (mesh.tensor, mesh.data) == (tensor, data)


def test_gains_of_fp8_alone():
  """At batch 1 and short contexts only the weights count; with many long sequences the cache does."""
  few = plan_deployment("llama-3.1-70b", "h200", batches=[1], context=64).batches[0]
  # (linears in bf16 + head) / (linears in fp8 with scales + head), by hand
  assert few.fp8_weights_gain == pytest.approx((2 * 68.451 + 2.106) / (68.478 + 2.106), rel=0.002)
  assert few.fp8_kv_gain == pytest.approx(1, abs=0.001)
  many = plan_deployment("llama-3.1-8b", "h200", batches=[256], context=8192).batches[0]
  assert many.bound_by == "kv" and many.fp8_kv_gain > 1.7 > many.fp8_weights_gain


def test_the_batch_at_which_decode_turns_compute_bound():
  plan = plan_deployment("llama-3.1-70b", "h100", batches=[1])
  assert plan.compute_bound_batch_empty == pytest.approx(295, abs=8)  # 1979 / 3.35 / 2
  assert plan.compute_bound_batch is None
  turn = plan.compute_bound_batch_empty
  around = plan_deployment("llama-3.1-70b", "h100", batches=[turn - 1, turn], context=1)
  assert [batch.bound_by for batch in around.batches] == ["weights", "flops"]


def test_devices_without_fp8_units_gain_bytes_and_no_flops():
  fp8, bf16 = (plan_deployment("llama-3.1-8b", "a100-80", weights=weights, batches=[1]) for weights in ("fp8", "bf16"))
  assert fp8.deployment.recipe.activations == "bf16"
  assert fp8.batches[0].decode_ceiling_tok_s > 1.6 * bf16.batches[0].decode_ceiling_tok_s
  assert fp8.batches[0].prefill_ceiling_tok_s == pytest.approx(bf16.batches[0].prefill_ceiling_tok_s)


@pytest.mark.parametrize("activations", ["auto", "fp8", "bf16"])
def test_activations_set_the_rate_of_prefill(activations):
  prefill = plan_deployment("llama-3.1-8b", "h100", activations=activations).batches[0].prefill_ceiling_tok_s
  half = plan_deployment("llama-3.1-8b", "h100", activations="bf16", kv_cache="bf16").batches[0].prefill_ceiling_tok_s
  assert prefill / half == pytest.approx(1 if activations == "bf16" else 2, rel=0.05)


@pytest.mark.parametrize(
  ("observed", "kind"), [(3.0, "hardware"), (3.86, "hardware"), (1.5, "slow"), (0.4, "wrong"), (5.0, "above")]
)
def test_verdicts(observed, kind):
  verdict = plan_deployment("llama-3.1-70b", "gb10", observed=observed).verdict
  assert verdict.kind == kind and verdict.sentence.count("\n") == 0
  assert verdict.fraction == pytest.approx(observed / 3.868, rel=1e-3)


def test_a_fault_names_the_usual_causes_in_order():
  sentence = plan_deployment("llama-3.1-70b", "gb10", observed=0.4).verdict.sentence
  assert sentence.startswith("0.4 tok/s is 10 % of the 3.87 tok/s that 273 GB/s allow") and "something is wrong" in sentence
  causes = ["not in FP8 (1.96 tok/s at most)", "swapped", "launched by the host", "clocks"]
  assert [sentence.index(cause) for cause in causes] == sorted(sentence.index(cause) for cause in causes)
  cut = plan_deployment("llama-3.1-70b", "l40s", tensor=2, observed=1).verdict.sentence
  causes = ["not in FP8", "offloaded", "launched by the host", "tensor parallelism over PCIe", "clocks"]
  assert [cut.index(cause) for cause in causes] == sorted(cut.index(cause) for cause in causes)
  assert "2 times 864 GB/s" in cut


def test_a_published_bf16_run_is_no_normal_fp8_run():
  """Two of these machines were reported with 3 tokens a second: 77 % of the ceiling in bf16, and slow for FP8."""
  bf16, fp8 = (plan_deployment("llama-3.1-70b", "gb10", count=2, weights=weights, observed=3.0) for weights in ("bf16", "fp8"))
  assert (bf16.verdict.kind, fp8.verdict.kind) == ("hardware", "slow")
  assert "not in FP8 (3.89 tok/s at most)" in fp8.verdict.sentence


def test_an_observed_batch_counts_all_sequences():
  verdict = plan_deployment("llama-3.1-8b", "h100", observed=1000, observed_batch=8, context=100).verdict
  alone = plan_deployment("llama-3.1-8b", "h100", observed=125, context=100).verdict
  assert "over 8 sequences" in verdict.sentence and verdict.fraction == pytest.approx(alone.fraction, rel=0.01)


def test_ways_out_are_sorted_and_computed():
  plan = plan_deployment("llama-3.1-70b", "gb10", batches=[1], kv_cache="bf16", weights="bf16", count=2, context=32768)
  gains = [way.total_gain for way in plan.ways_out]
  assert gains == sorted(gains, reverse=True) and min(gains) > 1.005
  ways = {way.what: way for way in plan.ways_out}
  fp8 = plan_deployment("llama-3.1-70b", "gb10", batches=[1], kv_cache="bf16", weights="fp8", count=2, context=32768)
  assert ways["FP8 weights"].total_gain == pytest.approx(
    fp8.batches[0].decode_ceiling_tok_s / plan.batches[0].decode_ceiling_tok_s
  )
  assert "an FP8 KV cache" in ways and "16,384 tokens of context instead of 32,768" in ways
  assert any(what.startswith("speculation") for what in ways) and any(what.startswith("tensor=4") for what in ways)
  assert any("H200" in what for what in ways)
  more = next(way for way in plan.ways_out if "sequences at once" in way.what)
  assert more.per_sequence_gain < 1 < more.total_gain
  from_four = plan_deployment("llama-3.1-8b", "h100", batches=[4, 8])
  doubled = next(way for way in from_four.ways_out if way.what == "8 sequences at once instead of 4")
  four, eight = from_four.batches
  assert doubled.total_gain == pytest.approx(eight.total_ceiling_tok_s / four.total_ceiling_tok_s)
  size = int(more.what.split()[0])
  larger = plan_deployment("llama-3.1-70b", "gb10", batches=[size], kv_cache="bf16", weights="bf16", count=2, context=32768)
  assert more.total_gain == pytest.approx(larger.batches[0].total_ceiling_tok_s / plan.batches[0].total_ceiling_tok_s)


def test_speculation_by_hand():
  assert Speculation(0.5, 2).tokens_per_step == 1 + 0.5 + 0.25
  assert Speculation(0.0, 4).tokens_per_step == 1
  # With no draft model and memory as the limit, the gain is the tokens of a step.
  config = dataclasses.replace(LlamaConfig.from_name("llama-3.1-8b"), vocab_size=1000, bos_id=None, eos_ids=())
  plan = plan_deployment(config, "h100", batches=[1], speculation=Speculation(0.5, 2))
  way = next(way for way in plan.ways_out if "prompt lookup" in way.what)
  assert way.total_gain == pytest.approx(1.75, rel=0.001)
  # With a draft model its four steps cost 4 x (0.97 GB of linears + 0.53 GB of head + the cache) on top of 70.58 GB + cache.
  plan = plan_deployment("llama-3.1-70b", "gb10", batches=[1], context=64)
  way = next(way for way in plan.ways_out if "llama-3.2-1b as draft" in way.what)
  assert way.total_gain == pytest.approx(Speculation().tokens_per_step * 70.6 / (70.6 + 4 * (0.973 + 0.525)), rel=0.002)
  # Where arithmetic is the limit, checking five tokens costs five times as much.
  slow = dataclasses.replace(load_device("gb10"), fp8_flops=1e9, bf16_flops=1e9)
  ways = plan_deployment(config, slow, batches=[1]).ways_out
  assert not any("speculation" in way.what for way in ways)


def test_published_systems_give_the_expected_range():
  plan = plan_deployment("llama-3.1-70b", "gb10", batches=[1])
  low, high = plan.batches[0].expected_tok_s
  assert low < 2.7 < high < plan.batches[0].total_ceiling_tok_s  # 2.7: a published FP8 run on this device
  assert all(row.source and plan.expected_fraction[0] <= row.fraction <= plan.expected_fraction[1] for row in plan.published)


@pytest.mark.parametrize("name", sorted(path.stem for path in (configs_folder() / "models").glob("*.toml")))
@pytest.mark.parametrize("device", [name for name in device_names() if name != "cpu"])
def test_every_model_on_every_device_is_consistent(name, device):
  plan = plan_deployment(name, load_device(device), batches=[1, 16])
  json.dumps(plan.to_json(), allow_nan=False)
  assert plan.fits or plan.smallest_change
  one, many = plan.batches
  assert one.decode_ceiling_tok_s >= many.decode_ceiling_tok_s and many.total_ceiling_tok_s >= one.total_ceiling_tok_s
  for batch in plan.batches:
    assert batch.total_ceiling_tok_s == pytest.approx(batch.batch * batch.decode_ceiling_tok_s)
    assert batch.step_floor_s == batch.times.step >= max(dataclasses.astuple(batch.times))


def test_the_model_may_be_a_file(capsys, tmp_path):
  config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
  }  # fmt: skip
  (tmp_path / "config.json").write_text(json.dumps(config))
  expected = plan_deployment("llama-3.1-8b", "h100").weights_bytes
  assert _json(capsys, f"--model={tmp_path}/config.json", "--device=h100")["weights_bytes"] == expected
  assert _json(capsys, f"--model={tmp_path}", "--device=h100")["weights_bytes"] == expected
  toml = configs_folder() / "models" / "llama-3.1-8b.toml"
  assert _json(capsys, f"--model={toml}", "--device=h100")["weights_bytes"] == expected
  device = configs_folder() / "devices" / "h100.toml"
  assert _json(capsys, "--model=llama-3.1-8b", f"--device={device}")["weights_bytes"] == expected


def test_a_checkpoint_brings_its_recipe(capsys, tmp_path):
  recipe = {"weights": "bf16", "granularity": "channel", "activations": "bf16", "kv": "bf16"}
  config = LlamaConfig.from_name("tiny")
  formats = (LayerFormat(*["bf16"] * 4),) * config.num_layers
  manifest = Manifest(config, Recipe(**recipe), formats, tokenizer=None, provenance={})
  (tmp_path / "jaxfp8.json").write_text(manifest.to_json())
  stored = _json(capsys, f"--model={tmp_path}", "--device=h100")["recipe"]
  assert stored == recipe
  assert _json(capsys, f"--model={tmp_path}", "--device=h100", "--weights=fp8")["recipe"]["weights"] == "fp8"
  (tmp_path / "jaxfp8.json").write_text('{"config": 3}')
  with pytest.raises(InputError, match="no whole checkpoint of jaxfp8"):
    _run(f"--model={tmp_path}", "--device=h100")


def test_the_context_is_the_models_where_that_is_less():
  plan = plan_deployment("tiny", "h100")
  assert (plan.deployment.context, plan.deployment.prompt, plan.max_context) == (512, 512, 512)


def test_tables_say_what_matters(capsys):
  assert _run(*SPARK, "--observed=3", "--batch=1,40") == 0
  text = " ".join(capsys.readouterr().out.split())
  for words in (
    "72,685,879,296", "estimate", "31 of 8,192 tokens", "* batch 40 lacks", "gpt-fast README", "x 1.93", "at batch 460",
    "Unified memory", "ways out, from batch 1", "speculation, llama-3.2-1b as draft", "this is the hardware, not a fault.",
  ):  # fmt: skip
    assert words in text, words
  assert _run("--model=llama-3.1-405b", "--device=a100-80", "--count=16", "--context=100", "--batch=1") == 0
  text = " ".join(capsys.readouterr().out.split())
  assert "No FP8 units" in text and "are held 2 times" in text and "28 of each sequence's last page stay empty" in text


def test_sweep(capsys):
  result = _json(capsys, "--model=llama-3.1-8b", "--sweep", "--device=gb10,h100,b200", "--batch=1")
  assert [row["device"] for row in result["devices"]] == ["gb10", "h100", "b200"]
  assert _run("--model=llama-3.1-8b", "--sweep", "--batch=1,8", "--tensor=2") == 0
  text = " ".join(capsys.readouterr().out.split())
  assert all(name in text for name in device_names()) and "cpu is left out" in text
  assert text.index("b200 ") < text.index("h100 ") < text.index("gb10 ")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plots_are_written(tmp_path, capsys, suffix):
  path = tmp_path / f"plan.{suffix}"
  assert _run(*SPARK, f"--plot={path}", "--observed=3") == 0
  assert path.stat().st_size > 10_000
  # A device that holds nothing still gets its picture.
  plot_plan(plan_deployment("llama-3.1-70b", "rtx-4090", batches=[1]), str(path))


def test_a_missing_matplotlib_is_one_sentence(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  with pytest.raises(InputError, match=r"needs matplotlib.*pip install 'jaxfp8\[plot\]'"):
    plot_plan(plan_deployment("tiny", "h100"), str(tmp_path / "x.png"))


BAD = [
  ((), "--model is missing"),
  (("--model=llama-3.1-70b",), "--device must name one device; got none.*gb10"),
  (("--model=llama-3.1-70b", "--device=gb10,h100"), "--device must name one device; got gb10,h100"),
  (("--model=llama-3.1-7b", "--device=gb10"), "no model named 'llama-3.1-7b'.*llama-3.1-70b"),
  (("--model=absent.toml", "--device=gb10"), r"cannot read \S*absent.toml"),
  (("--model=absent.gguf", "--device=gb10"), "absent.gguf"),
  (("--model=llama-3.1-70b", "--device=gb11"), "no device named 'gb11'.*gb10"),
  (("--model=llama-3.1-70b", "--device=mine.toml"), "cannot read mine.toml"),
  ((*SPARK, "--count=3"), "tensor=3 cannot cut.*possible are 1, 2, 4, 8, 16, 32, 64"),
  ((*SPARK, "--count=4", "--tensor=4", "--data=2"), "tensor times data must be count; got 4 x 2 and 4"),
  ((*SPARK, "--count=4", "--tensor=8"), "tensor times data must be count; got 8 x 1 and 4"),
  ((*SPARK, "--count=0"), "count must be at least 1; got 0"),
  ((*SPARK, "--tensor=-2"), "tensor must be at least 1; got -2"),
  ((*SPARK, "--data=0"), "data must be at least 1; got 0"),
  (("--model=smollm2-135m", "--device=h100", "--tensor=2"), "possible are 1, 3, 9"),
  (("--model=smollm2-135m", "--device=h100", "--tensor=3", "--granularity=block128"), "block128.*tensor=3"),
  ((*SPARK, "--batch=0"), "batch must be at least 1; got 0"),
  ((*SPARK, "--batch=1,-8"), "batch must be at least 1; got -8"),
  ((*SPARK, "--batch=1,x"), "--batch must be whole numbers.*'x'"),
  ((*SPARK, "--batch="), "batch must name at least one|whole numbers"),
  ((*SPARK, "--batch=100000000"), "batch must be at most 65536"),
  ((*SPARK, "--context=-1"), "context must be at least 1; got -1"),
  ((*SPARK, "--context=200000"), "context must be at most the 131,072 tokens of llama-3.1-70b; got 200,000"),
  ((*SPARK, "--prompt=0"), "prompt must be at least 1; got 0"),
  ((*SPARK, "--prompt=9000"), "prompt must be at most the context of 8,192 tokens; got 9,000"),
  ((*SPARK, "--observed=-3"), "observed must be positive; got -3"),
  ((*SPARK, "--observed=0"), "observed must be positive; got 0"),
  ((*SPARK, "--observed=nan"), "observed must be positive; got nan"),
  ((*SPARK, "--observed=inf"), "observed must be positive; got inf"),
  ((*SPARK, "--observed=3", "--observed_batch=0"), "observed_batch must be from 1"),
  ((*SPARK, "--acceptance=1"), "acceptance must be at least 0 and below 1; got 1"),
  ((*SPARK, "--acceptance=-0.1"), "acceptance must be at least 0 and below 1"),
  ((*SPARK, "--draft_tokens=0"), "draft_tokens must be at least 1"),
  ((*SPARK, "--page_tokens=16"), "page_tokens must be 32, 64 or 128; got 16"),
  ((*SPARK, "--weights=bf16", "--activations=fp8"), "fp8 activations need fp8 weights"),
  ((*SPARK, "--plot=x.jpeg"), "must end in .png, .svg, .pdf; got 'x.jpeg'"),
  ((*SPARK, "--plot=/absent/x.png"), "folder of --plot=/absent/x.png does not exist"),
  ((*SPARK, "stray"), "every other argument is a flag; got also 'stray'"),
  (("--model=llama-3.1-70b", "--device=cpu", "--count=2"), "cpu is this one machine"),
  (("--model=llama-3.1-70b", "--sweep", "--observed=3"), "--observed is about one device"),
  (("--model=llama-3.1-70b", "--sweep", "--plot=x.png"), "--plot is about one device"),
  (("--model=llama-3.1-70b", "--sweep", "--tensor=3"), "tensor=3 cannot cut"),
  (("--model=llama-3.1-70b", "--sweep", "--device=gb10,gb11"), "no device named 'gb11'"),
  ((*SPARK, "--weights=int4"), "weights.*int4|int4.*weights"),
  ((*SPARK, "--count=two"), "count=two"),
  ((*SPARK, "--contxt=3"), "contxt"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_bad_input_is_one_sentence(args, message, capsys):
  with pytest.raises((InputError, flags.Error), match=message) as error:
    _run(*args)
  assert "\n" not in str(error.value).strip() and len(str(error.value)) < 400
  assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (("--model=llama-3.1-70b", "--device=gb11"), "Near names: gb10"),
    ((*SPARK, "--contxt=3"), "contxt"),
    ((*SPARK, "--weights=int4"), "int4"),
    ((*SPARK, "--weights=bf16", "--batch=1"), "lacks 25,729,041,408 bytes (25.7 GB)"),
  ],
)
def test_a_bad_question_ends_with_code_1_and_one_sentence(args, message):
  done = _process(*args)
  assert done.returncode == 1 and message in done.stderr
  assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_the_command_answers_without_jax():
  code = "import sys; from jaxfp8.commands import plan; sys.exit('jax' in sys.modules or 'matplotlib' in sys.modules)"
  environment = os.environ | {"PYTHONPATH": str(configs_folder().parent)}
  assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0
  done = _process(*SPARK, "--observed=3.0", "--json")
  assert done.returncode == 0 and done.stderr == "" and json.loads(done.stdout)["fits"] is True


def test_the_page_is_what_the_script_makes():
  page = configs_folder().parent / "docs" / f"{make_docs.PAGE}.md"
  assert page.read_text(encoding="utf-8") == make_docs.make_page(), "run: python -m tools.make_docs"
  for device in ("gb10", "h100"):
    assert f"{make_docs.PAGE}-{device}.png" in page.read_text(encoding="utf-8")
    assert page.with_name(f"{make_docs.PAGE}-{device}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    (format_bytes(0), "0 B"),
    (format_bytes(999), "999 B"),
    (format_bytes(999_900), "1.00 MB"),
    (format_bytes(70_552_387_584), "70.6 GB"),
    (format_bytes(8.82e9), "8.82 GB"),
    (format_bytes(1.2e13), "12.0 TB"),
    (format_seconds(0), "0 s"),
    (format_seconds(0.2585), "258 ms"),
    (format_seconds(1.3e-6), "1.30 us"),
    (format_seconds(5e-10), "0.50 ns"),
    (format_rate(3.868), "3.87"),
    (format_rate(12345.6), "12,346"),
    (format_share(0.776), "78 %"),
    (format_share(0.0123), "1.2 %"),
  ],
)
def test_numbers_as_people_read_them(text, expected):
  assert text == expected
