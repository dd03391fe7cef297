"""Ragged batches over shuffled pages: what tests of paged operations compute with."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from tests.helpers import numpy_llama

FLOAT8 = ml_dtypes.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Batch:
  """lengths: each context's length, its queries included (0: an empty place). queries: how many of its last tokens ask."""

  lengths: tuple[int, ...]
  queries: tuple[int, ...] | None  # None: decode
  K: int = 2
  G: int = 1
  H: int = 8
  C: int = 32
  pages: str = "f32"  # "f32", "bf16", "fp8", or "fp8_lognormal": scales that spread over a factor of some hundreds
  padding: int = 0  # rows of q behind the last sequence
  seed: int = 0

  @property
  def num_queries(self) -> tuple[int, ...]:
    return self.queries if self.queries is not None else tuple(1 for _ in self.lengths)

  def arrays(self) -> dict[str, np.ndarray | None]:
    """Keyword arguments of `paged_attention`, as numpy. What belongs to nobody is noise too."""
    rng = np.random.default_rng([self.seed, *self.lengths])
    M = max(1, *(-(-length // self.C) for length in self.lengths)) + 1
    P = len(self.lengths) * M + 3
    T = len(self.lengths) if self.queries is None else sum(self.queries) + self.padding
    shape = (P, self.K, self.C, self.H)
    k, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    k_scale = v_scale = None
    if self.pages == "bf16":
      k, v = k.astype(ml_dtypes.bfloat16), v.astype(ml_dtypes.bfloat16)
    elif self.pages == "fp8":
      k_scale, v_scale = (numpy_llama.scale_of(x, -1) for x in (k, v))
      k, v = numpy_llama.to_float8(k, k_scale), numpy_llama.to_float8(v, v_scale)
    elif self.pages == "fp8_lognormal":
      k, v = (numpy_llama.to_float8(x * 100, np.float32(1)) for x in (k, v))
      k_scale, v_scale = (np.exp(1.5 * rng.standard_normal((*shape[:3], 1)) - 5).astype(np.float32) for _ in range(2))
    starts = None
    if self.queries is not None:
      starts = np.concatenate([[0], np.cumsum(self.queries)]).astype(np.int32)
    return {
      "q_TNH": rng.standard_normal((T, self.K * self.G, self.H)).astype(np.float32),
      "k_pages": k,
      "v_pages": np.ascontiguousarray(np.swapaxes(v, 2, 3)),
      "page_table_BM": rng.permutation(P)[: len(self.lengths) * M].reshape(len(self.lengths), M).astype(np.int32),
      "query_starts": starts,
      "lengths_B": np.array(self.lengths, np.int32),
      "k_scale": None if k_scale is None else k_scale[..., 0],
      "v_scale": None if v_scale is None else v_scale[..., 0],
    }


def to_jax(arrays):
  return {name: None if x is None else jnp.asarray(x) for name, x in arrays.items()}


def dense(arrays, sequence: int):
  """Keys and values [length, K, H] of one sequence, float64, gathered token by token."""
  length, C = int(arrays["lengths_B"][sequence]), arrays["k_pages"].shape[2]
  keys, values = [], []
  for position in range(length):
    page, slot = arrays["page_table_BM"][sequence, position // C], position % C
    k = arrays["k_pages"][page, :, slot].astype(np.float64)
    v = arrays["v_pages"][page, :, :, slot].astype(np.float64)
    if arrays["k_scale"] is not None:
      k = k * arrays["k_scale"][page, :, slot].astype(np.float64)[:, None]
      v = v * arrays["v_scale"][page, :, slot].astype(np.float64)[:, None]
    keys.append(k)
    values.append(v)
  return np.stack(keys), np.stack(values)


def attention_truth(arrays) -> np.ndarray:
  """[T, N, H] in float64; padding and empty places are zeros."""
  q, lengths = arrays["q_TNH"].astype(np.float64), arrays["lengths_B"]
  starts = arrays["query_starts"] if arrays["query_starts"] is not None else np.arange(len(lengths) + 1)
  out = np.zeros_like(q)
  for b, length in enumerate(lengths):
    if length and starts[b + 1] > starts[b]:
      k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in dense(arrays, b))
      out[starts[b] : starts[b + 1]] = numpy_llama.attention(q[starts[b] : starts[b + 1]], k, v)
  return out
