"""Static scales, roundings and what is decided by quality: against numpy's own statistics, rounding and fake quantization."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from jaxfp8.checkpoint import convert, load, readers, static_scales, stored_arrays
from jaxfp8.checkpoint.manifest import read_manifest
from jaxfp8.checkpoint.save import save
from jaxfp8.commands import calibrate as tool
from jaxfp8.commands import command
from jaxfp8.errors import InputError
from jaxfp8.model import fp8
from jaxfp8.quantization import calibration, observers, quality, quality_gate, rounding
from jaxfp8.recipe import Recipe
from jaxfp8.sharding import make_mesh
from tests.helpers import commands, numpy_llama, tiny_models
from tests.helpers.numpy_recipes import divergence

CASE = "gqa_9_3_untied"
STATIC = Recipe("fp8", "channel", "fp8_static", "fp8_static")
WIDE = Recipe("fp8", "channel", "f32", "f32")


@pytest.fixture(scope="module")
def config():
  return tiny_models.make_config(CASE)


@pytest.fixture(scope="module")
def chunks(config):
  return tiny_models.make_tokens(config, 8 * 64).reshape(8, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, config):
  return tiny_models.write_hf_folder(tmp_path_factory.mktemp("m") / "tiny", config, tiny_models.make_weights(config))


@pytest.fixture(scope="module")
def calibrated(folder, chunks):
  """(calibrator, {key: array}) in float32, so that numpy's float64 sees the same numbers."""
  calibrator = calibration.Calibrator(readers.open_source(folder), WIDE, chunks)
  return calibrator, {key: array for _, group in calibrator.layers() for key, array in group.items()}


def fake_weights(config) -> dict[str, np.ndarray]:
  """The tiny model's weights through float8, by numpy."""
  weights = tiny_models.make_weights(config)
  return {name: numpy_llama.fake_quantize_weight(w, "channel") if "_proj" in name else w for name, w in weights.items()}


def listen(config, weights, chunks):
  """({linear: amax of its inputs}, [amax of keys and values by head, in the order of the calls]) by numpy."""
  inputs, kv = {}, [0.0] * (2 * config.num_layers)
  for row in chunks:
    place = iter(range(len(kv)))

    def linear(x, name):
      inputs[name] = max(inputs.get(name, 0), np.abs(x).max())
      return x @ weights[name].astype(np.float64).T

    def hear(x, place=place):
      at = next(place)
      kv[at] = np.maximum(kv[at], np.abs(x).max(axis=(0, 2)))
      return x

    numpy_llama.forward(config, weights, row, linear, hear)
  return inputs, kv


def numpy_static(config, weights, tokens, scales):
  """Logits where linears and pages round with given scales."""
  names = iter([key for layer in range(config.num_layers) for key in (f"{layer}.k", f"{layer}.v")])

  def through(x, scale):
    return numpy_llama.to_float8(x, np.float32(scale)).astype(np.float64) * np.float32(scale)

  def linear(x, name):
    return through(x, scales[name.replace(".weight", ".input_scale[]")]) @ weights[name].astype(np.float64).T

  def kv(x):
    layer, which = next(names).split(".")
    return through(x, scales[f"model.layers.{layer}.self_attn.{which}_scale[K]"][None, :, None])

  weights = dict(weights)
  head = weights.pop("lm_head.weight")
  return numpy_llama.forward(config, weights | {"lm_head.weight": head}, tokens, linear, kv)


class TestScales:
  def test_what_is_seen_is_what_numpy_sees(self, config, chunks, calibrated):
    inputs, kv = listen(config, fake_weights(config), chunks)
    seen = {(s.layer, s.name): s.amax for s in calibrated[0].seen}
    first = {"qkv": "self_attn.q_proj", "o": "self_attn.o_proj", "gate_up": "mlp.up_proj", "down": "mlp.down_proj"}
    for (layer, name), amax in seen.items():
      own = first.get(name)
      truth = inputs[f"model.layers.{layer}.{own}.weight"] if own else kv[2 * layer + (name == "v_scale")]
      np.testing.assert_allclose(amax, truth, rtol=1e-3)
    assert len(seen) == 6 * config.num_layers

  def test_each_choice_against_numpy(self):
    values = np.random.default_rng(0).standard_t(3, (2, 200000)).astype(np.float32)
    sizes = observers.HistogramObserver(2)
    for part in np.split(values, 4, axis=1):
      sizes.add(part)
    found = sizes.scales()
    for row, own in enumerate(np.abs(values)):
      assert found["max"][row] == np.float32(own.max() / 448)
      percentile = np.percentile(own, observers.PERCENTILE, method="inverted_cdf")
      np.testing.assert_allclose(found["percentile"][row] * 448, percentile, rtol=0.02)

      def error(scale, own=own):
        rounded = np.clip(own / scale, 0, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
        return np.square(own - rounded).mean()

      best = min(error(own.max() / 448 * 2 ** (-step / 8)) for step in range(49))
      assert error(found["mse"][row]) <= 1.01 * best
    assert (observers.HistogramObserver(1).scales()["mse"] == 1).all(), "nothing but zeros has scale 1"

  def test_static_logits_against_numpy(self, config, folder, calibrated):
    """As near to float32 as a numpy fake quantization with the same scales, and not as near with other scales."""
    scales = {key: array for key, array in calibrated[1].items() if "_scale[" in key}
    source, weights, tokens = (
      readers.open_source(folder),
      tiny_models.make_weights(config),
      tiny_models.make_tokens(config, 150, 3),
    )
    plain = numpy_llama.forward(config, weights, tokens)
    recipe = dataclasses.replace(STATIC, activations="fp8_static")
    model = load.load_source(source, recipe, scales=scales)
    ours = divergence(plain, np.asarray(_logits(model, tokens))).mean()
    theirs = divergence(plain, numpy_static(config, fake_weights(config), tokens, scales)).mean()
    assert 0.7 * theirs < ours < 1.1 * theirs
    small = {key: array / 8 if "input" in key else array for key, array in scales.items()}
    saturated = load.load_source(source, recipe, scales=small)
    assert divergence(plain, np.asarray(_logits(saturated, tokens))).mean() > 2 * ours

  def test_the_largest_of_matrices_that_share_an_input(self, folder, calibrated, capsys):
    static_scales._say_once.cache_clear()
    scales = {key: array for key, array in calibrated[1].items() if "_scale[" in key}
    scales["model.layers.1.self_attn.k_proj.input_scale[]"] = np.float32(9)
    model = load.load_source(readers.open_source(folder), STATIC, scales=scales)
    assert model.segments[0].attention.qkv.static_scale[1] == 9
    assert capsys.readouterr().err.count("the largest counts") == 1
    scales["model.layers.1.self_attn.k_proj.input_scale[]"] = np.float32(0)
    with pytest.raises(InputError, match=r"must be positive; model\.layers\.1\.self_attn\.k_proj"):
      load.load_source(readers.open_source(folder), STATIC, scales=scales)

  def test_without_scales(self, folder):
    with pytest.raises(InputError, match=r"needs model.layers.0.self_attn.q_proj.input_scale\[\]; .* has none"):
      load.load_source(readers.open_source(folder), STATIC)

  def test_each_device_has_its_heads_scales(self, config, folder, calibrated):
    scales = {key: array for key, array in calibrated[1].items() if "_scale[" in key}
    mesh = make_mesh(config, 3)
    model = load.load_source(readers.open_source(folder), STATIC, scales=scales, mesh=mesh)
    for layer in range(config.num_layers):
      own = [np.asarray(s.data)[layer] for s in model.segments[0].attention.v_scale.get_value().addressable_shards]
      np.testing.assert_array_equal(np.concatenate(own), scales[f"model.layers.{layer}.self_attn.v_scale[K]"])


def _logits(model, tokens):
  return model.logits(quality.hidden_states(model, tokens))


class TestRounding:
  @staticmethod
  def case():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 64)) @ (rng.standard_normal((64, 64)) * np.exp(-np.arange(64) / 12)[:, None])
    return x.astype(np.float32), rng.standard_normal((40, 64)).astype(np.float32)

  @staticmethod
  def textbook(w, hessian):
    """Optimal brain quantization, a column at a time, the inverse of what is left computed anew each time; float64."""
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    damped = hessian + rounding.DAMPING * np.mean(np.diagonal(hessian)) * np.eye(len(hessian))
    left, scale, out = w.astype(np.float64), numpy_llama.scale_of(w, 1), np.zeros_like(w, np.float64)
    for place, column in enumerate(order):
      rest = order[place:]
      inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
      out[:, column] = (numpy_llama.to_float8(left[:, [column]], scale).astype(np.float64) * scale)[:, 0]
      error = (left[:, column] - out[:, column]) / inverse[0, 0]
      left[:, rest] -= error[:, None] * inverse[0]
    return out

  def test_gptq_is_the_textbooks(self):
    x, w = self.case()
    hessian = x.T @ x
    q = rounding.round_weights(w, "channel", "gptq", rounding.Inputs.of(hessian))
    truth = self.textbook(w, hessian.astype(np.float64))
    same = np.isclose(np.asarray(fp8.dequantize(q)), truth, rtol=1e-6)
    assert same.mean() > 0.98, "but where float32 decides a tie otherwise"
    loss = [
      np.square(x @ (w - v).T).sum()
      for v in (np.asarray(fp8.dequantize(q)), truth, np.asarray(fp8.dequantize(fp8.quantize(w))))
    ]
    assert loss[0] < 1.02 * loss[1] < 0.7 * loss[2]

  @pytest.mark.parametrize("granularity", ["tensor", "channel", "block128"])
  def test_least_squares(self, granularity):
    w = np.random.default_rng(1).standard_normal((130, 140)).astype(np.float32) ** 3
    q, plain = rounding.round_weights(w, granularity, "mse"), fp8.quantize(w, granularity)
    errors = [np.square(np.asarray(fp8.dequantize(x)) - w).sum() for x in (q, plain)]
    assert q.scale.shape == plain.scale.shape and errors[0] <= errors[1]
    assert granularity != "channel" or errors[0] < errors[1], "of many scales some have room"
    assert (np.asarray(q.scale) <= np.asarray(plain.scale)).all()

  def test_lower_divergence_at_the_same_size(self, config, folder, chunks):
    source, tokens = readers.open_source(folder), tiny_models.make_tokens(config, 200, 9)
    plain = numpy_llama.forward(config, tiny_models.make_weights(config), tokens)
    kl = {}
    for name in rounding.ROUNDINGS:
      calibrator = calibration.Calibrator(source, WIDE, chunks, name, None)
      found = {key: array for _, group in calibrator.layers() for key, array in group.items()}
      model = calibration.load_calibrated(calibration.abstract_calibrated(calibrator, WIDE), calibrator, found)
      kl[name] = divergence(plain, np.asarray(_logits(model, tokens))).mean()
    assert kl["gptq"] < 0.9 * kl["nearest"]

  def test_wrong_wishes(self, folder, chunks):
    with pytest.raises(InputError, match="must be one of nearest, mse, gptq; got 'best'"):
      calibration.Calibrator(readers.open_source(folder), WIDE, chunks, "best")
    with pytest.raises(InputError, match="gptq needs to know inputs of D=8"):
      rounding.round_weights(np.ones((4, 8)), "channel", "gptq")


@pytest.fixture(scope="module")
def written(folder, chunks, tmp_path_factory):
  out = tmp_path_factory.mktemp("c") / "out"
  calibration.calibrate(folder, out, chunks, rounding="gptq", scales="mse", provenance={"text": "some"})
  return out


class TestCheckpoint:
  def test_it_is_what_it_says(self, written, config):
    manifest, model = read_manifest(written), load.load(written)
    assert manifest.recipe == STATIC == model.recipe
    assert manifest.provenance["calibration"] == {"rounding": "gptq", "scales": "mse", "tokens": 512, "text": "some"}
    assert len(manifest.static_scales) == 9 * config.num_layers
    assert load.load(written, dataclasses.replace(STATIC, activations="bf16", kv="bf16")).segments[0].attention.k_scale is None

  def test_saved_again(self, written, tmp_path, config):
    model, tokens = load.load(written), tiny_models.make_tokens(config, 70)
    save(model, tmp_path / "again")
    np.testing.assert_array_equal(_logits(load.load(tmp_path / "again"), tokens), _logits(model, tokens))

  def test_a_checkpoint_keeps_its_weights(self, written, chunks, tmp_path):
    calibration.calibrate(written, tmp_path / "new", chunks, scales="max")
    old, new = load.load(written).segments[0], load.load(tmp_path / "new").segments[0]
    np.testing.assert_array_equal(old.mlp.down.weight.get_value().qvalue, new.mlp.down.weight.get_value().qvalue)
    assert (new.mlp.down.static_scale >= old.mlp.down.static_scale).all()
    with pytest.raises(InputError, match="float8 already"):
      calibration.calibrate(written, tmp_path / "other", chunks, rounding="gptq")

  def test_never_half_written(self, folder, chunks, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration.Calibrator, "_scales", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      calibration.calibrate(folder, tmp_path / "out", chunks)
    assert not list(tmp_path.iterdir())


class TestDecisions:
  def test_the_costliest_matrices_stay(self, config, folder):
    """Each matrix alone through float8, by numpy; the costliest is the one that is kept."""
    source, chunks = readers.open_source(folder), quality.cut_chunks(tiny_models.make_tokens(config, 300), 128, 64)
    weights, fake = tiny_models.make_weights(config), fake_weights(config)
    plain = [numpy_llama.forward(config, weights, row[:-1]) for row in chunks]
    costs = quality_gate.matrix_costs(source, "channel", chunks)
    truth = {}
    for layer in range(config.num_layers):
      for merged, modules in stored_arrays.merged_modules(layer).items():
        mixed = weights | {f"{module}.weight": fake[f"{module}.weight"] for module in modules}
        rows = [divergence(p, numpy_llama.forward(config, mixed, row[:-1])) for p, row in zip(plain, chunks, strict=True)]
        truth[layer, merged] = np.mean(rows)
    np.testing.assert_allclose([line["kl"]["value"] for line in costs], list(truth.values()), rtol=0.05)
    layer, merged = max(truth, key=truth.get)
    (expression,) = quality_gate.costliest(costs, 1)
    kept = load.load_source(source, Recipe(), keep_bf16=[expression])
    wide = [(i, name) for i, f in enumerate(kept.formats) for name, d in dataclasses.asdict(f).items() if d == "bf16"]
    assert wide == [(layer, merged)]
    assert quality_gate.keep_expressions(source, ["v_proj"], "channel", chunks) == ["v_proj"]

  def test_a_gate(self, folder, config, tmp_path):
    source, chunks = readers.open_source(folder), quality.cut_chunks(tiny_models.make_tokens(config, 300), 128, 64)
    convert.convert_checkpoint(source, tmp_path / "out", Recipe())
    found = quality_gate.judge(source, tmp_path / "out", chunks, quality_gate.GateLimits(max_kl=1e-9, min_top1=0))
    assert len(found["failures"]) == 1 and "KL divergence must be at most 1e-09" in found["failures"][0]
    assert found["positions"] == 128 and 0 < found["kl"]["value"] < 0.2 and json.dumps(found)

  def test_training_text_is_not_what_is_predicted(self):
    tokens = list(range(1000))
    held = quality.cut_chunks(tokens, 300, 100)
    training = quality.cut_training_chunks(tokens, 400, 50, held)
    assert training.shape == (8, 50) and not set(training.ravel()) & set(held.ravel())
    assert len(set(training.ravel())) == training.size
    with pytest.raises(InputError, match="no room for 900"):
      quality.cut_training_chunks(tokens, 400, 900, held)


class TestCommand:
  def test_writes_and_tells(self, folder, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    args = [f"--checkpoint={folder}", f"--output={tmp_path / 'out'}", f"--text={text}", "--tokens=512", "--context=64"]
    code, out, _ = self.run(monkeypatch, capsys, *args)
    result = json.loads(out.strip().splitlines()[-1])
    assert code == 0 and result["tokens"] == 512 and len(result["seen"]) == 18
    assert load.load(tmp_path / "out").recipe == STATIC
    code, _, err = self.run(monkeypatch, capsys, *args)
    assert code == 1 and "exists already" in err

  @staticmethod
  def run(monkeypatch, capsys, *args):
    commands.forget_flags(tool.FLAGS)
    monkeypatch.setattr("sys.argv", ["calibrate", *args])
    with pytest.raises(SystemExit) as end:
      command.run(tool.COMMAND)
    return end.value.code, *capsys.readouterr()
