"""A connection that carries messages: a JSON object in each line."""

import contextlib
import json
import select
import socket
import ssl
import threading
import time
from typing import Any

_MAX_LINE = 1 << 15  # bytes; a longer line is a stranger's
_MAX_NUMBER = 1 << 20
MAX_SENTENCE = 4000  # characters of a process's last sentence: at most half a line


class Line:
  """A connection that carries messages. process: the process at its other end, once it is known; ended: set at its end."""

  def __init__(self, sock: socket.socket):
    self.sock, self.process, self.ended = sock, -1, threading.Event()
    self._read = b""
    self._using = threading.Lock()  # OpenSSL may not read and write one connection at once
    self._poll = select.poll()
    self._poll.register(sock, select.POLLIN)

  def send(self, message: dict[str, Any]) -> None:
    """Sends, or does nothing where the other end is gone."""
    with contextlib.suppress(OSError), self._using:
      self.sock.sendall(json.dumps(message, ensure_ascii=False).encode(errors="replace") + b"\n")

  def read(self, seconds: float | None = None) -> dict[str, Any] | None:
    """The next message; None at the end. Raises ValueError for what is none, TimeoutError after `seconds`, and OSError."""
    until = None if seconds is None else time.monotonic() + seconds
    while b"\n" not in self._read:
      is_pending = isinstance(self.sock, ssl.SSLSocket) and self.sock.pending()
      if not is_pending and not self._poll.poll(until and max(0, 1000 * (until - time.monotonic()))):
        raise TimeoutError
      with self._using:
        piece = self.sock.recv(4096)
      if not piece:
        return None
      self._read += piece
      if len(self._read) > _MAX_LINE or self._read[:1] != b"{":
        raise ValueError("no message")
    line, self._read = self._read.split(b"\n", 1)
    message = json.loads(line)
    if not isinstance(message, dict):
      raise ValueError("no message")
    return message

  def close(self) -> None:
    with contextlib.suppress(OSError):
      self.sock.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
      self.sock.close()

  def keep_alive(self) -> None:
    """Notices a machine that is gone within a minute or two, where JAX's heartbeat does not."""
    self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
      if hasattr(socket, name):
        self.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def number(message: dict[str, Any], key: str) -> int:
  """A whole number of a message, such as a process's; -1 for anything else, and for one that no run has."""
  value = message.get(key)
  return value if type(value) is int and 0 <= value < _MAX_NUMBER else -1
