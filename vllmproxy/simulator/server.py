"""The simulated server's own wire: HTTP/1.1 on httptools, one answer at a time, as uvicorn behaves.

It shares nothing with the proxy's wire, so that the tests of that wire have an independent peer.
"""

from collections import deque
from typing import Any

import httptools
from twisted.internet.interfaces import (
    IDelayedCall,
    IHalfCloseableProtocol,
    IProtocolNegotiationFactory,
    IPullProducer,
    IReactorTime,
)
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from vllmproxy.simulator.config import SimulatorConfig
from vllmproxy.simulator.exchange import Exchange, Tunnel
from vllmproxy.simulator.request import Request
from vllmproxy.simulator.routes import Site
from vllmproxy.simulator.stats import Stats

__all__ = ["SimulatorConfig", "SimulatorFactory", "SimulatorProtocol"]

_BAD_REQUEST = b"Invalid HTTP request received."


@implementer(IHalfCloseableProtocol)
class SimulatorProtocol(Protocol):
    """One connection to the simulated vLLM."""

    #: A TCP, UNIX or in-memory transport: one that takes producers and can abort.
    transport: Any

    def __init__(self, factory: "SimulatorFactory", number: int) -> None:
        self.clock = factory.clock
        self.stats = factory.stats
        self._owner = factory
        self._number = number
        self._requests = 0
        self._parser: Any = httptools.HttpRequestParser(self)
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._queue: deque[Exchange] = deque()
        self._idle: IDelayedCall | None = None
        self._tunnel: Tunnel | None = None
        self._early = bytearray()
        self._advancing = False
        self._ended = False

    # -- from the socket -------------------------------------------------------------------------------

    def connectionMade(self) -> None:
        self.stats.connections_open += 1
        self.stats.connections_total += 1
        self._owner.connections.add(self)

    def dataReceived(self, data: bytes) -> None:
        self.stats.bytes_received += len(data)
        self._stop_idle()
        if self._tunnel is not None:
            self._tunnel.feed(data)
        elif self._queue and self._queue[-1].request.upgrade:
            self._early += data
        elif not self._ended:
            self._parse(data)

    def readConnectionLost(self) -> None:
        """A half-close counts as leaving, as it does for uvicorn; what was written still goes out."""
        self._client_left()
        self.close()

    def writeConnectionLost(self) -> None:
        """Not used: this side never half-closes."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._client_left()
        self.stats.connections_open -= 1
        self._owner.connections.discard(self)

    def _client_left(self) -> None:
        self._stop_idle()
        if not self._ended:
            self._ended = True
            for exchange in self._queue:
                exchange.client_left()

    # -- httptools' callbacks --------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._target = b""
        self._headers = []

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._requests += 1
        request = Request(
            method=self._parser.get_method().decode("ascii"),
            target=self._target,
            version=self._parser.get_http_version(),
            headers=tuple(self._headers),
            keep_alive=self._parser.should_keep_alive(),
            connection=self._number,
            number=self._requests,
        )
        self._owner.site.prepare(request)
        self._queue.append(Exchange(request, self))
        if len(self._queue) == 1:
            self._advance()
        elif len(self._queue) == 2:
            # As uvicorn: with requests waiting, nothing more is read until they have been answered.
            self.transport.pauseProducing()

    def on_body(self, data: bytes) -> None:
        self._queue[-1].request.feed(data)

    def on_message_complete(self) -> None:
        self._queue[-1].request.complete = True

    # -- the order of things ---------------------------------------------------------------------------

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserCallbackError:
            raise
        except httptools.HttpParserError:
            self._bad_request()
            return
        self._advance()

    def _upgrade(self, rest: bytes) -> None:
        self._parser = httptools.HttpRequestParser(self)
        request = self._queue[-1].request
        if request.websocket:
            request.upgrade = True
            self._early += rest

    def _bad_request(self) -> None:
        fresh = not self._queue
        self._client_left()
        if fresh:
            Exchange(_unreadable(), self).whole(400, _BAD_REQUEST, [(b"content-type", b"text/plain; charset=utf-8")])
        self.close()

    def _advance(self) -> None:
        if self._advancing:
            return
        self._advancing = True
        try:
            while self._queue and not self._ended and self._tunnel is None and self._step():
                pass
        finally:
            self._advancing = False

    def _step(self) -> bool:
        """Take the first request as far as it goes now; return whether it is over and another may follow."""
        exchange = self._queue[0]
        if not exchange.begun:
            exchange.begun = True
            self._owner.site.begin(exchange)
        if exchange.plan is not None and exchange.request.complete:
            plan, exchange.plan = exchange.plan, None
            exchange.run(plan)
        if not (exchange.done and exchange.request.complete) or self._tunnel is not None or self._ended:
            return False
        self._queue.popleft()
        self._early.clear()
        if not exchange.keep_alive:
            self.close()
        elif not self._queue:
            self._start_idle()
        if len(self._queue) == 1:
            self.transport.resumeProducing()
        return True

    def _start_idle(self) -> None:
        self._idle = self.clock.callLater(self._owner.config.keep_alive, self._idle_over)

    def _idle_over(self) -> None:
        self._idle = None
        self.close()

    def _stop_idle(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    # -- for exchanges ---------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Write raw bytes."""
        self.transport.write(data)

    def close(self) -> None:
        """Write what is queued, then FIN."""
        self._ended = True
        self._stop_idle()
        # A registered producer would hold the close back for ever.
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    def reset(self, *, at_once: bool) -> None:
        """RST; unless ``at_once``, when the kernel has taken what has just been written."""
        self._ended = True
        self._stop_idle()
        self.transport.unregisterProducer()
        if at_once:
            self.transport.abortConnection()
        else:
            self.transport.registerProducer(_AbortWhenDrained(self.transport), False)

    def exchange_done(self) -> None:
        """The answer is complete: the next request may be answered."""
        self._advance()

    def tunnel(self, tunnel: Tunnel) -> None:
        """Hand every later byte to the tunnel, with backpressure: the connection itself is the producer."""
        self._tunnel = tunnel
        self.transport.registerProducer(self.transport, True)
        early = bytes(self._early)
        self._early.clear()
        if early:
            tunnel.feed(early)


@implementer(IPullProducer)
class _AbortWhenDrained:
    """Resets a connection when its transport asks for more, that is, when everything written is out.

    ``abortConnection`` alone would throw away what the transport still holds. A transport asks a new pull
    producer once when it is registered, and from then on only when it has nothing left to send.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._asked = False

    def resumeProducing(self) -> None:
        if self._asked:
            self._transport.unregisterProducer()
            self._transport.abortConnection()
        self._asked = True

    def stopProducing(self) -> None:
        """The connection is gone already."""


def _unreadable() -> Request:
    return Request(method="GET", target=b"*", version="1.0", headers=(), keep_alive=False, complete=True)


@implementer(IProtocolNegotiationFactory)
class SimulatorFactory(Factory):
    """A simulated vLLM: listen with it on any stream endpoint.

    :ivar stats: what it has counted, readable while it runs.
    """

    noisy = False

    def __init__(self, clock: IReactorTime, config: SimulatorConfig | None = None) -> None:
        self.clock = clock
        self.config = SimulatorConfig() if config is None else config
        self.stats = Stats()
        self.site = Site(self.config, self.stats)
        self.connections: set[SimulatorProtocol] = set()
        self._numbers = 0

    def acceptableProtocols(self) -> list[bytes]:
        """What ALPN may choose, over TLS: Twisted refuses every offer to a factory that does not say."""
        return [b"http/1.1"]

    def buildProtocol(self, addr: object) -> SimulatorProtocol:
        """Return the protocol of one new connection."""
        self._numbers += 1
        return SimulatorProtocol(self, self._numbers)

    def stopFactory(self) -> None:
        """The last port has closed: every connection ends, as when a server's process does."""
        for connection in list(self.connections):
            connection.transport.abortConnection()
