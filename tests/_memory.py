"""A server channel, an agent and a whole exchange in memory, wired to :mod:`vllmproxy.testing`'s doubles."""

from collections.abc import Callable
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer
from zope.interface import implementer

from vllmproxy.http1.agent import UpstreamAgent
from vllmproxy.http1.answer import Answer, OutgoingHeaders
from vllmproxy.http1.factory import ServerFactory
from vllmproxy.http1.message import Limits, ResponseHead, WireError
from vllmproxy.http1.server import ServerChannel
from vllmproxy.http1.stream import Stream
from vllmproxy.http1.streaming import StreamingClient
from vllmproxy.keys.credentials import Credential
from vllmproxy.keys.gate import ANONYMOUS, Caller
from vllmproxy.keys.key import VirtualKey
from vllmproxy.keys.routes import Group
from vllmproxy.relay.headers import TrustedProxies
from vllmproxy.relay.quotas import Quotas
from vllmproxy.relay.relay import Relay
from vllmproxy.store.memory import MemoryStore
from vllmproxy.testing import MemoryEndpoint, MemoryObserver, MemoryTransport, RecordingReceiver
from vllmproxy.upstreams.server import Server
from vllmproxy.upstreams.upstream import Upstream as Address
from vllmproxy.usage.bookkeeper import Bookkeeper


class Hangups:
    """Stands for the HangupWatcher: transports in memory have no descriptor."""

    def watch(self, fd: int, hung_up: Callable[[], None]) -> None:
        raise AssertionError("a transport in memory has no descriptor")

    def forget(self, fd: int) -> None:
        raise AssertionError("a transport in memory has no descriptor")


def render(error: WireError, head: Any, peer: Any) -> bytes:
    """Answer a refused request with its status alone."""
    return b"HTTP/1.1 %d Refused\r\nconnection: close\r\ncontent-length: 0\r\n\r\n" % error.status


class Wire:
    """A server channel whose client is the test.

    :ivar streams: every request that was started, in order; each has a :class:`RecordingReceiver`.
    :param eager: read each body as soon as the request starts.
    :param answer: answer each request with 200 as soon as it is whole.
    """

    def __init__(self, *, eager: bool = True, answer: bool = False, limits: Limits = Limits(), **timeouts: Any) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.streams: list[Stream] = []
        self._eager = eager
        self._answer = answer
        hangups: Any = Hangups()
        self.factory = ServerFactory(self.clock, self._handle, render, hangups, limits=limits, **timeouts)
        self.connect()

    def connect(self) -> None:
        """Go on with a new connection."""
        self.channel: ServerChannel = self.factory.buildProtocol(None)
        self.transport = MemoryTransport(self.clock)
        self.transport.connect(self.channel)

    def _handle(self, stream: Stream) -> None:
        self.streams.append(stream)
        stream.receiver = AnsweringReceiver(stream) if self._answer else RefusingReceiver(stream)
        if self._eager:
            stream.read_body()

    def feed(self, data: bytes) -> None:
        """The client sends ``data``; what it makes happen later happens."""
        self.transport.receive(data)
        self.clock.advance(0)

    def feed_split(self, data: bytes, *cuts: int) -> None:
        """The client sends ``data`` in pieces."""
        ends = [*cuts, len(data)]
        for start, end in zip([0, *cuts], ends, strict=True):
            if end > start:
                self.feed(data[start:end])

    @property
    def refused(self) -> int:
        """The status of the wire's own refusal, 0 if there was none."""
        _, found, rest = self.transport.sent.rpartition(b"HTTP/1.1 ")
        return int(rest[:3]) if found and b" Refused" in rest else 0

    @property
    def seen(self) -> list[tuple[bytes, bytes, bytes, bool]]:
        """Method, target, body, whole: of every request that was started."""
        return [(s.head.method, s.head.target, self.receiver(i).body, s.complete) for i, s in enumerate(self.streams)]

    def receiver(self, index: int) -> RecordingReceiver:
        """The receiver of a started request."""
        receiver = self.streams[index].receiver
        assert isinstance(receiver, RecordingReceiver)
        return receiver


class RefusingReceiver(RecordingReceiver):
    """Answers a request whose body failed, as a receiver must."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream

    def body_failed(self, error: WireError) -> None:
        super().body_failed(error)
        self._stream.respond(error.status, b"Refused", b"", b"")


class AnsweringReceiver(RefusingReceiver):
    """Answers 200 as soon as the request is whole."""

    def body_complete(self) -> None:
        super().body_complete()
        self._stream.respond(200, b"OK", b"", b"ok")


ORIGIN = b"http://vllm:8000"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Informed:
    """An asker that makes a Deferred, as the agent's own does, and hands on informational answers."""

    def __init__(self, inform: Callable[[ResponseHead], None]) -> None:
        self.informed = inform
        self.answer: Deferred[Any] = Deferred(lambda _: self.request.cancel())
        self.request: Any = None

    def answered(self, answer: Answer) -> None:
        self.answer.callback(answer)

    def not_answered(self, reason: Failure) -> None:
        self.answer.errback(reason)


class Pending:
    """A request under way: its answer, body and end as they come."""

    def __init__(self, asked: "Deferred[Any]", pipe: bool = True) -> None:
        self.asked = asked
        self.answer: Answer | None = None
        self.failure: Failure | None = None
        self.receiver = RecordingReceiver()
        self._pipe = pipe
        asked.addCallbacks(self._answered, self._failed)

    def _answered(self, answer: Answer) -> None:
        self.answer = answer
        if self._pipe:
            answer.pipe(self.receiver)

    def _failed(self, failure: Failure) -> None:
        self.failure = failure

    @property
    def error(self) -> type[BaseException] | None:
        return self.failure.type if self.failure is not None else None

    @property
    def whole(self) -> bytes | None:
        """The body, if it is whole."""
        return self.receiver.body if self.receiver.events == ["answer_finished"] else None


class Upstream:
    """An agent whose upstream is the test."""

    def __init__(self, limits: Limits = Limits()) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.endpoint = MemoryEndpoint(self.clock)
        self.agent = UpstreamAgent(self.clock, self.endpoint, ORIGIN, limits=limits)

    def ask(
        self,
        method: bytes = b"GET",
        body: Any = None,
        *,
        upgrade: bool = False,
        inform: Any = None,
        pipe: bool = True,
    ) -> Pending:
        url, headers = ORIGIN + b"/v1/x?y", OutgoingHeaders(b"host: vllm\r\n", upgrade=upgrade)
        if inform is None:
            return Pending(self.agent.request(method, url, headers, body), pipe)
        asker = Informed(inform)
        asker.request = self.agent.ask(method, url, headers, body, asker)
        return Pending(asker.answer, pipe)

    @property
    def wires(self) -> list[MemoryTransport]:
        return self.endpoint.connections

    def settle(self) -> None:
        """Let what is due now happen, and no connection leak."""
        self.clock.advance(0)
        self.clock.advance(0)


def answered(upstream: Upstream, count: int) -> None:
    """Make ``count`` idle connections."""
    pending = [upstream.ask() for _ in range(count)]
    for wire in upstream.wires[-count:]:
        wire.receive(OK)
        wire.take()
    assert all(each.whole == b"ok" for each in pending)


@implementer(IBodyProducer)
class Body:
    """A body that the test writes."""

    def __init__(self, length: Any = UNKNOWN_LENGTH, replayable: bool = True) -> None:
        self.length = length
        self.replayable = replayable
        self.calls: list[str] = []
        self.done: Deferred[None] = Deferred()
        self.consumer: Any = None

    def startProducing(self, consumer: Any) -> "Deferred[None]":
        self.calls.append("start")
        self.consumer, self.done = consumer, Deferred()
        consumer.registerProducer(self, True)
        return self.done

    def pauseProducing(self) -> None:
        self.calls.append("pause")

    def resumeProducing(self) -> None:
        self.calls.append("resume")

    def stopProducing(self) -> None:
        self.calls.append("stop")

    def end(self) -> None:
        self.consumer.unregisterProducer()
        self.done.callback(None)


def caller_of(**fields: Any) -> Caller:
    """Return the caller with a virtual key that has these fields."""
    key = VirtualKey(**{"token": "ab" * 32, "key_name": "sk-...abcd", **fields})
    return Caller(key.token, key=key)


class Gatekeeper:
    """Lets in, refuses, or waits, as the test says."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.route_error: Exception | None = None
        self.caller = ANONYMOUS
        self.hold = False
        self.waiting: list[Deferred[Caller]] = []
        self.seen: list[Credential] = []

    def identify(self, credential: Credential) -> Caller | Deferred[Caller]:
        self.seen.append(credential)
        if self.hold:
            self.waiting.append(Deferred())
            return self.waiting[-1]
        if self.error is not None:
            raise self.error
        return self.caller

    def check_route(self, caller: Caller, group: Group, path: bytes, base: bytes) -> None:
        if self.route_error is not None:
            raise self.route_error


class House:
    """A proxy whose client, store and upstream are the test.

    :param shared: what the relay has besides.
    """

    def __init__(self, url: str = "http://gpu1:8000", authorization: bytes = b"", **shared: Any) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.endpoint = MemoryEndpoint(self.clock)
        self.observer = MemoryObserver()
        self.gate = Gatekeeper()
        upstream = Address.parse(url)
        self.agent = UpstreamAgent(self.clock, self.endpoint, upstream.origin)
        server = Server(upstream, self.agent, StreamingClient(self.agent), authorization)
        gate: Any = self.gate
        self.store = MemoryStore()
        Deferred.fromCoroutine(self.store.open())
        self.relay = Relay(
            self.clock,
            gate,
            server,
            self.observer,
            TrustedProxies(()),
            Quotas(self.store.limiter(self.clock), self.clock),
            Bookkeeper(self.store, self.clock, None),
            **shared,
        )
        self.relay.books.open()
        hangups: Any = Hangups()
        self.factory = ServerFactory(self.clock, self._handle, render, hangups)
        self.streams: list[Stream] = []
        self.client = self.connect()

    def _handle(self, stream: Stream) -> None:
        self.streams.append(stream)
        self.relay.handle(stream)

    def connect(self, peer: str = "192.0.2.1") -> MemoryTransport:
        transport = MemoryTransport(self.clock)
        transport.connect(self.factory.buildProtocol(IPv4Address("TCP", peer, 50_000)))
        return transport

    @property
    def wires(self) -> list[MemoryTransport]:
        """Connections to the upstream."""
        return self.endpoint.connections

    def turn(self) -> None:
        self.clock.advance(0)
        self.clock.advance(0)

    @property
    def record(self) -> Any:
        (record,) = self.observer.records
        return record
