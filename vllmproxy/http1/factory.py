"""Makes the server side's connections, and holds what they share: their limits and their deadlines."""

from collections.abc import Callable

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IProtocolNegotiationFactory, IReactorTime
from twisted.internet.protocol import Factory
from zope.interface import implementer

from vllmproxy.http1.deadlines import Deadlines
from vllmproxy.http1.hangup import HangupWatcher
from vllmproxy.http1.message import Limits, RequestHead, WireError
from vllmproxy.http1.server import ServerChannel
from vllmproxy.http1.stream import Stream


@implementer(IProtocolNegotiationFactory)
class ServerFactory(Factory):
    """Makes channels and holds what they share.

    :param handler: takes each :class:`Stream` when its head is complete and it is its turn.
    :param render: makes the whole answer for a request refused by the wire itself.
    :param min_body_rate: bytes a second that a client has to send of a body, over ``body_timeout``; 0 for any.
    """

    noisy = False

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
    ) -> None:
        self.handle = handler
        self.render = render
        self.hangups = hangups
        self.limits = limits
        self._closed: Deferred[None] | None = None
        self.channels: set[ServerChannel] = set()
        self.head_deadlines: Deadlines[ServerChannel] = Deadlines(clock, head_timeout, ServerChannel.head_late)
        self.idle_deadlines: Deadlines[ServerChannel] = Deadlines(clock, idle_timeout, ServerChannel.lose)
        self.body_deadlines: Deadlines[ServerChannel] = Deadlines(clock, body_timeout, ServerChannel.body_late)
        self.least_body = min_body_rate * body_timeout
        rate_timeout = body_timeout if min_body_rate else 0
        self.rate_deadlines: Deadlines[ServerChannel] = Deadlines(clock, rate_timeout, ServerChannel.body_slow)
        self.write_deadlines: Deadlines[ServerChannel] = Deadlines(clock, write_timeout, ServerChannel.write_late)
        self.linger_deadlines: Deadlines[ServerChannel] = Deadlines(clock, linger_timeout, ServerChannel.linger_late)

    def buildProtocol(self, addr: IAddress | None) -> ServerChannel:  # type: ignore[override]
        return ServerChannel(self, addr)

    def acceptableProtocols(self) -> list[bytes]:
        """What ALPN may choose (RFC 7301). Twisted breaks off the handshake of a client that offers any, HTTP/1.1 among
        them, unless the factory names its own."""
        return [b"http/1.1"]

    def forget(self, channel: ServerChannel) -> None:
        """A connection is gone."""
        self.channels.discard(channel)
        self.head_deadlines.clear(channel)
        self.idle_deadlines.clear(channel)
        self.body_deadlines.clear(channel)
        self.rate_deadlines.clear(channel)
        self.write_deadlines.clear(channel)
        self.linger_deadlines.clear(channel)
        if not self.channels and self._closed is not None and not self._closed.called:
            self._closed.callback(None)

    def close(self) -> Deferred[None]:
        """Reset every connection; the result fires when all of them are gone and their requests settled."""
        closed: Deferred[None] = Deferred()
        self._closed = closed
        for channel in list(self.channels):
            channel.abort()
        self.head_deadlines.close()
        self.idle_deadlines.close()
        self.body_deadlines.close()
        self.rate_deadlines.close()
        self.write_deadlines.close()
        self.linger_deadlines.close()
        if not self.channels:
            closed.callback(None)
        return closed
