"""The Hopper kernels in GPU interpret mode against float32 truth, with races detected. No GPU, no CUDA wheels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.fp8_matmul import sm90 as matmul
from pallas_kernels.fp8_matmul import xla as matmul_xla
from pallas_kernels.fused import reference as fused_reference
from pallas_kernels.fused import xla as fused_xla
from pallas_kernels.paged_attention import sm90 as attention
from pallas_kernels.paged_attention import xla as attention_xla
from tests.helpers import gpu_calls
from tests.helpers.gpu_calls import Attention, Matmul

# Every form, T over the regimes' edges, rows and columns that no tile divides, rings that are used more than once.
MATMULS = (
  Matmul("w8a8", 1, 64, 2048, num_sms=16),
  Matmul("w8a8", 7, 72, 576),
  Matmul("w8a8", 8, 192, 512, block_rows=64, static=True, num_sms=8),
  Matmul("w8a8", 17, 192, 512, block_rows=64, static=True),
  Matmul("w8a8", 64, 136, 256),
  Matmul("w8a16", 2, 64, 1024, x_size=1e6),
  Matmul("w8a16", 16, 128, 576, block_rows=128),
  Matmul("w8a16", 5, 64, 1024, x_size=1e6, num_sms=16),
  Matmul("w8a16", 33, 256, 1152, block_rows=128),
  Matmul("bf16", 1, 72, 576),
  Matmul("bf16", 3, 72, 512, num_sms=16),
  Matmul("bf16", 48, 192, 256),
  Matmul("w8a8", 3, 128, 576, block_rows=128),
  Matmul("w8a8", 8, 64, 2048, block_rows=64, num_sms=16),
  Matmul("w8a8", 17, 192, 512, block_rows=64),
  Matmul("w8a8", 150, 264, 256),
  Matmul("w8a8", 140, 256, 320, block_rows=128),
  Matmul("w8a16", 100, 256, 704, block_rows=64),
  Matmul("bf16", 65, 136, 192),
)
DECODES = (
  Attention("fp8", (0, 70, 129, 64), N=8, K=2, H=128, spread=1.0),
  Attention("fp8", (1, 200, 33), N=3, K=1, C=32),
  Attention("fp8", (130, 300), N=16, K=1, C=128),
  Attention("bf16", (600, 0, 63), N=2, K=2, H=128),
)
PREFILLS = (
  Attention("fp8", (5, 0, 100), counts=(5, 0, 37), N=6, K=2),
  Attention("fp8", (140, 33), counts=(3, 33), N=4, K=1, H=128, C=128, spread=1.0),
  Attention("bf16", (70, 1, 40), counts=(1, 1, 40), N=4, K=2, C=32),
  Attention("fp8", (10, 300), counts=(2, 3), N=2, K=1, spread=1.0, num_sms=16),
)


@pytest.mark.parametrize("call", MATMULS, ids=str)
def test_fp8_matmul(call):
  y, copies = call.run(matmul)
  assert gpu_calls.relative(y, call.truth()) < 2e-6
  assert copies.bytes_read == pytest.approx(call.cost(), rel=0.02)


@pytest.mark.parametrize("call", DECODES, ids=str)
def test_paged_attention_decode(call):
  y, copies = call.run(attention)
  assert gpu_calls.relative(y, call.truth()) < 4e-3  # the result is rounded to bf16
  assert copies.bytes_read == pytest.approx(call.cost(), rel=0.02)


@pytest.mark.parametrize("call", PREFILLS, ids=str)
def test_paged_attention_prefill(call):
  y, copies = call.run(attention)
  assert gpu_calls.relative(y, call.truth()) < 4e-3
  assert not y[sum(call.counts) :].any()
  assert copies.bytes_read == pytest.approx(call.cost(), rel=0.02)


@pytest.mark.parametrize("v_size", [1.0, 1e-5, 1e4])
def test_float8_values_survive_real_scales(v_size):
  """V's scales near amax / 448, spread log-normally: error at most twice that of float16 weights over the same pages."""
  call = Attention("fp8", (190,), N=2, K=1, spread=2.0, v_size=v_size)
  y, _ = call.run(attention)
  (q, k, v, table, _, lengths), scales = call.arrays()
  table = table + call.first_page
  k = (k.astype(np.float64) * scales["k_scale"][..., None])[table[0], 0].reshape(-1, call.H)
  v = (v.astype(np.float64) * scales["v_scale"][:, :, None])[table[0], 0].transpose(0, 2, 1).reshape(-1, call.H)
  scores = np.asarray(q[0], np.float64) @ k[: lengths[0]].T / np.sqrt(call.H)
  weights = np.exp(scores - scores.max(axis=1, keepdims=True))
  truth = weights @ v[: lengths[0]] / weights.sum(axis=1, keepdims=True)
  half = weights.astype(np.float16).astype(np.float64)
  plain = np.asarray(jnp.asarray(half @ v[: lengths[0]] / half.sum(axis=1, keepdims=True), jnp.bfloat16), np.float64)
  assert gpu_calls.relative(y[0], truth) < 2 * gpu_calls.relative(plain, truth)


def test_skinny_rows_do_not_depend_on_the_number_of_tokens():
  call = Matmul("w8a16", 40, 192, 1024, num_sms=16)
  x, w, w_scale, _ = call.arrays()
  many, _ = call.run(matmul)
  few, _ = call.run_on(matmul, x[:3], w, w_scale, None)
  np.testing.assert_array_equal(few, many[:3])


def test_float8_sums_keep_their_accuracy_over_a_long_row():
  """A model of Hopper's FP8 accumulator (14 bits, truncated, 32 products at a time) over the 28,672 columns of a 70B."""
  rng = np.random.default_rng(0)
  x, w = (np.clip(np.abs(rng.normal(size=size)) * 100, 0, 448).astype(jnp.float8_e4m3fn) for size in ((8, 28672), 28672))
  x, w = x.astype(np.float64), w.astype(np.float64)
  truth = x @ w
  errors = {every: np.max(np.abs(_short_sums(x * w, every) / truth - 1)) for every in (128, 28672)}
  assert errors[128] < 1e-3
  assert errors[28672] > 10 * errors[128]  # so the promotion is what keeps it


def _short_sums(products, promote_every):
  total = np.zeros(len(products), np.float32)
  for start in range(0, products.shape[1], promote_every):
    accumulator = np.zeros(len(products))
    for first in range(start, start + promote_every, 32):
      accumulator = accumulator + products[:, first : first + 32].sum(axis=1)
      unit = 2.0 ** (np.floor(np.log2(np.maximum(accumulator, 1e-30))) - 13)
      accumulator = np.floor(accumulator / unit) * unit
    total += accumulator.astype(np.float32)
  return total


def test_a_deadlock_becomes_an_error():
  """A barrier that nobody arrives at: the watchdog ends the wait."""
  from tests.helpers import gpu_mutants

  mutant = gpu_mutants.Mutant("waits for nobody", attention, "arrivals", r"num_arrivals=[^)]*\)", "num_arrivals=3)")
  with pytest.raises(Exception, match="not done after"):
    DECODES[1].run(mutant.load(), timeout_s=5)


def test_a_kernel_has_no_derivative_and_says_so():
  x, w = jnp.ones((2, 64), jnp.bfloat16), jnp.ones((64, 64), jnp.bfloat16)

  def total(x, implementation):
    return pallas_kernels.fp8_matmul(x, w, implementation=implementation, target=gpu_calls.GPU).astype(jnp.float32).sum()

  with pytest.raises(ValueError, match='Pass implementation="reference"'):
    jax.grad(total)(x, "sm90")
  assert jax.grad(total)(x, "reference").shape == x.shape


def test_dispatch_says_who_runs():
  hopper, ada = pallas_kernels.Target("cuda", (9, 0), 132), pallas_kernels.Target("cuda", (8, 9), 142)
  assert dispatch.order("fp8_matmul", hopper) == ("sm90", "xla")
  assert dispatch.order("page_write", hopper) == ("xla",)
  assert dispatch.order("rope_write", hopper) == ("sm90", "xla")
  assert dispatch.order("paged_attention", ada) == ("xla",)
  with pytest.raises(ValueError, match=r"sm90 needs a GPU of compute capability 9\.0"):
    pallas_kernels.fp8_matmul(
      jnp.ones((2, 64), jnp.bfloat16), jnp.ones((64, 64), jnp.bfloat16), implementation="sm90", target=ada
    )


@pytest.mark.parametrize("call", [MATMULS[0], MATMULS[5], MATMULS[8]], ids=str)
def test_fp8_matmul_in_plain_xla(call):
  y = gpu_calls.in_one_program(functools.partial(matmul_xla.fp8_matmul, out_dtype=jnp.float32), *call.arrays())
  assert gpu_calls.relative(y, call.truth()) < 5e-6


@pytest.mark.parametrize("call", [DECODES[0], DECODES[3], PREFILLS[0], PREFILLS[2]], ids=str)
def test_paged_attention_in_plain_xla(call):
  arrays, scales = call.arrays()
  y = gpu_calls.in_one_program(
    lambda arrays, scales: attention_xla.paged_attention(*arrays, **scales, first_page=call.first_page), arrays, scales
  )
  assert gpu_calls.relative(y.astype(jnp.float32), call.truth()) < 8e-3  # weights in bf16


@pytest.mark.parametrize("call", [DECODES[0], PREFILLS[0]], ids=str)
def test_page_write_in_plain_xla(call):
  (q, k, v, table, starts, lengths), _ = call.arrays()
  new = (np.ones((q.shape[0], call.K, call.H)).astype(k.dtype),) * 2
  written, wanted = (
    gpu_calls.in_one_program(
      lambda pages, new, *where, write=write: write(pages, new, (2, 3), *where), (k, v), new, table, starts, lengths
    )
    for write in (fused_xla.page_write, fused_reference.page_write)
  )
  for got, want in zip(written, wanted, strict=True):
    np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(want).view(np.uint8))


def test_calls_that_sm90_cannot_do_are_left_to_others():
  x = jnp.ones((2, 60), jnp.bfloat16)
  with pytest.raises(NotImplementedError, match="D a multiple of 64"):
    matmul.fp8_matmul(x, jnp.ones((64, 60), jnp.bfloat16), None, None, out_dtype=jnp.bfloat16, target=gpu_calls.GPU)
  call = dataclasses.replace(DECODES[0], H=32)
  arrays, scales = call.arrays()
  with pytest.raises(NotImplementedError, match="H=32"):
    attention.paged_attention(*arrays, **scales, target=gpu_calls.GPU)
