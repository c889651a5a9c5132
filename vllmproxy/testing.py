"""Test doubles for whoever tests the proxy or extends it: connections in memory that behave as Twisted's TCP does, and
an observer that keeps what it is told."""

from collections.abc import Callable
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import (
    IConsumer,
    IHalfCloseableProtocol,
    IProtocol,
    IProtocolFactory,
    IPushProducer,
    IReactorTime,
    IStreamClientEndpoint,
    ITransport,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from vllmproxy.http1.message import WireError
from vllmproxy.observers.record import RequestRecord


@implementer(ITransport, IConsumer, IPushProducer)
class MemoryTransport:
    """One end of a TCP connection whose peer is the test.

    As with ``twisted.internet.tcp``, closing and aborting are told to the protocol on the next turn of ``clock``,
    the producer is paused from within :meth:`write`, and nothing is delivered while reading is paused.

    :ivar sent: what the peer has read.
    :ivar queued: what waits for the peer to read; see :meth:`stall`.
    :ivar reading: whether the protocol wants to be given bytes.
    :ivar ending: how our side ended it: ``""``, ``"lose"`` or ``"abort"``.
    """

    def __init__(self, clock: IReactorTime, peer: str = "192.0.2.1", high_water: int = 65_536) -> None:
        self._clock = clock
        self._peer = peer
        self._high_water = high_water
        self.protocol: Any = None
        self.sent = b""
        self.queued = b""
        self.stalled = False
        self.reading = True
        self.write_closed = False
        self.ending = ""
        self.lost = False
        self._producer: Any = None
        self._paused = False
        self._inbox: list[bytes] = []
        self._peer_closed = False

    def connect(self, protocol: IProtocol) -> None:
        """Make this ``protocol``'s transport."""
        self.protocol = protocol
        protocol.makeConnection(self)

    # the test's side

    def receive(self, data: bytes) -> None:
        """The peer sends ``data``."""
        self._inbox.append(data)
        self._deliver()

    def close_from_peer(self) -> None:
        """The peer sends FIN."""
        self._peer_closed = True
        self._deliver()

    def reset_from_peer(self) -> None:
        """The peer sends RST."""
        self._lose(Failure(ConnectionLost()))

    def stall(self) -> None:
        """The peer reads no more."""
        self.stalled = True

    def drain(self) -> None:
        """The peer reads everything, and goes on reading."""
        self.stalled = False
        self.sent, self.queued = self.sent + self.queued, b""
        if self.ending == "lose":
            self._clock.callLater(0, self._lose, Failure(ConnectionDone()))
        elif self._paused and self._producer is not None:
            self._paused = False
            self._producer.resumeProducing()

    def take(self) -> bytes:
        """Return what was sent since the last call."""
        sent, self.sent = self.sent, b""
        return sent

    def _deliver(self) -> None:
        while self._inbox and self._open():
            self.protocol.dataReceived(self._inbox.pop(0))
        if self._peer_closed and self._open():
            self.reading = False
            if IHalfCloseableProtocol.providedBy(self.protocol):
                self.protocol.readConnectionLost()
            else:
                self._lose(Failure(ConnectionDone()))

    def _open(self) -> bool:
        return self.reading and not self.ending and not self.lost

    def _lose(self, reason: Failure) -> None:
        if self.lost:
            return
        if self._producer is not None:
            self._producer.stopProducing()
        self.lost = True
        self.protocol.connectionLost(reason)

    # the protocol's side

    def write(self, data: bytes) -> None:
        if self.lost or self.write_closed:
            return
        if not self.stalled:
            self.sent += data
            return
        self.queued += data
        if len(self.queued) > self._high_water and self._producer is not None and not self._paused:
            self._paused = True
            self._producer.pauseProducing()

    def writeSequence(self, data: Any) -> None:
        self.write(b"".join(data))

    def loseConnection(self) -> None:
        if self.ending or self.lost:
            return
        self.ending = "lose"
        if not self.queued:
            self._clock.callLater(0, self._lose, Failure(ConnectionDone()))

    def loseWriteConnection(self) -> None:
        self.write_closed = True

    def abortConnection(self) -> None:
        if self.ending == "abort" or self.lost:
            return
        self.ending = "abort"
        self._clock.callLater(0, self._lose, Failure(ConnectionAborted()))

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        self._producer = producer

    def unregisterProducer(self) -> None:
        self._producer = None

    def pauseProducing(self) -> None:
        self.reading = False

    def resumeProducing(self) -> None:
        if self.ending or self.lost:
            return
        self.reading = True
        if self._inbox or self._peer_closed:
            self._clock.callLater(0, self._deliver)

    def stopProducing(self) -> None:
        self.loseConnection()

    def getPeer(self) -> IPv4Address:
        return IPv4Address("TCP", self._peer, 40_000)

    def getHost(self) -> IPv4Address:
        return IPv4Address("TCP", "192.0.2.254", 4000)


@implementer(IStreamClientEndpoint)
class MemoryEndpoint:
    """Makes a :class:`MemoryTransport` of each connection asked for.

    :ivar connections: all of them, oldest first.
    :ivar refuse: what the next attempts fail with, ``None`` to succeed.
    :ivar hold: attempts wait in ``attempts`` until the test fires them with :meth:`go`.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self.connections: list[MemoryTransport] = []
        self.refuse: Exception | None = None
        self.hold = False
        self.attempts: list[Deferred[IProtocol]] = []
        self.cancelled = 0
        self._waiting: list[Callable[[], None]] = []

    def connect(self, protocolFactory: IProtocolFactory) -> "Deferred[IProtocol]":
        if self.refuse is not None:
            return fail(self.refuse)
        if not self.hold:
            return succeed(self._make(protocolFactory))
        attempt: Deferred[IProtocol] = Deferred(self._cancelled)
        self.attempts.append(attempt)
        self._waiting.append(lambda: attempt.callback(self._make(protocolFactory)))
        return attempt

    def go(self) -> None:
        """Let the attempts that wait succeed."""
        waiting, self._waiting = self._waiting, []
        for make in waiting:
            make()

    def _cancelled(self, _: "Deferred[IProtocol]") -> None:
        self.cancelled += 1
        self._waiting.clear()

    def _make(self, factory: IProtocolFactory) -> IProtocol:
        protocol = factory.buildProtocol(IPv4Address("TCP", "192.0.2.2", 8000))
        assert protocol is not None
        transport = MemoryTransport(self._clock)
        self.connections.append(transport)
        transport.connect(protocol)
        return protocol


class RecordingReceiver:
    """A stream's or an answer's receiver that keeps what it is given.

    :ivar body: the bytes so far, a tunnel's included.
    :ivar events: the other calls in order, by the names of the methods.
    :ivar reasons: why it ended, where it ended badly.
    """

    def __init__(self) -> None:
        self.body = b""
        self.events: list[str] = []
        self.reasons: list[Failure] = []

    def body_received(self, data: bytes) -> None:
        self.body += data

    def body_complete(self) -> None:
        self.events.append("body_complete")

    def body_failed(self, error: WireError) -> None:
        self.events.append(f"body_failed {error.status}")

    def client_gone(self, reason: Failure) -> None:
        self.events.append("client_gone")
        self.reasons.append(reason)

    def tunnel_received(self, data: bytes) -> None:
        self.body += data

    def tunnel_half_closed(self) -> None:
        self.events.append("tunnel_half_closed")

    def answer_received(self, data: bytes, last: bool) -> None:
        self.body += data
        if last:
            self.answer_finished()

    def answer_finished(self) -> None:
        self.events.append("answer_finished")

    def answer_failed(self, reason: Failure) -> None:
        self.events.append("answer_failed")
        self.reasons.append(reason)


class MemoryObserver:
    """Keeps every record.

    :ivar records: the finished requests, oldest first.
    :ivar in_flight: how many requests are started and not finished.
    """

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []
        self.in_flight = 0

    def started(self) -> None:
        """Take note of one more request."""
        self.in_flight += 1

    def finished(self, record: RequestRecord) -> None:
        """Keep ``record``."""
        self.in_flight -= 1
        self.records.append(record)
