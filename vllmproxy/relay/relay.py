"""The branch of the resource tree under ``/vllm``: makes an exchange of each request."""

from collections.abc import Callable

from attrs import define, field
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from vllmproxy.errors import StoreDown
from vllmproxy.http1.places import Places
from vllmproxy.http1.stream import Stream
from vllmproxy.keys.gate import Gate
from vllmproxy.observers.record import Observer
from vllmproxy.relay.admission import Admission
from vllmproxy.relay.bill import Bill, open_bill
from vllmproxy.relay.exchange import Exchange
from vllmproxy.relay.headers import TrustedProxies
from vllmproxy.relay.line import Line
from vllmproxy.relay.quotas import Quotas, Reservation
from vllmproxy.relay.states import Event
from vllmproxy.relay.waits import Timeouts, Waits
from vllmproxy.upstreams.server import Server
from vllmproxy.usage.bookkeeper import Bookkeeper, CannotWriteDown
from vllmproxy.usage.prices import Prices
from vllmproxy.usage.reader import UsageMode

_log = Logger(namespace=__name__)

_NOT_WRITTEN = "What is used cannot be written down just now. Try again in a moment."


@define(eq=False)
class Relay:
    """What all exchanges share.

    :ivar line: who is under way, and who waits for that.
    :ivar usage: how the tokens of streams are known.
    :ivar max_inspected_body: bytes of a body that is read before it is forwarded.
    :ivar max_held: bytes of all such bodies together; ``held``: those that are held just now.
    :ivar is_ending: what is under way is being reset, because the process ends.
    """

    clock: IReactorTime
    gate: Gate
    server: Server
    observer: Observer
    trusted: TrustedProxies
    quotas: Quotas
    books: Bookkeeper
    prices: Prices | None = None
    timeouts: Timeouts = field(factory=Timeouts)
    usage: UsageMode = "auto"
    max_inspected_body: int = 32 << 20
    max_held: int = 512 << 20
    held: int = 0
    is_ending: bool = False
    line: Line = field(factory=lambda: Line(Places()))
    waits: Waits = field(init=False)
    _held_by: dict[str | None, int] = field(factory=dict)
    _running: dict[str, set[Exchange]] = field(factory=dict)
    _former: list[Server] = field(factory=list)
    _next_turn: list[Callable[[], None]] = field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.waits = Waits(self.clock, self.timeouts)

    def handle(self, stream: Stream) -> None:
        """Take a request whose head is complete."""
        self.observer.started()
        Exchange(self, stream).begin()

    def serve(self, server: Server) -> None:
        """Send requests to ``server`` from here on. Those under way go on where they are."""
        self._former = [each for each in (*self._former, self.server) if not each.agent.is_idle]
        self.server = server

    def began(self, exchange: Exchange, token: str | None) -> None:
        """A request of that key was let in."""
        if token is not None:
            self._running.setdefault(token, set()).add(exchange)

    def ended(self, exchange: Exchange, token: str | None) -> None:
        """A request of that key is over."""
        running = self._running.get(token or "")
        if running is not None:
            running.discard(exchange)
            if not running:
                del self._running[token or ""]

    def may_hold(self, token: str | None, size: int) -> bool:
        """Tell whether so many bytes more of a key's bodies may be held: of all that there is room for, no key has more
        than a quarter."""
        by_key = self._held_by.get(token, 0) + size
        return self.held + size <= self.max_held and by_key <= max(self.max_held // 4, self.max_inspected_body)

    def hold(self, token: str | None, size: int) -> None:
        """So many bytes more, or fewer, are held of that key's bodies."""
        self.held += size
        self._held_by[token] = self._held_by.get(token, 0) + size
        if not self._held_by[token]:
            del self._held_by[token]

    def running(self) -> list[str]:
        """Return the keys that have requests under way."""
        return list(self._running)

    def revoke(self, token: str, *, forwarded: bool) -> None:
        """End what that key has under way; what waits before what runs, whose place would be the next one's.

        :param forwarded: also what vLLM has.
        """
        ended = [each for each in self._running.get(token, ()) if forwarded or not each.is_forwarded]
        for exchange in sorted(ended, key=lambda each: each.has_place):
            exchange.feed(Event.REVOKED)

    def open_bill(self, admission: Admission, reservation: Reservation | None, time: float) -> Bill:
        """Begin the bill of a request that is about to be forwarded. Raises :class:`StoreDown`."""
        try:
            return open_bill(
                admission, reservation, time=time, quotas=self.quotas, prices=self.prices, books=self.books
            )
        except CannotWriteDown as error:
            _log.error("A request was refused: {error}", error=str(error))
            if reservation is not None:
                self.cancel(reservation)
            raise StoreDown(_NOT_WRITTEN) from None

    def cancel(self, reservation: Reservation) -> None:
        """Give back all of a reservation whose request was never forwarded."""
        self.quotas.settle(reservation, forwarded=False)

    def next_turn(self, act: Callable[[], None]) -> None:
        """Act in the next turn of the reactor: when many clients leave in one, vLLM hears of all of them first."""
        if not self._next_turn:
            self.clock.callLater(0, self._act)
        self._next_turn.append(act)

    def _act(self) -> None:
        acts, self._next_turn = self._next_turn, []
        for act in acts:
            try:
                act()
            except Exception:  # nothing is awaited here; one exchange's fault must not keep the others waiting
                _log.failure("Ending an exchange failed")

    def end(self) -> None:
        """Let nobody else in: whose connection is lost from here on has not left by themselves."""
        self.is_ending = True
        self.line.close()

    async def close(self) -> None:
        """End the waits and the connections to vLLM, and settle what is left."""
        self.waits.close()
        self._act()
        for server in (*self._former, self.server):
            server.agent.close()
        await self.quotas.close()
