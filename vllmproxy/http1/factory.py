"""Makes the server side's connections, and holds what they share: their limits and their deadlines."""

from collections import Counter
from collections.abc import Callable
from itertools import islice
from operator import itemgetter

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IProtocolNegotiationFactory, IReactorTime
from twisted.internet.protocol import Factory
from zope.interface import implementer

from vllmproxy.deadlines import Deadlines
from vllmproxy.http1.hangup import HangupWatcher
from vllmproxy.http1.message import Limits, RequestHead, WireError
from vllmproxy.http1.places import Places
from vllmproxy.http1.server import ServerChannel
from vllmproxy.http1.stream import Stream
from vllmproxy.http1.templates import KnownHeads

#: How many are looked at for one that may lose its place.
_LOOKS = 1000
#: Seconds that a client has to read an answer that vLLM gave, before its connection's place may be another's.
GRACE = 5.0
#: Connections beyond ``max_connections`` that are taken while requests are under way on all of them, so that whoever
#: asks how the proxy is gets an answer.
RESERVE = 64


@implementer(IProtocolNegotiationFactory)
class ServerFactory(Factory):
    """Makes channels and holds what they share.

    At ``max_connections`` a new one takes the place of one whose request is not there: of one that closes and waits
    only for its client's close_notify, else of the one that has been idle longest, else of the one whose head, whose
    body's next byte, or who to read the answers that it has, has been awaited longest. Where there is none, the reserve
    is left, and then the new one is reset.

    :param handler: takes each :class:`Stream` when its head is complete and it is its turn.
    :param render: makes the whole answer for a request refused by the wire itself.
    :param min_body_rate: bytes a second that a client has to send of a body, over ``body_timeout``; 0 for any.
    :param max_connections: 0 for any number, as for ``per_client``: how many one client may have.
    :param client_of: what a peer is counted as; empty for one that may have any number.
    :ivar client_of: the same; it may be exchanged.
    :ivar known: heads that have come before.
    :ivar connections: those that are open, but for those that lost their place.
    :ivar refused: how many were not let in, by why; ``evicted``: how many lost their place to a new one.
    """

    noisy = False
    #: The server is stopping: each connection's next answer is its last.
    draining = False

    def __init__(
        self,
        clock: IReactorTime,
        handler: Callable[[Stream], None],
        render: Callable[[WireError, RequestHead | None, IAddress | None], bytes],
        hangups: HangupWatcher,
        *,
        limits: Limits = Limits(),
        head_timeout: float = 10.0,
        idle_timeout: float = 75.0,
        body_timeout: float = 60.0,
        min_body_rate: int = 0,
        write_timeout: float = 60.0,
        linger_timeout: float = 2.0,
        unused_timeout: float = 2.0,
        max_connections: int = 0,
        per_client: int = 0,
        client_of: Callable[[IAddress | None], str] = lambda _: "",
    ) -> None:
        self.clock = clock
        self.handle = handler
        self.render = render
        self.hangups = hangups
        self.change_limits(limits)
        self._waiting: list[Deferred[None]] = []
        self._most = max_connections
        self.client_of = client_of
        most = max_connections + RESERVE if max_connections else 0
        self.connections: Places[ServerChannel] = Places(most, per_client=per_client)
        self.refused: Counter[str] = Counter()
        self.evicted = 0
        self.channels: set[ServerChannel] = set()
        self.head_deadlines: Deadlines[ServerChannel] = Deadlines(clock, head_timeout, ServerChannel.head_late)
        self.idle_deadlines: Deadlines[ServerChannel] = Deadlines(clock, idle_timeout, ServerChannel.lose)
        self.body_deadlines: Deadlines[ServerChannel] = Deadlines(clock, 0, ServerChannel.body_late)
        self.rate_deadlines: Deadlines[ServerChannel] = Deadlines(clock, 0, ServerChannel.body_slow)
        self.write_deadlines: Deadlines[ServerChannel] = Deadlines(clock, write_timeout, ServerChannel.write_late)
        self.linger_deadlines: Deadlines[ServerChannel] = Deadlines(clock, linger_timeout, ServerChannel.linger_late)
        self.unused_deadlines: Deadlines[ServerChannel] = Deadlines(clock, unused_timeout, ServerChannel.unused_late)
        self.change_body(body_timeout, min_body_rate)

    def change_limits(self, limits: Limits) -> None:
        """Hold what comes on new connections to these; heads that are known were held to others."""
        self.limits = limits
        self.known = KnownHeads()

    def change_body(self, timeout: float, min_rate: int) -> None:
        """Have bodies come in that time, and at least at that rate."""
        self.least_body = min_rate * timeout
        self.body_deadlines.change(timeout)
        self.rate_deadlines.change(timeout if min_rate else 0)

    def buildProtocol(self, addr: IAddress | None) -> ServerChannel:  # type: ignore[override]
        return ServerChannel(self, addr)

    def acceptableProtocols(self) -> list[bytes]:
        """What ALPN may choose (RFC 7301). Twisted breaks off the handshake of a client that offers any, HTTP/1.1 among
        them, unless the factory names its own."""
        return [b"http/1.1"]

    def admit(self, channel: ServerChannel) -> bool:
        """Give a new connection a place, if there is one."""
        client = self.client_of(channel.peer) if self.connections.counts_clients else ""
        entry = self.connections.enter(channel, client)
        if entry == "no_place" and self._evict():
            entry = self.connections.enter(channel, client)
        if entry != "placed":
            self.refused[entry] += 1
            return False
        if self._most and self.connections.taken > self._most:
            self._evict()
        return True

    def _evict(self) -> bool:
        channel = self._closing() or self._idle() or self._late()
        if channel is None:
            return False
        self.evicted += 1
        self._end_waits(channel)
        self.connections.leave(channel)
        channel.evict()
        return True

    def _closing(self) -> ServerChannel | None:
        """Return a connection on which nothing is to be done any more but to wait for its client, if one is near."""
        return next((channel for channel in islice(self.linger_deadlines, 64) if channel.has_said_all), None)

    def _idle(self) -> ServerChannel | None:
        """Return the connection that has been idle longest, but for those whose last answer is on its way."""
        return self.idle_deadlines.longest(_may_give_way, looks=_LOOKS)[1]

    def _late(self) -> ServerChannel | None:
        """Return a connection with no request under way whose client has been awaited longest, if one is near: for a
        head, for a body, or to read the answers that it has."""
        _, channel = max(
            self.head_deadlines.longest(),
            self.body_deadlines.longest(),
            self.write_deadlines.longest(_may_give_way, looks=_LOOKS),
            key=itemgetter(0),
        )
        return channel

    def forget(self, channel: ServerChannel) -> None:
        """A connection is gone."""
        self.channels.discard(channel)
        self.connections.leave(channel)
        self._end_waits(channel)
        if not self.channels:
            waiting, self._waiting = self._waiting, []
            for waiter in waiting:
                waiter.callback(None)

    def _end_waits(self, channel: ServerChannel) -> None:
        self.head_deadlines.clear(channel)
        self.idle_deadlines.clear(channel)
        self.body_deadlines.clear(channel)
        self.rate_deadlines.clear(channel)
        self.write_deadlines.clear(channel)
        self.linger_deadlines.clear(channel)
        self.unused_deadlines.clear(channel)

    def drain(self) -> Deferred[None]:
        """Have every connection end with the requests that are under way; the result fires when all are gone.

        Idle ones close now. One on which nothing has come yet is given a moment: a client that has just been accepted
        has sent its request, or is about to, and could not know.
        """
        self.draining = True
        for channel in list(self.channels):
            channel.drain()
        return self._emptied()

    def _emptied(self) -> Deferred[None]:
        emptied: Deferred[None] = Deferred()
        if self.channels:
            self._waiting.append(emptied)
        else:
            emptied.callback(None)
        return emptied

    def close(self) -> Deferred[None]:
        """Reset every connection; the result fires when all of them are gone and their requests settled."""
        for channel in list(self.channels):
            channel.abort()
        self.head_deadlines.close()
        self.idle_deadlines.close()
        self.body_deadlines.close()
        self.rate_deadlines.close()
        self.write_deadlines.close()
        self.linger_deadlines.close()
        self.unused_deadlines.close()
        return self._emptied()


def _may_give_way(channel: ServerChannel, seconds: float) -> bool:
    """Tell whether a connection that was given its last answer so long ago may lose its place."""
    return channel.has_answered and (seconds >= GRACE or not channel.is_sending)
