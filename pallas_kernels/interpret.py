"""Runs the Mosaic GPU kernels on a CPU, for tests only: slow, exact about semantics, silent about time.

    with running() as copies:            # every kernel called inside is interpreted, races and forgotten fences are errors
      fp8_matmul(..., implementation="interpret")
    copies.bytes_read                    # what its TMA copies fetched, to compare with cost()

JAX's GPU interpret mode models barriers, TMA and its two proxies. Three things it lacks are added here by replacing private
functions of jax 0.12.0.1, so a new JAX needs a look at this file:
  - wgmma with its left operand in registers, which every W8A16 kernel uses, has no rule;
  - wgmma's reads of shared memory are invisible to the race detector: here they are reads of the async proxy, so a missing
    barrier wait and a missing commit_smem() both become races;
  - wgmma is asynchronous: its operands may be overwritten until the accumulator has been read. Here a copy into them, or an
    arrival at a barrier that frees them, before that is an error.
What stays invisible: the width of the FP8 accumulator, timing, and everything that the compiler does.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.state import types as state_types

from pallas_kernels.dispatch import Target


@dataclasses.dataclass
class Copies:
  """Bytes that TMA moved inside one `running()`: read from and written to device memory."""

  bytes_read: int = 0
  bytes_written: int = 0


class UnorderedOperand(RuntimeError):
  """Shared memory was given away while a wgmma might still read it."""


_copies = Copies()
_lock = threading.Lock()
_outstanding: dict[object, list] = {}  # Pallas thread -> shared memory ranges its unfinished wgmmas read


@contextlib.contextmanager
def running(timeout_s: float = 60) -> Iterator[Copies]:
  """Counts the copies of what runs inside, and cleans up after an error. Raises at the first race, and after `timeout_s`.

  A kernel whose barrier nobody arrives at would wait for ever: when the time is over, all its waits fail.
  """
  global _copies
  _copies = Copies()
  watchdog = threading.Timer(timeout_s, _stop_waiting, (timeout_s,))
  watchdog.start()
  try:
    with mode():
      yield _copies
  except BaseException:
    gpu_callbacks.reset_gpu_interpret_mode_state()
    raise
  finally:
    watchdog.cancel()
    _outstanding.clear()


def _stop_waiting(timeout_s: float) -> None:
  memory = gpu_callbacks._shared_memory
  if memory is not None:
    memory.set_failed(TimeoutError(f"the kernel was not done after {timeout_s:.0f} s: a deadlock, or too large a test"))


@contextlib.contextmanager
def mode() -> Iterator[None]:
  """Interprets every kernel that is traced inside, with race detection."""
  _install()
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True, on_race="raise")):
    yield


def played_gpu(target: Target | None) -> Target:
  """The GPU whose kernels are interpreted: `target`, or for a CPU an H100 with two SMs, since every CTA costs milliseconds."""
  return target if target is not None and target.platform != "cpu" else Target("cuda", (9, 0), 2)


@functools.cache
def _install() -> None:
  interpreter = jaxpr_interpret.JaxprInterpreter
  interpreter._interpret_wgmma_ref_p = _interpret_wgmma
  copy_in, copy_out = gpu_callbacks.copy_gmem_to_smem, gpu_callbacks.copy_smem_to_gmem
  arrive, deref = gpu_callbacks._barrier_arrive, gpu_callbacks.wgmma_accumulator_deref
  gpu_callbacks.copy_gmem_to_smem = functools.partial(_copy_in, copy_in)
  gpu_callbacks.copy_smem_to_gmem = functools.partial(_copy_out, copy_out)
  gpu_callbacks._barrier_arrive = functools.partial(_arrive, arrive)
  gpu_callbacks.wgmma_accumulator_deref = functools.partial(_deref, deref)
  # Several CPU devices under shard_map share one process; the check is about one.
  gpu_callbacks.call_assert_no_barriers_allocated = lambda token: token


def _interpret_wgmma(self, eqn, token, get_invals):
  acc, a, b, *leaves = get_invals()
  empty = jax.tree.structure([])
  trees = [eqn.params[f"{name}_transforms_tree"] or empty for name in ("acc", "a", "b")]
  acc_transforms, a_transforms, b_transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(tuple(trees)), leaves)
  acc, acc_transforms = jaxpr_interpret.resolve_ref(eqn.invars[0].aval, acc, acc_transforms)
  b, b_transforms = jaxpr_interpret.resolve_ref(eqn.invars[2].aval, b, b_transforms)
  in_registers = not isinstance(eqn.invars[1].aval, state_types.AbstractRef)
  if not in_registers:
    a, a_transforms = jaxpr_interpret.resolve_ref(eqn.invars[1].aval, a, a_transforms)
  body = functools.partial(_wgmma, in_registers=in_registers, source_info=eqn.source_info)
  return callback.io_callback(
    body,
    gpu_callbacks.TOKEN_SHAPE_DTYPE,
    token=token,
    mesh_location=self.mesh_location,
    thread=self.thread,
    acc=(acc, acc_transforms),
    a=(a, a_transforms),
    b=(b, b_transforms),
  ), []


@gpu_callbacks.fail_on_exception
def _wgmma(*, token, mesh_location, thread, acc, a, b, in_registers, source_info):
  memory = gpu_callbacks._get_shared_memory()
  logging_info = gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)

  def content(ref) -> tuple[Any, Any, Any]:
    key = gpu_callbacks.HostAllocationKey.from_array(ref[0])
    access = memory.access(key, _plain(ref[1]))
    value, _, _ = memory.get_buffer_content(key, access, thread, logging_info=logging_info)
    return key, access, value

  def operand(ref):
    key, access, value = content(ref)
    # A place of its own in the vector clock, as a TMA copy has: what the thread stored without a fence is then unordered with
    # this read, and so is whatever overwrites the operand before the thread has waited (see _deref).
    clock = memory.incr_clock(thread)
    clock.inc(memory.get_next_tma_thread_id())
    gpu_callbacks.get_races().check_read(thread, clock.async_smem_clock.copy(), key, access, source_info=source_info)
    with _lock:
      _outstanding.setdefault(thread, []).append((key, access, clock))
    return value

  left = np.asarray(a[0]) if in_registers else operand(a)
  right = operand(b)
  key, access, old = content(acc)
  # In float64, whose rounding does not show: numpy adds float32 in an order that depends on the number of columns.
  with np.errstate(invalid="ignore"):  # rows that nothing was loaded into are NaN, and stay in their rows
    product = np.matmul(left.astype(np.float64), right.astype(np.float64))
  memory.store_buffer_content(key, access, (old + product).astype(old.dtype), thread, logging_info=logging_info)
  return token


def _deref(original, **kwargs):
  thread = kwargs["thread"]
  if not kwargs["wait_n"]:
    memory = gpu_callbacks._get_shared_memory()
    with _lock:
      finished = _outstanding.pop(thread, ())
    with memory.lock:
      for _, _, clock in finished:
        memory.clocks[thread].update(clock)
  return original(**kwargs)


def _arrive(original, token, mesh_location, thread, *args, **kwargs):
  with _lock:
    unfinished = bool(_outstanding.get(thread))
  if unfinished:
    return _fail(token, UnorderedOperand("barrier_arrive before the wgmma that reads the freed memory was awaited"))
  return original(token, mesh_location, thread, *args, **kwargs)


def _copy_in(original, **kwargs):
  memory = gpu_callbacks._get_shared_memory()
  target = gpu_callbacks.HostAllocationKey.from_array(kwargs["dst_allocation_key_as_array"])
  access = memory.access(target, _plain(kwargs["dst_transforms"]))
  with _lock:
    clash = any(key == target and _overlap(access, other) for key, other, _ in _outstanding.get(kwargs["thread"], ()))
    _copies.bytes_read += _size(kwargs["src_allocation_key_as_array"], kwargs["src_transforms"])
  if clash:
    return _fail(kwargs["token"], UnorderedOperand("copy_gmem_to_smem into memory that an unfinished wgmma reads"))
  return original(**kwargs)


def _copy_out(original, **kwargs):
  with _lock:
    _copies.bytes_written += _size(kwargs["dst_allocation_key_as_array"], kwargs["dst_transforms"])
  return original(**kwargs)


@gpu_callbacks.fail_on_exception
def _fail(token, error):
  raise error


def _size(key_as_array, transforms) -> int:
  """Bytes of a device memory range that lie inside its array."""
  memory = gpu_callbacks._get_shared_memory()
  key = gpu_callbacks.HostAllocationKey.from_array(key_as_array)
  access = memory.access(key, _plain(transforms))
  described = memory.buffer_shape_and_dtype(key)
  inside = gpu_callbacks.interpret_utils.clip_range_to_shape(access.range, tuple(described.shape))
  if inside is None:
    return 0
  return int(np.prod(gpu_callbacks.interpret_utils.Access(inside).shape)) * np.dtype(described.dtype).itemsize


def _plain(transforms):
  return jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))


def _overlap(a, b) -> bool:
  return all(_bounds(x)[0] < _bounds(y)[1] and _bounds(y)[0] < _bounds(x)[1] for x, y in zip(a.range, b.range, strict=True))


def _bounds(part) -> tuple[int, int]:
  return (part.start, part.stop) if isinstance(part, slice) else (int(part), int(part) + 1)
