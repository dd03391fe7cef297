"""How processes find each other: threads of this process on loopback, without JAX. What strangers and mistakes do there."""

import concurrent.futures
import contextlib
import queue
import socket
import threading
import time

import pytest
import trustme

from jaxfp8.distributed import addresses, meeting
from jaxfp8.distributed.environment import ProcessPlace
from jaxfp8.distributed.meeting import Meeting
from jaxfp8.distributed.tls import Tls
from jaxfp8.errors import InputError
from tests.distributed.test_processes import free_port
from tests.helpers.commands import wait_until


@pytest.fixture
def port(monkeypatch):
  monkeypatch.setattr(meeting, "_GREETING_SECONDS", 1.0)
  return free_port()


def make(port: int, process: int, count: int = 2, seconds: int = 30, **fields) -> Meeting:
  return Meeting(ProcessPlace(f"127.0.0.1:{port}", count, process, start_seconds=seconds, **fields))


def assemble(*meetings: Meeting) -> list[str]:
  """All of them at once: what each says, or the run that it is in."""

  def come(one: Meeting) -> str:
    try:
      one.assemble()
      return one.run_id
    except InputError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(len(meetings)) as pool:
    return list(pool.map(come, meetings))


def watched(one: Meeting) -> queue.Queue[str]:
  said: queue.Queue[str] = queue.Queue()
  one.watch(said.put)
  return said


@contextlib.contextmanager
def waiting(one: Meeting):
  """A meeting that waits for others in a thread of its own; gives the future of what it says in the end."""
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    future = pool.submit(lambda: assemble(one)[0])
    yield future


def connect(port: int) -> socket.socket:
  until = time.monotonic() + 5
  while True:
    try:
      return socket.create_connection(("127.0.0.1", port), timeout=5)
    except OSError:
      assert time.monotonic() < until
      time.sleep(0.01)


class TestAll:
  def test_all_come(self, port):
    """Later ones first; one run id for all; the address is the one that was reached."""
    meetings = [make(port, process, 3) for process in (2, 1, 0)]
    runs = assemble(*meetings)
    assert len(set(runs)) == 1 and len(runs[0]) == 16
    assert {str(one.address) for one in meetings} == {f"127.0.0.1:{port}"}
    assert str(meetings[-1].bind_address) == f"127.0.0.1:{port}", "not all addresses of the machine"

  def test_an_early_end_is_heard_by_all(self, port):
    meetings = [make(port, process, 3) for process in range(3)]
    assemble(*meetings)
    said = [watched(one) for one in meetings]
    meetings[1].announce("Stopped.\x1b[2J")
    assert said[0].get(timeout=5) == said[2].get(timeout=5) == "process 1: Stopped.\\x1b[2J"
    assert said[1].empty()

  @pytest.mark.parametrize("letter", ["世", "🌍", "\x00", "\ud800"])
  def test_a_long_sentence(self, port, letter):
    meetings = [make(port, process) for process in range(2)]
    assemble(*meetings)
    said = watched(meetings[1])
    meetings[0].announce(letter * 10_000)
    assert said.get(timeout=5).startswith("process 0: ")

  def test_a_killed_process_is_missed_at_once(self, port):
    meetings = [make(port, process, 3) for process in range(3)]
    assemble(*meetings)
    said = [watched(one) for one in meetings]
    meetings[2]._lines[0].close()
    assert "process 2 is gone" in said[0].get(timeout=5)
    assert "process 2 is gone" in said[1].get(timeout=5)

  def test_process_0_is_missed_too(self, port):
    meetings = [make(port, process, 2) for process in range(2)]
    assemble(*meetings)
    said = watched(meetings[1])
    meetings[0]._lines[1].close()
    assert "process 0 is gone" in said.get(timeout=5)

  def test_who_is_done_may_go(self, port):
    meetings = [make(port, process, 2) for process in range(2)]
    assemble(*meetings)
    said = watched(meetings[0])
    meetings[1].done()
    meetings[1]._lines[0].close()
    meetings[0].wait_for_the_others(5)
    time.sleep(0.1)
    assert said.empty()

  def test_the_others_wait_for_the_first(self, port):
    meetings = [make(port, process, 2) for process in range(2)]
    assemble(*meetings)
    meetings[0].done()
    assert meetings[1].wait_until_done() == ""

  @pytest.mark.parametrize("how", ["announce", "close"])
  def test_the_others_hear_that_the_first_fails(self, port, how):
    meetings = [make(port, process, 2) for process in range(2)]
    assemble(*meetings)
    if how == "announce":
      meetings[0].announce("convert: no space left.")
    else:
      meetings[0]._lines[1].close()
    expected = "process 0: convert: no space" if how == "announce" else "hosts: process 0 is gone"
    assert meetings[1].wait_until_done().startswith(expected)


class TestMistakes:
  def test_a_port_in_use(self, port):
    """By a listener, by another run that still waits, and by one whose address JAX has taken over."""
    with socket.create_server(("127.0.0.1", port)):
      assert "another run or program uses" in assemble(make(port, 0))[0]
    first, second = make(port, 0), make(port, 1)
    with waiting(first) as future:
      connect(port).close()
      assert "another run or program uses" in assemble(make(port, 0))[0]
      assert assemble(second)[0] == future.result()
    with jax_like(port):
      assert "another run or program uses" in assemble(make(port, 0))[0]
      late = assemble(make(port, 1, seconds=3))[0]
    assert "no process 0 waits" in late and "--process_id" in late

  def test_an_id_that_is_taken(self, port, capsys):
    """The second one ends, and the run goes on."""
    zero = make(port, 0, 3)
    with waiting(zero) as future, waiting(make(port, 1, 3)) as one:
      wait_until(lambda: 1 in zero._lines)
      assert "another process 1 has come before" in assemble(make(port, 1, 3))[0]
      assert assemble(make(port, 2, 3))[0] == one.result() == future.result()
    assert len(one.result()) == 16
    assert "a second process 1 came from 127.0.0.1 and was refused" in capsys.readouterr().err

  def test_unequal_counts(self, port):
    for sentence in assemble(make(port, 0, 2), make(port, 1, 3)):
      assert "the same --num_processes; process 0 has 2, process 1 has 3" in sentence

  def test_one_that_never_comes(self, port):
    zero, one = assemble(make(port, 0, 3, seconds=1), make(port, 1, 3, seconds=20))
    assert zero == one and "process 2 did not come within 1 s" in zero

  def test_no_process_0(self, port):
    started = time.monotonic()
    [sentence] = assemble(make(port, 1, 2, seconds=1))
    assert "process 0 cannot be reached" in sentence and "Connection refused" in sentence
    assert time.monotonic() - started < 5

  def test_process_0_ends_while_others_wait(self, port):
    with socket.create_server(("127.0.0.1", port)) as listening, waiting(make(port, 1)) as future:
      listening.accept()[0].close()
      assert "ended, or is another program" in future.result()

  def test_process_0_waits_aloud(self, port, monkeypatch, capsys):
    monkeypatch.setattr(meeting, "_QUIET_SECONDS", 0.2)
    assemble(make(port, 0, 4, seconds=1))
    assert f"hosts: waiting for processes 1, 2, 3 of 4 at 127.0.0.1:{port}." in capsys.readouterr().err

  def test_all_addresses_only_on_purpose(self, monkeypatch):
    with pytest.raises(InputError, match=r"0\.0\.0\.0:8476 names no machine"):
      Meeting(ProcessPlace("0.0.0.0:8476", 2, 0)).assemble()

  def test_another_machines_address(self):
    """TEST-NET-1 is nobody's address."""
    with pytest.raises(InputError, match="no address of this machine"):
      Meeting(ProcessPlace("192.0.2.1:8476", 2, 0)).assemble()

  def test_a_translated_address(self, port, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", f"0.0.0.0:{port}")
    zero = Meeting(ProcessPlace(f"192.0.2.1:{port}", 2, 0, start_seconds=30))
    assert len(set(assemble(zero, make(port, 1)))) == 1
    assert (str(zero.bind_address), str(zero.address)) == (f"0.0.0.0:{port}", f"127.0.0.1:{port}")


class TestStrangers:
  @pytest.mark.parametrize(
    "text",
    [b"", b"GET / HTTP/1.1\r\n\r\n", b"{" * 100_000, b"[1]\n", b'{"end": "x", "process": 1}\n', b'{"jaxfp8": 1}\n', b"\0" * 9,
     b'{"jaxfp8": 1, "process": "1", "of": 2}\n', b'{"jaxfp8": 1, "process": 0, "of": 2}\n',
     b'{"jaxfp8": 9, "process": 1, "of": 2}\n',
     b'{"jaxfp8": 1, "process": true, "of": 2}\n', b'{"jaxfp8": 1, "process":' + b"9" * 4200 + b', "of": 2}\n',
     b'{"jaxfp8": 1, "process": 99, "of": 2}\n', b'{"done": true}\n', b'{"jaxfp8": ' + b"9" * 5000 + b"}\n"],
  )  # fmt: skip
  def test_what_they_say_does_not_matter(self, port, text):
    """One that speaks another language, one that stays silent: the run goes on without them."""
    with waiting(make(port, 0)) as future:
      silent, stranger = connect(port), connect(port)
      with contextlib.suppress(OSError):
        stranger.sendall(text)
      assert assemble(make(port, 1))[0] == future.result() and len(future.result()) == 16
      silent.close()
      stranger.close()

  def test_too_many(self, port, monkeypatch):
    monkeypatch.setattr(meeting, "_MAX_GREETINGS", 4)
    with waiting(make(port, 0)) as future:
      strangers = [connect(port) for _ in range(20)]
      assert len(assemble(make(port, 1, seconds=20))[0]) == 16 or future.result()
      for stranger in strangers:
        stranger.close()


class TestAddresses:
  @pytest.mark.parametrize(
    "text",
    [":8476", "http://host:8476", "::1:8499", "host:٨٤٧٦", "host:8476 ", " host:8476", "ho st:1", "host", "host:", "host:0",
     "host:65536", "host:-1", "[::1]", "[::1:1", "[zz]:1", "hóst:1", "host:1:2", "-x:1", "[1.2.3.4]:1", "host:1\n"],
  )  # fmt: skip
  def test_malformed(self, text):
    with pytest.raises(InputError, match="--coordinator must be HOST:PORT"):
      ProcessPlace(text, 2, 0)

  @pytest.mark.parametrize("text", ["host:1", "10.0.0.1:65535", "[::1]:8476", "a-b.c_d.svc:8476", "[fd00::1]:1"])
  def test_good(self, text):
    assert str(addresses.Address.parse(text)) == text

  def test_an_unknown_host_ends_at_once(self, monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    started = time.monotonic()
    for process in (0, 1):
      with pytest.raises(InputError, match=r"'no-such-host\.invalid' of --coordinator is unknown here"):
        Meeting(ProcessPlace("no-such-host.invalid:8476", 2, process)).assemble()
    assert time.monotonic() - started < 20

  def test_a_pods_name_may_appear_later(self, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    answers = iter([socket.gaierror(-2, "Name or service not known"), [(socket.AF_INET, 1, 6, "", ("10.0.0.7", 8476))]])

    def getaddrinfo(*_, **__):
      if isinstance(answer := next(answers), Exception):
        raise answer
      return answer

    monkeypatch.setattr(addresses.socket, "getaddrinfo", getaddrinfo)
    found = addresses.resolve(addresses.Address("pod-0", 8476), time.monotonic() + 10)
    assert found == [(socket.AF_INET, addresses.Address("10.0.0.7", 8476))]

  def test_addresses_that_others_reach_come_first(self, monkeypatch):
    found = [(socket.AF_INET, 1, 6, "", (host, 1)) for host in ("127.0.1.1", "10.0.0.7")]
    monkeypatch.setattr(addresses.socket, "getaddrinfo", lambda *_, **__: found)
    assert [numeric.host for _, numeric in addresses.resolve(addresses.Address("me", 1))] == ["10.0.0.7", "127.0.1.1"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Files of two authorities: {"good" or "other": (certificate, key)} of process 0 and others, and the good authority."""
  folder = tmp_path_factory.mktemp("tls")
  authorities = {"good": trustme.CA(), "other": trustme.CA()}
  authorities["good"].cert_pem.write_to_path(str(folder / "ca"))
  for name, authority in authorities.items():
    made = authority.issue_cert("127.0.0.1")
    made.private_key_pem.write_to_path(str(folder / f"{name} key"))
    (folder / name).write_bytes(b"".join(part.bytes() for part in made.cert_chain_pems))
  return folder


class TestCertificates:
  def tls(self, files, name="good", **options) -> Tls:
    return Tls(str(files / name), str(files / f"{name} key"), str(files / "ca"), **options)

  def test_all_have_them(self, port, files):
    meetings = [make(port, process, 3, tls=self.tls(files)) for process in range(3)]
    assert len(set(assemble(*meetings))) == 1
    said = [watched(one) for one in meetings]
    meetings[2].announce("Stopped.")
    assert said[0].get(timeout=5) == said[1].get(timeout=5) == "process 2: Stopped."
    assert str(meetings[1].address) == f"127.0.0.1:{port}", "the host that certificates are compared with"

  def test_one_of_another_authority(self, port, files, capsys):
    zero, one = assemble(make(port, 0, seconds=2, tls=self.tls(files)), make(port, 1, tls=self.tls(files, "other")))
    assert "process 1 did not come" in zero and "no secure connection" in one
    assert "a connection from 127.0.0.1 was refused: the certificate is not accepted" in capsys.readouterr().err

  def test_process_0_of_another_authority(self, port, files):
    _, one = assemble(make(port, 0, seconds=2, tls=self.tls(files, "other")), make(port, 1, tls=self.tls(files)))
    assert "no secure connection" in one and "the certificate is not accepted" in one

  @pytest.mark.parametrize("who", [0, 1])
  def test_one_side_has_none(self, port, files, who):
    said = assemble(*(make(port, process, seconds=2, tls=self.tls(files) if process == who else None) for process in (0, 1)))
    assert all(sentence.startswith("hosts: ") for sentence in said), said

  def test_a_prefix_of_names(self, port, files):
    """These certificates hold no URI."""
    prefixed = self.tls(files, uri_prefix="spiffe://here/")
    _, one = assemble(make(port, 0, seconds=2, tls=self.tls(files)), make(port, 1, tls=prefixed))
    assert "no URI of the certificate starts with spiffe://here/" in one

  def test_files_that_cannot_be_used(self, files):
    with pytest.raises(InputError, match=r"--mtls_cert_file=.*absent is no file"):
      Tls(str(files / "absent"), str(files / "good key"), str(files / "ca"))
    with pytest.raises(InputError, match=r"the files of --mtls_\* cannot be used"):
      Tls(str(files / "good"), str(files / "other key"), str(files / "ca"))
    with pytest.raises(InputError, match="must end with /"):
      self.tls(files, uri_prefix="spiffe://here")


@contextlib.contextmanager
def jax_like(port: int):
  """A server that shares its port and speaks first, as gRPC does."""
  listening = socket.socket()
  listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
  listening.bind(("127.0.0.1", port))
  listening.listen()

  def serve():
    with contextlib.suppress(OSError):
      while True:
        connection, _ = listening.accept()
        connection.sendall(b"\0\0\x12\x04\0\0\0\0\0" + b"\0" * 18)

  threading.Thread(target=serve, daemon=True).start()
  yield
  listening.shutdown(socket.SHUT_RDWR)
  listening.close()
