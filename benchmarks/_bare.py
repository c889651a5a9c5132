"""A relay of ``compare.py`` that does next to nothing: what Twisted, httptools and Python cost by themselves.

    python benchmarks/_bare.py PORT UPSTREAM

Heads are read by llhttp and passed on as they came; bodies too. There is no check of its own, no key, no limit, no log,
no deadline and no back pressure: it is nothing to put in front of anybody.
"""

import sys
from typing import Any

import httptools
from _running import HOST, allow_many_files
from twisted.internet import reactor
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP4ServerEndpoint, connectProtocol
from twisted.internet.protocol import Factory, Protocol


class Message(Protocol):
    """One side of the relay: finds out where each message ends."""

    parser: Any = None

    def connectionMade(self) -> None:
        self.parser = self.new_parser(self)
        self.transport.setTcpNoDelay(True)  # type: ignore[union-attr]

    def send(self, data: bytes) -> None:
        """Try the socket; what it does not take goes by Twisted's queue."""
        transport: Any = self.transport
        sent = 0
        if not transport.dataBuffer and not transport._tempDataBuffer:
            try:
                sent = transport.socket.send(data)
            except BlockingIOError:
                sent = 0
        if sent < len(data):
            transport.write(data[sent:])

    def on_header(self, name: bytes, value: bytes) -> None:
        """Anybody who does anything looks at each."""


class Client(Message):
    """A connection from a client."""

    new_parser = httptools.HttpRequestParser

    def __init__(self, pool: list["Upstream"]) -> None:
        self.pool = pool
        self.upstream: Upstream | None = None
        self.waiting = b""

    def dataReceived(self, data: bytes) -> None:
        self.parser.feed_data(data)
        if self.upstream is not None:
            self.upstream.send(data)
        elif self.waiting:
            self.waiting += data
        elif self.pool:
            self.upstream = self.pool.pop()
            self.upstream.client = self
            self.upstream.send(data)
        else:
            self.waiting = data
            place = TCP4ClientEndpoint(reactor, HOST, int(sys.argv[2]))
            connectProtocol(place, Upstream(self.pool)).addCallback(self.go_on)

    def go_on(self, upstream: "Upstream") -> None:
        self.upstream, upstream.client = upstream, self
        data, self.waiting = self.waiting, b""
        upstream.send(data)

    def connectionLost(self, reason: Any = None) -> None:
        if self.upstream is not None:
            self.upstream.client = None
            self.upstream.transport.abortConnection()  # type: ignore[union-attr]


class Upstream(Message):
    """A connection to the upstream; in the pool while it has nothing to do."""

    new_parser = httptools.HttpResponseParser

    def __init__(self, pool: list["Upstream"]) -> None:
        self.pool = pool
        self.client: Client | None = None
        self.whole = False

    def on_message_complete(self) -> None:
        self.whole = True

    def dataReceived(self, data: bytes) -> None:
        self.parser.feed_data(data)
        client = self.client
        if client is None:
            return
        if self.whole:
            self.whole = False
            client.upstream = self.client = None
            self.pool.append(self)
        client.send(data)

    def connectionLost(self, reason: Any = None) -> None:
        if self in self.pool:
            self.pool.remove(self)
        elif self.client is not None:
            self.client.transport.abortConnection()  # type: ignore[union-attr]


class Clients(Factory):
    noisy = False

    def __init__(self) -> None:
        self.pool: list[Upstream] = []

    def buildProtocol(self, addr: Any) -> Client:
        return Client(self.pool)


if __name__ == "__main__":
    allow_many_files()
    TCP4ServerEndpoint(reactor, int(sys.argv[1]), interface=HOST, backlog=4096).listen(Clients())
    reactor.run()
