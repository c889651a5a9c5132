"""Writing straight to real sockets below Twisted's transports, and what is kept for the end of a turn."""

import os
import socket
import struct
from contextlib import suppress
from typing import Any

import pytest
import pytest_twisted
import trustme
from _plain import Transport
from _reactor import reactor, until
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, TCP4ClientEndpoint, UNIXClientEndpoint, wrapClientTLS
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import Certificate, PrivateCertificate, optionsForClientTLS, trustRootFromCertificates
from twisted.logger import LogEvent

from vllmproxy.http1.sockets import delivery, queued_bytes, raw_socket
from vllmproxy.plain import is_plain, write_now
from vllmproxy.turn import _LONG, _MOST, Turn

#: What a poll told of: two descriptors that can be read.
TOLD = {1: 1, 2: 1}


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


def test_outside_of_a_turn_all_is_written_at_once() -> None:
    turn, one = Turn(), Transport()
    turn.write(one, b"a")
    assert one.writes == [b"a"]
    turn.begin(dict(TOLD))
    turn.end()
    turn.write(one, b"b")
    assert one.writes == [b"a", b"b"]


def test_in_a_turn_it_is_written_at_its_end_and_together() -> None:
    turn, one, other = Turn(), Transport(), Transport()
    turn.begin(dict(TOLD))
    turn.write(one, b"a")
    turn.write(other, b"x")
    turn.write(one, memoryview(b"b"))
    assert (one.writes, other.writes) == ([], [])
    turn.end()
    assert (one.writes, other.writes) == ([b"ab"], [b"x"])
    turn.end()
    assert (one.writes, other.writes) == ([b"ab"], [b"x"])


def test_what_is_to_be_done_before_anything_leaves_is_done_once_for_all_of_it() -> None:
    turn, one = Turn(), Transport()
    seen: list[list[bytes]] = []
    turn.before_writing(lambda: seen.append(list(one.writes)))
    assert seen == [[]]
    turn.begin(dict(TOLD))
    turn.write(one, b"a")
    turn.before_writing(lambda: seen.append(list(one.writes)))
    turn.write(one, b"b")
    assert len(seen) == 1
    turn.end()
    assert (seen[1:], one.writes) == ([[]], [b"ab"])
    turn.begin(dict(TOLD))
    turn.before_writing(lambda: seen.append(list(one.writes)))
    turn.write(one, b"c" * _LONG)
    assert seen[2:] == [[b"ab"]]
    turn.before_writing(lambda: seen.append(list(one.writes)))
    turn.end()
    assert len(seen) == 4


def test_what_a_write_brings_about_is_prepared_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    turn, one, other = Turn(), Transport(), Transport()
    seen: list[list[bytes]] = []
    turn.begin(dict(TOLD))
    for _ in range(_MOST - 2):
        turn.write(Transport(), b"x")
    one.sends = lambda: turn.before_writing(lambda: seen.append(list(other.writes)))
    turn.write(one, b"a")
    turn.write(other, b"b")
    assert (seen, other.writes) == ([[]], [b"b"])
    turn.end()


def test_what_fails_before_a_write_keeps_none_from_leaving(logged_errors: list[LogEvent]) -> None:
    turn, one = Turn(), Transport()
    turn.begin(dict(TOLD))
    turn.write(one, b"a")
    turn.before_writing(lambda: 1 // 0)
    turn.end()
    assert one.writes == [b"a"]
    assert len(logged_errors) == 1
    logged_errors.clear()


def test_a_long_piece_is_written_at_once_behind_what_was_kept() -> None:
    turn, one, other = Turn(), Transport(), Transport()
    turn.begin(dict(TOLD))
    turn.write(other, b"x")
    turn.write(one, b"a")
    turn.write(one, b"b")
    turn.write(one, b"c" * _LONG)
    assert (one.writes, other.writes) == ([b"ab", b"c" * _LONG], [])
    turn.write(one, b"d")
    turn.end()
    assert (one.writes[2:], other.writes) == ([b"d"], [b"x"])


def test_no_more_than_some_wait_for_each_other() -> None:
    turn, many = Turn(), [Transport() for _ in range(_MOST + 1)]
    turn.begin(dict(TOLD))
    for number, each in enumerate(many):
        assert all(before.writes == [] for before in many[: min(number, _MOST)]) is (number < _MOST)
        turn.write(each, b"a")
    assert [each.writes for each in many] == [[b"a"]] * _MOST + [[]]
    turn.end()
    assert many[-1].writes == [b"a"]


def test_what_a_write_brings_about_keeps_the_order_of_each_connection() -> None:
    turn, one, other = Turn(), Transport(), Transport()
    one.sends = lambda: turn.write(other, b"y")
    turn.begin(dict(TOLD))
    turn.write(one, b"a")
    turn.write(other, b"x")
    turn.end()
    assert (one.writes, other.writes) == ([b"a"], [b"x", b"y"])


@pytest.mark.parametrize("end", ["loseConnection", "loseWriteConnection"])
@pytest_twisted.ensureDeferred
async def test_what_is_kept_leaves_before_the_connections_end(end: str) -> None:
    server, client = Sink(), Sink()
    port = reactor.listenTCP(0, factory(server), interface="127.0.0.1")
    await TCP4ClientEndpoint(reactor, "127.0.0.1", port.getHost().port).connect(factory(client))
    await until(lambda: server.transport is not None)
    turn = Turn()
    turn.begin(dict(TOLD))
    turn.write(client.transport, b"the last ")
    getattr(client.transport, end)()
    turn.write(client.transport, b"word")
    turn.end()
    await server.lost
    assert server.received == b"the last word"
    await client.lost
    await port.stopListening()


@pytest.mark.parametrize("end", ["loseConnection", "loseWriteConnection"])
@pytest_twisted.ensureDeferred
async def test_what_is_written_behind_a_queue_leaves_before_the_end_that_waits_for_the_queue(end: str) -> None:
    server, client = Sink(), Sink()
    port = reactor.listenTCP(0, factory(server), interface="127.0.0.1")
    await TCP4ClientEndpoint(reactor, "127.0.0.1", port.getHost().port).connect(factory(client))
    await until(lambda: server.transport is not None)
    server.transport.pauseProducing()  # type: ignore[union-attr]
    transport: Any = client.transport
    with suppress(BlockingIOError):
        while True:
            transport.socket.send(bytes(65_536))
    transport.write(b"what is queued, ")
    turn = Turn()
    turn.begin(dict(TOLD))
    turn.write(transport, b"the end")
    getattr(transport, end)()
    server.transport.resumeProducing()  # type: ignore[union-attr]
    await server.lost
    turn.end()
    assert server.received.lstrip(b"\0") == b"what is queued, the end"
    await client.lost
    await port.stopListening()


@pytest.mark.parametrize("is_gone", [False, True])
@pytest_twisted.ensureDeferred
async def test_what_is_kept_of_a_connection_that_is_aborted_is_dropped(is_gone: bool) -> None:
    server, client = Sink(), Sink()
    port = reactor.listenTCP(0, factory(server), interface="127.0.0.1")
    await TCP4ClientEndpoint(reactor, "127.0.0.1", port.getHost().port).connect(factory(client))
    await until(lambda: server.transport is not None)
    turn, other = Turn(), Transport()
    turn.begin(dict(TOLD))
    turn.write(client.transport, b"nothing")
    turn.write(other, b"x")
    client.transport.abortConnection()  # type: ignore[union-attr]
    if is_gone:
        await client.lost
    turn.end()
    assert other.writes == [b"x"]
    await server.lost
    assert server.received == b""
    await port.stopListening()
