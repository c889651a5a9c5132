"""An answer's body on its way past: read for what it used, and without what the client did not ask for."""

from vllmproxy.http1.message import ResponseHead
from vllmproxy.upstreams.server import Told
from vllmproxy.usage.reader import reader_for
from vllmproxy.usage.sse import SseReader
from vllmproxy.usage.tokens import Usage
from vllmproxy.usage.withhold import Withholder


class Passing:
    """One answer's body.

    :param withholds: a stream's usage was asked for on the proxy's own behalf.
    :param told: what the server has told of itself before.
    :ivar streamed: it is a stream of events.
    :ivar model: as vLLM named it, and ``usage``: once it is over.
    """

    def __init__(self, head: ResponseHead, told: Told, *, withholds: bool) -> None:
        content_type = head.get(b"content-type")
        self.streamed = content_type is not None and content_type.startswith(b"text/event-stream")
        self._told = told
        encoding, metadata = head.get(b"content-encoding"), head.get(b"metadata")
        self._reader = reader_for(head.status, content_type, encoding, metadata)
        self._withholder: Withholder | None = None
        if withholds and isinstance(self._reader, SseReader):
            self._withholder = Withholder(told.fingerprint)
        self.model: str | None = None
        self.usage: Usage | None = None

    def feed(self, data: bytes) -> bytes:
        """Take the next piece, and return what the client gets of it."""
        if self._reader is not None:
            self._reader.feed(data)
        return data if self._withholder is None else self._withholder.feed(data)

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
            self._reader = None
