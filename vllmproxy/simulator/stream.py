"""Sends a body over time: paced events, or many bytes, never faster than the client reads."""

from collections.abc import Iterable, Iterator
from typing import Any

from twisted.internet.interfaces import IDelayedCall, IPushProducer
from zope.interface import implementer

from vllmproxy.simulator.exchange import Exchange
from vllmproxy.simulator.shapes import Event

#: A wait in seconds, and what is sent after it.
Step = tuple[float, bytes]
COMMENT = b": keep-alive\n\n"


def paced(events: Iterable[Event], ttft: float, tpot: float) -> Iterator[Step]:
    """Yield each event with its wait: ``ttft`` for the first token, ``tpot`` for each later one."""
    wait = ttft
    for waits, data in events:
        yield (wait if waits else 0.0), data
        if waits:
            wait = tpot


def with_comments(steps: Iterable[Step], every: float) -> Iterator[Step]:
    """Yield the steps with a ``: keep-alive`` comment whenever ``every`` seconds pass in silence."""
    for wait, data in steps:
        left = wait
        while 0 < every < left:
            yield every, COMMENT
            left -= every
        yield left, data


@implementer(IPushProducer)
class Pump:
    """Writes steps to an exchange as they fall due, and finishes it after the last.

    While the transport is full nothing is taken from the steps, so memory stays flat behind a slow reader.
    """

    def __init__(self, exchange: Exchange, steps: Iterable[Step], *, count_events: bool = False) -> None:
        self._exchange = exchange
        self._steps = iter(steps)
        self._count_events = count_events
        self._next: bytes | None = None
        self._call: IDelayedCall | None = None
        self._paused = False
        self._stopped = False

    @property
    def _transport(self) -> Any:
        return self._exchange.channel.transport

    def start(self) -> None:
        """Begin, unless the exchange was cut with its head, which has been sent."""
        if self._exchange.stopped:
            return
        self._exchange.feed_from(self)
        self._transport.registerProducer(self, True)
        self._run()

    def _run(self) -> None:
        while not (self._paused or self._stopped):
            if self._next is None and not self._take():
                return
            data, self._next = self._next, None
            assert data is not None
            if self._count_events and not data.startswith(b":"):
                self._exchange.stats.events += 1
            self._exchange.write(data)

    def _take(self) -> bool:
        """Take the next step; return whether it can be sent now."""
        step = next(self._steps, None)
        if step is None:
            self._exchange.finish()
            return False
        wait, self._next = step
        if wait > 0:
            self._call = self._exchange.clock.callLater(wait, self._due)
        return wait <= 0

    def _due(self) -> None:
        self._call = None
        self._run()

    def stop(self) -> None:
        """Write nothing more and let go of the transport."""
        if self._stopped:
            return
        self._stopped = True
        if self._call is not None:
            self._call.cancel()
        self._transport.unregisterProducer()

    def pauseProducing(self) -> None:
        self._paused = True

    def resumeProducing(self) -> None:
        self._paused = False
        if self._call is None:
            self._run()

    def stopProducing(self) -> None:
        """The transport is gone; the protocol's ``connectionLost`` says so to the exchange."""
        self._paused = True
