"""How the Hopper paged_attention cuts its work: tile sizes, and the tile of each query.

A tile is a few query tokens of one sequence; their G query heads of one KV head are the columns of a product.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import tuned
from pallas_kernels.dispatch import HOPPER_SHARED_BYTES, HOPPER_SMS, Target

ROWS = 64  # tokens or head channels of one wgmma
HEAD_SIZES = (64, 128)
PAGE_SIZES = (32, 64, 128)  # tokens


@dataclasses.dataclass(frozen=True)
class Tiling:
  """query tokens and (padded) columns a tile, pages a stage, stages of the ring, parts that a context is cut into."""

  tokens: int
  columns: int
  pages: int
  stages: int
  splits: int
  ctas_per_sm: int


class CallShape(NamedTuple):
  """The static sizes of one attention call (the project's letters), and the dtype of its pages."""

  T: int
  N: int
  K: int
  H: int
  C: int
  B: int
  M: int
  decode: bool
  dtype: DTypeLike


def choose_tiling(shape: CallShape, target: Target) -> Tiling:
  """Tile sizes for a call, measured ones (tuned.py) or else the formula's. They depend on static sizes only, so one program
  treats every length alike."""
  T, N, K, H, C, B, M, decode, dtype = shape
  G = N // K
  # Every column costs registers: its output, its softmax and, where K and V are widened, them.
  most = 64 if dtype != jnp.float8_e4m3fn and C <= 64 else 32
  if most < G:
    raise NotImplementedError(f"sm90 needs at most {most} query heads a KV head for these pages; got {G}")
  sizes = tuned.lookup("paged_attention", target, key_of(shape))
  tokens = 1 if decode else sizes["tokens"] if "tokens" in sizes else most // G
  columns = next((c for c in (16, 32, 64) if c >= tokens * G), 0)
  pages = max(1, ROWS // C)
  num_tiles = B if decode else T // tokens + B
  ctas = 3 if columns == 16 else 2
  page_bytes = 2 * pages * C * (H * jnp.dtype(dtype).itemsize + (4 if dtype == jnp.float8_e4m3fn else 0))
  fixed = columns * (2 * H * 2 + pages * C * 2 + ROWS * 4) + 3584
  if sizes:
    return _possible(Tiling(tokens, columns, pages, 0, 0, ctas), sizes, most // G, -(-M // pages), (fixed, page_bytes))
  stages = min((HOPPER_SHARED_BYTES // ctas - fixed) // page_bytes, 4)
  sms = target.num_sms or HOPPER_SMS
  splits = max(1, min(ctas * sms // (K * num_tiles), -(-M // (2 * pages))))
  return Tiling(tokens, columns, pages, max(stages, 2), splits, ctas)


def key_of(shape: CallShape) -> dict[str, str | int]:
  """How a measured entry is found. Sizes: stages, splits, and for prefill tokens."""
  sizes = {letter: getattr(shape, letter) for letter in "NKHCBM"} | {"pages": jnp.dtype(shape.dtype).name}
  return {"regime": "decode", **sizes} if shape.decode else {"regime": "prefill", "T": shape.T, **sizes}


def _possible(tiling: Tiling, sizes, most_tokens: int, steps: int, smem: tuple[int, int]) -> Tiling:
  """`tiling` with measured sizes. Raises ValueError unless the kernel can work with it."""
  allowed = {"stages", "splits"} | ({"tokens"} if "tokens" in sizes else set())
  if set(sizes) != allowed:
    tuned.refuse("paged_attention", sizes, f"the names {', '.join(sorted(allowed))}")
  tiling = dataclasses.replace(tiling, stages=sizes["stages"], splits=sizes["splits"])
  used = smem[0] + tiling.stages * smem[1]
  rules = {
    f"at most {most_tokens} tokens a tile": tiling.tokens <= most_tokens,
    "2 to 8 stages": 2 <= tiling.stages <= 8,
    f"1 to {steps} splits": 1 <= tiling.splits <= steps,
    f"at most {HOPPER_SHARED_BYTES} bytes of shared memory, not {used}": used <= HOPPER_SHARED_BYTES,
  }
  for rule, holds in rules.items():
    if not holds:
      tuned.refuse("paged_attention", sizes, rule)
  return tiling


def query_rows(tiling: Tiling, G: int) -> int:
  """Rows of queries that a tile has in device memory: TMA fills up to 8, or to whole groups of 8, with zeros."""
  rows = tiling.tokens * G
  return tiling.columns if rows > 8 and rows % 8 else rows


def bytes_in_flight(H: int, C: int, tiling: Tiling, dtype) -> int:
  """Bytes of pages under way to one CTA while its ring is full."""
  return 2 * tiling.stages * tiling.pages * C * H * jnp.dtype(dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Tiles:
  """sequences [tiles], tokens [tiles, tokens] and how many keys each of them sees, limits [tiles, tokens] (0: padding)."""

  sequences: jax.Array
  tokens: jax.Array
  limits: jax.Array
  places: jax.Array  # [T], where each token lies among the tiles' tokens
  present: jax.Array  # [T]

  def untile(self, x):
    """[tiles * tokens, ...] -> [T, ...], zeros for padding."""
    return jnp.where(self.present.reshape(-1, *(1,) * (x.ndim - 1)), x[self.places], 0)


def prefill_tiles(query_starts, lengths_B, T: int, size: int) -> Tiles:
  """Every sequence's queries in tiles of `size` tokens; T // size + B tiles always suffice."""
  B = lengths_B.shape[0]
  counts = query_starts[1:] - query_starts[:-1]
  first_tile = jnp.cumulative_sum((counts + size - 1) // size, include_initial=True)
  tile = jnp.arange(T // size + B)
  sequence = jnp.clip(jnp.searchsorted(first_tile[1:], tile, side="right", method="compare_all"), 0, B - 1)
  offset = (tile - first_tile[sequence])[:, None] * size + jnp.arange(size)
  inside = (offset < counts[sequence][:, None]) & (tile < first_tile[-1])[:, None]
  limits = jnp.where(inside, (lengths_B - counts)[sequence][:, None] + offset + 1, 0)
  tokens = jnp.where(inside, query_starts[sequence][:, None] + offset, 0)
  token = jnp.arange(T)
  owner = jnp.clip(jnp.searchsorted(query_starts[1:], token, side="right", method="compare_all"), 0, B - 1)
  places = first_tile[owner] * size + token - query_starts[owner]
  present = token < query_starts[-1]
  return Tiles(sequence.astype(jnp.int32), tokens, limits.astype(jnp.int32), jnp.where(present, places, 0), present)
