"""The server channel on real sockets: slow readers, hang-ups behind unread bytes, half-closes."""

import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import pytest_twisted
from _memory import render
from twisted.internet import reactor as installed_reactor
from twisted.internet.task import deferLater

from vllmproxy.http1.factory import ServerFactory
from vllmproxy.http1.hangup import HangupWatcher
from vllmproxy.http1.server import HOLD
from vllmproxy.http1.stream import Stream
from vllmproxy.testing import RecordingReceiver

reactor: Any = installed_reactor
GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"


class Filler:
    """Writes an answer of ``size`` bytes as fast as the client reads."""

    def __init__(self, stream: Stream, size: int) -> None:
        self._stream, self._left, self._paused = stream, size, False
        stream.start_response(200, b"OK", b"", length=size)
        stream.set_producer(self)
        self._fill()

    def _fill(self) -> None:
        while self._left and not self._paused and not self._stream.over:
            piece = b"x" * min(self._left, 65_536)
            self._left -= len(piece)
            self._stream.write(piece, last=not self._left)

    def pauseProducing(self) -> None:
        self._paused = True

    def resumeProducing(self) -> None:
        self._paused = False
        self._fill()


class Site:
    """A channel's server on loopback."""

    def __init__(self, **timeouts: Any) -> None:
        self.streams: list[Stream] = []
        self.watcher = HangupWatcher(reactor)
        self.factory = ServerFactory(reactor, self._handle, render, self.watcher, **timeouts)
        self.port = reactor.listenTCP(0, self.factory, interface="127.0.0.1")

    def _handle(self, stream: Stream) -> None:
        stream.receiver = RecordingReceiver()
        self.streams.append(stream)

    def connect(self, receive_buffer: int = 0) -> socket.socket:
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", self.port.getHost().port))
        return sock

    async def ask(self, sock: socket.socket, data: bytes) -> Stream:
        """Send one request; return its stream."""
        count = len(self.streams)
        await until(lambda: _connected(sock))
        await send(sock, data)
        await until(lambda: len(self.streams) > count)
        return self.streams[-1]


def _connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


async def send(sock: socket.socket, data: bytes) -> None:
    """Send all of ``data`` while the reactor runs."""
    while data:
        with suppress(BlockingIOError):
            data = data[sock.send(data) :]
        await deferLater(reactor, 0.002, lambda: None)


@asynccontextmanager
async def site(**timeouts: Any) -> AsyncIterator[Site]:
    made = Site(**timeouts)
    yield made
    made.factory.close()
    await until(lambda: not made.factory.channels)
    made.watcher.close()
    await made.port.stopListening()


async def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end
        await deferLater(reactor, 0.005, lambda: None)


@pytest_twisted.ensureDeferred
async def test_a_slow_reader_is_no_stalled_one() -> None:
    """It takes bytes all the time, though the kernel's buffer is too full for us to add to it."""
    async with site(write_timeout=0.5) as server:
        sock = server.connect(receive_buffer=16_384)
        stream = await server.ask(sock, GET)
        Filler(stream, 50_000_000)
        assert server.factory.channels.copy().pop().congested
        end = time.monotonic() + 3
        while time.monotonic() < end:
            await deferLater(reactor, 0.02, lambda: None)
            assert sock.recv(4096)
        assert not stream.over
        sock.close()


@pytest_twisted.ensureDeferred
async def test_a_stalled_reader_is_let_go() -> None:
    async with site(write_timeout=0.2) as server:
        sock = server.connect(receive_buffer=16_384)
        stream = await server.ask(sock, GET)
        Filler(stream, 50_000_000)
        await until(lambda: stream.over)
        assert stream.receiver.events == ["client_gone"]  # type: ignore[union-attr]
        sock.close()


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("unread", [b"", GET, b"x" * 10])
@pytest_twisted.ensureDeferred
async def test_a_client_that_hangs_up_is_noticed_at_once(how: str, unread: bytes) -> None:
    async with site() as server:
        sock = server.connect()
        stream = await server.ask(sock, GET)
        if unread:
            sock.send(unread)
        await deferLater(reactor, 0.02, lambda: None)
        if how == "rst":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        gone = time.monotonic()
        await until(lambda: stream.over)
        assert time.monotonic() - gone < 1
        assert stream.receiver.events.count("client_gone") == 1  # type: ignore[union-attr]


@pytest_twisted.ensureDeferred
async def test_a_client_that_hangs_up_behind_an_upload_that_nobody_reads() -> None:
    async with site() as server:
        sock = server.connect()
        stream = await server.ask(sock, b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10000000\r\n\r\n")
        await send(sock, b"x" * 70_000)
        await until(lambda: stream.held_bytes >= HOLD)
        held = stream.held_bytes
        await send(sock, b"x" * 10_000)  # stays in the kernel's buffer, and the FIN behind it
        sock.close()
        await until(lambda: stream.over)
        assert stream.held_bytes == held
        assert stream.receiver.events == ["client_gone"]  # type: ignore[union-attr]


@pytest_twisted.ensureDeferred
async def test_a_refusal_survives_an_upload_that_goes_on() -> None:
    async with site() as server:
        sock = server.connect()
        stream = await server.ask(sock, b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n")
        stream.respond(401, b"Unauthorized", b"", b"no")
        for _ in range(10):
            await send(sock, b"x" * 100_000)
        received = b""
        while piece := sock.recv(65_536):
            received += piece
        assert received.startswith(b"HTTP/1.1 401 ")
        assert received.endswith(b"no")
        sock.close()


@pytest_twisted.ensureDeferred
async def test_a_tunnel_half_closes_on_plain_sockets() -> None:
    async with site() as server:
        sock = server.connect()
        stream = await server.ask(
            sock, b"GET / HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        stream.start_tunnel(b"S", b"")
        sock.shutdown(socket.SHUT_WR)
        receiver: Any = stream.receiver
        await until(lambda: receiver.events == ["tunnel_half_closed"])
        stream.pause_body()
        stream.write_raw(b"still here")
        stream.resume_body()
        stream.half_close()
        await until(lambda: "client_gone" in receiver.events)
        assert sock.recv(1000).endswith(b"\r\n\r\nstill here")
        assert sock.recv(1) == b""
        sock.close()
