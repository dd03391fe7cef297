"""Tile sizes of the Hopper fp8_matmul: plain integers, no kernel.

Few tokens: what counts is bytes of weights under way. By Little's law one SM of an H100 needs 18 KB in flight to draw its share
of 3.35 TB/s at 700 ns (26 KB on an H200); the ring of stages, times the CTAs that fit, is at least 32 KB and mostly 100.
Many tokens: tiles as large as registers allow, twice: one accumulator of the tensor cores and one float32 sum.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels import tuned
from pallas_kernels.dispatch import HOPPER_SHARED_BYTES, HOPPER_SMS, Target
from pallas_kernels.fp8_matmul import api

WG_ROWS = 64  # rows of one wgmma
MAX_FEW, MAX_SKINNY = 16, 64  # tokens of the two skinny regimes
_CTA_BYTES = 1024  # what the hardware keeps of it for each CTA
_SCRATCH_BYTES = 1024  # barriers and Mosaic's own


@dataclasses.dataclass(frozen=True)
class Tiling:
  """rows of w and tokens of x a tile, columns of D a step (depth), stages, parts of D (splits), CTAs an SM holds."""

  rows: int
  tokens: int
  depth: int
  stages: int
  splits: int
  ctas_per_sm: int

  def stage_bytes(self, x_dtype, w_dtype) -> int:
    return self.depth * (self.rows * jnp.dtype(w_dtype).itemsize + self.tokens * jnp.dtype(x_dtype).itemsize)

  def weight_bytes_in_flight(self, w_dtype) -> int:
    """Bytes of weights under way to one CTA while its ring is full."""
    return self.stages * self.rows * self.depth * jnp.dtype(w_dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Form:
  """Which operands: dtype of w in memory, of x as the tensor cores see it, and rows of w that share a block scale (0: none).

  grouped: whether each token of x has a scale per 128 columns, beside block scales of w.
  """

  w_dtype: jnp.dtype
  x_dtype: jnp.dtype
  block_rows: int = 0
  grouped: bool = False

  @property
  def widens(self) -> bool:
    return self.w_dtype == jnp.float8_e4m3fn and self.x_dtype != jnp.float8_e4m3fn

  def __str__(self):
    name = "bf16" if self.w_dtype != jnp.float8_e4m3fn else "w8a16" if self.widens else "w8a8"
    return f"{name}-block{self.block_rows}{'-grouped' if self.grouped else ''}" if self.block_rows else name


def choose_tiling(T: int, F: int, D: int, form: Form, target: Target) -> Tiling:
  """The tile sizes for a call: measured ones (tuned.py), or else the formula's. Sums are cut at the same columns for every T of
  a regime."""
  sizes = tuned.lookup("fp8_matmul", target, key_of(T, F, D, form))
  if T <= MAX_SKINNY and sizes:
    # Both skinny entries of a matrix cut D alike, or a row's bits would depend on its company.
    splits = {tuned.lookup("fp8_matmul", target, key_of(tokens, F, D, form)).get("splits") for tokens in (1, MAX_SKINNY)}
    if len(splits) > 1:
      tuned.refuse("fp8_matmul", sizes, "equal splits for up to 16 and up to 64 tokens of a matrix")
  tiling = _formula(T, F, D, form, target)
  return _replaced(tiling, sizes, F, D, form, wide=T > MAX_SKINNY) if sizes else tiling


def key_of(T: int, F: int, D: int, form: Form) -> dict[str, str | int]:
  """How a measured entry is found. Sizes: rows, depth, stages, splits, and for wide ones tokens."""
  return {
    "regime": "wide" if T > MAX_SKINNY else "skinny-64" if T > MAX_FEW else "skinny-16",
    "F": F,
    "D": D,
    "form": str(form),
  }


def _replaced(tiling: Tiling, sizes, F: int, D: int, form: Form, *, wide: bool) -> Tiling:
  """`tiling` with measured sizes. Raises ValueError unless the kernels can work with it."""
  unit = unit_of(D, form)
  allowed = {"rows", "depth", "stages", "splits"} | ({"tokens"} if wide else set())
  if set(sizes) != allowed:
    tuned.refuse("fp8_matmul", sizes, f"the names {', '.join(sorted(allowed))}")
  tiling = dataclasses.replace(tiling, **sizes)
  most_tokens = _most_tokens(form)
  steps = D // tiling.depth // tiling.splits
  used = tiling.stages * tiling.stage_bytes(form.x_dtype, form.w_dtype) + tiling.rows * tiling.tokens * 4
  rules = {
    "rows of 64 or 128": tiling.rows in (WG_ROWS, 2 * WG_ROWS),
    f"a depth of {unit} times 1, 2 or 4 that divides D={D}": tiling.depth in (unit, 2 * unit, 4 * unit)
    and D % tiling.depth == 0,
    "splits that divide the steps of D, 1 for wide ones": steps * tiling.depth * tiling.splits == D
    and (tiling.splits == 1 or not wide),
    f"tokens a multiple of 8 up to {most_tokens}": not wide or (tiling.tokens % 8 == 0 and tiling.tokens <= most_tokens),
    f"stages from 2 to the {steps} steps of a part": min(2, steps) <= tiling.stages <= steps,
    f"at most {_room(1)} bytes of shared memory, not {used}": used <= _room(1),
  }
  for rule, holds in rules.items():
    if not holds:
      tuned.refuse("fp8_matmul", sizes, rule)
  return tiling


def _most_tokens(form: Form) -> int:
  """Of a wide tile: the most that leaves no register spilled."""
  return 96 if form.widens or form.grouped else 128


def _room(ctas: int) -> int:
  """Bytes of shared memory that a CTA has for its ring and its results."""
  return HOPPER_SHARED_BYTES // ctas - _CTA_BYTES - _SCRATCH_BYTES


def _formula(T: int, F: int, D: int, form: Form, target: Target) -> Tiling:
  sms = target.num_sms or HOPPER_SMS
  unit = unit_of(D, form)
  if T > MAX_SKINNY:
    rows = WG_ROWS if F < 2 * WG_ROWS else 2 * WG_ROWS
    tokens = _most_tokens(form)
    tiling = Tiling(rows, tokens, unit, 1, 1, 1)
    room = _room(1) - tokens * rows * 4
  else:
    few = T <= MAX_FEW
    long = 2 * unit if D % (2 * unit) == 0 else unit
    rows = 2 * WG_ROWS if not few and WG_ROWS * sms <= F else WG_ROWS
    splits = _choose_splits(-(-F // WG_ROWS), D // long, sms)
    waves = -(-(-(-F // rows) * splits) // sms)
    ctas = min(waves, 3 if few else 1)  # registers: more tokens leave no room for a second CTA
    tokens = -(-T // 8) * 8
    tiling = Tiling(rows, tokens, long if few else unit, 1, splits, ctas)
    room = _room(ctas) - rows * tokens * 4
  stages = min(room // tiling.stage_bytes(form.x_dtype, form.w_dtype), D // tiling.depth // tiling.splits, 16)
  return dataclasses.replace(tiling, stages=stages)


def unit_of(D: int, form: Form) -> int:
  """Columns that are summed in one accumulator: 128 bytes of a row of w, or 64 where D allows no more."""
  unit = 128 // jnp.dtype(form.w_dtype).itemsize
  return unit if D % unit == 0 else 64 // jnp.dtype(form.w_dtype).itemsize


def form_of(x_TD, w_FD, w_scale, x_scale=None) -> Form:
  """What is multiplied. Raises NotImplementedError for what the kernels cannot do."""
  F, D = w_FD.shape
  if jnp.float32 in (x_TD.dtype, w_FD.dtype):
    raise NotImplementedError(f"sm90 multiplies float8 and bfloat16, not {x_TD.dtype} by {w_FD.dtype}")
  if D % 64 or F % 8:
    raise NotImplementedError(f"sm90 needs D a multiple of 64 and F of 8; got F={F}, D={D}")
  block_rows = api.block_rows(w_FD, w_scale) if w_scale is not None and w_scale.ndim == 2 else 0
  if block_rows % WG_ROWS:
    raise NotImplementedError(f"sm90 needs scale blocks of a multiple of {WG_ROWS} rows; got {block_rows}")
  if not api.is_float8(w_FD) and api.is_float8(x_TD):
    raise NotImplementedError("sm90 does not mix float8 activations with bfloat16 weights")
  widens = api.is_float8(w_FD) and not api.is_float8(x_TD)
  return Form(w_FD.dtype, jnp.dtype(jnp.float16) if widens else x_TD.dtype, block_rows, api.is_grouped(x_scale))


def _choose_splits(row_tiles: int, steps: int, sms: int) -> int:
  """Parts to cut D into. One where row tiles alone give four of nine SMs a CTA: a ring of some 200 KB in each of them holds
  many times the bytes that must be under way, an SM then draws some 33 bytes a cycle of the 64 that L2 gives it (H100), and
  sums need no finishing. Otherwise as many as fill three CTAs a SM in few, long, even waves; ties go to fewer parts."""
  if 9 * row_tiles >= 4 * sms:
    return 1

  def time(splits):
    waves = -(-row_tiles * splits // (3 * sms))
    return waves * (steps // splits + 3) + splits / 4  # filling a ring and the end cost about 3 steps; a part, to be read again

  return min((s for s in range(1, steps + 1) if steps % s == 0), key=lambda s: (time(s), s))
