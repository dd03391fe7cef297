"""One conformance suite for paged_attention, inherited by every implementation that runs here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import paged_attention
from tests.helpers import paged_cases
from tests.helpers.paged_cases import Batch

BATCHES = {
  "decode": Batch((1, 33, 0, 64, 100), None, K=2, G=3, H=64, C=64),
  "decode_mha": Batch((65, 1, 130, 0), None, K=3, G=1, H=8, C=128),
  "decode_bf16": Batch((31, 32, 33), None, K=1, G=5, H=128, C=32, pages="bf16"),
  "decode_fp8": Batch((70, 5, 0, 129), None, K=2, G=4, H=64, C=64, pages="fp8"),
  "decode_fp8_lognormal": Batch((70, 5, 0, 129), None, K=1, G=2, H=128, C=128, pages="fp8_lognormal"),
  "decode_one": Batch((47,), None, K=1, G=1, H=64, C=32, pages="fp8"),
  "prefill": Batch((40, 7, 0, 65, 1), (40, 7, 0, 65, 1), K=2, G=3, H=64, C=32, padding=9),
  "history": Batch((100, 64, 33), (37, 1, 33), K=1, G=5, H=8, C=64, padding=1),
  "history_mha": Batch((129, 5), (65, 2), K=2, G=1, H=128, C=128, pages="bf16"),
  "prefill_fp8": Batch((70, 33, 2), (70, 20, 1), K=2, G=2, H=64, C=64, pages="fp8", padding=3),
  "prefill_fp8_lognormal": Batch((40, 90, 0), (31, 2, 0), K=1, G=4, H=128, C=32, pages="fp8_lognormal"),
  "prefill_one_token": Batch((1,), (1,), K=1, G=2, H=8, C=32, padding=1),
  "riding_along": Batch((90, 50, 17), (1, 50, 1), K=1, G=3, H=64, C=64, pages="fp8", padding=4),
}


@functools.cache
def case(name):
  arrays = BATCHES[name].arrays()
  return arrays, paged_cases.attention_truth(arrays)


@functools.cache
def attend(implementation):
  return jax.jit(functools.partial(paged_attention, implementation=implementation))


def error_of(implementation, arrays, truth) -> float:
  out = np.asarray(attend(implementation)(**paged_cases.to_jax(arrays)), np.float64)
  assert out.shape == truth.shape and np.isfinite(out).all()
  return float(np.sqrt(np.mean((out - truth) ** 2)) / np.sqrt(np.mean(truth**2)))


@functools.cache
def reference_error(name) -> float:
  return error_of("reference", *case(name))


class Conformance:
  implementation: str
  floor = 1e-6  # relative rms error that float32 arithmetic may always have

  def limit(self, name) -> float:
    return max(2 * reference_error(name), self.floor)

  @pytest.mark.parametrize("name", BATCHES)
  def test_matches_float64(self, name):
    assert error_of(self.implementation, *case(name)) <= self.limit(name)

  def test_padding_and_empty_places_are_zero(self):
    for name in ("decode", "prefill", "riding_along"):
      arrays, truth = case(name)
      out = np.asarray(attend(self.implementation)(**paged_cases.to_jax(arrays)))
      zero = (truth == 0).all(axis=(1, 2))
      assert zero.any() and (out[zero] == 0).all()

  def test_bf16_queries(self):
    arrays, truth = case("prefill_fp8")
    rounded = paged_cases.to_jax(arrays) | {"q_TNH": jnp.asarray(arrays["q_TNH"], jnp.bfloat16)}
    out = attend(self.implementation)(**rounded)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), truth, atol=0.05 * np.abs(truth).max())

  def test_what_it_must_not_read(self):
    """Pages of others, and what stands in a page behind a sequence's last token, change nothing."""
    for name in ("decode_fp8", "prefill"):
      arrays, _ = case(name)
      B, C = BATCHES[name], arrays["k_pages"].shape[2]
      visible = np.zeros((arrays["k_pages"].shape[0], C), bool)
      for b, length in enumerate(B.lengths):
        for position in range(length):
          visible[arrays["page_table_BM"][b, position // C], position % C] = True
      changed = dict(arrays)
      changed["k_pages"] = np.where(visible[:, None, :, None], arrays["k_pages"], arrays["k_pages"].dtype.type(7))
      changed["v_pages"] = np.where(visible[:, None, None], arrays["v_pages"], arrays["v_pages"].dtype.type(-5))
      out = [np.asarray(attend(self.implementation)(**paged_cases.to_jax(x))) for x in (arrays, changed)]
      np.testing.assert_array_equal(*out)

  @pytest.mark.parametrize(
    ("name", "sabotage"),
    [
      ("decode_fp8", lambda a: a | {"k_scale": np.ones_like(a["k_scale"]) * a["k_scale"].mean()}),
      ("prefill_fp8", lambda a: a | {"v_scale": np.ones_like(a["v_scale"]) * a["v_scale"].mean()}),
      ("prefill", lambda a: a | {"k_pages": a["v_pages"].swapaxes(2, 3), "v_pages": a["k_pages"].swapaxes(2, 3)}),
      ("decode", lambda a: a | {"lengths_B": np.maximum(a["lengths_B"] - 1, 0)}),
      ("history", lambda a: a | {"lengths_B": a["lengths_B"] - 1}),
      ("history", lambda a: a | {"page_table_BM": a["page_table_BM"][:, ::-1]}),
      ("decode_bf16", lambda a: a | {"q_TNH": a["q_TNH"][:, ::-1]}),
    ],
  )
  def test_sabotage_is_seen(self, name, sabotage):
    """The comparison can fail: with a wrong argument the error is far outside what is allowed."""
    arrays, truth = case(name)
    assert error_of(self.implementation, sabotage(dict(arrays)), truth) > 50 * self.limit(name)


class TestReference(Conformance):
  implementation = "reference"

  def limit(self, name):
    return self.floor


class TestCpu(Conformance):
  implementation = "cpu"

  def test_bits_do_not_depend_on_company(self):
    """Each sequence of a batch by itself, with another page table and another number of rows: the same bits."""
    for name in ("prefill_fp8", "history"):
      arrays, _ = case(name)
      together = np.asarray(attend("cpu")(**paged_cases.to_jax(arrays)))
      starts = arrays["query_starts"]
      for b in range(len(arrays["lengths_B"])):
        alone = dict(arrays) | {
          "q_TNH": arrays["q_TNH"][starts[b] : starts[b + 1]],
          "page_table_BM": arrays["page_table_BM"][b : b + 1],
          "query_starts": np.array([0, starts[b + 1] - starts[b]], np.int32),
          "lengths_B": arrays["lengths_B"][b : b + 1],
        }
        out = np.asarray(attend("cpu")(**paged_cases.to_jax(alone)))
        np.testing.assert_array_equal(out.view(np.int32), together[starts[b] : starts[b + 1]].view(np.int32))

  def test_decode_has_the_bits_of_prefill(self):
    for name in ("decode", "decode_fp8"):
      arrays, _ = case(name)
      queries = (arrays["lengths_B"] > 0).astype(np.int32)
      ragged = dict(arrays) | {
        "q_TNH": arrays["q_TNH"][queries > 0],
        "query_starts": np.concatenate([[0], np.cumsum(queries)]).astype(np.int32),
      }
      as_prefill = np.asarray(attend("cpu")(**paged_cases.to_jax(ragged)))
      as_decode = np.asarray(attend("cpu")(**paged_cases.to_jax(arrays)))[queries > 0]
      np.testing.assert_array_equal(as_prefill.view(np.int32), as_decode.view(np.int32))


class TestXla(Conformance):
  """Written for GPUs, and runs anywhere. It rounds keys, values and weights of float8 and bf16 pages to bf16."""

  implementation = "xla"

  def limit(self, name):
    return self.floor if BATCHES[name].pages == "f32" else 0.01

  def test_sabotage_is_seen(self):
    for name in ("decode_fp8", "prefill_fp8"):
      arrays, truth = case(name)
      for scale in ("k_scale", "v_scale"):
        wrong = dict(arrays) | {scale: np.ones_like(arrays[scale]) * arrays[scale].mean()}
        assert error_of("xla", wrong, truth) > 5 * self.limit(name)


@pytest.mark.gpu
class TestGpu(TestXla):
  """What runs on the GPU that is here: the kernel for queries in bf16, XLA otherwise. The truth has exact queries."""

  implementation = "auto"

  @pytest.mark.parametrize("name", BATCHES)
  def test_matches_float64_with_bf16_queries(self, name):
    arrays = case(name)[0]
    arrays = arrays | {"q_TNH": arrays["q_TNH"].astype(jnp.bfloat16)}
    truth = paged_cases.attention_truth(arrays | {"q_TNH": arrays["q_TNH"].astype(np.float32)})
    assert error_of("auto", arrays, truth) <= 0.01


class TestRules:
  """Every broken rule is a ValueError that names it."""

  GOOD = Batch((5, 9), (5, 9), K=2, G=2, H=8, C=32, pages="fp8")

  @pytest.mark.parametrize(
    ("change", "message"),
    [
      (lambda a: {"q_TNH": a["q_TNH"][..., :4]}, "V pages keep the token axis last"),
      (lambda a: {"v_pages": a["k_pages"]}, "V pages keep the token axis last"),
      (lambda a: {"q_TNH": a["q_TNH"][:, :3]}, "K dividing N|dividing N"),
      (lambda a: {"lengths_B": a["lengths_B"][:1]}, "agree in B"),
      (lambda a: {"query_starts": a["query_starts"][:2]}, "agree in B"),
      (lambda a: {"query_starts": None}, "agree in B"),
      (lambda a: {"v_pages": a["v_pages"].astype(jnp.bfloat16)}, "one dtype"),
      (lambda a: {"k_scale": None}, "need k_scale"),
      (lambda a: {"v_scale": None}, "need v_scale"),
      (lambda a: {"k_scale": a["k_scale"][:, :1]}, "must be float32"),
      (lambda a: {"v_scale": a["v_scale"].astype(jnp.bfloat16)}, "must be float32"),
      (lambda a: {x: a[x].astype(jnp.bfloat16) for x in ("k_pages", "v_pages")}, "others must not have one"),
    ],
  )
  def test_broken(self, change, message):
    good = paged_cases.to_jax(self.GOOD.arrays())
    with pytest.raises(ValueError, match=message):
      paged_attention(**(good | change(good)))

  @pytest.mark.parametrize(("name", "message"), [("nonsense", "no implementation named"), ("sm90", "cannot run here")])
  def test_a_forced_implementation_that_cannot_run(self, name, message):
    with pytest.raises(ValueError, match=message):
      paged_attention(**paged_cases.to_jax(self.GOOD.arrays()), implementation=name)


def test_the_reference_has_a_derivative():
  """Along a random direction, against central differences in float64."""
  arrays = Batch((20, 7), (12, 7), K=1, G=2, H=8, C=32).arrays()
  jax_arrays = paged_cases.to_jax(arrays)
  rng = np.random.default_rng(0)
  cotangent = rng.standard_normal(arrays["q_TNH"].shape)

  def loss(q, k, v):
    out = paged_attention(**(jax_arrays | {"q_TNH": q, "k_pages": k, "v_pages": v}), implementation="reference")
    return jnp.sum(out * cotangent)

  names = ("q_TNH", "k_pages", "v_pages")
  gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*(jax_arrays[name] for name in names))
  for name, gradient in zip(names, gradients, strict=True):
    direction = rng.standard_normal(arrays[name].shape)
    moved = [arrays | {name: arrays[name].astype(np.float64) + sign * 1e-5 * direction} for sign in (1, -1)]
    numeric = np.sum((paged_cases.attention_truth(moved[0]) - paged_cases.attention_truth(moved[1])) * cotangent) / 2e-5
    np.testing.assert_allclose(np.vdot(np.asarray(gradient, np.float64), direction), numeric, rtol=1e-4)
