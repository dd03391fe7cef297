"""Addresses of the coordinator: HOST:PORT, where HOST is a name, an IPv4 address or an IPv6 address in brackets."""

import dataclasses
import errno
import ipaddress
import os
import re
import socket
import time

from jaxfp8.errors import InputError
from jaxfp8.terminal import say

BIND_VARIABLE = "JAX_COORDINATOR_BIND_ADDRESS"  # of JAX too: where process 0 listens, if that is not the coordinator's address
_FORM = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)):(?P<port>[0-9]{1,5})", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Address:
  """host: a name, or an IP address without brackets. port: 1 .. 65535."""

  host: str
  port: int

  def __str__(self):
    return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

  @classmethod
  def parse(cls, text: str, source: str = "--coordinator") -> "Address":
    """Raises InputError, which names `source`, for anything but HOST:PORT."""
    found = _FORM.fullmatch(text)
    if found and 0 < int(found["port"]) < 65536 and (not found["six"] or _is_ipv6(found["six"])):
      return cls(found["six"] or found["name"], int(found["port"]))
    raise InputError(
      f"hosts: {source} must be HOST:PORT of process 0, such as 10.0.0.1:8476 or [fd00::1]:8476, or auto; got {text!r}."
    )


def resolve(address: Address, until: float | None = None) -> list[tuple[socket.AddressFamily, Address]]:
  """The numeric addresses of a host, those that other machines can reach first. Raises InputError if there are none.

  until: a pod of Kubernetes asks again until then, since a name appears some time after its pod.
  """
  while True:
    try:
      found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
      numeric = dict.fromkeys((family, Address(str(where[0]), address.port)) for family, _, _, _, where in found)
      return sorted(numeric, key=lambda pair: is_loopback(pair[1].host))
    except (OSError, UnicodeError) as error:
      if not (until and time.monotonic() < until and "KUBERNETES_SERVICE_HOST" in os.environ):
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
          f"hosts: the host {address.host!r} of --coordinator is unknown here: {reason}. Pass a name that this machine can "
          "resolve, or an IP address."
        ) from error
    time.sleep(1)


def listen(wanted: Address, *, everywhere: bool = False) -> tuple[socket.socket, Address]:
  """A socket that listens at an address of this machine alone, and that address in numbers.

  everywhere: whether it may be all addresses of this machine. Raises InputError if it is taken, or no address of this machine.
  """
  failure: OSError | None = None
  for family, numeric in resolve(wanted):
    if not everywhere and ipaddress.ip_address(numeric.host).is_unspecified:
      raise InputError(
        f"hosts: --coordinator={wanted} names no machine. Pass an address of process 0's machine that the others reach; "
        f"to listen at all of its addresses, set {BIND_VARIABLE}={wanted} there as well."
      )
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
      sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # or an earlier run's closed connections hold the port
      sock.bind((numeric.host, numeric.port))
      sock.listen(128)
    except OSError as error:
      sock.close()
      failure = failure if failure and failure.errno == errno.EADDRINUSE else error
      continue
    if is_loopback(numeric.host) and not is_loopback(wanted.host):
      say(f"hosts: {wanted.host} is {numeric.host} here, so only processes of this machine can come.")
    return sock, numeric
  assert failure is not None
  if failure.errno == errno.EADDRINUSE:
    raise InputError(f"hosts: another run or program uses {wanted}, so process 0 cannot listen there. Pass a free port.")
  if failure.errno == errno.EADDRNOTAVAIL:
    raise InputError(
      f"hosts: {wanted.host} is no address of this machine, where process 0 runs. Pass an address of this machine to all "
      f"processes; if it is a translated one, set {BIND_VARIABLE}=HOST:PORT here."
    )
  raise InputError(f"hosts: process 0 cannot listen at {wanted}: {failure.strerror}. Pass another address.")


def is_loopback(host: str) -> bool:
  """Whether only processes of the same machine reach this host: 127.*, ::1 or a name of localhost."""
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost" or host.endswith(".localhost")


def _is_ipv6(text: str) -> bool:
  try:
    return ipaddress.ip_address(text).version == 6
  except ValueError:
    return False
