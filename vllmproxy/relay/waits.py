"""How long an exchange may wait for what."""

from typing import TYPE_CHECKING

from attrs import define, frozen
from twisted.internet.interfaces import IReactorTime

from vllmproxy.deadlines import Deadlines
from vllmproxy.keys.policy import Route
from vllmproxy.relay.states import Event

if TYPE_CHECKING:
    from vllmproxy.relay.exchange import Exchange

#: How often a silence is looked at before it counts as one.
LOOKS = 4


@frozen(kw_only=True)
class Timeouts:
    """In seconds; 0 switches a wait off.

    :ivar first_byte: from the end of the request to the head of its answer, and from there to the first byte of its
        body: vLLM sends the head of a stream before it begins with the prompt.
    :ivar first_byte_for: the same for certain routes; the longest that covers a path counts.
    :ivar between_bytes: in which no byte of an answer's body passes, though the client would take it.
    :ivar tunnel_idle: in which no byte passes in a WebSocket. As above, it may take half as long again to be seen.
    :ivar line: in the line for a place.
    :ivar total: from the head of a request to the end of its answer; a WebSocket has none.
    """

    first_byte: float = 600.0
    first_byte_for: tuple[tuple[Route, float], ...] = ()
    between_bytes: float = 600.0
    tunnel_idle: float = 600.0
    line: float = 30.0
    total: float = 0.0


@define
class Silence:
    """Tells a silence by looking now and then how much has passed, which costs nothing when something passes.

    :param looks: how many in a row, with nothing in between, make it one.
    """

    _looks: int
    _passed: int = 0
    _in_a_row: int = 0

    def lasts(self, passed: int) -> bool:
        """Look once more. ``passed``: bytes so far."""
        self._in_a_row = self._in_a_row + 1 if passed == self._passed else 0
        self._passed = passed
        return self._in_a_row >= self._looks


class Waits:
    """The waits of all exchanges.

    :ivar first_byte: for vLLM's answer; ``is_by_route``: on some routes it is another.
    :ivar has_total: there is a wait for all of an exchange.
    """

    def __init__(self, clock: IReactorTime, timeouts: Timeouts) -> None:
        def waits(event: Event = Event.LATE) -> "Deadlines[Exchange]":
            return Deadlines(clock, 0, lambda exchange: exchange.feed(event))

        self._new = waits
        self.first_byte = waits()
        self._first_byte_for: dict[Route, Deadlines[Exchange]] = {}
        self.between_bytes = waits()
        self.tunnel_idle = waits()
        self.line = waits()
        self.total = waits(Event.EXPIRED)
        self.change(timeouts)

    def change(self, timeouts: Timeouts) -> None:
        """Have every wait last as long as ``timeouts`` say, those under way too, but for what is no longer named of
        ``first_byte_for``."""
        self.first_byte.change(timeouts.first_byte)
        by_length = sorted(timeouts.first_byte_for, key=lambda each: len(each[0].text), reverse=True)
        former, self._first_byte_for = self._first_byte_for, {}
        for route, seconds in by_length:
            waits = self._first_byte_for[route] = former.get(route) or self._new()
            waits.change(seconds)
        self.between_bytes.change(timeouts.between_bytes / LOOKS)
        self.tunnel_idle.change(timeouts.tunnel_idle / LOOKS)
        self.line.change(timeouts.line)
        self.total.change(timeouts.total)
        self.has_total = timeouts.total > 0
        self.is_by_route = bool(by_length)

    def first_byte_of(self, route: str) -> "Deadlines[Exchange]":
        """Return the wait for vLLM's answer to a request on ``route``."""
        return next((waits for each, waits in self._first_byte_for.items() if each.covers(route)), self.first_byte)

    def close(self) -> None:
        """End them all."""
        for waits in (self.first_byte, self.between_bytes, self.tunnel_idle, self.line, self.total):
            waits.close()
        for waits in self._first_byte_for.values():
            waits.close()


class Patience:
    """One exchange's: it is in one wait at a time, and in ``total`` besides."""

    __slots__ = ("_exchange", "_silence", "_wait", "_waits")

    def __init__(self, exchange: "Exchange", waits: Waits) -> None:
        self._exchange: Exchange | None = exchange
        self._waits = waits
        self._wait: Deadlines[Exchange] | None = None
        self._silence: Silence | None = None
        if waits.has_total:
            waits.total.set(exchange)

    def _begin(self, wait: "Deadlines[Exchange] | None") -> None:
        exchange = self._exchange
        if exchange is None:
            return
        if self._wait is not None:
            self._wait.clear(exchange)
        self._wait = wait
        if wait is not None:
            wait.set(exchange)

    def for_place(self) -> None:
        """The exchange stands in the line."""
        self._begin(self._waits.line)

    def for_answer(self, route: str) -> None:
        """It waits for the head of vLLM's answer, or behind that for the first byte of the body."""
        waits = self._waits
        self._begin(waits.first_byte_of(route) if waits.is_by_route else waits.first_byte)

    def for_more(self) -> None:
        """The body has begun."""
        self._silence = Silence(LOOKS)
        self._begin(self._waits.between_bytes)

    def for_tunnel(self) -> None:
        """Bytes pass both ways, for any time in all."""
        if self._exchange is not None:
            self._waits.total.clear(self._exchange)
        self._silence = Silence(LOOKS)
        self._begin(self._waits.tunnel_idle)

    def for_nothing(self) -> None:
        """Somebody who has a deadline already is at work."""
        self._begin(None)

    def lasts(self, passed: int, *, held_up: bool) -> bool:
        """The wait for more is over: tell whether it goes on, because something has passed since, or nothing could.

        :param passed: bytes so far.
        :param held_up: nothing could, because the client does not read.
        """
        if not held_up and (self._silence is None or self._silence.lasts(passed)):
            return False
        self._begin(self._wait)
        return True

    def end(self) -> None:
        """It is over."""
        exchange, self._exchange = self._exchange, None  # which leads here
        if exchange is not None:
            if self._waits.has_total:
                self._waits.total.clear(exchange)
            if self._wait is not None:
                self._wait.clear(exchange)
