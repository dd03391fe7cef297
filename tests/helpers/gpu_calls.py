"""Random calls of the GPU kernels, their truth, and runs of them in interpret mode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Target, interpret
from pallas_kernels.fp8_matmul import api as matmul_api
from pallas_kernels.fp8_matmul import cost as matmul_cost
from pallas_kernels.fp8_matmul import reference as matmul_reference
from pallas_kernels.fp8_matmul import tiling as matmul_tiling
from pallas_kernels.paged_attention import cost as attention_cost
from pallas_kernels.paged_attention import reference as attention_reference
from pallas_kernels.paged_attention import tiling as attention_tiling

FP8, BF16, F32 = jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32
GPU = Target("cuda", (9, 0), 2)  # an H100 with two SMs: every CTA costs milliseconds here


def to_float8(x):
  """(e4m3 values, float32 scale) of each vector along the last axis."""
  amax = np.max(np.abs(x), axis=-1)
  scale = np.where(amax > 0, amax / 448, 1.0).astype(np.float32)
  return np.clip(x / scale[..., None], -448, 448).astype(FP8), scale


def in_one_program(function, *arguments):
  """function(*arguments) as one compiled program, where op by op each would be one; None stays None."""
  arguments = jax.tree.map(jnp.asarray, arguments)
  return jax.jit(function)(*arguments)


def relative(got, want) -> float:
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert np.isfinite(got).all()
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@dataclasses.dataclass(frozen=True)
class Matmul:
  form: str
  T: int
  F: int
  D: int
  block_rows: int = 0
  x_size: float = 1.0
  static: bool = False
  num_sms: int = 2  # many SMs and few rows: the skinny kernel cuts D into parts

  def __str__(self):
    block = f"-block{self.block_rows}" if self.block_rows else ""
    return f"{self.form}-T{self.T}-F{self.F}-D{self.D}{block}{'-parts' if self.num_sms > 2 else ''}"

  @property
  def target(self):
    return Target("cuda", (9, 0), self.num_sms)

  def arrays(self):
    """x, w, w_scale, x_scale; scales spread over a factor of about a thousand."""
    rng = np.random.default_rng(self.T * 31 + self.F * 7 + self.D)
    x = rng.normal(size=(self.T, self.D)) * self.x_size
    w = rng.normal(size=(self.F, self.D))
    if self.form == "bf16":
      return x.astype(BF16), w.astype(BF16), None, None
    w_scale = (self.F // self.block_rows, -(-self.D // 128)) if self.block_rows else (self.F,)
    w_scale = np.exp(1.5 * rng.normal(size=w_scale)).astype(np.float32)
    w = np.clip(w * 100, -448, 448).astype(FP8)
    if self.form == "w8a16":
      return x.astype(BF16), w, w_scale, None
    groups = (-(-self.D // 128),) if self.block_rows else ()  # block scales of w come with scales of groups of x
    x_scale = np.asarray(np.exp(1.5 * rng.normal(size=() if self.static else (*groups, self.T))), np.float32)
    return np.clip(x * 100, -448, 448).astype(FP8), w, w_scale, x_scale

  def truth(self):
    return in_one_program(functools.partial(matmul_reference.fp8_matmul, out_dtype=F32), *self.arrays())

  def cost(self) -> int:
    form = matmul_tiling.form_of(*self.arrays())
    return matmul_cost.tma_cost(self.T, self.F, self.D, form, self.target)[0]

  def run(self, kernels):
    return self.run_on(kernels, *self.arrays())

  def run_on(self, kernels, *arrays):
    def call(*arrays):
      y = kernels.fp8_matmul(*arrays, out_dtype=F32, target=self.target)
      return y.finish(F32) if isinstance(y, matmul_api.PartialSums) else y

    with interpret.running() as copies:
      y = np.asarray(in_one_program(call, *arrays))
    return y, copies


@dataclasses.dataclass(frozen=True)
class Attention:
  """counts: query tokens of each sequence, None for decode. spread: of the logarithm of V's norms from token to token."""

  pages: str
  lengths: tuple[int, ...]
  counts: tuple[int, ...] | None = None
  N: int = 4
  K: int = 2
  H: int = 64
  C: int = 64
  spread: float = 0.0
  v_size: float = 1.0
  q_size: float = 2.0
  first_page: int = 2  # where the layer's pages begin
  num_sms: int = 2

  def __str__(self):
    kind = "decode" if self.counts is None else "prefill"
    return f"{kind}-{self.pages}-N{self.N}-K{self.K}-H{self.H}-C{self.C}-{'_'.join(map(str, self.lengths))}"

  @property
  def target(self):
    return Target("cuda", (9, 0), self.num_sms)

  @property
  def M(self) -> int:
    return max(-(-length // self.C) for length in self.lengths)

  def arrays(self):
    B, M = len(self.lengths), self.M
    P = self.first_page + B * M + 3
    rng = np.random.default_rng(sum(self.lengths))
    T = B if self.counts is None else sum(self.counts) + 2  # two rows of padding
    q = (self.q_size * rng.normal(size=(T, self.N, self.H))).astype(BF16)
    k = rng.normal(size=(P, self.K, self.C, self.H))
    v = rng.normal(size=(P, self.K, self.C, self.H)) * self.v_size
    v = v * np.exp(self.spread * rng.normal(size=(P, self.K, self.C, 1)))
    table = rng.permutation(P - self.first_page)[: B * M].reshape(B, M).astype(np.int32)
    written = np.zeros((P, self.C), bool)
    for row, length in zip(table, self.lengths, strict=True):
      written[self.first_page + row] = np.arange(M * self.C).reshape(M, self.C) < length
    if self.pages == "fp8":
      (k, k_scale), (v, v_scale) = to_float8(k), to_float8(v)
      # Places that nothing was written to are zeros, scales too, as in a new pool.
      k_scale, v_scale = (np.where(written[:, None], scale, np.float32(0)) for scale in (k_scale, v_scale))
      k, v = (np.where(written[:, None, :, None], x, FP8(0)) for x in (k, v))
    else:
      # And here they are what another sequence left: finite, and large enough to be noticed.
      k, v = (np.where(written[:, None, :, None], x, 1e3).astype(BF16) for x in (k, v))
      k_scale = v_scale = None
    starts = None if self.counts is None else np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int32)
    arrays = q, k, np.swapaxes(v, 2, 3), table, starts, np.asarray(self.lengths, np.int32)
    return arrays, {"k_scale": k_scale, "v_scale": v_scale}

  def truth(self):
    (q, *rest), scales = self.arrays()
    return in_one_program(
      lambda args, scales: attention_reference.paged_attention(*args, **scales, first_page=self.first_page),
      (q.astype(F32), *rest),
      scales,
    )

  def cost(self) -> int:
    (q, k, *_), _ = self.arrays()
    sizes = q.shape[0], self.N, self.K, self.H, self.C, len(self.lengths), self.M
    tiling = attention_tiling.choose_tiling(attention_tiling.CallShape(*sizes, self.counts is None, k.dtype), self.target)
    seen = self.lengths if self.counts is None else self._tiles(q.shape[0], tiling.tokens)
    return attention_cost.tma_cost(seen, self.N, self.K, self.H, self.C, tiling=tiling, dtype=k.dtype)[0]

  def _tiles(self, num_tokens, size) -> list[int]:
    """How many keys the last query of each tile sees; tiles that nobody needs see none."""
    seen = [
      length - count + min(first + size, count)
      for length, count in zip(self.lengths, self.counts, strict=True)
      for first in range(0, count, size)
    ]
    return seen + [0] * (num_tokens // size + len(self.lengths) - len(seen))

  def run(self, kernels, timeout_s=60):
    def call(arrays, scales):
      return kernels.paged_attention(*arrays, **scales, first_page=self.first_page, target=self.target).astype(F32)

    with interpret.running(timeout_s) as copies:
      y = np.asarray(in_one_program(call, *self.arrays()))
    return y, copies
