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
        write_timeout: float = 60.0,
        linger_timeout: float = 2.0,
        unused_timeout: float = 2.0,
    ) -> None:
        self.handle = handler
        self.render = render
        self.hangups = hangups
        self.limits = limits
        self._waiting: list[Deferred[None]] = []
        self.channels: set[ServerChannel] = set()
        self.head_deadlines: Deadlines[ServerChannel] = Deadlines(clock, head_timeout, ServerChannel.head_late)
        self.idle_deadlines: Deadlines[ServerChannel] = Deadlines(clock, idle_timeout, ServerChannel.lose)
        self.body_deadlines: Deadlines[ServerChannel] = Deadlines(clock, body_timeout, ServerChannel.body_late)
        self.write_deadlines: Deadlines[ServerChannel] = Deadlines(clock, write_timeout, ServerChannel.write_late)
        self.linger_deadlines: Deadlines[ServerChannel] = Deadlines(clock, linger_timeout, ServerChannel.linger_late)
        self.unused_deadlines: Deadlines[ServerChannel] = Deadlines(clock, unused_timeout, ServerChannel.unused_late)

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
        self.write_deadlines.clear(channel)
        self.linger_deadlines.clear(channel)
        self.unused_deadlines.clear(channel)
        if not self.channels:
            waiting, self._waiting = self._waiting, []
            for waiter in waiting:
                waiter.callback(None)

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
        self.write_deadlines.close()
        self.linger_deadlines.close()
        self.unused_deadlines.close()
        return self._emptied()
