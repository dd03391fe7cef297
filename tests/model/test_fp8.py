"""Float8: the quantizers bit for bit against numpy and ml_dtypes, exact conversion to wider dtypes, and float8 as bytes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfp8.errors import InputError
from jaxfp8.model import fp8
from pallas_kernels.float8_bytes import from_bytes, to_bytes, view_as_bytes
from pallas_kernels.fp8_matmul.cpu import widen
from tests.helpers import numpy_llama

FLOAT8 = ml_dtypes.float8_e4m3fn
CODES = np.arange(256, dtype=np.uint8).view(FLOAT8)
FINITE = np.isfinite(CODES.astype(np.float32))


def assert_bits(got, want):
  got = np.asarray(got)
  assert got.dtype == want.dtype and got.shape == want.shape
  np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


def make(rng, F, D, kind):
  w = rng.standard_normal((F, D)).astype(np.float32)
  if kind == "spread":
    w *= np.exp(3 * rng.standard_normal((F, 1))).astype(np.float32)
  if kind == "outliers":
    w[rng.random((F, D)) < 0.02] *= 1000
  if kind == "zeros":
    w[rng.random(F) < 0.5] = 0
  if kind == "tiny":
    w *= np.float32(1e-9)
  return w


class TestQuantize:
  """Independent of jax: scale = amax * float32(1 / 448), value / scale rounded to nearest even by numpy and ml_dtypes."""

  @settings(max_examples=12, deadline=None)
  @given(
    F=st.sampled_from([1, 7, 128, 129, 300]),
    D=st.sampled_from([1, 52, 128, 257]),
    kind=st.sampled_from(["normal", "spread", "outliers", "zeros", "tiny"]),
    seed=st.integers(0, 1000),
  )
  def test_every_granularity(self, F, D, kind, seed):
    w = make(np.random.default_rng(seed), F, D, kind)
    for granularity, axis in (("tensor", (0, 1)), ("channel", 1)):
      q = fp8.quantize(jnp.asarray(w), granularity)
      scale = np.broadcast_to(numpy_llama.scale_of(w, axis), (F, 1))
      assert_bits(q.scale, np.ascontiguousarray(scale[:, 0]))
      assert_bits(q.qvalue, numpy_llama.to_float8(w, scale))
      np.testing.assert_array_equal(fp8.dequantize(q), numpy_llama.to_float8(w, scale).astype(np.float32) * scale)
    q = jax.tree.map(np.asarray, fp8.quantize(jnp.asarray(w), "block128"))
    back = np.asarray(fp8.dequantize(q))
    assert q.scale.shape == (-(-F // 128), -(-D // 128)) and q.shape == (F, D)
    for i in range(q.scale.shape[0]):
      for j in range(q.scale.shape[1]):
        block = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
        scale = numpy_llama.scale_of(w[block], (0, 1))
        assert q.scale[i, j] == scale
        assert_bits(q.qvalue[block], numpy_llama.to_float8(w[block], scale))
        np.testing.assert_array_equal(back[block], q.qvalue[block].astype(np.float32) * scale)

  @pytest.mark.parametrize("granularity", ["tensor", "channel", "block128"])
  def test_compiled_gives_the_same_bits(self, granularity):
    """XLA compiles divisions by constants as products, which round differently."""
    w = jnp.asarray(make(np.random.default_rng(1), 200, 300, "spread"))
    plain, compiled = fp8.quantize(w, granularity), jax.jit(fp8.quantize, static_argnums=1)(w, granularity)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(compiled), strict=True):
      assert_bits(b, np.asarray(a))

  def test_bf16_weights_are_quantized_as_float32(self):
    w = make(np.random.default_rng(2), 20, 30, "normal").astype(ml_dtypes.bfloat16)
    a, b = fp8.quantize(jnp.asarray(w)), fp8.quantize(jnp.asarray(w.astype(np.float32)))
    assert_bits(a.qvalue, np.asarray(b.qvalue))
    assert_bits(a.scale, np.asarray(b.scale))

  def test_zero_rows_have_scale_one(self):
    w = np.zeros((3, 200), np.float32)
    w[1, 5] = 3
    for granularity, zeros in (("channel", [0, 2]), ("block128", [])):
      q = fp8.quantize(jnp.asarray(w), granularity)
      assert all(q.scale[row] == 1 for row in zeros)
      assert np.isfinite(np.asarray(q.qvalue, np.float32)).all()
      np.testing.assert_allclose(fp8.dequantize(q), w, rtol=1e-6)
    assert fp8.quantize(jnp.zeros((2, 300)), "block128").scale.tolist() == [[1, 1, 1]]
    assert fp8.quantize(jnp.zeros((2, 3)), "tensor").scale.tolist() == [1, 1]

  def test_error_is_at_most_half_a_step(self):
    w = make(np.random.default_rng(3), 64, 64, "spread")
    q = fp8.quantize(jnp.asarray(w))
    error = np.abs(np.asarray(fp8.dequantize(q), np.float64) - w)
    assert np.all(error <= np.abs(w) / 16 * 1.00001 + np.asarray(q.scale)[:, None] * 2**-10)

  @pytest.mark.parametrize(
    ("w", "granularity", "message"),
    [(np.zeros((2, 2)), "row", "must be tensor, channel or block128"), (np.zeros(4), "channel", r"must be \[F, D\]")],
  )
  def test_refusals(self, w, granularity, message):
    with pytest.raises(InputError, match=message):
      fp8.quantize(jnp.asarray(w), granularity)

  def test_smaller_blocks_of_a_merged_weight(self):
    """A model repeats block scales if a head has fewer rows than a block; `dequantize` accepts the repeated scales."""
    w = make(np.random.default_rng(4), 256, 200, "spread")
    q = fp8.quantize(jnp.asarray(w), "block128")
    finer = fp8.QArray(q.qvalue, jnp.repeat(q.scale, 4, axis=0))
    np.testing.assert_array_equal(fp8.dequantize(finer), fp8.dequantize(q))


class TestTokens:
  @settings(max_examples=20, deadline=None)
  @given(shape=st.sampled_from([(1, 52), (5, 128), (4, 3, 64), (2, 1, 10)]), seed=st.integers(0, 1000))
  def test_a_scale_per_vector(self, shape, seed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) * np.exp(3 * rng.standard_normal((*shape[:-1], 1)))).astype(np.float32)
    x[0] = 0
    values, scale = fp8.quantize_tokens(jnp.asarray(x))
    assert_bits(scale, numpy_llama.scale_of(x, -1)[..., 0])
    assert_bits(values, numpy_llama.to_float8(x, numpy_llama.scale_of(x, -1)))

  def test_a_bound_limits_the_scale_and_larger_values_saturate(self):
    x = (
      np.random.default_rng(3).standard_normal((40, 96)).astype(np.float32)
      * np.geomspace(0.1, 100, 40, dtype=np.float32)[:, None]
    )
    values, scale = fp8.quantize_tokens(jnp.asarray(x), bound=1.5)
    amax = np.minimum(np.abs(x).max(axis=1), np.float32(1.5))
    assert (amax == 1.5).any() and (amax < 1.5).any()
    assert_bits(scale, amax * np.float32(1 / 448))
    assert_bits(values, numpy_llama.to_float8(x, (amax * np.float32(1 / 448))[:, None]))
    assert_bits(fp8.quantize_tokens(jnp.asarray(x), jnp.float32(0.25), bound=1.5).values, numpy_llama.to_float8(x, 0.25))


class TestRounding:
  def test_saturates(self):
    """`astype` alone would give NaN for these values."""
    x = jnp.array([448.0, 449, 464, 465, 1e30, jnp.inf, -465, -jnp.inf, 0, -0.0])
    want = np.array([448, 448, 448, 448, 448, 448, -448, -448, 0, -0.0], np.float32)
    assert_bits(fp8.to_float8(x), want.astype(FLOAT8))
    assert np.isnan(np.float32(470).astype(FLOAT8).astype(np.float32)), "the trap that this is about"

  def test_ties_go_to_even(self):
    """The middle of every two neighbouring values, rounded by ml_dtypes and by hand."""
    values = np.unique(CODES[FINITE].astype(np.float32))
    middle = (values[1:] + values[:-1]) / 2
    got = np.asarray(fp8.to_float8(jnp.asarray(middle)))
    assert_bits(got, middle.astype(FLOAT8))
    assert (got.view(np.uint8) & 1 == 0).all()

  def test_every_code_survives(self):
    assert_bits(fp8.to_float8(jnp.asarray(CODES[FINITE].astype(np.float32))), CODES[FINITE])


class TestWiden:
  @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
  @pytest.mark.parametrize("as_bytes", [False, True])
  def test_exact_for_every_finite_code(self, dtype, as_bytes):
    codes = jnp.asarray(CODES.view(np.uint8) if as_bytes else CODES)
    wide = np.asarray(jax.jit(widen, static_argnums=1)(codes, dtype))[FINITE]
    assert_bits(wide, CODES[FINITE].astype(np.float32).astype(wide.dtype))
    assert np.signbit(wide[CODES[FINITE].view(np.uint8) == 0x80])


class TestBytes:
  def test_round_trip(self):
    x = jnp.asarray(CODES)
    assert_bits(to_bytes(x), CODES.view(np.uint8))
    assert_bits(from_bytes(to_bytes(x)), CODES)
    y = jnp.ones(3)
    assert to_bytes(y) is y and from_bytes(y) is y and view_as_bytes(y) is y

  def test_a_view_shares_its_memory(self):
    x = jnp.asarray(np.repeat(CODES, 4096))
    view = view_as_bytes(x)
    assert_bits(view, np.asarray(x).view(np.uint8))
    assert view.unsafe_buffer_pointer() == x.unsafe_buffer_pointer()


def test_vmap_equals_a_loop():
  """quantize under vmap over a stack of matrices gives the bits of one call for each matrix."""
  w = jnp.asarray(make(np.random.default_rng(5), 3 * 20, 30, "normal")).reshape(3, 20, 30)
  stacked = jax.vmap(fp8.quantize)(w)
  for i in range(3):
    one = fp8.quantize(w[i])
    assert_bits(stacked.qvalue[i], np.asarray(one.qvalue))
    assert_bits(stacked.scale[i], np.asarray(one.scale))
