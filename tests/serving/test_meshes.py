"""One model cut over 1, 2, 4 and 8 devices by tensor, data and both, against the same model on one: tokens, logits, errors."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.mesh import MeshShape
from jaxfp8.model import llama
from jaxfp8.model.llama import Llama
from jaxfp8.recipe import Recipe
from jaxfp8.sharding import make_mesh
from tests.helpers import numpy_llama, tiny_llamas, tiny_models
from tests.helpers.step_driver import Driver, Row
from tests.helpers.tiny_llamas import F32

# Up to four devices a KV head each, and on eight every KV head on two; V = 103 and F = 91 divide by nothing.
CONFIG = dataclasses.replace(
  tiny_models.make_config("gqa_9_3_untied"), num_heads=8, num_kv_heads=4, d_model=64, num_layers=2, name="meshes"
)
NINE = tiny_models.make_config("gqa_9_3_untied")


class TestWhatIsPossible:
  @pytest.mark.parametrize(
    ("model", "tensor", "kv", "group"),
    [
      ("llama-3.1-405b", 16, 8, 2),
      ("llama-3.1-405b", 8, 8, 1),
      ("llama-3.1-70b", 8, 8, 1),
      ("llama-3.1-70b", 16, 8, 2),
      ("llama-3.2-1b", 8, 8, 1),
      ("llama-3.2-1b", 16, 8, 2),
      ("llama-3.2-3b", 8, 8, 1),
      ("llama-3.1-8b", 32, 8, 4),
    ],
  )
  def test_real_models(self, model, tensor, kv, group):
    """With all weights declared: V and F are padded where they must be."""
    config = LlamaConfig.from_name(model)
    shape = MeshShape.for_model(config, tensor)
    assert (shape.kv, shape.group) == (kv, group)
    abstract = Llama(config, Recipe(), shape=shape)
    assert abstract.embedding.get_value().shape[0] % tensor == 0
    assert abstract.segments[0].attention.qkv.weight.get_value().shape[1] == kv * group * (config.num_kv_heads // kv)

  @pytest.mark.parametrize("tensor", [2, 4, 8])
  def test_nine_heads_on_two_and_four(self, tensor):
    with pytest.raises(
      InputError, match=rf"tensor={tensor} cannot cut the 9 query and 3 KV heads of .*; possible are 1, 3, 9\."
    ):
      make_mesh(NINE, tensor)

  @pytest.mark.parametrize(("tensor", "data", "message"), [(8, 2, "needs 16 devices; 8 are here"), (0, 1, "at least 1")])
  def test_too_many_and_too_few(self, tensor, data, message):
    with pytest.raises(InputError, match=message):
      make_mesh(CONFIG, tensor, data)


class TestNumbers:
  @pytest.mark.parametrize(("tensor", "data"), [(2, 1), (4, 1), (8, 1), (1, 2), (1, 8), (2, 2), (4, 2)])
  def test_logits_and_tokens_of_one_device(self, tensor, data):
    """Two prompts together, then two greedy steps; kv and group by the widest mesh."""
    tokens, logprobs = _generate(tensor, data)
    want_tokens, want = _generate(1, 1)
    np.testing.assert_array_equal(tokens, want_tokens)
    np.testing.assert_allclose(logprobs, want, atol=1e-5)

  @pytest.mark.parametrize("recipe", [F32, Recipe("fp8", "channel", "fp8", "fp8")], ids=["f32", "w8a8"])
  @pytest.mark.parametrize("tensor", [4, 8])
  def test_rows_of_a_long_prefill_are_cut(self, recipe, tensor, monkeypatch):
    """Reduce-scatter and all-gather around each norm, against all-reduce: what is rounded is the same, rows or no rows."""
    tokens, mesh = tiny_models.make_tokens(CONFIG, 50), make_mesh(CONFIG, tensor)
    weights, found = tiny_llamas.load(CONFIG, recipe, mesh=mesh), []
    for least in (512, 8):
      monkeypatch.setattr(llama, "_MIN_CUT_ROWS", least)
      driver = Driver(weights, mesh, prefill_sizes=(56,), decode_sizes=(4,))
      text = driver.steps.lower("prefill", 56).as_text()
      assert ("reduce_scatter" in text) == (least == 8)
      assert "reduce_scatter" not in driver.steps.lower("decode", 4).as_text()
      found.append(driver.prefill([Row(tokens, 0, 50, (1,)), Row(tokens, 0, 6, (2,), 1)], size=56)[1])
    np.testing.assert_allclose(*found, atol=1e-5 if recipe is F32 else 0.05)

  def test_against_float64(self):
    """What all of them are compared with is a Llama."""
    prompt = tiny_models.make_tokens(CONFIG, 40, seed=40)
    truth = numpy_llama.forward(CONFIG, tiny_models.make_weights(CONFIG), prompt)[-1]
    np.testing.assert_allclose(_generate(1, 1)[1][0, 0], jax.nn.log_softmax(truth), atol=1e-4)


@functools.cache
def _generate(tensor: int, data: int):
  """(tokens [3, 2], log-probabilities [3, 2, V])."""
  mesh = make_mesh(CONFIG, tensor, data)
  driver = Driver(
    tiny_llamas.load(CONFIG, F32, mesh=mesh), mesh, num_pages=4, max_sequences=2, prefill_sizes=(56,), decode_sizes=(2,)
  )
  prompts = [tiny_models.make_tokens(CONFIG, n, seed=n) for n in (40, 15)]
  rows = [Row(prompts[0], 0, 40, (3,)), Row(prompts[1], 0, 15, (2,), slot=1)]

  def shards(rows):
    return [rows] if data == 1 else [[rows[0]], [rows[1]], *[[]] * (data - 2)]

  results = [driver.prefill(*shards(rows), size=56)]
  for _ in range(2):
    rows = [dataclasses.replace(row, start=row.stop, stop=row.stop + 1, from_device=True) for row in rows]
    results.append(driver.decode(*shards(rows), size=2))
  tokens, logprobs = zip(*results, strict=True)
  return np.stack(tokens), np.stack(logprobs)


class TestFloat8Activations:
  """W8A8 on a mesh: a device scales the activations that it has, so local amax is part of the definition."""

  @pytest.mark.parametrize("tensor", [1, 2, 4, 8])
  def test_within_twice_the_error_of_a_reference_that_scales_per_device(self, tensor):
    tokens, weights = tiny_models.make_tokens(CONFIG, 60), tiny_models.make_weights(CONFIG)
    rounded = {n: numpy_llama.fake_quantize_weight(w, "channel") if "proj" in n else w for n, w in weights.items()}
    truth = numpy_llama.forward(CONFIG, rounded, tokens)
    reference = numpy_llama.forward(CONFIG, rounded, tokens, linear=_scaled_per_device(rounded, tensor))
    mesh = make_mesh(CONFIG, tensor)
    model = tiny_llamas.load(CONFIG, Recipe("fp8", "channel", "fp8", "f32"), weights=weights, mesh=mesh)
    driver = Driver(model, mesh, prefill_sizes=(64,), decode_sizes=(4,))
    _, logprobs = driver.prefill([Row(tokens[:n], 0, n, (i,), i) for i, n in enumerate((15, 15, 30, 4))], size=64)
    want = np.asarray(jax.nn.log_softmax(truth[[14, 14, 29, 3]]))
    error = _rms(logprobs - want)
    reference_error = _rms(np.asarray(jax.nn.log_softmax(reference[[14, 14, 29, 3]])) - want)
    assert reference_error > 1e-3
    assert error <= 2 * reference_error


def _scaled_per_device(weights, tensor: int):
  """A linear layer whose inputs are float8 with a scale per token, and per device where the inputs are cut over devices."""
  cut = {"o_proj": CONFIG.num_heads * CONFIG.head_dim, "down_proj": CONFIG.d_ff}

  def linear(x, name):
    w = weights[name].astype(np.float64)
    columns = next((size for matrix, size in cut.items() if matrix in name), None)
    if columns is None:
      return numpy_llama.fake_quantize(x, -1) @ w.T
    part = -(-columns // tensor)
    starts = range(0, columns, part)
    return sum(numpy_llama.fake_quantize(x[:, s : s + part], -1) @ w[:, s : s + part].T for s in starts)

  return linear


def _rms(x) -> float:
  return float(np.sqrt(np.mean(np.square(x))))
