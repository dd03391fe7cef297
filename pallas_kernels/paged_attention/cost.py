"""The bytes and operations of a call of paged_attention, from the shapes of its arguments and results."""

import jax.numpy as jnp

from pallas_kernels.costs import Cost, bytes_of
from pallas_kernels.paged_attention.tiling import Tiling, query_rows


def tma_cost(lengths, N: int, K: int, H: int, C: int, *, tiling: Tiling, dtype) -> tuple[int, int]:
  """(bytes of pages and scales that TMA reads, float operations) for tiles that each see `lengths` tokens."""
  token = 2 * (H * jnp.dtype(dtype).itemsize + (4 if dtype == jnp.float8_e4m3fn else 0))
  step = tiling.pages * C
  tokens = sum(-(-length // step) * step for length in lengths)
  rows = query_rows(tiling, N // K)
  limits = 0 if tiling.tokens == 1 else tiling.columns * 4  # how far each column sees
  query_bytes = len(lengths) * K * tiling.splits * (rows * H * 2 + limits)
  return K * tokens * token + query_bytes, 4 * K * tokens * H * tiling.columns


def call_cost(q, pools, outputs, tokens: int, lengths) -> Cost:
  """The traffic with device memory: every sequence's pages once, however many tiles see them.

  q, outputs: the kernel's queries and results. pools: K, V and, for float8 pages, their scales. tokens: number of queries,
  shared out evenly over the sequences. lengths: tokens of each sequence.
  """
  _, K, _, H = pools[0].shape
  a_token = K * (2 * H * pools[0].dtype.itemsize + (8 if len(pools) == 4 else 0))
  queries = tokens // len(lengths)
  attended = sum(queries * (length - queries) + queries * (queries + 1) // 2 for length in lengths)
  heads = q.size // (H * tokens)
  return Cost(
    kv_read_bytes=sum(lengths) * a_token,
    read_bytes=bytes_of(q),
    written_bytes=bytes_of(*outputs),
    flops=4 * heads * H * attended,
    number_format="bf16",  # float8 pages are widened to float16
  )


def combine_cost(out, log_sum, outputs) -> Cost:
  """The cost of joining the splits of attention. Their padding is not read."""
  T, K, S, _, H = out.shape
  rows = outputs[0].size // (T * K * H)
  read = T * K * S * rows * (H * out.dtype.itemsize + log_sum.dtype.itemsize)
  return Cost(read_bytes=read, written_bytes=bytes_of(*outputs), flops=4 * T * K * S * rows * H)


def least_work(q_TNH, k_pages, *, num_sequences: int, context: int) -> tuple[int, int]:
  """(bytes, float operations) that no implementation avoids, for sequences of `context` tokens with equally many queries."""
  T, N, H = q_TNH.shape
  K, fp8 = k_pages.shape[1], k_pages.dtype == jnp.float8_e4m3fn
  token_bytes = 2 * (H * k_pages.dtype.itemsize + (4 if fp8 else 0))
  attended = context - (T / num_sequences - 1) / 2  # tokens that a query sees on average
  return num_sequences * context * K * token_bytes + 4 * T * N * H, int(4 * T * attended * N * H)
