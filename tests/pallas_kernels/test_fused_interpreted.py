"""The fused small operations in GPU interpret mode, in plain XLA and as they stand, against float64 numpy."""

import functools

import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import interpret
from pallas_kernels.fused import cpu, reference, sm90, xla
from pallas_kernels.paged_attention import combine
from tests.helpers import gpu_calls
from tests.helpers.fused_calls import Joined, Norm, Rope, Silu

NORMS = (Norm(3, 1024), Norm(1, 640), Norm(2, 384, quantize=False), Norm(2, 512, static=0.02), Norm(2, 17408))
GROUPED_NORMS = (Norm(3, 1024, grouped=True), Norm(2, 384, grouped=True), Norm(2, 17408, grouped=True))
SILUS = (
  Silu(3, 512),
  Silu(2, 384, S=3),
  Silu(1, 640, S=2, quantize=False, token_scale=None),
  Silu(2, 256, S=4, static=0.5, token_scale="all"),
  Silu(2, 384, S=2, channel_scale=False),
)
GROUPED_SILUS = (Silu(2, 3584, grouped=True), Silu(1, 640, S=2, grouped=True, channel_scale=False))
ROPES = (
  Rope("fp8", (40, 0, 33, 1), G=4, H=64, S=3),
  Rope("fp8", (64, 65), K=1, G=8, H=128),
  Rope("bf16", (5, 70), K=3, G=3, S=2),
  Rope("fp8", (5, 0, 40), counts=(5, 0, 37), G=1, static=True),
  Rope("bf16", (3, 33), counts=(3, 2), K=1, G=2, H=128),
  Rope("fp8", (5, 33), S=2, channel_scale=False),
)
CALLS = NORMS + GROUPED_NORMS + SILUS + GROUPED_SILUS + ROPES
PLAIN = {"cpu": cpu, "xla": xla, "reference": reference}


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_kernels(call):
  vector, _ = call.run(sm90)
  assert gpu_calls.relative(vector, call.truth()) < call.limit()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_plain(call, name):
  """Where they do not round to float8 themselves, the linear that follows does."""

  def rounding(operation, index):
    @functools.wraps(operation)
    def run(*args, quantize, static_scale, grouped, **kwargs):
      result = operation(*args, quantize=quantize, static_scale=static_scale, grouped=grouped, **kwargs)
      hidden = result[index] if index else result
      if quantize:
        hidden = pallas_kernels.Quantized(*pallas_kernels.float8.quantize_tokens(hidden, static_scale, grouped=grouped))
      return (result[0], hidden) if index else hidden

    return run

  class Module:
    residual_norm = staticmethod(rounding(PLAIN[name].residual_norm, 1))
    silu_multiply = staticmethod(rounding(PLAIN[name].silu_multiply, 0))
    rope_write = staticmethod(PLAIN[name].rope_write)

  vector, _ = call.run(Module)
  assert gpu_calls.relative(vector, call.truth()) < call.limit()


JOINED = (
  Joined(5, 2, 4),
  Joined(1, 1, 3),
  Joined(40, 1, 2, quantize=False),
  Joined(300, 1, 16),
  Joined(5, 2, 4, static=0.03),
  Joined(5, 2, 4, grouped=True),
  Joined(9, 1, 8, grouped=True),
  Joined(1, 2, 3, grouped=True, H=128),
)


@pytest.mark.parametrize("call", JOINED, ids=str)
def test_parts_are_joined(call, monkeypatch):
  monkeypatch.setattr(combine, "_LOADED", 8)  # so that runs are short
  vector, _ = call.run(combine)
  assert gpu_calls.relative(vector, call.truth()) < call.limit()


def test_a_group_that_crosses_kv_heads_is_left_to_the_linear_layer():
  call = Joined(2, 2, 3, grouped=True)  # 128 channels are two heads of 64, and three heads belong to a KV head
  with interpret.running():
    result = call.call(combine, call.arrays()[0])
  assert result.shape == (2, 6, 64)


def test_calls_that_cannot_be_are_left_to_others():
  plain = {"quantize": False, "static_scale": None, "grouped": False, "target": gpu_calls.GPU}
  ones = jnp.ones((2, 192), jnp.bfloat16)
  with pytest.raises(NotImplementedError, match="multiple of 128; got 192"):
    sm90.residual_norm(ones, ones, jnp.ones(192), eps=1e-5, **plain)
  wide = jnp.ones((2, 256), jnp.float32)
  with pytest.raises(NotImplementedError, match="computes in bfloat16"):
    sm90.residual_norm(wide, wide, jnp.ones(256), eps=1e-5, **plain)


def test_wrong_shapes_are_named():
  x = jnp.ones((2, 64), jnp.bfloat16)
  with pytest.raises(ValueError, match=r"residual_norm: y must be bfloat16 \[T, D\]=\(2, 64\)"):
    pallas_kernels.residual_norm(x, x[:1], jnp.ones(64), eps=1e-5)
  with pytest.raises(ValueError, match="needs gates and as many ups; got 63"):
    pallas_kernels.silu_multiply(pallas_kernels.PartialSums(x[None, :, :63]))
  pages = jnp.zeros((2, 1, 32, 64)), jnp.zeros((2, 1, 64, 32))
  with pytest.raises(ValueError, match=r"qkv must be \[T, K \* \(G \+ 2\) \* H\]"):
    pallas_kernels.rope_write(pallas_kernels.PartialSums(x[None]), x, x, pages, None, None, None)
