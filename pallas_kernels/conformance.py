"""The first use of a device: each kernel computes one small call there and is compared with plain XLA.

    require(device, folder)   once a process and kind of device; what has passed is remembered in `folder`, under a digest of
                              the device's kind, driver, jax and the source of these kernels
    run(target)               every check's outcome, for whoever wants to see them

Kernels are proven without a GPU; what that cannot show (memory ordering, the compiler at hand, the real accumulator) shows here
as a wrong number, before it shows in a text. Nothing happens on a CPU, or for a device that is only compiled for.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch, tuned
from pallas_kernels.dispatch import Target
from pallas_kernels.float8 import GROUP, Quantized
from pallas_kernels.fp8_matmul.api import PartialSums, fp8_matmul
from pallas_kernels.fused.api import residual_norm, rope_write, silu_multiply
from pallas_kernels.paged_attention.api import paged_attention

FP8, BF16 = jnp.float8_e4m3fn, jnp.bfloat16
ROUNDED = 0.05  # relative error of a result in float8: each value is off by up to 1/16, most by less


class KernelError(ValueError):
  """A kernel fails on this device. The message names it and says how to go on."""


@dataclasses.dataclass(frozen=True)
class Check:
  """One small call of one kernel. call(*arguments, implementation=, target=); limit: of the relative error."""

  name: str
  operation: str
  call: Callable
  arguments: Callable[[], tuple]
  limit: float


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a kernel did: its relative error, or the words of what failed."""

  check: str
  implementation: str
  error: float
  limit: float
  failure: str = ""

  @property
  def passed(self) -> bool:
    return not self.failure and self.error <= self.limit  # not for a NaN

  def sentence(self) -> str:
    how = f"fails: {self.failure}" if self.failure else f"is off by {self.error:.2g}, where {self.limit:.2g} is allowed"
    return f"{self.check}: the kernel {self.implementation!r} {how}"


def require(
  device: Any,
  folder: str | os.PathLike = "",
  *,
  read: Callable[[pathlib.Path], bytes] = pathlib.Path.read_bytes,
  write: Callable[[pathlib.Path, bytes], Any] = tuned.write_bytes,
) -> None:
  """Raises KernelError unless every kernel for `device` computes there what plain XLA computes.

  folder: where a success is remembered, so that the next process does not compute it again; empty: only this process does.
  read, write: read and write its files; may raise OSError.
  """
  target = Target.of(device)
  if target.platform != "cpu" and device in jax.devices():
    _require(device, target, str(folder), read, write)


@functools.cache
def _require(device: Any, target: Target, folder: str, read: Callable, write: Callable) -> None:
  note = pathlib.Path(folder) / f"kernels-{fingerprint(device)}" if folder else None
  if note is not None:
    with contextlib.suppress(OSError):
      read(note)
      return
  with jax.default_device(device):
    outcomes = run(target)
  require_passed(outcomes, target.kind or f"compute capability {target.capability}")
  if note is not None and outcomes:
    with contextlib.suppress(OSError):  # the next start checks again, and that is all
      write(note, "".join(f"{o.check} {o.implementation} {o.error:.3g}\n" for o in outcomes).encode())


def require_passed(outcomes: list[Outcome], device: str) -> None:
  """Raises KernelError if one has not passed."""
  failed = [outcome.sentence() for outcome in outcomes if not outcome.passed]
  if failed:
    raise KernelError(
      f"pallas_kernels: on this {device} the kernels do not compute what plain XLA does. {'; '.join(failed)}. Go on with "
      '--implementation=xla (implementation="xla" in a program), and report it with the file that jaxfp8 validate-gpu '
      "writes."
    )


def run(target: Target, implementation: Callable[[str], str | None] | None = None) -> list[Outcome]:
  """The outcome of every check on the default device. implementation: the name for an operation; by default its kernel."""
  outcomes = []
  for check in CHECKS:
    name = (implementation or functools.partial(kernel_of, target=target))(check.operation)
    if name:
      outcomes.append(run_one(check, name, target))
  return outcomes


def kernel_of(operation: str, target: Target) -> str | None:
  """The kernel that an operation has for a target, or None."""
  return next((name for name in dispatch.order(operation, target) if name not in ("xla", "cpu")), None)


def run_one(check: Check, implementation: str, target: Target) -> Outcome:
  """One kernel against XLA. Any error, a launch failure too, is an outcome."""
  arguments = jax.tree.map(jnp.asarray, check.arguments())

  def compute(name):
    program = jax.jit(lambda *arguments: plain(check.call(*arguments, implementation=name, target=target)))
    return jax.device_get(program(*arguments))

  try:
    error = error_of(compute(implementation), compute("xla"))
  except Exception as failure:  # whatever it is, it is the kernel's
    words = " ".join(f"{type(failure).__name__}: {failure}".split())
    words = words if len(words) < 400 else f"{words[:200]} [...] {words[-150:]}"
    return Outcome(check.name, implementation, float("nan"), check.limit, words)
  return Outcome(check.name, implementation, error, check.limit)


def error_of(got, want) -> float:
  """The largest relative error (by norms) of two trees' arrays; infinite where one is not finite."""
  worst = 0.0
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not np.isfinite(a).all() or a.shape != b.shape:
      return float("inf")
    worst = max(worst, float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)))
  return worst


def plain(tree):
  """Results as float32 arrays that can be compared: float8 under its scale, sums finished."""
  if isinstance(tree, Quantized):
    values = tree.values.reshape(tree.values.shape[0], -1).astype(jnp.float32)
    if tree.scale.ndim == 2:
      return values * jnp.repeat(tree.scale.T, GROUP, axis=1)[:, : values.shape[1]]
    return values * (tree.scale[:, None] if tree.scale.ndim else tree.scale)
  if isinstance(tree, PartialSums):
    return tree.finish(jnp.float32)
  if isinstance(tree, tuple) and len(tree) == 4 and tree[0].dtype == FP8:  # a pool of pages
    k, v, k_scale, v_scale = tree
    return k.astype(jnp.float32) * k_scale[..., None], v.astype(jnp.float32) * v_scale[:, :, None]
  if isinstance(tree, tuple | list):
    return tuple(plain(leaf) for leaf in tree)
  return tree.astype(jnp.float32).reshape(tree.shape[0], -1)


def fingerprint(device: Any) -> str:
  """A digest of all that decides what a kernel computes: the device's kind, driver, jax, our source, measured tile sizes."""
  driver = pathlib.Path("/proc/driver/nvidia/version")
  facts = [device.device_kind, device.client.platform_version, jax.__version__, driver.read_text() if driver.exists() else ""]
  digest = hashlib.sha256("\n".join(facts).encode())
  here = pathlib.Path(__file__).parent
  measured = [path for name in dispatch.OPERATIONS for folder in tuned.folders(name) for path in folder.glob("*.json")]
  for path in sorted({*here.rglob("*.py"), *measured}):
    with contextlib.suppress(OSError):  # measurements that are not this user's: they are not used
      digest.update(tuned.read_bytes(path))
  return digest.hexdigest()[:32]


def _rng() -> np.random.Generator:
  return np.random.default_rng(0)


def _spread(rng, *shape) -> np.ndarray:
  """Scales over a factor of some hundreds, so that one at a wrong place is seen."""
  return np.exp(1.5 * rng.standard_normal(shape)).astype(np.float32)


def _float8(rng, *shape) -> np.ndarray:
  return np.clip(100 * rng.standard_normal(shape), -448, 448).astype(FP8)


def _matmul(form: str, T: int, F: int, D: int, block: bool = False):
  def arguments():
    rng = _rng()
    x = _float8(rng, T, D) if form == "w8a8" else rng.standard_normal((T, D)).astype(BF16)
    if form == "bf16":
      return x, rng.standard_normal((F, D)).astype(BF16), None, None
    w_scale = _spread(rng, F // 128, D // 128) if block else _spread(rng, F)
    return x, _float8(rng, F, D), w_scale, _spread(rng, *((D // 128,) if block else ()), T) if form == "w8a8" else None

  return arguments


def _pages(rng, K: int, H: int, C: int, num_pages: int, *, fp8: bool):
  shapes = (num_pages, K, C, H), (num_pages, K, H, C)
  if not fp8:
    return tuple(rng.standard_normal(shape).astype(BF16) for shape in shapes)
  return (*(_float8(rng, *shape) for shape in shapes), *(_spread(rng, num_pages, K, C) / 100 for _ in range(2)))


def _attention(lengths, counts, *, fp8: bool, quantize: bool, grouped: bool = False, K=2, G=3, H=64, C=64):
  """Arguments of `_attend`; pages of sequences in no order, none of them the first."""

  def arguments():
    rng, B = _rng(), len(lengths)
    M = -(-max(lengths) // C)
    T = B if counts is None else sum(counts) + 2
    starts = None if counts is None else np.cumsum([0, *counts]).astype(np.int32)
    table = (1 + rng.permutation(B * M)).reshape(B, M).astype(np.int32)
    q = rng.standard_normal((T, K * G, H)).astype(BF16)
    return q, _pages(rng, K, H, C, B * M + 1, fp8=fp8), table, starts, np.asarray(lengths, np.int32)

  def call(q, pages, *where, **kernels):
    k_scale, v_scale = pages[2:] or (None, None)
    rounding = {"quantize": quantize, "grouped": grouped}
    return paged_attention(q, *pages[:2], *where, k_scale=k_scale, v_scale=v_scale, **rounding, **kernels)

  return call, arguments


def _norm_arguments():
  rng = _rng()
  return *(rng.standard_normal((3, 512)).astype(BF16) for _ in range(2)), _spread(rng, 512)


def _rope_arguments(T=3, K=2, G=3, H=64, C=64):
  rng = _rng()
  sums = rng.standard_normal((2, T, K * (G + 2) * H)).astype(np.float32), _spread(rng, K * (G + 2) * H), _spread(rng, T)
  angles = rng.standard_normal((T, H // 2)).astype(np.float32)
  table, lengths = np.arange(1, 2 * T + 1, dtype=np.int32).reshape(T, 2), np.array([70, 1, 64][:T], np.int32)
  return *sums, np.cos(angles), np.sin(angles), _pages(rng, K, H, C, 2 * T + 2, fp8=True), table, lengths


def _rope(parts, w_scale, x_scale, cos, sin, pages, table, lengths, **kernels):
  return rope_write(PartialSums(parts, w_scale, x_scale), cos, sin, pages, table, None, lengths, first_page=1, **kernels)


def _silu_arguments():
  rng = _rng()
  return rng.standard_normal((2, 3, 1024)).astype(np.float32), 0.3 * _spread(rng, 1024), _spread(rng, 3)


def _silu(parts, w_scale, x_scale, **options):
  return silu_multiply(PartialSums(parts, w_scale, x_scale), quantize=True, **options)


def _checks() -> Iterator[Check]:
  for name, form, T, F, D, *block in (
    ("W8A8, 3 tokens", "w8a8", 3, 192, 1024),
    ("W8A16 with block scales, 20 tokens", "w8a16", 20, 256, 512, True),
    ("W8A8 with block scales, 8 tokens", "w8a8", 8, 256, 1024, True),
    ("W8A8, 136 tokens", "w8a8", 136, 256, 512),
    ("W8A8 with block scales, 136 tokens", "w8a8", 136, 256, 512, True),
    ("W8A16, 72 tokens", "w8a16", 72, 256, 512),
    ("bf16, 5 tokens", "bf16", 5, 128, 512),
  ):
    yield Check(f"fp8_matmul ({name})", "fp8_matmul", fp8_matmul, _matmul(form, T, F, D, *block), 0.01)
  for name, lengths, counts, fp8, quantize in (
    ("decode, float8 pages", (300, 0, 65), None, True, True),
    ("prefill, float8 pages", (130, 40), (37, 40), True, False),
    ("decode, bf16 pages", (70, 128), None, False, False),
  ):
    call, arguments = _attention(lengths, counts, fp8=fp8, quantize=quantize)
    yield Check(f"paged_attention ({name})", "paged_attention", call, arguments, ROUNDED if quantize else 0.02)
  call, arguments = _attention((300, 0, 65), None, fp8=True, quantize=True, grouped=True, G=4)
  yield Check("paged_attention (decode, scales of groups)", "paged_attention", call, arguments, ROUNDED)
  for name, grouped in (("", False), (" (scales of groups)", True)):
    norm = functools.partial(residual_norm, eps=1e-5, quantize=True, grouped=grouped)
    yield Check(f"residual_norm{name}", "residual_norm", norm, _norm_arguments, ROUNDED)
    silu = functools.partial(_silu, grouped=grouped)
    yield Check(f"silu_multiply{name}", "silu_multiply", silu, _silu_arguments, ROUNDED)
  yield Check("rope_write", "rope_write", _rope, _rope_arguments, ROUNDED)


CHECKS = tuple(_checks())
