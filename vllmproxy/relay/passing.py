"""An answer's body on its way past: read for what it used, and without what the client did not ask for."""

from collections.abc import Callable

from attrs import define

from vllmproxy.http1.message import ResponseHead, once
from vllmproxy.upstreams.server import Told
from vllmproxy.usage.alike import Alike
from vllmproxy.usage.reader import UsageReader, is_event_stream, reader_for
from vllmproxy.usage.sse import SseReader
from vllmproxy.usage.tokens import Usage
from vllmproxy.usage.withhold import Withholder


@define  # not frozen, which takes three times as long to make
class _Kind:
    """What an answer's head tells of its body.

    :ivar streamed: it is a stream of events.
    :ivar reader: makes what reads it, if anything does.
    """

    streamed: bool
    reader: Callable[[], UsageReader] | None


def _kind_of(head: ResponseHead) -> _Kind:
    content_type = head.get(b"content-type")
    reader = reader_for(head.status, content_type, head.get(b"content-encoding"), head.get(b"metadata"))
    return _Kind(is_event_stream(content_type), reader)


class Passing:
    """One answer's body.

    :param withholds: a stream's usage was asked for on the proxy's own behalf.
    :param told: what the server has told of itself before.
    :ivar streamed: it is a stream of events; ``counts_events``: which can be read.
    :ivar shortens: what the client gets may be less than vLLM sends.
    :ivar model: as vLLM named it, and ``usage``: once it is over.
    """

    def __init__(self, head: ResponseHead, told: Told, *, withholds: bool) -> None:
        kind = once(head, _kind_of)
        self.streamed = kind.streamed
        self._told = told
        self._reader = None if kind.reader is None else kind.reader()
        self._events = self._reader if isinstance(self._reader, SseReader) else None
        self.counts_events = self._events is not None
        self._withholder = None if self._events is None or not withholds else Withholder(told.fingerprint)
        self.shortens = self._withholder is not None
        self._alike = None if self._events is None else Alike()  # None where no events of this stream are
        self._is_between = False  # two events, and nothing of them is kept
        self.model: str | None = None
        self.usage: Usage | None = None

    def feed(self, data: bytes) -> bytes:
        """Take the next piece, and return what the client gets of it."""
        events = self._events
        if events is None:
            if self._reader is not None:
                self._reader.feed(data)
            return data
        if self._is_between and self._alike is not None:
            alike = self._alike.count(data)
            if alike:  # as it would come of what follows, in less than half the time
                events.counted += alike
                return data
        withholder = self._withholder
        events.feed(data)
        out = data if withholder is None else withholder.feed(data)
        if self._alike is not None:
            self._learn(self._alike, events, data)
        return out

    def _learn(self, alike: Alike, events: SseReader, data: bytes) -> None:
        self._is_between = events.is_between and (self._withholder is None or self._withholder.is_between)
        if self._is_between and not alike.learn(data):
            self._alike = None

    def finish(self) -> bytes:
        """It has come to its end: return what the client gets besides."""
        if self._withholder is None:
            return b""
        rest = self._withholder.finish()
        self._told.fingerprint = self._withholder.fingerprint
        return rest

    def read(self) -> None:
        """It is over, whole or not: see what it told."""
        if self._reader is not None:
            self.model, self.usage = self._reader.finish()
            self._reader = self._events = None
