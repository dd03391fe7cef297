"""Several processes that run one program over JAX's multi-controller runtime: how they meet, agree, exchange values and end.

    join(..)                          in every process, before JAX looks for devices
    with together():                  an exception in one process ends all processes
      require_same({"flag": ..})      the same error in every process if their values differ
      requests = broadcast(requests)  from process 0 to all
      least(free_bytes)               the smallest value of all processes, in every process

Values travel through the key-value store of JAX's coordinator (process 0), not through devices. Waiting there costs nothing and
has no time limit, so a chat may be silent for hours. Every process must make the same calls in the same order. With a single
process, nothing is sent. How the processes find each other, and hear of an early end: meeting.py. The end of another process
ends this one by `os._exit`: never rely on `finally`. Uses jax._src.distributed, as Orbax does, because the store has no public
name.
"""

import contextlib
import importlib.metadata
import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax._src import distributed
from jax.sharding import Mesh

from jaxfp8 import unfinished
from jaxfp8.distributed.detection import detect
from jaxfp8.distributed.environment import ProcessPlace
from jaxfp8.distributed.meeting import Meeting
from jaxfp8.errors import InputError, first_line
from jaxfp8.source_digest import source_digest
from jaxfp8.terminal import make_visible, say, visible

_CONNECT_SECONDS = 60  # for JAX's own connections, when all processes have come
_WAIT_MS = 10_000  # time limit of one request to the store; `_get` repeats the request
_GOODBYE_SECONDS = 3.0  # process 0 stays so long, so that the others can read why all end
_REASON_SECONDS = 2.0  # a step that fails waits so long for the reason
_RUN = "jaxfp8/run"
_calls = itertools.count()  # a key of the store is written only once, so every call has its own number
_leaving = threading.Event()
_meeting: Meeting | None = None


class _FoundByAll(InputError):
  """An error that every process finds and raises by itself, so no process announces it."""


def join(place: ProcessPlace) -> None:
  """Connects to the other processes. Call before JAX looks for devices; then jax.devices() has the devices of all processes.

  Only Python's prints still go to stdout: the output of Gloo and NCCL moves to stderr. Raises InputError in every process if
  they do not all come within `place.start_seconds`, or if the cluster does not identify this process.
  """
  _keep_stdout()
  jax.config.update("jax_enable_preemption_service", False)  # the service would catch SIGTERM and not end the process
  place, device_ids = detect(place)
  meeting = _meet(place)
  meeting.watch(_end)
  meeting.wait_for_coordinator()
  tls = place.tls and {
    "mtls_cert_file": place.tls.cert_file,
    "mtls_key_file": place.tls.key_file,
    "mtls_ca_file": place.tls.ca_file,
    "mtls_peer_uri_prefix": place.tls.uri_prefix,
  }
  try:
    jax.distributed.initialize(
      str(meeting.address),
      place.num_processes,
      place.process_id,
      local_device_ids=device_ids,
      cluster_detection_method="deactivate",
      coordinator_bind_address=str(meeting.bind_address),
      heartbeat_timeout_seconds=place.heartbeat_seconds,
      shutdown_timeout_seconds=place.heartbeat_seconds,
      initialization_timeout=_CONNECT_SECONDS,
      **(tls or {}),
    )
  except (ValueError, TypeError, RuntimeError) as error:
    raise InputError(f"hosts: the processes cannot connect to JAX's coordinator ({first_line(error)}).") from error
  if place.process_id == 0:
    _client().key_value_set(_RUN, meeting.run_id)
  elif (run := _get(_RUN)) != meeting.run_id:
    raise InputError(f"hosts: {place.coordinator} belongs to another run now ({run}). Give each run a port of its own.")


def first_only(main: Callable[[], int | None]) -> int | None:
  """Runs `main`, and returns its exit code. Of the tasks of a SLURM step only the first one does; the others wait for it.

  Call it in such a task alone. Raises InputError in the others too if the first one fails.
  """
  if not ProcessPlace().is_one_of_many:
    return main()
  meeting = _meet(detect(ProcessPlace())[0])
  if meeting.index == 0:
    meeting.watch(_end)
    with together():
      return main()
  reason = meeting.wait_until_done()
  if reason:
    raise _FoundByAll(reason)
  say("hosts: task 0 of this SLURM step has done the work; this one has waited for it.")
  return 0


def _meet(place: ProcessPlace) -> Meeting:
  global _meeting
  _meeting = Meeting(place)
  try:
    _meeting.assemble()
  except InputError as error:
    _leaving.set()  # the others know, or are told
    raise _FoundByAll(str(error)) from error
  return _meeting


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
      if count() > 1 and _leaving.wait(_REASON_SECONDS):
        threading.Event().wait()  # `_end` says more, and ends this process
      sentence = (
        f"hosts: a step failed, as it does when another process has ended ({first_line(error)}). Start all processes again."
      )
    else:
      sentence = f"hosts: stopped by {type(error).__name__}: {error}"
    announce(sentence)
    if isinstance(error, jax.errors.JaxRuntimeError):
      raise InputError(sentence) from error
    raise


def announce(sentence: str) -> None:
  """Tells the other processes that this process ends, and why. The caller must call `leave` or `say_goodbye` next."""
  if _meeting and not _leaving.is_set():
    _leaving.set()
    _meeting.announce(sentence)


def say_goodbye() -> None:
  """Process 0 waits, up to _GOODBYE_SECONDS, until the others have ended: its own end would abort them."""
  if _meeting:
    _meeting.wait_for_the_others(_GOODBYE_SECONDS)


def leave(code: int) -> None:
  """Ends this process at once with this exit status, if it is one of many; otherwise returns.

  Process 0 ends last, since the others hear the reason from it. Without `leave`, JAX's own shutdown would wait for processes
  that have failed.
  """
  if _client() is None and _meeting is None:
    return
  if code == 0:
    if _meeting:
      _meeting.done()
    if _client():
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.distributed.shutdown()
  else:
    _leaving.set()
    say_goodbye()
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


def _end(sentence: str) -> None:
  """Ends this process because another one has ended. Called in a thread of its own."""
  if _leaving.is_set():
    return
  _leaving.set()
  os.write(2, f"{visible(sentence)}\n".encode(errors="replace"))
  unfinished.abandon_unfinished()
  flushing = threading.Thread(target=sys.stdout.flush, daemon=True)  # another thread may hold its lock for ever
  flushing.start()
  flushing.join(1)
  say_goodbye()
  os._exit(1)


def _keep_stdout() -> None:
  """Points file descriptor 1 to stderr, for libraries; sys.stdout keeps the original standard output."""
  kept = os.dup(1)
  sys.stdout.flush()
  os.dup2(2, 1)
  answers = open(kept, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)  # noqa: SIM115
  sys.stdout = make_visible(answers) if answers.isatty() else answers
