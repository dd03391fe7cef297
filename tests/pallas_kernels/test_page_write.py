"""One conformance suite for page_write, inherited by every implementation that runs here: exact, against numpy loops."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import page_write
from pallas_kernels.float8_bytes import from_bytes, to_bytes

AXES = (2, 3, 2, 2)  # K pages, V pages and two scales
# (lengths, queries or None for decode, tokens a page, padding)
BATCHES = {
  "decode": ((1, 32, 33, 0, 64), None, 32, 0),
  "decode_one": ((40,), None, 64, 0),
  "prefill": ((40, 0, 7, 64), (40, 0, 7, 64), 32, 5),
  "history": ((100, 33, 64, 65), (37, 1, 20, 1), 64, 3),
  "large_pages": ((129, 128), (5, 128), 128, 0),
  "one_token": ((1,), (1,), 32, 1),
}


def make_case(lengths, queries, C, padding, dtype=np.float32, seed=0):
  """(pools, values, page table, query_starts, lengths) as numpy, with K = 2 and H = 4."""
  rng = np.random.default_rng([seed, *lengths])
  B, M = len(lengths), max(-(-length // C) for length in lengths) + 1
  P = B * M + 2
  T = B if queries is None else sum(queries) + padding
  table = rng.permutation(P)[: B * M].reshape(B, M).astype(np.int32)

  def noise(*shape):
    return rng.standard_normal(shape).astype(np.float32).astype(dtype)

  pools = noise(P, 2, C, 4), noise(P, 2, 4, C), noise(P, 2, C).astype(np.float32), noise(P, 2, C).astype(np.float32)
  values = noise(T, 2, 4), noise(T, 2, 4), noise(T, 2).astype(np.float32), noise(T, 2).astype(np.float32)
  starts = None if queries is None else np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
  return pools, values, table, starts, np.array(lengths, np.int32)


def truth(pools, values, table, starts, lengths):
  pools = [pool.copy() for pool in pools]
  for b, length in enumerate(lengths):
    rows = [b] if starts is None else range(starts[b], starts[b + 1])
    first = length - len(rows)
    for position, row in zip(range(first, length), rows, strict=True):
      if position < 0:
        continue  # an empty place
      for pool, value, axis in zip(pools, values, AXES, strict=True):
        C = pool.shape[axis]
        np.moveaxis(pool, axis, 1)[table[b, position // C], position % C] = value[row]
  return pools


@functools.cache
def writer(implementation):
  def write(pools, values, table, starts, lengths):
    return page_write(pools, values, AXES, table, starts, lengths, implementation=implementation)

  return jax.jit(write)


def assert_same_bytes(pools, wanted):
  for pool, want in zip(pools, wanted, strict=True):
    np.testing.assert_array_equal(np.asarray(pool).view(np.uint8), want.view(np.uint8))


class Conformance:
  implementation: str

  def run(self, pools, values, table, starts, lengths):
    return writer(self.implementation)(*jax.tree.map(jnp.asarray, (pools, values, table, starts, lengths)))

  @pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.float8_e4m3fn], ids=lambda d: np.dtype(d).name)
  @pytest.mark.parametrize("name", BATCHES)
  def test_exactly_the_tokens_are_written(self, name, dtype):
    case = make_case(*BATCHES[name], dtype)
    assert_same_bytes(self.run(*case), truth(*case))

  def test_nothing_to_write(self):
    case = make_case((0, 0), (0, 0), 32, 4)
    assert_same_bytes(self.run(*case), case[0])

  def test_sabotage_is_seen(self):
    """A length that is one too short, K and V swapped, another page: each changes bytes."""
    for name in ("decode", "history"):
      pools, values, table, starts, lengths = make_case(*BATCHES[name])
      wanted = truth(pools, values, table, starts, lengths)
      for wrong in (
        (pools, values, table, starts, np.maximum(lengths - 1, 1)),
        (pools, (values[1], values[0], *values[2:]), table, starts, lengths),
        (pools, values, table[:, ::-1], starts, lengths),
      ):
        with pytest.raises(AssertionError):
          assert_same_bytes(self.run(*wrong), wanted)

  @pytest.mark.parametrize(
    ("change", "message"),
    [
      (lambda pools, values: (pools, (values[0][:, :1], *values[1:])), "with tokens on axis 2 takes float32"),
      (lambda pools, values: (pools, (values[0].astype(jnp.bfloat16), *values[1:])), "Quantize or cast before writing"),
      (lambda pools, values: (pools, (*values[:3], values[3][..., None])), "takes float32"),
    ],
  )
  def test_broken_rules(self, change, message):
    pools, values, *where = jax.tree.map(jnp.asarray, make_case(*BATCHES["prefill"]))
    pools, values = change(tuple(pools), tuple(values))
    with pytest.raises(ValueError, match=message):
      page_write(pools, values, AXES, *where, implementation=self.implementation)


class TestReference(Conformance):
  implementation = "reference"


class TestCpu(Conformance):
  implementation = "cpu"

  @pytest.mark.parametrize("name", ["decode", "history"])
  @pytest.mark.parametrize("dtype", [jnp.float32, jnp.float8_e4m3fn], ids=["float32", "float8"])
  def test_in_place(self, name, dtype):
    """With donated pools nothing as large as a pool is allocated. Float8 enters programs as bytes, see float8_bytes.py."""
    pools, values, *where = jax.tree.map(jnp.asarray, make_case(*BATCHES[name]))
    large = tuple(to_bytes(jnp.zeros((4096, *pool.shape[1:]), dtype)) for pool in pools[:2])
    values = tuple(value.astype(dtype) for value in values[:2])

    def write(pools, values):
      return tuple(map(to_bytes, page_write(tuple(map(from_bytes, pools)), values, AXES[:2], *where, implementation="cpu")))

    memory = jax.jit(write, donate_argnums=0).lower(large, values).compile().memory_analysis()
    pool_bytes = sum(pool.nbytes for pool in large)
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 10


class TestXla(Conformance):
  implementation = "xla"


@pytest.mark.gpu
class TestGpu(Conformance):
  implementation = "auto"
