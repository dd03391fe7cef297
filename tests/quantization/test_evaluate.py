"""tools/evaluate.py and jaxfp8.quality: against numpy in float64; the real model against an independent fake quantization."""

import functools
import json

import jax
import numpy as np
import pytest

from jaxfp8.checkpoint import convert, readers
from jaxfp8.commands import command, evaluate
from jaxfp8.errors import InputError
from jaxfp8.quantization import quality
from jaxfp8.recipe import LayerFormat, Recipe
from tests.helpers import commands, numpy_llama, numpy_recipes, tiny_llamas, tiny_models
from tests.helpers.numpy_recipes import divergence, log_softmax

CASE = "gqa_9_3_untied"


def tiny(recipe: Recipe = tiny_llamas.F32, weights=None):
  return tiny_llamas.load(CASE, recipe, weights=weights)


@functools.cache
def tiny_chunks():
  config = tiny_models.make_config(CASE)
  return quality.cut_chunks(tiny_models.make_tokens(config, 700), 280, 70)


class TestScores:
  def test_against_float64(self):
    """Two Llamas that differ, by jaxfp8's prefill and by numpy."""
    config, weights = tiny_models.make_config(CASE), tiny_models.make_weights(tiny_models.make_config(CASE))
    other = {name: w + 0.02 * np.random.default_rng(1).standard_normal(w.shape).astype("f") for name, w in weights.items()}
    scores = quality.Reference(tiny(), tiny_chunks()).score(tiny(weights=other))
    for row, *found in zip(tiny_chunks(), scores.nll, scores.kl, scores.agrees, strict=True):
      p, q = (numpy_llama.forward(config, w, row[:-1]) for w in (weights, other))
      truth = -log_softmax(q)[np.arange(len(row) - 1), row[1:]], divergence(p, q), p.argmax(-1) == q.argmax(-1)
      for ours, wanted in zip(found, truth, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=2e-3, atol=1e-4)
    assert scores.kl.mean() > 0.01 and 0 < scores.agrees.mean() < 1

  def test_a_model_is_at_no_distance_from_itself(self):
    reference = quality.Reference(tiny(), tiny_chunks())
    found = quality.Quality.of(reference.score(tiny()), reference.nll)
    assert abs(found.kl.value) < 1e-6 and found.top1.value == 1 and found.perplexity_ratio.value == 1

  def test_the_kv_pages_of_a_recipe_count(self):
    reference = quality.Reference(tiny(), tiny_chunks())
    kl = {kv: reference.score(tiny(Recipe("f32", "channel", "f32", kv))).kl.mean() for kv in ("f32", "bf16", "fp8")}
    assert kl["f32"] < 1e-7 < kl["bf16"] < kl["fp8"] / 10


class TestLayers:
  @pytest.mark.parametrize("granularity", ["tensor", "channel", "block128"])
  def test_a_layer_costs_what_a_model_with_that_layer_in_float8_costs(self, granularity):
    """`with_layers` against a Llama with formats layer by layer, whose kernels take the float8 weights themselves."""
    config = tiny_models.make_config(CASE)
    recipe = Recipe("fp8", granularity, "f32", "f32")
    base, quantized, reference = tiny(), tiny(recipe), quality.Reference(tiny(), tiny_chunks())
    kl = {}
    for layer in range(config.num_layers):
      weights = tiny_models.make_weights(config)
      for name in [name for name in weights if f".{layer}." in name and "proj" in name]:
        weights[name] = numpy_llama.fake_quantize_weight(weights[name], granularity).astype(np.float32)
      kl[layer] = reference.score(quality.with_layers(base, quantized, [layer])).kl
      np.testing.assert_allclose(kl[layer], reference.score(tiny(weights=weights)).kl, atol=3e-6, rtol=1e-3)
    together = reference.score(quality.with_layers(base, quantized, range(config.num_layers)))
    np.testing.assert_allclose(together.kl, reference.score(quantized).kl, atol=3e-6, rtol=1e-3)
    assert together.kl.mean() > max(x.mean() for x in kl.values()) > 1e-4
    assert reference.score(base).kl.mean() < 1e-6, "the base itself is unchanged"

  def test_models_that_do_not_belong_together(self):
    formats = (LayerFormat.uniform("fp8"), *[LayerFormat.uniform("f32")] * 2)
    from jaxfp8.model.llama import Llama

    mixed = Llama(tiny_models.make_config(CASE), Recipe("fp8", "channel", "f32", "f32"), formats=formats)
    for pair in ((tiny(), mixed), (tiny(), tiny_llamas.load("mha_tied"))):
      with pytest.raises(InputError, match="two models of one config"):
        quality.with_layers(*pair, [0])


class TestIntervals:
  def test_chunks_of_a_normal_distribution(self):
    """Of 300 samples of 30 chunks, about 95 % of the intervals hold the true mean (a percentile interval: somewhat fewer)."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):
      values = 2 + rng.standard_normal((30, 1)) + 0.1 * rng.standard_normal((30, 5))
      estimate = quality.bootstrap(values)
      assert estimate.low <= estimate.value <= estimate.high
      held += estimate.low <= 2 <= estimate.high
    assert 0.88 < held / 300 < 0.98

  def test_positions_of_a_chunk_are_not_drawn_one_by_one(self):
    values = np.repeat(np.random.default_rng(0).standard_normal((10, 1)), 1000, axis=1)
    estimate = quality.bootstrap(values)
    assert estimate.high - estimate.low > 0.5 * np.std(values)
    assert quality.bootstrap(values, quality.EXP).value == pytest.approx(np.exp(values.mean()))


class TestChunks:
  def test_they_cover_the_text_and_do_not_overlap(self):
    chunks = quality.cut_chunks(list(range(1000)), 300, 100)
    assert chunks.shape == (3, 101) and chunks.dtype == np.int32
    assert chunks[0, 0] == 0 and chunks[-1, -1] == 999
    assert (np.diff(chunks, axis=1) == 1).all() and (chunks[1:, 0] > chunks[:-1, -1]).all()

  def test_each_starts_with_bos(self):
    chunks = quality.cut_chunks(list(range(10, 1000)), 300, 100, bos_id=1)
    assert chunks.shape == (3, 101) and (chunks[:, 0] == 1).all() and chunks[0, 1] == 10

  @pytest.mark.parametrize(("tokens", "context", "why"), [(100, 100, "two chunks"), (5, 1, "two chunks"), (2000, 100, "2020")])
  def test_too_little(self, tokens, context, why):
    with pytest.raises(InputError, match=why):
      quality.cut_chunks(list(range(1000)), tokens, context)


@pytest.fixture(scope="module")
def real():
  """SmolLM2-135M-Instruct over two short chunks of CPython's topics."""
  return numpy_recipes.Comparison(256, 128)


@pytest.mark.parametrize("name", ["fp8-channel:fp8:fp8", "fp8-block128:fp8:bf16", "fp8-channel:fp8_static:fp8_static"])
def test_real_model_is_as_good_as_numpys_fake_quantization(name, real):
  """The other recipes: python tests/numpy_recipes.py."""
  ours, theirs = real.divergences(name)
  assert 0.001 < theirs < 0.1
  assert ours <= 1.1 * theirs, f"{name}: KL {ours:.5f}, numpy's {theirs:.5f}"
  assert ours >= 0.8 * theirs, "so much better than its own recipe cannot be"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  config = tiny_models.make_config(CASE)
  return tiny_models.write_hf_folder(tmp_path_factory.mktemp("m") / "tiny", config, tiny_models.make_weights(config))


class TestCommand:
  @pytest.fixture
  def run(self, monkeypatch, capsys, folder):
    def run(*args: str):
      commands.forget_flags(evaluate.FLAGS)
      sizes = (f"--checkpoint={folder}", "--tokens=96", "--context=32", "--layer_tokens=64", "--cache_dir=")
      monkeypatch.setattr("sys.argv", ["evaluate", *sizes, *args])
      with pytest.raises(SystemExit) as end:
        command.run(evaluate.COMMAND)
      return end.value.code, *capsys.readouterr()

    return run

  def test_tables_plot_and_json(self, run, tmp_path):
    recipes = ["bf16:bf16:bf16", "fp8-channel:fp8:fp8"]
    code, out, _ = run(f"--recipes={','.join(recipes)}", f"--plot={tmp_path / 'layers.png'}")
    lines = out.strip().splitlines()
    result = json.loads(lines[-1])
    assert code == 0 and [line["recipe"] for line in result["recipes"]] == recipes
    assert [line["layer"] for line in result["layers"]] == [0, 1, 2]
    assert result["tokens"] == 96 and result["jax"] == jax.__version__ and len(result["text"].split("sha256 ")[1]) == 13
    for line in (*result["recipes"], *result["layers"], {**result["all_layers"]}):
      for key in ("perplexity", "perplexity_ratio", "kl", "top1"):
        assert line[key]["low"] <= line[key]["value"] <= line[key]["high"]
    assert result["recipes"][0]["kl"]["value"] < result["recipes"][1]["kl"]["value"] / 5
    assert any(line.startswith("fp8-channel:fp8:fp8") for line in lines) and "…" not in out
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")

  def test_markdown(self, run):
    _, out, _ = run("--recipes=fp8-channel:bf16:bf16", "--markdown", "--reference=bf16")
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert len(rows) == 3 and {row.count("|") for row in rows} == {6}

  def test_gate(self, run):
    recipe = "--recipes=fp8-channel:fp8:fp8"
    code, _, err = run(recipe, "--json", "--gate", "--max_kl=1e-6")
    assert code == 1 and "KL divergence must be at most 1e-06; got" in err
    code, _, err = run(recipe, "--json", "--gate", "--max_kl=1", "--min_top1=0.9999", "--max_perplexity_ratio=0.5")
    assert code == 1 and "KL" not in err and "top-1 agreement must be at least" in err and "perplexity ratio" in err
    assert run(recipe, "--json", "--gate", "--max_kl=1", "--max_perplexity_ratio=2")[0] == 0
    assert run(recipe, "--json", "--max_kl=1e-6")[0] == 0, "limits count with --gate alone"

  def test_a_number_that_is_none_fails_the_gate(self, run, monkeypatch):
    estimate = quality.Estimate(float("nan"), 0, 0)
    monkeypatch.setattr(quality.Quality, "of", lambda *_: quality.Quality(estimate, estimate, estimate, estimate))
    assert run("--recipes=fp8-channel:fp8:fp8", "--json", "--gate")[0] == 1

  @pytest.mark.parametrize(
    ("args", "why"),
    [
      (["--recipes=fp8:bf16"], "weights[-granularity[-rounding]]:activations:kv"),
      (["--recipes=bf16-channel:bf16:bf16"], "granularity for fp8 alone"),
      (["--recipes=fp8-channel-best:bf16:bf16"], "a rounding of nearest, mse, gptq"),
      (["--keep_bf16=auto:0"], "needs N from 1 to 12"),
      (["--recipes=fp4:bf16:bf16"], "weights must be one of"),
      (["--recipes=bf16:fp8:bf16"], "fp8 activations need fp8 weights"),
      (["--text=/none/such.txt"], "cannot read --text=/none/such.txt"),
      (["--tokens=1"], "at least two chunks"),
      (["--plot=layers.jpeg"], "must end in .png"),
      (["extra"], "every argument is a flag"),
    ],
  )
  def test_mistakes_are_one_sentence(self, run, args, why):
    code, out, err = run(*args)
    assert code == 1 and why in err and not out and len(err.strip().splitlines()) == 1

  def test_another_pythons_topics_are_said(self, run, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "TOPICS_SHA256", "0")
    assert "is not that of CPython" in run("--recipes=bf16:bf16:bf16", "--json")[2]
    (tmp_path / "own.txt").write_text("the quick brown fox " * 50)
    code, out, err = run("--recipes=bf16:bf16:bf16", "--json", f"--text={tmp_path / 'own.txt'}")
    assert code == 0 and "CPython" not in err and json.loads(out)["text"].startswith("own.txt (sha256 ")

  def test_a_converted_checkpoint_has_no_source(self, run, tmp_path, folder):
    convert.convert_checkpoint(readers.open_source(folder), tmp_path / "converted", Recipe())
    code, _, err = run(f"--checkpoint={tmp_path / 'converted'}")
    assert code == 1 and "converted already" in err
