"""A request's body on its way to an upstream, piece by piece."""

from typing import TYPE_CHECKING, Any

from twisted.internet.interfaces import IConsumer
from twisted.python.failure import Failure
from zope.interface import classImplements

from vllmproxy.http1.answer import Request

if TYPE_CHECKING:
    from vllmproxy.http1.client import ClientConnection

#: Bytes of a body's first pieces that wait for each other, so that they leave with the head.
_SHORT = 16_384


class Upload:
    """Takes a body from its producer, frames it, and hands it to the connection."""

    def __init__(self, connection: "ClientConnection", request: Request) -> None:
        self._connection = connection
        self._body = request.body  # until it is over: each would wait for the collector because of the other
        self._is_chunked = request.chunked
        self._cork: list[bytes | memoryview] | None = None

    def begin(self, head: bytes) -> None:
        """Send the head, with what has come of the body meanwhile."""
        assert self._body is not None
        self._cork = [head]
        sending = self._body.startProducing(self)
        sending.addCallbacks(self._sent, self._not_sent)
        self._uncork()

    @property
    def is_over(self) -> bool:
        """Whether all of it has been handed over, or no more of it is wanted."""
        return self._body is None

    def stop(self) -> None:
        """No more of it is wanted."""
        body, self._body = self._body, None
        if body is not None:
            body.stopProducing()

    def _sent(self, _: None) -> None:
        self._body = None
        self.unregisterProducer()
        if self._is_chunked:
            self._out(b"0\r\n\r\n")

    def _not_sent(self, reason: Failure) -> None:
        self._connection.fail(reason)

    def write(self, data: bytes | memoryview) -> None:
        """A piece of the body."""
        if not data:  # as a chunk it would be the last one
            return
        if self._is_chunked:
            data = b"%x\r\n%s\r\n" % (len(data), data)
        self._out(data)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """Pause ``producer`` while the upstream does not read."""
        self._connection.registerProducer(producer, streaming)

    def unregisterProducer(self) -> None:
        self._connection.unregisterProducer()

    def _out(self, data: bytes | memoryview) -> None:
        if self._cork is None:
            self._connection.write(data)
            return
        self._cork.append(data)
        if len(data) > _SHORT:  # then its sender is to hear whether the upstream takes it
            self._uncork()

    def _uncork(self) -> None:
        cork, self._cork = self._cork, None
        if cork:
            self._connection.write(b"".join(cork))


classImplements(Upload, IConsumer)


def in_one_chunk(data: bytes) -> bytes:
    """Return a whole body in the chunked coding (RFC 9112 §7.1)."""
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if data else b"0\r\n\r\n"
