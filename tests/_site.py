"""A server channel on a real socket, in the test's own reactor; plain or with TLS."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from _memory import render
from _reactor import reactor, until
from twisted.internet.task import deferLater

from vllmproxy.http1.factory import ServerFactory
from vllmproxy.http1.hangup import HangupWatcher
from vllmproxy.http1.stream import Stream
from vllmproxy.testing import RecordingReceiver


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
    """A channel's server on loopback.

    :param certificate: listen with TLS.
    """

    def __init__(self, certificate: Any = None, **timeouts: Any) -> None:
        self.streams: list[Stream] = []
        self.watcher = HangupWatcher(reactor)
        self.factory = ServerFactory(reactor, self._handle, render, self.watcher, **timeouts)
        if certificate is None:
            self.port = reactor.listenTCP(0, self.factory, interface="127.0.0.1")
        else:
            self.port = reactor.listenSSL(0, self.factory, certificate, interface="127.0.0.1")

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
async def site(certificate: Any = None, **timeouts: Any) -> AsyncIterator[Site]:
    made = Site(certificate, **timeouts)
    yield made
    made.factory.close()
    await until(lambda: not made.factory.channels)
    made.watcher.close()
    await made.port.stopListening()
