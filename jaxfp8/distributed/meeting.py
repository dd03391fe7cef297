"""How the processes of a run find each other, and how each hears at once that another one ends. Imports no jax.

    meeting = Meeting(place)
    meeting.assemble()               # returns in every process when all have come, or raises InputError in each
    meeting.watch(end)               # from now on end(sentence) is called when another process ends early
    meeting.announce("Stopped.")     # this process ends early, and the others shall say so

Process 0 listens at the coordinator's address, and every other process connects and says which one it is. JAX's coordinator
cannot do this part: it takes a port that is taken, aborts all processes where one is missing, and ends a run for a stranger.
When all have come, the address passes to JAX's coordinator. The connections stay open as long as the processes live: they carry
the sentence of a process that ends early, and a connection that breaks tells of a process that was killed.

With certificates (`ProcessPlace.tls`) each side proves who it is; without, anybody who reaches the address can take part, so it
belongs into a private network. Refuses to know models, flags and what JAX does afterwards.
"""

import contextlib
import dataclasses
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxfp8.distributed.addresses import BIND_VARIABLE, Address, listen, resolve
from jaxfp8.distributed.environment import ProcessPlace
from jaxfp8.distributed.lines import MAX_SENTENCE, Line, number
from jaxfp8.distributed.tls import Tls
from jaxfp8.errors import InputError
from jaxfp8.terminal import say, visible

_PROTOCOL = 1
_GREETING_SECONDS = 10.0  # a connection says who it is within this time
_MAX_GREETINGS = 64  # connections that may do so at once
_QUIET_SECONDS = 10.0  # process 0 then says whom it waits for
_RETRY_SECONDS = 0.1
_TAKEN = "A run that has started already, or another program, answers there"


@dataclasses.dataclass(frozen=True)
class _Event:
  """What came over a line: a message, or None when it has ended."""

  line: Line
  message: dict[str, Any] | None
  peer: str = ""


class Meeting:
  """This process's connections: to all others in process 0, to process 0 in the others.

  address: where JAX's coordinator is to be reached, and bind_address: where it is to listen; both after `assemble`.
  run_id: the same random word in all processes of a run.
  """

  def __init__(self, place: ProcessPlace):
    assert place.coordinator and place.num_processes is not None and place.process_id is not None
    self.count, self.index, self.seconds, self._tls = place.num_processes, place.process_id, place.start_seconds, place.tls
    self._coordinator = Address.parse(place.coordinator)
    self.address = self.bind_address = self._coordinator
    self.run_id = ""
    self._lines: dict[int, Line] = {}
    self._events: queue.Queue[_Event] = queue.Queue()
    self._done: set[int] = set()  # processes that have said that they are done
    self._listening: socket.socket | None = None
    self._greetings = threading.BoundedSemaphore(_MAX_GREETINGS)

  def assemble(self) -> None:
    """Waits until all processes have come. Raises InputError in all of them if they do not all come, or do not fit together."""
    try:
      if self.index == 0:
        self._assemble_as_first()
      else:
        self._come()
    except BaseException:
      for line in self._lines.values():
        line.close()
      raise

  def announce(self, sentence: str) -> None:
    """Tells the others that this process ends early, and why."""
    for line in list(self._lines.values()):
      line.send({"end": sentence[:MAX_SENTENCE]})

  def done(self) -> None:
    """Tells the others that this process has done all its work, so that its end is no surprise."""
    for line in list(self._lines.values()):
      line.send({"done": True})

  def wait_until_done(self) -> str:
    """Waits for process 0, which is done or ends early: then the sentence why; empty where it is done."""
    while True:
      event = self._events.get()
      if event.message is None or "done" in event.message or "end" in event.message:
        return self._reason(event) or ""

  def watch(self, end: Callable[[str], None]) -> None:
    """Calls `end` in a thread of its own with the reason when another process ends early. Process 0 tells the others."""

    def listen() -> None:
      while True:
        event = self._events.get()
        if reason := self._reason(event):
          for process, line in self._lines.items():
            if self.index == 0 and line is not event.line and process not in self._done:
              line.send({"end": reason, "relayed": True})
          end(reason)
          return

    threading.Thread(target=listen, daemon=True).start()

  def wait_for_the_others(self, seconds: float) -> None:
    """In process 0: waits until the connections to all others have ended, or the time is over."""
    until = time.monotonic() + seconds
    for line in list(self._lines.values()) if self.index == 0 else ():
      line.ended.wait(max(0.0, until - time.monotonic()))

  def _reason(self, event: _Event) -> str | None:
    """Why the process at the other end of a line ends early; None if it does not."""
    if self._lines.get(event.line.process) is not event.line:  # a stranger's, or a process that was refused
      return None
    if event.message is None:
      if event.line.process in self._done:
        return None
      return f"hosts: process {event.line.process} is gone: it was killed, or its machine or network has failed."
    if "done" in event.message:
      self._done.add(event.line.process)
    if "end" not in event.message:
      return None
    sentence = visible(str(event.message["end"]))
    return sentence if event.message.get("relayed") else f"process {event.line.process}: {sentence}"

  # Process 0.

  def _assemble_as_first(self) -> None:
    started = time.monotonic()
    self._listening = self._bind()
    threading.Thread(target=self._accept, args=(self._listening,), daemon=True).start()
    told = False
    while missing := sorted(set(range(1, self.count)) - self._lines.keys()):
      waited = time.monotonic() - started
      if waited > self.seconds:
        raise self._broken(
          f"hosts: {self._names(missing)} did not come within {self.seconds} s. Start all {self.count} processes, and check "
          f"that every one reaches {self._coordinator}."
        )
      if waited > _QUIET_SECONDS and not told:
        told = True
        say(f"hosts: waiting for {self._names(missing)} of {self.count} at {self._coordinator}.")
      with contextlib.suppress(queue.Empty):
        self._hear(self._events.get(timeout=min(0.5, self.seconds)))
    self.run_id = secrets.token_hex(8)
    self._pass_on(self._listening)
    for line in self._lines.values():
      line.send({"start": self.run_id})

  def _hear(self, event: _Event) -> None:
    """Takes in a process that has come. Raises InputError for one that does not belong here or has ended."""
    line, message = event.line, event.message
    if self._lines.get(line.process) is line:
      if reason := self._reason(event):
        raise self._broken(reason)
      return
    if message is None:
      return
    process, count = number(message, "process"), number(message, "of")
    if message.get("jaxfp8") != _PROTOCOL or not 0 < process < count:
      refusal = "hosts: process 0 has another version of jaxfp8. Start all of them alike."
    elif count != self.count:
      sentence = (
        f"hosts: every process must have the same --num_processes; process 0 has {self.count}, process {process} has {count}. "
        "Start all of them alike."
      )
      line.send({"refused": sentence})
      raise self._broken(sentence)
    elif process in self._lines:
      refusal = f"hosts: another process {process} has come before. Give every process a --process_id of its own."
      say(f"hosts: a second process {process} came from {event.peer} and was refused.")
    else:
      line.process = process
      self._lines[process] = line
      return
    line.send({"refused": refusal})
    line.close()

  def _broken(self, sentence: str) -> InputError:
    for line in self._lines.values():
      line.send({"refused": sentence})
    return InputError(sentence)

  def _names(self, processes: list[int]) -> str:
    return ("process " if len(processes) == 1 else "processes ") + ", ".join(map(str, processes))

  def _bind(self) -> socket.socket:
    variable = os.environ.get(BIND_VARIABLE)
    sock, numeric = listen(Address.parse(variable, BIND_VARIABLE) if variable else self._coordinator, everywhere=bool(variable))
    self.bind_address = numeric
    self.address = self._address_for_jax(Address("127.0.0.1", numeric.port) if variable else numeric)
    return sock

  def _accept(self, listening: socket.socket) -> None:
    while True:
      self._greetings.acquire()
      try:
        sock, where = listening.accept()
      except OSError:  # the address has passed to JAX
        return
      threading.Thread(target=self._greet, args=(sock, where[0]), daemon=True).start()

  def _greet(self, sock: socket.socket, peer: str) -> None:
    """Hears who has connected. What says nothing, or something else, is a stranger and no concern of the run."""
    try:
      sock.settimeout(_GREETING_SECONDS)
      line = Line(self._tls.accept(sock) if self._tls else sock)
      message = line.read(_GREETING_SECONDS)
    except (OSError, ValueError, RecursionError) as error:
      sock.close()
      if self._tls and isinstance(error, OSError) and (sentence := Tls.explain(error)):
        say(f"hosts: a connection from {peer} was refused: {sentence}.")
      return
    finally:
      self._greetings.release()
    self._events.put(_Event(line, message, peer))
    self._follow(line)

  def _follow(self, line: Line) -> None:
    """Puts what comes over a line into the queue of events, until the line ends."""
    line.keep_alive()
    message: dict[str, Any] | None = {}
    while message is not None:
      try:
        message = line.read()
      except (OSError, ValueError, RecursionError):
        message = None
      self._events.put(_Event(line, message))
    line.ended.set()

  def _pass_on(self, listening: socket.socket) -> None:
    """Lets JAX's coordinator listen at the address, and nobody else: the socket stays bound as long as this process lives."""
    # gRPC shares a port with sockets that allow it; another run's process 0 does not ask for that, so it is refused.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    with contextlib.suppress(OSError):
      listening.shutdown(socket.SHUT_RDWR)  # a bound socket that does not listen gets no connections

  # The other processes.

  def _come(self) -> None:
    until = time.monotonic() + self.seconds
    line = self._connect(until)
    line.process = 0
    self._lines[0] = line
    line.send({"jaxfp8": _PROTOCOL, "process": self.index, "of": self.count})
    try:
      message = line.read(max(1.0, until - time.monotonic()))
    except TimeoutError as error:
      raise InputError(
        f"hosts: not all {self.count} processes came within {self.seconds} s. Start all of them, and check that every one "
        f"reaches {self._coordinator}."
      ) from error
    except (ValueError, RecursionError) as error:
      raise InputError(
        f"hosts: no process 0 waits at {self._coordinator}. {_TAKEN}: use a free port, and a --process_id that is not taken."
      ) from error
    except OSError as error:
      if sentence := Tls.explain(error):
        raise InputError(f"hosts: no secure connection to {self._coordinator}: {sentence}.") from error
      message = None
    if message is None:
      raise InputError(
        f"hosts: process 0 at {self._coordinator} ended, or is another program, before all {self.count} processes had come. "
        "Read its message, and start all of them again."
      )
    if reason := self._reason(_Event(line, message)):
      raise InputError(reason)
    if "start" not in message:
      raise InputError(visible(str(message.get("refused", "hosts: process 0 refused this process."))))
    self.run_id = str(message["start"])
    threading.Thread(target=self._follow, args=(line,), daemon=True).start()

  def _connect(self, until: float) -> Line:
    """Connects to process 0, which may not have started yet."""
    while True:
      failure = "it does not answer"
      for family, numeric in resolve(self._coordinator, until):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
          sock.settimeout(min(_GREETING_SECONDS, max(0.1, until - time.monotonic())))
          sock.connect((numeric.host, numeric.port))
          line = Line(self._tls.connect(sock, self._coordinator.host) if self._tls else sock)
          self.address = self._address_for_jax(numeric)
          return line
        except OSError as error:
          sock.close()
          if self._tls and (sentence := Tls.explain(error)):
            raise InputError(f"hosts: no secure connection to {self._coordinator}: {sentence}.") from error
          failure = error.strerror or failure
      if time.monotonic() > until:
        raise InputError(
          f"hosts: process 0 cannot be reached at {self._coordinator} within {self.seconds} s: {failure}. Start process 0, and "
          "check --coordinator and the firewall."
        )
      time.sleep(_RETRY_SECONDS)

  def wait_for_coordinator(self, seconds: float = 5.0) -> None:
    """Returns when JAX's coordinator listens: JAX's client would wait a second before it tries again."""
    until = time.monotonic() + seconds
    while self.index and time.monotonic() < until:
      with contextlib.suppress(OSError):
        socket.create_connection((self.address.host, self.address.port), timeout=1).close()
        return
      time.sleep(0.02)

  def _address_for_jax(self, numeric: Address) -> Address:
    """The address that was reached; with certificates the name, which they are compared with."""
    return self._coordinator if self._tls else numeric
