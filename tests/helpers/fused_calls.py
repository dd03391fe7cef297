"""Random calls of the fused small operations, their truth in float64 numpy, and runs of them in interpret mode.

Results are one float64 vector a call, parts of equal weight one after the other, so that one number says how far two runs are
from each other. What is rounded to float8 is compared with the unrounded truth: XLA may leave out the rounding to bf16 before
it, so that now and then another of two neighbours is chosen.
"""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels import PartialSums, Quantized, interpret
from tests.helpers import gpu_calls
from tests.helpers.gpu_calls import GPU, in_one_program, to_float8

BF16 = ml_dtypes.bfloat16


def wide(x):
  return np.asarray(x).astype(np.float64)


def as_vector(*parts):
  """Each part divided by its norm, so that none hides behind another."""
  parts = [wide(part).ravel() for part in parts]
  return np.concatenate([part / max(np.linalg.norm(part), 1e-30) for part in parts])


def activations(result):
  """What the linear that follows gets, and where there are scales of groups, these too."""
  if not isinstance(result, Quantized):
    return (wide(result),)
  scale = wide(result.scale)
  if scale.ndim == 2:
    return wide(result.values) * np.repeat(scale.T, 128, axis=1), scale.T
  return (wide(result.values) * scale.reshape(-1, 1),)


def group_scales(x, quantize, static, grouped):
  """The scales that groups of `x` should have, where they have some."""
  if not (quantize and grouped and static is None):
    return ()
  largest = np.abs(x.reshape(len(x), -1, 128)).max(axis=2)
  return (np.where(largest > 0, largest / 448, 1),)


def rounded(x, quantize, static, grouped=False):
  """What the linear that follows gets, by numpy, in the form of `activations`."""
  x = x.astype(np.float32).astype(BF16)
  if not quantize:
    return (wide(x),)
  if static is not None:
    return (wide(np.clip(x.astype(np.float32) * np.float32(1 / static), -448, 448).astype(gpu_calls.FP8)) * static,)
  if grouped:
    q, scale = to_float8(x.astype(np.float32).reshape(len(x), -1, 128))
    return (wide(q) * scale[..., None]).reshape(x.shape), scale
  q, scale = to_float8(x.astype(np.float32))
  return (wide(q) * scale[:, None],)


def make_sums(rng, S, T, F, token_scale, channel_scale=True):
  """(PartialSums of S splits as a product leaves them, their finished value). Block scales are already applied."""
  if S == 1:
    parts = rng.normal(size=(1, T, F)).astype(BF16)
    return PartialSums(parts), wide(parts[0])
  parts = rng.normal(size=(S, T, F)).astype(np.float32)
  w_scale = np.exp(rng.normal(size=F)).astype(np.float32) if channel_scale else None
  x_scale = None if token_scale is None else np.exp(rng.normal(size=(T,) if token_scale == "token" else ())).astype(np.float32)
  total = wide(parts).sum(axis=0) * (1 if w_scale is None else w_scale) * (1 if x_scale is None else x_scale.reshape(-1, 1))
  return PartialSums(parts, w_scale, x_scale), total


class Call:
  def run(self, kernels, timeout_s=60):
    with interpret.running(timeout_s) as copies:
      return self.vector(in_one_program(lambda arrays: self.call(kernels, arrays), self.arrays()[0])), copies

  def truth(self):
    return self.arrays()[1]

  def limit(self) -> float:
    """How far from the truth a result may be: little more than the truth rounded by numpy."""
    _, truth, *by_numpy = self.arrays()
    return 3e-3 + (1.05 * gpu_calls.relative(by_numpy[0], truth) if by_numpy else 0)


@dataclasses.dataclass(frozen=True)
class Norm(Call):
  T: int
  D: int
  quantize: bool = True
  static: float | None = None
  grouped: bool = False

  def arrays(self):
    rng = np.random.default_rng(self.T * self.D)
    x, y = ((3 * rng.normal(size=(self.T, self.D))).astype(BF16) for _ in range(2))
    x[0], y[0] = (0, 0) if self.T > 1 else (x[0], y[0])  # a row of zeros
    weight = rng.normal(size=self.D).astype(np.float32) + 1
    total = wide((x.astype(np.float32) + y.astype(np.float32)).astype(BF16))
    normed = total / np.sqrt((total**2).mean(axis=1, keepdims=True) + 0.5) * weight
    static = None if self.static is None else np.float32(self.static)
    return (
      (x, y, weight, static),
      as_vector(total, normed, *group_scales(normed, self.quantize, static, self.grouped)),
      as_vector(total, *rounded(normed, self.quantize, static, self.grouped)),
    )

  def call(self, kernels, arrays):
    *arrays, static = arrays
    rounding = {"quantize": self.quantize, "static_scale": static, "grouped": self.grouped}
    return kernels.residual_norm(*arrays, eps=0.5, **rounding, target=GPU)

  def vector(self, result):
    return as_vector(result[0], *activations(result[1]))


@dataclasses.dataclass(frozen=True)
class Silu(Call):
  T: int
  F: int
  S: int = 1
  quantize: bool = True
  static: float | None = None
  token_scale: str | None = "token"
  channel_scale: bool = True
  grouped: bool = False

  def arrays(self):
    rng = np.random.default_rng(self.T * self.F + self.S)
    sums, total = make_sums(rng, self.S, self.T, 2 * self.F, self.token_scale, self.channel_scale)
    gate, up = total[:, : self.F], total[:, self.F :]
    static = None if self.static is None else np.float32(self.static)
    hidden = gate / (1 + np.exp(-gate)) * up
    rounding = self.quantize, static, self.grouped
    return (sums, static), as_vector(hidden, *group_scales(hidden, *rounding)), as_vector(*rounded(hidden, *rounding))

  def call(self, kernels, arrays):
    sums, static = arrays
    rounding = {"quantize": self.quantize, "static_scale": static, "grouped": self.grouped}
    return kernels.silu_multiply(sums, **rounding, dtype=jnp.bfloat16, target=GPU)

  def vector(self, result):
    return as_vector(*activations(result))


@dataclasses.dataclass(frozen=True)
class Rope(Call):
  """lengths: contexts with the tokens to write; counts: query tokens of each sequence, None for decode."""

  pages: str
  lengths: tuple[int, ...]
  counts: tuple[int, ...] | None = None
  K: int = 2
  G: int = 2
  H: int = 64
  S: int = 1
  C: int = 32
  first_page: int = 5
  static: bool = False
  channel_scale: bool = True

  def arrays(self):
    rng = np.random.default_rng(sum(self.lengths) + self.S)
    counts = self.counts or tuple(1 for _ in self.lengths)
    T = len(self.lengths) if self.counts is None else sum(counts) + 2
    B, M = len(self.lengths), max(-(-length // self.C) for length in self.lengths)
    P = self.first_page + B * M + 2
    sums, total = make_sums(rng, self.S, T, self.K * (self.G + 2) * self.H, "token", self.channel_scale)
    angles = rng.normal(size=(T, self.H // 2)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    table = rng.permutation(B * M).reshape(B, M).astype(np.int32)
    dtype = gpu_calls.FP8 if self.pages == "fp8" else BF16
    pages = [rng.normal(size=shape).astype(dtype) for shape in ((P, self.K, self.C, self.H), (P, self.K, self.H, self.C))]
    if self.pages == "fp8":
      pages += [rng.normal(size=(P, self.K, self.C)).astype(np.float32) for _ in range(2)]
    static = tuple(np.exp(rng.normal(size=self.K)).astype(np.float32) * 0.01 for _ in range(2)) if self.static else None
    starts = None if self.counts is None else np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    where = table, starts, np.asarray(self.lengths, np.int32)
    heads = wide(total.astype(np.float32).astype(BF16)).reshape(T, self.K, self.G + 2, self.H)
    truth = self._truth(heads, wide(cos), wide(sin), pages, table, counts, static)
    return (sums, cos, sin, tuple(pages), where, np.int32(self.first_page), static), truth

  def _truth(self, heads, cos, sin, pages, table, counts, static):
    half = self.H // 2
    a, b, cos, sin = heads[..., :half], heads[..., half:], cos[:, None, None], sin[:, None, None]
    turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    turned = turned.astype(np.float32).astype(BF16).astype(np.float32)
    keys, values = turned[:, :, self.G], heads[:, :, self.G + 1].astype(np.float32)
    pages = [page.copy() for page in pages]
    token = 0
    for row, length, count in zip(table, self.lengths, counts, strict=True):
      for position in range(length - count, length) if length else ():
        page, place = self.first_page + row[position // self.C], position % self.C
        for number, x in enumerate((keys[token], values[token])):
          if self.pages == "fp8":
            given = None if static is None else static[number]
            q, scale = (
              to_float8(x) if given is None else (np.clip(x * (1 / given)[:, None], -448, 448).astype(gpu_calls.FP8), given)
            )
            pages[2 + number][page, :, place] = scale
          else:
            q = x.astype(BF16)
          pages[number][(page, slice(None), place) if number == 0 else (page, slice(None), slice(None), place)] = q
        token += 1
      token += count if not length else 0
    return as_vector(turned[:, :, : self.G], *pages)

  def call(self, kernels, arrays):
    sums, cos, sin, pages, where, first_page, static = arrays
    options = {"first_page": first_page, "static_scales": static, "dtype": jnp.bfloat16, "target": GPU}
    return kernels.rope_write(sums, cos, sin, pages, *where, **options)

  def vector(self, result):
    return as_vector(result[0], *result[1])


@dataclasses.dataclass(frozen=True)
class Joined(Call):
  """Softmax over all keys at once, from S parts with very different sums, some of them empty."""

  S: int
  K: int
  G: int
  quantize: bool = True
  static: float | None = None
  grouped: bool = False
  H: int = 64

  def arrays(self):
    rng = np.random.default_rng(self.S)
    out = rng.normal(size=(2, self.K, self.S, self.G, self.H)).astype(np.float32)
    sums = (10 * rng.normal(size=(2, self.K, self.S, self.G))).astype(np.float32)
    empty = rng.random(sums.shape) < (0.3 if self.S > 1 else 0)
    out, sums = np.where(empty[..., None], 0, out), np.where(empty, np.float32(-1e30), sums)
    weights = np.exp2(sums.astype(np.float64) - sums.max(axis=2, keepdims=True))
    truth = (out * weights[..., None]).sum(axis=2) / weights.sum(axis=2)[..., None]
    truth[:, -1] *= 1 if self.K == 1 else 3
    out[:, -1] *= 1 if self.K == 1 else 3  # the largest value is not the first head's
    truth = truth.reshape(2, -1)
    static = None if self.static is None else np.float32(self.static)
    rounding = self.quantize, static, self.grouped
    return (out, sums, static), as_vector(truth, *group_scales(truth, *rounding)), as_vector(*rounded(truth, *rounding))

  def call(self, kernels, arrays):
    *parts, static = arrays
    rounding = {"quantize": self.quantize, "static_scale": static, "grouped": self.grouped}
    return kernels.combine(*parts, self.G, dtype=jnp.bfloat16, **rounding)

  def vector(self, result):
    return as_vector(*activations(result))
