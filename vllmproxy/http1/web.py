"""Drives ``twisted.web`` requests from a :class:`Stream`, so that Klein works on the strict channel.

``twisted.web._http2.H2Stream`` does the same for HTTP/2 and shows which methods a ``Request`` needs. Requests
and answers are buffered: this is for the proxy's own API, not for what passes through.
"""

from collections.abc import Callable
from io import BytesIO
from typing import Any

from twisted.python.failure import Failure
from twisted.web.http import parse_qs
from twisted.web.http_headers import Headers
from twisted.web.server import Site

from vllmproxy.http1.message import WireError
from vllmproxy.http1.stream import Stream


class WebExchange:
    """One API request: collects its body, runs ``site``'s request on it, sends the answer with its length.

    :param limit: bytes of the request's body; more is refused with 413.
    :param hold: asked for each piece of the body whether so many bytes more may be held; where they may not, it has
        refused the request.
    :param refuse: answers a refused request.
    :param id: what the request is known by: its ``x-request-id``, whatever the client sent, and the answer's.
    :param done: called at the end with ``twisted.web``'s request, ``None`` where it came to none.
    """

    transport = None  # twisted.web's Request asks for it; there is none to hand out

    def __init__(
        self,
        stream: Stream,
        site: Site,
        *,
        limit: int,
        hold: Callable[[int], bool] = lambda _: True,
        refuse: Callable[[Stream, WireError], None],
        id: bytes,
        done: Callable[[Any], None],
    ) -> None:
        self.site = site
        self.factory = site
        self._stream = stream
        self._limit = limit
        self._hold = hold
        self._refuse = refuse
        self._id = id
        self._done = done
        self._body = bytearray()
        self._request: Any = None
        self._answer: list[bytes] = []
        self._status = (500, b"Internal Server Error")
        self._lines: list[bytes] = []

    def begin(self) -> None:
        """Take the request's body."""
        stream = self._stream
        stream.receiver = self
        if (stream.head.content_length or 0) > self._limit:
            self._too_large()
        else:
            stream.read_body()

    def _too_large(self) -> None:
        self._body.clear()  # the connection is there for a while still
        self._refuse(self._stream, WireError(413, f"The body is larger than {self._limit} bytes."))

    # the stream's side

    def body_received(self, data: bytes) -> None:
        if len(self._body) + len(data) > self._limit:
            self._too_large()
        elif self._hold(len(data)):
            self._body += data
        else:
            self._body.clear()

    def body_complete(self) -> None:
        head = self._stream.head
        request = self.site.requestFactory(self, queued=False)
        self._request = request
        for name, value in head.headers:
            request.requestHeaders.addRawHeader(name, value)
        if head.content_length is not None:
            request.requestHeaders.addRawHeader(b"content-length", b"%d" % head.content_length)
        request.requestHeaders.setRawHeaders(b"x-request-id", [self._id])
        request.parseCookies()
        request.content = BytesIO(self._body)  # which copies it
        self._body.clear()
        # What Request.requestReceived does, less its parsing of forms: that is quadratic, raises what nobody catches,
        # and runs before anybody has been asked for a key. HEAD is GET here, so that the answer's length is known; the
        # stream leaves the body out. The version is one for which the channel, not the request, frames the answer.
        request.method = b"GET" if head.method == b"HEAD" else head.method
        request.uri, request.clientproto = head.target, b"HTTP/2"
        request.path, _, query = head.target.partition(b"?")
        request.args = parse_qs(query, keep_blank_values=True)
        request.process()

    def body_failed(self, error: WireError) -> None:
        self._refuse(self._stream, error)

    def client_gone(self, reason: Failure) -> None:
        request, self._request = self._request, None
        if request is not None:
            request.connectionLost(reason)
        self._done(request)

    def tunnel_received(self, data: bytes) -> None:
        """No tunnels here."""

    def tunnel_half_closed(self) -> None:
        """No tunnels here."""

    # the request's side: what twisted.web.http.Request calls on its channel

    def writeHeaders(self, version: bytes, code: bytes, reason: bytes, headers: Headers) -> None:
        self._status = (int(code), reason)
        self._lines = [
            b"%s: %s\r\n" % (name, value)
            for name, values in headers.getAllRawHeaders()
            if name.lower() not in (b"content-length", b"transfer-encoding", b"connection")
            for value in values
        ]

    def write(self, data: bytes) -> None:
        self._answer.append(data)

    def writeSequence(self, pieces: list[bytes]) -> None:
        self._answer.extend(pieces)

    def requestDone(self, request: Any) -> None:
        if self._request is None:
            return
        self._request = None
        stream = self._stream
        lines = b"".join(self._lines) + b"x-request-id: %b\r\n" % self._id
        stream.respond(self._status[0], self._status[1], lines, b"".join(self._answer))
        self._done(request)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """The answer is buffered: a pull producer is run to its end, a push producer needs no pausing."""
        while not streaming and self._request is not None and self._request.producer is not None:
            producer.resumeProducing()

    def unregisterProducer(self) -> None:
        """Nothing is kept of producers."""

    def loseConnection(self) -> None:
        self._stream.abort()

    def abortConnection(self) -> None:
        self._stream.abort()

    def getPeer(self) -> Any:
        return self._stream.peer

    def getHost(self) -> Any:
        return self._stream.channel.transport.getHost()

    def isSecure(self) -> bool:
        return self._stream.is_secure
