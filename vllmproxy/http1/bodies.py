"""A request's body on its way from a server stream to an upstream connection."""

from collections.abc import Iterator
from mmap import mmap
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IConsumer, IPushProducer
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer
from zope.interface import classImplements

from vllmproxy.http1.stream import Stream

#: Some of a body.
Piece = bytes | memoryview | mmap
#: What is kept of a body that is piped so that it can be sent once more, a longer one is sent only once; and what is
#: sent at a time of one that is here.
REPLAYABLE = 65_536


class StreamedBody:
    """Pipes a stream's body into a connection as it comes, and back pressure the other way.

    :ivar length: bytes where the client said so, else ``UNKNOWN_LENGTH``.
    """

    def __init__(self, stream: Stream) -> None:
        self.length: Any = UNKNOWN_LENGTH if stream.head.content_length is None else stream.head.content_length
        self._stream = stream
        self._consumer: Any = None
        self._done: Deferred[None] | None = None
        self._kept: list[bytes] | None = []
        self._kept_bytes = 0
        self._begun = False
        self._whole = False

    def startProducing(self, consumer: IConsumer) -> "Deferred[None]":
        """Send all of it: what an earlier connection was given first. The result fires when it is whole."""
        self._consumer = consumer
        done: Deferred[None] = Deferred()
        self._done = done
        consumer.registerProducer(self, True)
        for data in self._kept or ():
            self._consumer.write(data)
        if self._whole:
            self._finish()
        elif self._begun:
            self._stream.resume_body()
        else:
            self._begun = True
            self._stream.read_body()
        return done

    @property
    def replayable(self) -> bool:
        """Whether all that was sent is still here to be sent again."""
        return self._kept is not None

    def body_received(self, data: bytes) -> None:
        """A piece from the client."""
        self._kept_bytes += len(data)
        if self._kept is not None:
            if self._kept_bytes > REPLAYABLE and self._consumer is not None:
                self._kept = None
            else:
                self._kept.append(data)
        if self._consumer is not None:
            self._consumer.write(data)

    def body_complete(self) -> None:
        """The client's request is whole."""
        self._whole = True
        if self._consumer is not None:
            self._finish()

    def _finish(self) -> None:
        done, self._done = self._done, None
        self._consumer.unregisterProducer()
        self._stream.resume_body()  # nobody else will, if the last piece was one too many
        if done is not None:
            done.callback(None)

    def forget(self) -> None:
        """The answer has begun: nothing is sent again."""
        self._kept = None

    def pauseProducing(self) -> None:
        self._stream.pause_body()

    def resumeProducing(self) -> None:
        self._stream.resume_body()

    def stopProducing(self) -> None:
        """The connection wants no more; the client's bytes wait for another one, or for the end."""
        self._consumer = None
        self._done = None
        if not self._whole and not self._stream.over:
            self._stream.pause_body()


classImplements(StreamedBody, IBodyProducer, IPushProducer)


class WholeBody:
    """A body that is all here.

    :ivar length: bytes; ``UNKNOWN_LENGTH`` where it is to be sent in chunks, as it came.
    :ivar whole: all of it where it is short: a connection writes that with the head. A long one is written bit by bit
        as the upstream takes it, for what waits in a transport is copied there more than once.
    """

    replayable = True

    def __init__(self, pieces: list[Piece], *, chunked: bool) -> None:
        size = sum(map(len, pieces))
        self.length: Any = UNKNOWN_LENGTH if chunked else size
        self.whole = b"".join(pieces) if size <= REPLAYABLE else None
        self._pieces = pieces
        self._size = self._left = size
        self._bits: Iterator[bytes | memoryview] = iter(())
        self._paused = False
        self._consumer: Any = None
        self._done: Deferred[None] | None = None

    def startProducing(self, consumer: IConsumer) -> "Deferred[None]":
        """Send all of it, from the beginning."""
        done: Deferred[None] = Deferred()
        self._consumer, self._done, self._paused = consumer, done, False
        self._left, self._bits = self._size, _bits_of(self._pieces)
        consumer.registerProducer(self, True)
        self.resumeProducing()
        return done

    def _write(self) -> None:
        bit = next(self._bits, b"")
        self._left -= len(bit)
        self._consumer.write(bit)
        if not self._left and self._done is not None:
            done, self._done = self._done, None
            self._consumer.unregisterProducer()
            done.callback(None)

    def forget(self) -> None:
        """The answer has begun: nothing is sent again."""
        self.whole = None
        self.replayable = False
        if self._done is None:
            self._pieces, self._bits = [], iter(())

    def pauseProducing(self) -> None:
        self._paused = True

    def resumeProducing(self) -> None:
        self._paused = False
        while self._done is not None and not self._paused:
            self._write()

    def stopProducing(self) -> None:
        """The connection wants no more."""
        self._paused = True


classImplements(WholeBody, IBodyProducer, IPushProducer)


def _bits_of(pieces: list[Piece]) -> Iterator[memoryview]:
    for piece in pieces:
        view = memoryview(piece)
        for at in range(0, len(view), REPLAYABLE):
            yield view[at : at + REPLAYABLE]


def is_replayable(body: Any) -> bool:
    """Whether a body producer can send its body from the beginning again."""
    return body is None or bool(getattr(body, "replayable", False))
