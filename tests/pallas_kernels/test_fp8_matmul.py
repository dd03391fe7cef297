"""One conformance suite for fp8_matmul, inherited by every implementation that runs here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import fp8_matmul
from pallas_kernels.fp8_matmul import cpu as cpu_file

DTYPES = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "fp8": ml_dtypes.float8_e4m3fn}


@dataclasses.dataclass(frozen=True)
class Call:
  """block_rows: 0 is a scale per channel. x_scale: "token", "groups", "static", or "" for plain activations."""

  x: str
  w: str
  T: int
  F: int
  D: int
  block_rows: int = 0
  x_scale: str = ""

  def arrays(self):
    rng = np.random.default_rng([self.T, self.F, self.D])

    def values(dtype, *shape):
      noise = rng.standard_normal(shape).astype(np.float32)
      return (np.clip(noise * 100, -448, 448) if dtype == "fp8" else noise).astype(DTYPES[dtype])

    def scales(*shape):  # over a factor of some hundreds: a wrong place is seen
      return np.exp(1.5 * rng.standard_normal(shape)).astype(np.float32)

    x, w = values(self.x, self.T, self.D), values(self.w, self.F, self.D)
    w_scale = x_scale = None
    if self.w == "fp8":
      w_scale = scales(self.F // self.block_rows, -(-self.D // 128)) if self.block_rows else scales(self.F)
    if self.x == "fp8":
      x_scale = scales(*{"token": (self.T,), "groups": (-(-self.D // 128), self.T), "static": ()}[self.x_scale])
    return x, w, w_scale, x_scale


CALLS = {
  "f32": Call("f32", "f32", 5, 91, 52),
  "f32_one_row": Call("f32", "f32", 1, 384, 200),
  "bf16": Call("bf16", "bf16", 64, 130, 257),
  "bf16_one_row": Call("bf16", "bf16", 1, 91, 52),
  "mixed": Call("bf16", "f32", 3, 40, 100),
  "f32_fp8": Call("f32", "fp8", 7, 91, 52),
  "bf16_fp8": Call("bf16", "fp8", 33, 384, 576),
  "bf16_fp8_one_row": Call("bf16", "fp8", 1, 257, 130),
  "blocks": Call("bf16", "fp8", 9, 256, 300, block_rows=128),
  "blocks_of_64": Call("f32", "fp8", 2, 192, 128, block_rows=64),
  "blocks_of_1": Call("f32", "fp8", 4, 91, 129, block_rows=1),
  "blocks_one_row": Call("bf16", "fp8", 1, 256, 52, block_rows=32),
  "w8a8": Call("fp8", "fp8", 16, 130, 257, x_scale="token"),
  "w8a8_one_row": Call("fp8", "fp8", 1, 128, 128, x_scale="token"),
  "w8a8_static": Call("fp8", "fp8", 6, 91, 52, x_scale="static"),
  "w8a8_blocks": Call("fp8", "fp8", 5, 256, 200, block_rows=128, x_scale="groups"),
  "w8a8_blocks_static": Call("fp8", "fp8", 5, 256, 200, block_rows=128, x_scale="static"),
  "one_of_each": Call("f32", "fp8", 1, 1, 1),
}


def truth(x, w, w_scale, x_scale) -> np.ndarray:
  w = w.astype(np.float64)
  if w_scale is not None and w_scale.ndim == 1:
    w = w * w_scale[:, None]
  elif w_scale is not None:
    rows = w.shape[0] // w_scale.shape[0]
    w = np.array([[w[f, d] * float(w_scale[f // rows, d // 128]) for d in range(w.shape[1])] for f in range(w.shape[0])])
  if x_scale is not None and x_scale.ndim == 2:
    x, x_scale = x.astype(np.float64) * np.repeat(x_scale.astype(np.float64), 128, axis=0)[: x.shape[1]].T, None
  y = x.astype(np.float64) @ w.T
  return y if x_scale is None else y * (x_scale[:, None] if x_scale.ndim else float(x_scale))


@functools.cache
def case(name):
  arrays = CALLS[name].arrays()
  return arrays, truth(*arrays)


@functools.cache
def multiply(implementation, out_dtype=jnp.float32):
  return jax.jit(functools.partial(fp8_matmul, implementation=implementation, out_dtype=out_dtype))


def error_of(implementation, arrays, want) -> float:
  got = np.asarray(multiply(implementation)(*arrays), np.float64)
  assert got.shape == want.shape
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))


class Conformance:
  implementation: str
  floor = 5e-7  # relative error that float32 sums may always have

  def limit(self, name):
    return max(2 * error_of("reference", *case(name)), self.floor)

  @pytest.mark.parametrize("name", CALLS)
  def test_matches_float64(self, name):
    assert error_of(self.implementation, *case(name)) <= self.limit(name)

  @pytest.mark.parametrize("name", ["bf16_fp8", "w8a8", "blocks"])
  def test_bf16_results_are_rounded_once(self, name):
    arrays, _ = case(name)
    full = np.asarray(multiply(self.implementation)(*arrays))
    half = np.asarray(multiply(self.implementation, jnp.bfloat16)(*arrays))
    assert half.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(half.view(np.uint16), full.astype(ml_dtypes.bfloat16).view(np.uint16))

  @pytest.mark.parametrize(
    ("name", "place", "sabotage"),
    [
      ("bf16_fp8", 2, np.ones_like),
      ("bf16_fp8", 2, lambda s: np.roll(s, 1)),
      ("blocks", 2, lambda s: s[::-1]),
      ("blocks", 2, lambda s: s[:, ::-1]),
      ("w8a8", 3, np.ones_like),
      ("w8a8", 3, lambda s: s[::-1]),
      ("w8a8_static", 3, lambda s: s * np.float32(1.01)),
      ("f32", 1, lambda w: w[::-1]),
    ],
  )
  def test_sabotage_is_seen(self, name, place, sabotage):
    arrays, want = case(name)
    wrong = [*arrays]
    wrong[place] = np.asarray(sabotage(arrays[place]), np.float32)
    assert error_of(self.implementation, wrong, want) > 50 * self.limit(name)

  def test_every_float8_code_is_exact(self):
    """One column of weights with every finite code, times one: widening loses nothing, subnormals and -0 included."""
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    codes = codes[np.isfinite(codes.astype(np.float32))]
    one = np.ones((2, 1), np.float32)
    y = multiply(self.implementation)(one, codes[:, None], np.ones(len(codes), np.float32), None)
    np.testing.assert_array_equal(np.asarray(y)[0], codes.astype(np.float32))


class TestReference(Conformance):
  implementation = "reference"

  def limit(self, name):
    return self.floor

  def test_it_has_a_derivative(self):
    """dy/dx, dy/dw and dy/dscale of the reference are those of the formula."""
    x, w, w_scale, _ = (jnp.asarray(a) if a is not None else None for a in CALLS["f32_fp8"].arrays())
    cotangent = jax.random.normal(jax.random.key(0), (7, 91))

    def loss(x, w_scale):
      return jnp.vdot(fp8_matmul(x, w, w_scale, implementation="reference", out_dtype=jnp.float32), cotangent)

    by_x, by_scale = jax.grad(loss, argnums=(0, 1))(x, w_scale)
    wide = np.asarray(w, np.float64)
    np.testing.assert_allclose(by_x, np.asarray(cotangent) @ (wide * np.asarray(w_scale)[:, None]), rtol=1e-3, atol=1e-1)
    np.testing.assert_allclose(by_scale, np.sum(np.asarray(cotangent) * (np.asarray(x) @ wide.T), axis=0), rtol=1e-3, atol=1e-2)


class TestCpu(Conformance):
  implementation = "cpu"

  @pytest.mark.parametrize("name", ["f32", "bf16", "bf16_fp8", "blocks", "w8a8", "w8a8_blocks"])
  def test_bits_do_not_depend_on_the_number_of_rows(self, name):
    (x, w, w_scale, x_scale), _ = case(name)
    whole = np.asarray(multiply("cpu")(x, w, w_scale, x_scale))
    for rows in (1, 2, 3, len(x) - 1):
      scale = x_scale if x_scale is None or x_scale.ndim == 0 else x_scale[..., :rows]
      part = np.asarray(multiply("cpu")(x[:rows], w, w_scale, scale))
      np.testing.assert_array_equal(part.view(np.int32), whole[:rows].view(np.int32))

  @pytest.mark.parametrize("name", ["blocks", "bf16_fp8", "w8a8_blocks"])
  def test_large_matrices_go_in_blocks_of_rows(self, name, monkeypatch):
    """With room for a fraction of the matrix, in loops: the same bits."""
    arrays, _ = case(name)
    arrays = [np.concatenate([a, a]) if i in (1, 2) and a is not None else a for i, a in enumerate(arrays)]
    whole = np.asarray(fp8_matmul(*arrays, implementation="cpu", out_dtype=jnp.float32))
    monkeypatch.setattr(cpu_file, "_MAX_WIDENED", arrays[1].size // 3)
    parts = np.asarray(fp8_matmul(*arrays, implementation="cpu", out_dtype=jnp.float32))
    np.testing.assert_array_equal(parts.view(np.int32), whole.view(np.int32))


class TestXla(Conformance):
  """Written for GPUs, and runs anywhere. On a CPU XLA multiplies bf16 exactly and adds in float32, as on a GPU."""

  implementation = "xla"


@pytest.mark.gpu
class TestGpu(Conformance):
  """What runs on the GPU that is here: a kernel where it can do the call, XLA otherwise."""

  implementation = "auto"

  def limit(self, name):
    """FP8 tensor cores add with some 14 bits; the rest is float32, in another order."""
    return 1e-3 if CALLS[name].x == "fp8" else max(super().limit(name), 1e-5)

  def test_sabotage_is_seen(self):
    for name, place in (("bf16_fp8", 2), ("blocks", 2), ("w8a8", 3)):
      arrays, want = case(name)
      wrong = [np.ones_like(a) if i == place else a for i, a in enumerate(arrays)]
      assert error_of("auto", wrong, want) > 50 * self.limit(name)


class TestRules:
  X, W = np.zeros((4, 8), np.float32), np.zeros((6, 8), np.float32)
  W8, SCALE = np.zeros((6, 8), ml_dtypes.float8_e4m3fn), np.ones(6, np.float32)
  X8, X_SCALE = np.zeros((4, 8), ml_dtypes.float8_e4m3fn), np.ones(4, np.float32)

  @pytest.mark.parametrize(
    ("arguments", "message"),
    [
      ((X[0], W), r"must agree in D; got x \(8,\)"),
      ((X[:, :5], W), "must agree in D"),
      ((X, W[None]), "must agree in D"),
      ((X, W8), "float8 weights need w_scale"),
      ((X, W, SCALE), "others must not have one"),
      ((X8, W8, SCALE), "float8 activations need x_scale"),
      ((X, W8, SCALE, X_SCALE), "others must not have one"),
      ((X.astype(np.float16), W), "float8_e4m3fn, bfloat16 or float32; got float16"),
      ((X, W.astype(np.float16)), "w must be"),
      ((X8, W8, SCALE, X_SCALE[:3]), "x_scale must be float32"),
      ((X8, W8, SCALE, X_SCALE[None]), "needs weights with block scales"),
      ((X8, W8, np.ones((1, 1), np.float32), X_SCALE[:, None]), "x_scale must be float32"),
      ((X8, W8, SCALE, X_SCALE.astype(ml_dtypes.bfloat16)), "x_scale must be float32"),
      ((X, W8, SCALE[:5]), "w_scale must be float32"),
      ((X, W8, SCALE.astype(ml_dtypes.bfloat16)), "w_scale must be float32"),
      ((X, W8, np.ones((4, 1), np.float32)), "w_scale must be float32"),
      ((X, W8, np.ones((2, 1), np.float32)), "R a power of two"),
      ((X, W8, np.ones((3, 2), np.float32)), "w_scale must be float32"),
      ((X, W8, np.float32(1)), "Expand a per-tensor scale"),
    ],
  )
  def test_broken(self, arguments, message):
    with pytest.raises(ValueError, match=message):
      fp8_matmul(*map(jnp.asarray, arguments))

  @pytest.mark.parametrize(("name", "message"), [("nonsense", "no implementation named"), ("sm90", "cannot run here")])
  def test_a_forced_implementation_that_cannot_run(self, name, message):
    with pytest.raises(ValueError, match=message):
      fp8_matmul(jnp.asarray(self.X), jnp.asarray(self.W), implementation=name)
