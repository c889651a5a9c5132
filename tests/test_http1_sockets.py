"""What is read of and written to real sockets below Twisted's transports."""

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytest_twisted
import trustme
from twisted.internet import reactor as installed_reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, TCP4ClientEndpoint, UNIXClientEndpoint, wrapClientTLS
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import Certificate, PrivateCertificate, optionsForClientTLS, trustRootFromCertificates
from twisted.internet.task import deferLater

from vllmproxy.http1.sockets import delivery, queued_bytes, raw_socket
from vllmproxy.plain import is_plain, write_now

reactor: Any = installed_reactor


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    yield ours, theirs
    ours.close()
    theirs.close()


def eventually(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)


def acknowledged(sock: socket.socket) -> int:
    known = delivery(sock)
    assert known is not None
    return known.acknowledged


def test_a_byte_that_the_peers_kernel_took_counts(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = pair
    before = delivery(ours)
    assert before is not None
    ours.sendall(b"x" * 1000)
    eventually(lambda: acknowledged(ours) == before.acknowledged + 1000)
    after = delivery(ours)
    assert after is not None
    assert after.segments > before.segments


def test_none_counts_when_the_peer_had_closed_before(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.sendall(b"first")
    assert theirs.recv(5) == b"first"
    eventually(lambda: acknowledged(ours) == 5 + 1)  # Linux counts the SYN
    before = delivery(ours)
    assert before is not None
    theirs.close()
    ours.sendall(b"second")
    eventually(lambda: _reset(ours))
    after = delivery(ours)
    assert after is not None
    assert after.acknowledged == before.acknowledged
    assert after.segments > before.segments


def _reset(sock: socket.socket) -> bool:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 7  # TCP_CLOSE


def test_a_fin_confirms_what_the_peer_read(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.sendall(b"first")
    theirs.recv(5)
    theirs.sendall(b"answer")
    ours.recv(6)
    before = acknowledged(ours)
    ours.sendall(b"second")
    assert theirs.recv(6) == b"second"
    theirs.close()
    assert ours.recv(1) == b""
    assert acknowledged(ours) == before + 6


def test_nothing_is_known_of_other_sockets() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert delivery(ours) is None
    assert delivery(None) is None
    closed = socket.socket()
    closed.close()
    assert delivery(closed) is None


class Sink(Protocol):
    """Takes what comes."""

    def __init__(self) -> None:
        self.received = b""
        self.lost: Deferred[None] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Any = None) -> None:
        self.lost.callback(None)


def factory(sink: Sink) -> Factory:
    made = Factory()
    made.noisy = False
    made.buildProtocol = lambda addr: sink  # type: ignore[method-assign,assignment]
    return made


async def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end
        await deferLater(reactor, 0.005, lambda: None)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest_twisted.ensureDeferred
async def test_what_is_written_arrives_once_and_in_order(kind: str, tmp_path: Any) -> None:
    server, client = Sink(), Sink()
    if kind == "tcp":
        port = reactor.listenTCP(0, factory(server), interface="127.0.0.1")
        await TCP4ClientEndpoint(reactor, "127.0.0.1", port.getHost().port).connect(factory(client))
    else:
        port = reactor.listenUNIX(str(tmp_path / "s"), factory(server))
        await UNIXClientEndpoint(reactor, str(tmp_path / "s")).connect(factory(client))
    await until(lambda: server.transport is not None)
    transport: Any = client.transport
    assert is_plain(transport)
    assert is_plain(server.transport)
    sock = raw_socket(transport)
    assert sock is not None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    server.transport.pauseProducing()  # type: ignore[union-attr]
    sent = b""
    for size in (1, 10, 3_000_000, 5, 700_000, 1):
        piece = os.urandom(size)
        write_now(transport, piece)
        sent += piece
    assert queued_bytes(transport) > 1_000_000
    server.transport.resumeProducing()  # type: ignore[union-attr]
    await until(lambda: len(server.received) >= len(sent))
    assert server.received == sent
    assert queued_bytes(transport) == 0
    write_now(transport, b"last")
    transport.loseConnection()
    await server.lost
    assert server.received == sent + b"last"
    write_now(transport, b"too late")
    await client.lost
    write_now(transport, b"too late")
    assert not is_plain(None)
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_write_to_a_reset_connection_is_told_in_the_reactors_own_way() -> None:
    server, client = Sink(), Sink()
    port = reactor.listenTCP(0, factory(server), interface="127.0.0.1")
    await TCP4ClientEndpoint(reactor, "127.0.0.1", port.getHost().port).connect(factory(client))
    await until(lambda: server.transport is not None)
    sock = raw_socket(server.transport)
    assert sock is not None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.transport.abortConnection()  # type: ignore[union-attr]
    ours = raw_socket(client.transport)
    assert ours is not None
    await server.lost
    for _ in range(5):
        write_now(client.transport, b"x") if client.transport.connected else None  # type: ignore[union-attr]
    await client.lost
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_tls_transport_is_never_plain_though_its_socket_shows() -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    pem = issued.private_key_pem.bytes() + issued.cert_chain_pems[0].bytes()
    certificate = PrivateCertificate.loadPEM(pem)
    server, client = Sink(), Sink()
    port = reactor.listenSSL(0, factory(server), certificate.options(), interface="127.0.0.1")
    trust = trustRootFromCertificates([Certificate.loadPEM(authority.cert_pem.bytes())])
    endpoint = HostnameEndpoint(reactor, "127.0.0.1", port.getHost().port)
    await wrapClientTLS(optionsForClientTLS("localhost", trust), endpoint).connect(factory(client))
    client.transport.write(b"hello")  # type: ignore[union-attr]
    await until(lambda: server.received == b"hello")
    for end in (client.transport, server.transport):
        assert not is_plain(end)
        sock = raw_socket(end)
        assert sock is not None
        assert delivery(sock) is not None
    client.transport.loseConnection()  # type: ignore[union-attr]
    await server.lost
    await client.lost
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_starttls_makes_a_plain_transport_plain_no_more() -> None:
    server, client = Sink(), Sink()
    port = reactor.listenTCP(0, factory(server), interface="127.0.0.1")
    await TCP4ClientEndpoint(reactor, "127.0.0.1", port.getHost().port).connect(factory(client))
    transport: Any = client.transport
    assert is_plain(transport)
    transport.startTLS(optionsForClientTLS("localhost"))
    assert not is_plain(transport)
    transport.abortConnection()
    await client.lost
    await server.lost
    await port.stopListening()
