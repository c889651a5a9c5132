"""The requests that are under way at once, and the line before them."""

from collections import Counter, deque
from typing import TYPE_CHECKING, Final

from vllmproxy.errors import Overloaded
from vllmproxy.http1.places import Entry, Places, client_named
from vllmproxy.relay.headers import Client
from vllmproxy.relay.states import Event

if TYPE_CHECKING:
    from vllmproxy.relay.exchange import Exchange

_FULL: Final[dict[Entry, str]] = {
    "no_place": "This proxy has as many requests under way as it may. Try again in a moment.",
    "line_full": "This proxy has as many requests under way and waiting as it may. Try again in a moment.",
    "client_full": "Your address has as many requests under way as it may. Try again when one of them is over.",
}
_LATE: Final = "This proxy has as many requests under way as it may, and this one has waited long enough. Try again."


class Line:
    """Lets requests in, in order.

    :ivar refused: how many were not let in, by why (:data:`~vllmproxy.http1.places.Entry`), or ``late``.
    """

    def __init__(self, places: "Places[Exchange]") -> None:
        self.places = places
        self.refused: Counter[str] = Counter()
        self._called: deque[Exchange] = deque()
        self._calling = False

    def enter(self, exchange: "Exchange", client: Client) -> bool:
        """Tell whether the exchange may go on at once. If not, it is fed :attr:`Event.PLACED` when its turn comes.

        Raises :class:`Overloaded`.
        """
        entry = self.places.enter(exchange, _counted_as(client) if self.places.counts_clients else "")
        if entry in _FULL:
            self.refused[entry] += 1
            raise Overloaded(_FULL[entry])
        return entry == "placed"

    def late(self) -> Overloaded:
        """Return what an exchange is told whose turn did not come in time."""
        self.refused["late"] += 1
        return Overloaded(_LATE)

    def leave(self, exchange: "Exchange") -> None:
        """It is over, wherever it was: let the next one in. One that comes to nothing lets in the one behind it, so
        this goes round, and not deeper and deeper."""
        called = self.places.leave(exchange)
        if called is None:
            return
        self._called.append(called)
        if self._calling:
            return
        self._calling = True
        try:
            while self._called:
                self._called.popleft().feed(Event.PLACED)
        finally:
            self._calling = False

    def close(self) -> None:
        """Let nobody else in."""
        self.places.close()


def _counted_as(client: Client) -> str:
    """Return whom a request is counted for: nobody where a trusted proxy does not say whose it is."""
    return "" if client.trusted and client.address == client.peer else client_named(client.address)
