"""The pool of upstream connections in memory: reuse, bodies, cancelling, and the one retry that is safe."""

from typing import Any

import pytest
from _memory import OK, ORIGIN, Body, Pending, Upstream, answered
from twisted.internet.defer import CancelledError
from twisted.internet.endpoints import HostnameEndpoint
from twisted.internet.error import ConnectionRefusedError as Refused
from twisted.internet.error import DNSLookupError
from twisted.internet.interfaces import IHostnameResolver
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import LogEvent, LogLevel, formatEvent, globalLogPublisher
from twisted.web.iweb import UNKNOWN_LENGTH
from zope.interface import implementer

from vllmproxy.http1 import client as client_module
from vllmproxy.http1.agent import ConnectFailed, UpstreamAgent
from vllmproxy.http1.answer import AnswerLost, NotExecuted, OutgoingHeaders
from vllmproxy.http1.sockets import Delivery


def test_connections_are_reused_newest_first_and_not_when_old() -> None:
    upstream = Upstream()
    answered(upstream, 2)
    first, second = upstream.wires
    upstream.ask()
    assert second.sent
    assert not first.sent
    second.receive(OK)
    upstream.clock.advance(2.4)
    second.take()
    upstream.ask()
    assert second.sent
    upstream.clock.advance(1)
    assert first.ending == "abort"
    assert not second.ending
    second.receive(OK)
    upstream.clock.advance(2.6)
    assert len(upstream.wires) == 2
    upstream.ask()  # too old, though its turn to expire has not come
    assert len(upstream.wires) == 3
    assert second.ending == "abort"


def test_idle_connections_expire_by_themselves() -> None:
    upstream = Upstream()
    answered(upstream, 3)
    upstream.clock.advance(3.5)
    upstream.settle()
    assert all(wire.lost for wire in upstream.wires)
    assert not upstream.clock.getDelayedCalls()


@pytest.mark.parametrize("how", ["fin", "rst", "bytes"])
def test_an_idle_connection_that_ended_is_not_taken_again(how: str) -> None:
    """Not even within the same turn of the reactor, when its loss is on the way."""
    upstream = Upstream()
    answered(upstream, 1)
    (wire,) = upstream.wires
    {"fin": wire.close_from_peer, "rst": wire.reset_from_peer, "bytes": lambda: wire.receive(OK)}[how]()
    pending = upstream.ask()
    assert len(upstream.wires) == 2
    upstream.wires[1].receive(OK)
    assert pending.whole == b"ok"


def test_a_connection_whose_answer_was_paused_is_read_again_when_it_is_free() -> None:
    upstream = Upstream()
    pending = upstream.ask()
    (wire,) = upstream.wires
    wire.receive(OK[:-1])
    assert pending.answer is not None
    pending.answer.connection.pause_answer()
    assert not wire.reading
    wire.protocol.dataReceived(OK[-1:])  # TLS hands on what it has decrypted, paused or not
    assert pending.whole == b"ok"
    pending.answer.connection.pause_answer()  # too late: it is no longer this answer's
    assert wire.reading
    upstream.ask()
    assert len(upstream.wires) == 1
    assert wire.reading


def test_closing_the_agent_leaves_nothing() -> None:
    upstream = Upstream()
    answered(upstream, 2)
    pending = upstream.ask()
    upstream.agent.close()
    upstream.settle()
    assert all(wire.lost for wire in upstream.wires)
    assert not upstream.clock.getDelayedCalls()
    assert pending.whole is None


# connecting


@pytest.mark.parametrize("error", [Refused(), DNSLookupError(), OSError(24, "Too many open files")])
def test_no_connection(error: Exception) -> None:
    upstream = Upstream()
    upstream.endpoint.refuse = error
    assert upstream.ask().error is ConnectFailed


def test_cancelling_while_connecting() -> None:
    upstream = Upstream()
    upstream.endpoint.hold = True
    pending = upstream.ask()
    pending.asked.cancel()
    assert pending.error is CancelledError
    assert upstream.endpoint.cancelled == 1


@implementer(IHostnameResolver)
class NoWord:
    """A name server that never answers."""

    def resolveHostName(self, receiver: Any, *args: Any, **more: Any) -> Any:
        receiver.resolutionBegan(None)
        return receiver


def test_a_cancelled_attempt_says_nothing_of_the_upstream() -> None:
    """Cancelled while it looks a name up, ``HostnameEndpoint`` fails with ``DNSLookupError``."""
    reactor: Any = MemoryReactorClock()
    reactor.installNameResolver(NoWord())
    agent = UpstreamAgent(reactor, HostnameEndpoint(reactor, "vllm.invalid", 8000), ORIGIN)
    said: list[LogEvent] = []
    globalLogPublisher.addObserver(said.append)
    try:
        pending = Pending(agent.request(b"GET", ORIGIN + b"/", OutgoingHeaders(b"host: vllm\r\n")))
        pending.asked.cancel()
    finally:
        globalLogPublisher.removeObserver(said.append)
    assert pending.error is CancelledError
    assert not said


def test_looking_a_name_up_is_part_of_an_attempt_and_has_its_time() -> None:
    reactor: Any = MemoryReactorClock()
    reactor.installNameResolver(NoWord())
    endpoint = HostnameEndpoint(reactor, "vllm.invalid", 8000, timeout=2)
    agent = UpstreamAgent(reactor, endpoint, ORIGIN, name="unix:/nowhere", connect_timeout=2)
    said: list[LogEvent] = []
    globalLogPublisher.addObserver(said.append)
    try:
        pending = Pending(agent.request(b"GET", ORIGIN + b"/", OutgoingHeaders(b"host: vllm\r\n")))
        reactor.advance(1.9)
        assert pending.error is None
        reactor.advance(0.2)
    finally:
        globalLogPublisher.removeObserver(said.append)
    assert pending.error is ConnectFailed
    (event,) = said
    assert formatEvent(event).startswith("unix:/nowhere cannot be reached")
    assert not reactor.getDelayedCalls()


def test_an_attempt_that_succeeds_waits_for_nothing_more() -> None:
    upstream = Upstream()
    upstream.endpoint.hold = True
    pending = upstream.ask()
    upstream.clock.advance(4.9)
    upstream.endpoint.go()
    upstream.clock.advance(1)
    upstream.wires[0].receive(OK)
    assert pending.whole == b"ok"


@pytest.mark.parametrize("error", [Refused(), DNSLookupError()])
def test_an_upstream_that_cannot_be_reached_is_told_of_once(error: Exception) -> None:
    upstream = Upstream()
    upstream.endpoint.refuse = error
    said: list[LogEvent] = []
    globalLogPublisher.addObserver(said.append)
    try:
        upstream.ask()
        upstream.ask()
        upstream.endpoint.refuse = None
        upstream.ask()
    finally:
        globalLogPublisher.removeObserver(said.append)
    assert [event["log_level"] for event in said] == [LogLevel.warn, LogLevel.info]


def test_cancelling_while_waiting_resets() -> None:
    upstream = Upstream()
    pending = upstream.ask()
    pending.asked.cancel()
    assert pending.error is CancelledError
    assert upstream.wires[0].ending == "abort"
    upstream.settle()
    upstream.ask()
    assert len(upstream.wires) == 2


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("part", [b"", b"HTTP/1.1 2", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_no_answer_on_a_new_connection_is_never_asked_again(clean: bool, part: bytes) -> None:
    upstream = Upstream()
    pending = upstream.ask(b"POST")
    if part:
        upstream.wires[0].receive(part)
    (upstream.wires[0].close_from_peer if clean else upstream.wires[0].reset_from_peer)()
    upstream.settle()
    assert pending.error is AnswerLost
    assert len(upstream.wires) == 1


# bodies


HEAD = b"POST /v1/x?y HTTP/1.1\r\nhost: vllm\r\n\r\n"


@pytest.mark.parametrize(("length", "wire"), [(5, b"hello"), (UNKNOWN_LENGTH, b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n")])
def test_framing_of_a_body(length: Any, wire: bytes) -> None:
    upstream, body = Upstream(), Body(length)
    pending = upstream.ask(b"POST", body)
    for piece in (b"he", b"", b"llo"):
        body.consumer.write(piece)
    body.end()
    assert upstream.wires[0].take() == HEAD + wire
    upstream.wires[0].receive(OK)
    assert pending.whole == b"ok"
    assert body.calls == ["start"]


def test_an_upstream_that_does_not_read_pauses_the_body() -> None:
    upstream, body = Upstream(), Body()
    upstream.ask(b"POST", body)
    upstream.wires[0].stall()
    body.consumer.write(b"x" * 100_000)
    assert body.calls == ["start", "pause"]
    upstream.wires[0].drain()
    assert body.calls == ["start", "pause", "resume"]


def test_an_early_answer_ends_the_body_and_the_connection() -> None:
    upstream, body = Upstream(), Body(10)
    pending = upstream.ask(b"POST", body)
    body.consumer.write(b"hello")
    upstream.wires[0].receive(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
    assert pending.whole == b"no"
    assert body.calls == ["start", "stop"]
    body.consumer.write(b"world")
    assert b"world" not in upstream.wires[0].take()
    upstream.ask()
    assert len(upstream.wires) == 2


def test_an_early_head_lets_the_body_go_on() -> None:
    upstream, body = Upstream(), Body(10)
    pending = upstream.ask(b"POST", body)
    body.consumer.write(b"hello")
    upstream.wires[0].receive(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n")
    body.consumer.write(b"world")
    body.end()
    upstream.wires[0].receive(b"0\r\n\r\n")
    assert pending.whole == b"ok"
    upstream.ask()
    assert len(upstream.wires) == 1


@pytest.mark.parametrize("how", ["fin", "rst", "cancel"])
def test_the_end_of_the_connection_stops_the_body_once(how: str) -> None:
    upstream, body = Upstream(), Body()
    pending = upstream.ask(b"POST", body)
    wire = upstream.wires[0]
    {"fin": wire.close_from_peer, "rst": wire.reset_from_peer, "cancel": pending.asked.cancel}[how]()
    upstream.settle()
    assert body.calls == ["start", "stop"]
    assert pending.error in (AnswerLost, CancelledError)
    assert pending.answer is None
    body.consumer.write(b"late")
    assert pending.receiver.events == []


# the one retry


class Kernel:
    """Stands for TCP_INFO: what the kernel knows of the connection, in the order that it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *known: Delivery | None) -> None:
        self._known = list(known)
        monkeypatch.setattr(client_module, "delivery", self._delivery)

    def _delivery(self, sock: Any) -> Delivery | None:
        return self._known.pop(0) if len(self._known) > 1 else self._known[0]


NEW = Delivery(acknowledged=1, sent=0)
BEFORE = Delivery(acknowledged=100, sent=99)
#: The peer's kernel answered what was sent with a reset.
REFUSED = Delivery(acknowledged=100, sent=104, closed=True)
#: How it ended, what the kernel knows then and from then on, and whether that proves that nothing of it was seen.
ENDS = {
    "fin, nothing left yet": ("fin", Delivery(100, 99), False),  # the kernel may send it while the peer reads on
    "fin, nothing left, and refused": ("fin", Delivery(100, 99, closed=True), True),
    "fin, then our bytes were refused": ("fin", Delivery(100, 104, closed=True), True),
    "fin, and never a word on our bytes": ("fin", Delivery(100, 104), False),
    "fin, some confirmed": ("fin", Delivery(101, 104), False),
    "fin, some confirmed, then refused": ("fin", Delivery(101, 104, closed=True), False),
    "fin, unknown": ("fin", None, False),
    "rst, nothing left": ("rst", Delivery(100, 99, closed=True), True),
    "rst, nothing confirmed": ("rst", Delivery(100, 104, closed=True), False),
    "rst, some confirmed": ("rst", Delivery(101, 104, closed=True), False),
    "lost, though the kernel goes on": ("rst", Delivery(100, 99), False),  # a FIN under TLS
    "rst, unknown": ("rst", None, False),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("replayable", [True, False])
def test_only_what_was_provably_not_seen_is_asked_again(
    name: str, replayable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    how, after, safe = ENDS[name]
    upstream, body = Upstream(), Body(5, replayable)
    Kernel(monkeypatch, NEW, BEFORE, after)
    answered(upstream, 1)
    pending = upstream.ask(b"POST", body)
    body.consumer.write(b"hello")
    (upstream.wires[0].close_from_peer if how == "fin" else upstream.wires[0].reset_from_peer)()
    upstream.clock.pump([0.01] * 400)
    again = safe and replayable
    assert len(upstream.wires) == (2 if again else 1)
    if not again:
        assert pending.error is (NotExecuted if safe else AnswerLost)
        assert body.calls == ["start", "stop"]
        assert not upstream.clock.getDelayedCalls()
        return
    assert body.calls == ["start", "stop", "start"]
    body.consumer.write(b"hello")
    body.end()
    assert upstream.wires[1].take() == HEAD + b"hello"
    upstream.wires[1].receive(OK)
    assert pending.whole == b"ok"


def test_a_kernel_that_counts_nothing_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = Upstream()
    Kernel(monkeypatch, NEW)
    answered(upstream, 1)
    pending = upstream.ask(b"POST")
    upstream.wires[0].close_from_peer()
    upstream.settle()
    assert pending.error is AnswerLost
    assert len(upstream.wires) == 1


@pytest.mark.parametrize(("word", "again"), [(Delivery(100, 104, closed=True), True), (Delivery(105, 104), False)])
def test_the_peers_word_on_what_was_sent_after_its_fin_is_awaited(
    word: Delivery, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = Upstream()
    Kernel(monkeypatch, NEW, BEFORE, Delivery(100, 104), Delivery(100, 104), word)
    answered(upstream, 1)
    pending = upstream.ask(b"POST")
    upstream.wires[0].close_from_peer()
    assert pending.error is None
    for _ in range(3):
        upstream.clock.advance(0.01)
    assert len(upstream.wires) == (2 if again else 1)
    assert pending.error is (None if again else AnswerLost)


def test_cancelling_while_the_peers_word_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = Upstream()
    Kernel(monkeypatch, NEW, BEFORE, Delivery(100, 104))
    answered(upstream, 1)
    pending = upstream.ask(b"POST")
    upstream.wires[0].close_from_peer()
    pending.asked.cancel()
    assert pending.error is CancelledError
    upstream.settle()
    assert upstream.wires[0].lost
    upstream.clock.advance(4)
    assert not upstream.clock.getDelayedCalls()


def test_it_is_asked_again_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = Upstream()
    Kernel(monkeypatch, NEW, NEW, NEW, REFUSED)
    answered(upstream, 3)
    pending = upstream.ask(b"POST")
    upstream.wires[2].close_from_peer()
    assert len(upstream.wires) == 4  # a new one, though idle ones are there: they may be as dead
    upstream.wires[3].close_from_peer()
    upstream.settle()
    assert pending.error is AnswerLost
    assert len(upstream.wires) == 4


@pytest.mark.parametrize("part", [b"H", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n"])
def test_an_answer_that_began_is_never_asked_for_again(part: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = Upstream()
    Kernel(monkeypatch, NEW, REFUSED)  # even if the kernel says so
    answered(upstream, 1)
    pending = upstream.ask(b"POST")
    upstream.wires[0].receive(part)
    upstream.wires[0].close_from_peer()
    assert pending.error is AnswerLost
    assert len(upstream.wires) == 1


def test_cancelling_a_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = Upstream()
    Kernel(monkeypatch, NEW, REFUSED)
    answered(upstream, 1)
    pending = upstream.ask(b"POST")
    upstream.endpoint.hold = True
    upstream.wires[0].close_from_peer()
    pending.asked.cancel()
    assert pending.error is CancelledError
    assert upstream.endpoint.cancelled == 1


def test_a_retry_that_cannot_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = Upstream()
    Kernel(monkeypatch, NEW, REFUSED)
    answered(upstream, 1)
    pending = upstream.ask(b"POST")
    upstream.endpoint.refuse = Refused()
    upstream.wires[0].close_from_peer()
    assert pending.error is ConnectFailed
