"""How long an exchange may wait for what."""

from typing import TYPE_CHECKING

from attrs import frozen
from twisted.internet.interfaces import IReactorTime

from vllmproxy.http1.deadlines import Deadlines
from vllmproxy.keys.policy import Route
from vllmproxy.relay.admission import Admission
from vllmproxy.relay.states import Event

if TYPE_CHECKING:
    from vllmproxy.relay.exchange import Exchange


@frozen(kw_only=True)
class Timeouts:
    """In seconds; 0 switches a wait off.

    :ivar first_byte: from the end of the request to the head of its answer, and from there to the first byte of its
        body: vLLM sends the head of a stream before it begins with the prompt.
    :ivar first_byte_for: the same for certain routes; the longest that covers a path counts.
    :ivar between_bytes: from one piece of an answer's body to the next, while the client takes them.
    :ivar tunnel_idle: in which no byte passes in a WebSocket. Looked at once in that time, so up to twice that passes.
    :ivar line: in the line for a place.
    :ivar total: from the head of a request to the end of its answer; a WebSocket has none.
    """

    first_byte: float = 600.0
    first_byte_for: tuple[tuple[Route, float], ...] = ()
    between_bytes: float = 600.0
    tunnel_idle: float = 600.0
    line: float = 30.0
    total: float = 0.0


class Waits:
    """The waits of all exchanges. An exchange is in one of them at a time, and besides in ``total``."""

    def __init__(self, clock: IReactorTime, timeouts: Timeouts) -> None:
        def waits(seconds: float, event: Event = Event.LATE) -> "Deadlines[Exchange]":
            return Deadlines(clock, seconds, lambda exchange: exchange.feed(event))

        self._first_byte = waits(timeouts.first_byte)
        by_length = sorted(timeouts.first_byte_for, key=lambda each: len(each[0].text), reverse=True)
        self._first_byte_for = [(route, waits(seconds)) for route, seconds in by_length]
        self.between_bytes = waits(timeouts.between_bytes)
        self.tunnel_idle = waits(timeouts.tunnel_idle)
        self.line = waits(timeouts.line)
        self.total = waits(timeouts.total, Event.EXPIRED)

    def first_byte(self, admission: Admission) -> "Deadlines[Exchange]":
        """Return the wait for vLLM's answer to a request."""
        if not self._first_byte_for:
            return self._first_byte
        route = admission.route
        return next((waits for each, waits in self._first_byte_for if each.covers(route)), self._first_byte)

    def close(self) -> None:
        """End them all."""
        for waits in (self._first_byte, self.between_bytes, self.tunnel_idle, self.line, self.total):
            waits.close()
        for _, waits in self._first_byte_for:
            waits.close()
