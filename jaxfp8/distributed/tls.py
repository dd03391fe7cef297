"""Certificates with which the processes of a run prove to each other who they are (mutual TLS), as JAX takes them."""

import dataclasses
import os
import ssl

from jaxfp8.errors import InputError


@dataclasses.dataclass(frozen=True)
class Tls:
  """Files in PEM form: this process's certificate, its key, and the authority that all certificates come from.

  uri_prefix: what a URI among the names of the other side's certificate must start with, ending in "/"; without it, process 0's
  certificate must hold the host of --coordinator. Raises InputError for files that cannot be used together.
  """

  cert_file: str
  key_file: str
  ca_file: str
  uri_prefix: str | None = None

  def __post_init__(self):
    if self.uri_prefix is not None and not self.uri_prefix.endswith("/"):
      raise InputError(f"hosts: --mtls_peer_uri_prefix must end with /; got {self.uri_prefix!r}.")
    for flag, path in (("cert", self.cert_file), ("key", self.key_file), ("ca", self.ca_file)):
      if not os.path.isfile(path):
        raise InputError(f"hosts: --mtls_{flag}_file={path} is no file. Pass a certificate in PEM form.")
    self._context(ssl.PROTOCOL_TLS_SERVER)

  def accept(self, sock):
    """The server's side of a connection. Raises OSError where the client has no certificate of the authority."""
    return self._checked(self._context(ssl.PROTOCOL_TLS_SERVER).wrap_socket(sock, server_side=True))

  def connect(self, sock, host: str):
    """The client's side of a connection to `host`. Raises OSError."""
    return self._checked(self._context(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(sock, server_hostname=host))

  @staticmethod
  def explain(error: OSError) -> str:
    """Why certificates were not accepted; empty for another failure of a connection."""
    if isinstance(error, ssl.SSLCertVerificationError):
      return f"the certificate is not accepted ({getattr(error, 'verify_message', error)})"
    if isinstance(error, ssl.SSLError):
      return f"the other side speaks no TLS, or does not accept this certificate ({error.reason or error})"
    return ""

  def _context(self, protocol) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    try:
      context.load_cert_chain(self.cert_file, self.key_file)
      context.load_verify_locations(self.ca_file)
    except (OSError, ValueError) as error:
      reason = getattr(error, "strerror", None) or str(error)
      raise InputError(
        f"hosts: the files of --mtls_* cannot be used: {reason}. Pass a PEM certificate, its key and its CA."
      ) from error
    context.check_hostname = protocol == ssl.PROTOCOL_TLS_CLIENT and self.uri_prefix is None
    context.verify_mode = ssl.CERT_REQUIRED
    return context

  def _checked(self, sock: ssl.SSLSocket) -> ssl.SSLSocket:
    names = (sock.getpeercert() or {}).get("subjectAltName", ())
    if self.uri_prefix and not any(kind == "URI" and str(name).startswith(self.uri_prefix) for kind, name in names):
      sock.close()
      raise ssl.SSLCertVerificationError(f"no URI of the certificate starts with {self.uri_prefix}")
    return sock
