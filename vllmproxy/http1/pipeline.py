"""The requests of one connection that have come and are not begun: parsed only as far as they will be begun soon."""

from collections import deque
from collections.abc import Callable

from vllmproxy.http1.message import Limits, RequestHead, WireError
from vllmproxy.http1.requests import RequestReader
from vllmproxy.http1.stream import Stream
from vllmproxy.http1.templates import KnownHeads, Whence

#: Requests that may be queued behind each other before what follows them is left unparsed.
QUEUE = 16
#: Bytes that are parsed at a time: hundreds of requests fit into one read.
_SLICE = 8192


class Pipeline:
    """Takes bytes and gives requests, in order (RFC 9112 §9.3.2).

    :param make: makes a stream of a head that has just been read.
    :param known: as for :class:`~vllmproxy.http1.requests.RequestReader`, and so is ``whence``.
    :ivar error: why nothing more is read of this connection. Requests that were whole before are still to be answered.
    :ivar in_head: whether some of a head has come, and not all of it.
    :ivar is_empty: whether nothing is here but, maybe, some of a head.
    :ivar has_early: whether bytes came behind a WebSocket handshake that is not answered yet.
    """

    def __init__(
        self, make: Callable[[RequestHead], Stream], limits: Limits, known: KnownHeads, whence: Whence
    ) -> None:
        self._make: Callable[[RequestHead], Stream] | None = make
        self._queue: deque[Stream] = deque()
        self._incoming: Stream | None = None
        self._unparsed = b""
        self._reader = RequestReader(self, limits, known, whence)
        self.error: WireError | None = None
        self.in_head = self.has_early = False
        self.is_empty = True

    def feed(self, data: bytes) -> None:
        """Take what was read."""
        self._unparsed += data
        self._parse()

    def fail(self, error: WireError) -> None:
        """Read nothing more."""
        self.error = self._reader.error = error

    def first(self) -> Stream | None:
        """Return the next request, whose body may still be coming."""
        if self._unparsed and len(self._queue) < 2:  # the last one's body may be in there
            self._parse()
        return self._queue[0] if self._queue else None

    def pop(self) -> Stream:
        """Take that one: it begins."""
        first = self._queue.popleft()
        self.is_empty = not (self._queue or self._unparsed)
        return first

    def take_early(self) -> bytes:
        """The connection is a tunnel: return what came behind the handshake."""
        early, self._unparsed = self._reader.take_early() + self._unparsed, b""
        self.has_early, self.is_empty = False, not self._queue
        return early

    def resume(self) -> None:
        """The connection stays HTTP although a WebSocket was asked for."""
        self._reader.resume()
        self._look()

    def close(self) -> None:
        """The connection is gone: let go of it, and of whose body was coming."""
        self._queue.clear()
        self._incoming = None
        self._make = None
        self._reader.close()

    def _parse(self) -> None:
        data, at, reader = self._unparsed, 0, self._reader
        if len(self._queue) < QUEUE and reader.take(data):
            at = len(data)
        while at < len(data) and len(self._queue) < QUEUE and reader.error is None:
            end = at + _SLICE
            if end < len(data):
                end = max(end, at + reader.body_left)
            reader.feed(data[at:end])
            at = end
        self._unparsed = data[at:] if reader.error is None else b""
        self._look()

    def _look(self) -> None:
        """The reader has read something."""
        reader = self._reader
        self.error, self.in_head, self.has_early = reader.error, reader.in_head, reader.early is not None
        self.is_empty = not (self._queue or self._unparsed)

    # vllmproxy.http1.requests.RequestSink

    def request_begun(self, head: RequestHead) -> None:
        assert self._make is not None
        self._incoming = self._make(head)
        self._queue.append(self._incoming)

    def body_read(self, data: bytes) -> None:
        stream = self._incoming
        assert stream is not None
        stream.held.append(data)
        stream.held_bytes += len(data)

    def request_read(self) -> None:
        assert self._incoming is not None
        self._incoming.complete = True
        self._incoming = None

    def whole_request(self, head: RequestHead, body: bytes) -> None:
        assert self._make is not None
        stream = self._make(head)
        stream.held, stream.held_bytes, stream.complete = [body], len(body), True
        self._queue.append(stream)
