"""Several processes that run one program over JAX's multi-controller runtime: how they meet, agree, exchange values and end.

    join(..)                          in every process, before JAX looks for devices
    with together():                  an exception in one process ends all processes
      require_same({"flag": ..})      the same error in every process if their values differ
      requests = broadcast(requests)  from process 0 to all
      least(free_bytes)               the smallest value of all processes, in every process

Values travel through the key-value store of JAX's coordinator (process 0), not through devices. Waiting there costs nothing and
has no time limit, so a chat may be silent for hours. Every process must make the same calls in the same order. With a single
process, nothing is sent. JAX's heartbeat notices a killed process and aborts the others from C++: never rely on `finally`.
Uses jax._src.distributed, as Orbax does, because the store has no public name.
"""

import contextlib
import importlib.metadata
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax._src import distributed
from jax.sharding import Mesh

from jaxfp8.distributed.environment import AUTO, ProcessPlace
from jaxfp8.errors import InputError
from jaxfp8.source_digest import source_digest
from jaxfp8.terminal import make_visible, visible

START_SECONDS = 300  # how long processes wait for each other at the start
_WAIT_MS = 10_000  # time limit of one request to the store; `_get` repeats the request
_GOODBYE_SECONDS = 3.0  # process 0 stays so long, so that the others can read why all end
_FAILURE = "jaxfp8/failure"
_calls = itertools.count()  # a key of the store is written only once, so every call has its own number
_leaving = threading.Event()


class _FoundByAll(InputError):
  """An error that every process finds and raises by itself, so no process announces it."""


def join(place: ProcessPlace) -> None:
  """Connects to the other processes. Call before JAX looks for devices; then jax.devices() has the devices of all processes.

  Only Python's prints still go to stdout: the output of Gloo and NCCL moves to stderr. Raises InputError if the others are not
  found, or if the cluster does not identify this process.
  """
  _keep_stdout()
  jax.config.update("jax_enable_preemption_service", False)  # the service would catch SIGTERM and not end the process
  explicit = place.coordinator != AUTO and place.coordinator is not None
  try:
    jax.distributed.initialize(
      place.coordinator if explicit else None,
      place.num_processes,
      place.process_id,
      cluster_detection_method="deactivate" if explicit else None,
      heartbeat_timeout_seconds=place.heartbeat_seconds,
      shutdown_timeout_seconds=place.heartbeat_seconds,
      initialization_timeout=START_SECONDS,
    )
  except (ValueError, TypeError, RuntimeError) as error:
    reason = " ".join(str(error).split())[:300]
    raise InputError(
      f"hosts: the processes cannot meet ({reason}). Check --coordinator, --num_processes and --process_id, or what SLURM or "
      "Kubernetes say."
    ) from error
  if _client():
    threading.Thread(target=_listen, daemon=True).start()


def count() -> int:
  """The number of processes of this run. Does not make JAX look for devices."""
  return distributed.global_state.num_processes if _client() else 1


def spans_processes(mesh: Mesh) -> bool:
  """Whether the devices of the mesh belong to more than one process."""
  return len({device.process_index for device in mesh.devices.flat}) > 1


def is_first() -> bool:
  """Whether this process reads the requests and prints the answers."""
  return index() == 0


def index() -> int:
  """The index of this process, 0 .. count() - 1."""
  return distributed.global_state.process_id if _client() else 0


@contextlib.contextmanager
def together() -> Iterator[None]:
  """An exception in the block ends all processes: the others are told its message.

  A JaxRuntimeError becomes an InputError, since it mostly means that another process has ended.
  """
  try:
    yield
  except Exception as error:
    if isinstance(error, _FoundByAll):
      raise
    if isinstance(error, InputError):
      sentence = str(error)
    elif isinstance(error, jax.errors.JaxRuntimeError):
      first = str(error).split("\n", 1)[0][:300]
      sentence = f"hosts: a step failed, as it does when another process has ended ({first}). Start all processes again."
    else:
      sentence = f"hosts: stopped by {type(error).__name__}: {error}"
    announce(sentence)
    if isinstance(error, jax.errors.JaxRuntimeError):
      raise InputError(sentence) from error
    raise


def announce(sentence: str) -> None:
  """Tells the other processes that this process ends, and why. The caller must call `leave` next."""
  if _client() is None or _leaving.is_set():
    return
  _leaving.set()
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first, or the coordinator is gone
    _client().key_value_set(_FAILURE, json.dumps([index(), sentence]))


def leave(code: int) -> None:
  """Ends this process at once with this exit status, if it is one of many; otherwise returns.

  Process 0 ends last, since the others read the reason from its store. Without `leave`, JAX's own shutdown would wait for
  processes that have failed.
  """
  if _client() is None:
    return
  if code == 0:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      jax.distributed.shutdown()
  else:
    _leaving.set()
    _wait_for_the_others()
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(code)


def gather(value: Any) -> list[Any]:
  """Every process's value (plain JSON), in the order of the processes."""
  if count() == 1:
    return [value]
  key = f"jaxfp8/{next(_calls)}"
  _client().key_value_set(f"{key}/{index()}", json.dumps(value))
  return [json.loads(_get(f"{key}/{process}")) for process in range(count())]


def broadcast(value: Any = None) -> Any:
  """Process 0's value (plain JSON) in every process. Waits without a time limit."""
  if count() == 1:
    return value
  key = f"jaxfp8/{next(_calls)}"
  if is_first():
    _client().key_value_set(key, json.dumps(value))
    return value
  return json.loads(_get(key))


def least(value: int) -> int:
  """The smallest of all processes' values, in every process."""
  return min(gather(value))


def require_same(facts: Mapping[str, Any]) -> None:
  """Raises the same InputError in every process if one of the facts (plain JSON, by name) differs between processes."""
  for process, others in enumerate(gather(dict(facts))):
    if process == 0:
      first = others
    for name in first | others:
      mine, theirs = first.get(name), others.get(name)
      if mine != theirs:
        raise _FoundByAll(
          f"hosts: every process must have the same {name}; process 0 has {mine!r}, process {process} has {theirs!r}. "
          "Start all of them alike."
        )


def software() -> dict[str, str]:
  """The software of this process, for `require_same`: versions, and a digest of this package's source."""
  version = importlib.metadata.version("jaxfp8")
  return {"version": f"jaxfp8 {version} ({source_digest()[:8]}) with jax {jax.__version__}"}


def _client() -> Any:
  """The client of JAX's key-value store; None before `join` and in a run of one process."""
  return distributed.global_state.client


def _get(key: str) -> str:
  """The value of a key of the store. Waits without a time limit until a process has set the key."""
  while True:
    try:
      return _client().blocking_key_value_get(key, _WAIT_MS)
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise


def _listen() -> None:
  """Waits until another process announces its end, then ends this process."""
  try:
    process, sentence = json.loads(_get(_FAILURE))
  except (jax.errors.JaxRuntimeError, AttributeError):  # this process ends, or JAX is about to end it
    return
  if process == index() or _leaving.is_set():
    return
  _leaving.set()
  os.write(2, visible(f"process {process}: {sentence}\n").encode(errors="replace"))
  leave(1)


def _wait_for_the_others() -> None:
  """Marks this process as leaving. Process 0 then waits, up to _GOODBYE_SECONDS, until all processes are marked."""
  client, until = _client(), time.monotonic() + _GOODBYE_SECONDS
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    client.key_value_set(f"jaxfp8/left/{index()}", "", allow_overwrite=True)
    while is_first() and len(client.key_value_dir_get("jaxfp8/left")) < count() and time.monotonic() < until:
      time.sleep(0.05)


def _keep_stdout() -> None:
  """Points file descriptor 1 to stderr, for libraries; sys.stdout keeps the original standard output."""
  kept = os.dup(1)
  sys.stdout.flush()
  os.dup2(2, 1)
  answers = open(kept, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)  # noqa: SIM115
  sys.stdout = make_visible(answers) if answers.isatty() else answers
