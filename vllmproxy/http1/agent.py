"""``IAgent`` for one upstream: a pool of kept-alive connections, and the one retry that is safe."""

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, maybeDeferred
from twisted.internet.error import ConnectError, DNSLookupError, TimeoutError
from twisted.internet.interfaces import IAddress, IReactorTime, IStreamClientEndpoint
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.iweb import IAgent, IBodyProducer, IResponse
from zope.interface import classImplements

from vllmproxy.deadlines import Deadlines
from vllmproxy.http1.answer import Answer, Asker, HandshakeFailed, NotExecuted, OutgoingHeaders, Request
from vllmproxy.http1.bodies import is_replayable
from vllmproxy.http1.client import ClientConnection
from vllmproxy.http1.message import Limits, ResponseHead

_log = Logger(namespace=__name__)


#: What an endpoint, or the TLS handshake after it, fails with.
_CONNECT_ERRORS = (ConnectError, DNSLookupError, HandshakeFailed, OSError)


class ConnectFailed(Exception):
    """No connection to the upstream could be made: nothing was sent."""


class SetUpFailed(ConnectFailed):
    """No connection could be made, and that is a fault of the proxy's: the log has it. Nothing was sent."""


class _Waiter:
    """Makes a Deferred of what becomes of a request."""

    def __init__(self) -> None:
        self.request: Request | None = None
        self.answer: Deferred[IResponse] = Deferred(self._cancelled)

    def _cancelled(self, _: "Deferred[IResponse]") -> None:
        if self.request is not None:
            self.request.cancel()

    def informed(self, head: ResponseHead) -> None:
        """A Deferred fires once."""

    def answered(self, answer: Answer) -> None:
        self.answer.callback(answer)

    def not_answered(self, reason: Failure) -> None:
        self.answer.errback(reason)


class _ConnectionFactory(Factory):
    noisy = False

    def __init__(self, build: Callable[[], ClientConnection]) -> None:
        self._build = build

    def buildProtocol(self, addr: IAddress | None) -> ClientConnection:  # type: ignore[override]  # not Twisted's Protocol
        return self._build()


class ConnectionDeadlines:
    """What connections to one upstream must be done with in time.

    :ivar handshake: TLS. :ivar write: the upstream takes some of what waits for it.
    """

    def __init__(self, clock: IReactorTime, *, handshake: float, write: float) -> None:
        self.clock = clock
        self.handshake: Deadlines[ClientConnection] = Deadlines(clock, handshake, ClientConnection.abort)
        self.write: Deadlines[ClientConnection] = Deadlines(clock, write, ClientConnection.write_late)

    def clear(self, connection: ClientConnection) -> None:
        """A connection is gone."""
        self.handshake.clear(connection)
        self.write.clear(connection)

    def close(self) -> None:
        """End every wait."""
        self.handshake.close()
        self.write.close()


class UpstreamAgent:
    """Requests to one upstream.

    Connections are reused newest first and thrown away after ``idle`` seconds: uvicorn closes its side after 5 s
    without a word, so half of that keeps clear of the edge. A request is sent a second time only when the first
    connection was a reused one and provably took no byte of it (:class:`NotExecuted`), on a new connection.

    :param origin: ``http://host:port``, what request URIs begin with; the rest is the origin-form target.
    :param name: what the log calls the upstream; its origin, unless it has a better one.
    :param connect_timeout: seconds for a connection, the look-up of a name included and TLS not.
    """

    def __init__(
        self,
        clock: IReactorTime,
        endpoint: IStreamClientEndpoint,
        origin: bytes,
        *,
        name: str = "",
        idle: float = 2.5,
        connect_timeout: float = 5.0,
        handshake_timeout: float = 5.0,
        write_timeout: float = 60.0,
        limits: Limits = Limits(),
    ) -> None:
        self._clock = clock
        self._endpoint = endpoint
        self._origin_length = len(origin)
        self._origin = origin
        self._limits = limits
        self._connect_seconds = connect_timeout
        self._busy: set[ClientConnection] = set()
        self._idle: Deadlines[ClientConnection] = Deadlines(clock, idle, ClientConnection.abort)
        self._deadlines = ConnectionDeadlines(clock, handshake=handshake_timeout, write=write_timeout)
        self._factory = _ConnectionFactory(self._build)
        self._name = name or origin.decode("ascii")
        self._reachable = True

    def request(  # type: ignore[override]  # header lines come as they go on the wire
        self,
        method: bytes,
        uri: bytes,
        headers: OutgoingHeaders | None = None,
        bodyProducer: IBodyProducer | None = None,
    ) -> "Deferred[IResponse]":
        """Do what :meth:`ask` does, for who waits by a Deferred. Cancelling it cancels the request."""
        assert headers is not None
        waiter = _Waiter()
        waiter.request = self.ask(method, uri, headers, bodyProducer, waiter)
        return waiter.answer

    def ask(
        self, method: bytes, uri: bytes, headers: OutgoingHeaders, body: IBodyProducer | None, asker: Asker
    ) -> Request:
        """Send a request. ``uri`` begins with the origin.

        It fails with :class:`ConnectFailed`, :class:`~vllmproxy.http1.answer.AnswerLost` or
        :class:`~vllmproxy.http1.message.BadAnswer`, and with whatever else goes wrong; it raises nothing. Cancelling
        resets the connection.
        """
        assert uri.startswith(self._origin)
        request = Request(method, uri[self._origin_length :], headers, body, asker)
        connection = self._take()
        if connection is None:
            self._send_on_new(request)
        else:
            _send(connection, request)
        return request

    def _take(self) -> ClientConnection | None:
        while (newest := self._idle.pop_newest()) is not None:
            connection, is_due = newest
            if not (is_due or connection.has_ended()):
                self._busy.add(connection)
                return connection
            connection.abort()
        return None

    def _send_on_new(self, request: Request) -> None:
        connecting = self._connect()
        request.stop = connecting.cancel
        connecting.addCallbacks(self._connected, self._not_connected, callbackArgs=(request,), errbackArgs=(request,))

    def _connect(self) -> "Deferred[ClientConnection]":
        """Make a connection, within its time: endpoints have none for looking a name up. What is cancelled fails with
        ``CancelledError``, whatever the endpoint makes of it: ``HostnameEndpoint``, cancelled while it looks a name up,
        says that there is no such name."""
        ended: Exception | None = None

        def end(why: Exception) -> None:
            nonlocal ended
            ended = why
            connecting.cancel()

        def in_time(result: Any) -> Any:
            if late.active():
                late.cancel()
            return result

        def failed(reason: Failure) -> None:
            attempt.errback(reason if ended is None else Failure(ended))

        attempt: Deferred[ClientConnection] = Deferred(lambda _: end(CancelledError()))
        connecting: Deferred[Any] = maybeDeferred(self._endpoint.connect, self._factory)
        late = self._clock.callLater(self._connect_seconds, end, TimeoutError())
        connecting.addBoth(in_time)
        connecting.addCallback(ClientConnection.shaken)
        connecting.addCallbacks(attempt.callback, failed)
        return attempt

    def _connected(self, connection: ClientConnection, request: Request) -> None:
        if not self._reachable:
            self._reachable = True
            _log.info("{origin} can be reached again", origin=self._name)
        self._busy.add(connection)
        _send(connection, request)

    def _not_connected(self, reason: Failure, request: Request) -> None:
        if reason.check(*_CONNECT_ERRORS):
            if self._reachable:
                self._reachable = False
                _log.warn("{origin} cannot be reached: {reason}", origin=self._name, reason=reason.getErrorMessage())
            reason = Failure(ConnectFailed())
        elif not reason.check(CancelledError):
            _log.failure("Setting up a connection to {origin} failed", reason, origin=self._name)
            reason = Failure(SetUpFailed())
        request.fail(reason)

    def _not_executed(self, request: Request) -> None:
        request.headers.sent = False
        if is_replayable(request.body):
            self._send_on_new(request)
        else:
            request.fail(Failure(NotExecuted("the connection ended before the request")))

    def _build(self) -> ClientConnection:
        return ClientConnection(self._released, self._gone, self._not_executed, self._limits, self._deadlines)

    def _released(self, connection: ClientConnection) -> None:
        self._busy.discard(connection)
        self._idle.set(connection)

    def _gone(self, connection: ClientConnection) -> None:
        self._busy.discard(connection)
        self._idle.clear(connection)

    @property
    def is_idle(self) -> bool:
        """Whether it has no connection."""
        return not self._busy and next(iter(self._idle), None) is None

    def close(self) -> None:
        """Reset every connection."""
        idle = list(self._idle)
        self._idle.close()
        self._deadlines.close()
        for connection in [*idle, *self._busy]:
            connection.abort()


classImplements(UpstreamAgent, IAgent)


def _send(connection: ClientConnection, request: Request) -> None:
    """Send, or fail and leave no connection behind that waits for nobody."""
    request.headers.sent = True
    try:
        connection.send(request)
    except Exception:  # nothing is awaited here
        connection.fail(Failure())
