"""Turns the bytes of a connection into requests. No sockets, no answers."""

import re
from typing import Any, Protocol

import httptools

from vllmproxy.http1.chunks import Chunks
from vllmproxy.http1.message import Limits, RequestHead, WireError, fields_of
from vllmproxy.http1.rules import VERSIONS_SPOKEN, check_request
from vllmproxy.http1.templates import Cut, KnownHeads, Whence, cut

_BAD_SYNTAX = "The request is not well-formed HTTP/1.1."
#: Those that are spoken here.
_VERSIONS = {"1.1": (1, 1), "1.0": (1, 0)}
#: llhttp's words for a version that is none of its own.
_OTHER_VERSION = "Invalid HTTP version"
_EMPTY_LINES = re.compile(rb"[\r\n]*")
_WHOLE_LINES = re.compile(rb"(?:\r\n)*\r?\Z")


class RequestSink(Protocol):
    """Takes what a :class:`RequestReader` finds. It only notes it: the reader is in the middle of its bytes."""

    def request_begun(self, head: RequestHead) -> None:
        """A head that passed every check."""

    def body_read(self, data: bytes) -> None:
        """A piece of the body of the request begun last."""

    def request_read(self) -> None:
        """That request is whole."""

    def whole_request(self, head: RequestHead, body: bytes) -> None:
        """All of these for one that came in one piece."""


class RequestReader:
    """Parses requests with llhttp, and refuses what llhttp or :mod:`vllmproxy.http1.rules` refuse.

    :param known: heads that need no parsing, and ``whence`` the bytes come.
    :ivar error: set once, when the bytes are no HTTP that may be served; nothing is parsed afterwards.
    :ivar in_head: some of a head has come, not all of it.
    :ivar early: what came behind a WebSocket handshake; ``None`` where there is none. Nothing is parsed until
        :meth:`resume` says that the connection stayed HTTP.
    """

    def __init__(self, sink: RequestSink, limits: Limits, known: KnownHeads, whence: Whence) -> None:
        self._sink = sink
        self._limits = limits
        self._known = known
        self._whence = whence
        self._parser: Any = httptools.HttpRequestParser(self)
        self.error: WireError | None = None
        self.in_head = False
        self.early: bytes | None = None
        self._head: RequestHead | None = None
        self._head_bytes = 0
        self._body_bytes = 0
        self._progressed = False
        self._silent = 0  # bytes fed in a row that carried no message on: they reach no callback that could count
        self._data = b""
        self._at = 0  # where in that the message goes on, or the next one begins, as far as is known
        self._begun = bytearray()  # what earlier reads brought of an unfinished head
        self._head_at = 0  # where in that and the read of now the head begins
        self._line_begun = b""  # the CR of an empty line before it that is still to end
        self._chunks: Chunks | None = None  # of the body that comes
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._ignoring_head = False
        self._body_follows_upgrade = False
        self._between = True  # two requests, or before the first; not behind the last
        self._cut: Cut | None = None  # the head that was not known, and is parsed now

    def feed(self, data: bytes) -> None:
        """Parse the next bytes, as they came."""
        if self.early is not None:
            self.early += data
            return
        if self.error is not None:
            return
        size, self._progressed = len(data), False
        while data:
            self._data, self._at = data, 0
            try:
                self._parser.feed_data(data)
                data = b""
                if self.in_head:
                    self._begun += self._data[self._head_at :]
                    self._head_at = 0
                elif self._chunks is not None:
                    self._follow(self._chunks)
                elif self._at < len(self._data):
                    self._pass_over_empty_lines()
            except httptools.HttpParserUpgrade as upgrade:
                data = self._after_upgrade(data[upgrade.args[0] :])
            except (httptools.HttpParserError, WireError) as error:
                self._broke(error)
                return
        self._silent = 0 if self._progressed else self._silent + size
        if self._silent > self._limits.head:
            most = self._limits.head
            self.error = WireError(431, f"A header line, a chunk extension or a trailer has more than {most} bytes.")

    def _broke(self, error: httptools.HttpParserError | WireError) -> None:
        """The parser refused something, or a callback of ours did, which has said why."""
        self.error = self.error or _refusal_of(error)

    def take(self, data: bytes) -> bool:
        """Take the next bytes, as they came, if they are one whole request with a head that is known; they are not to
        be fed then."""
        self._cut = None
        if not self._between or self.error is not None or self.early is not None or self._line_begun:
            return False
        found = self._cut = cut(data, self._whence)
        if found is None:
            return False
        at = found[3]
        size = len(data) - at
        head = None if size > self._limits.body > 0 else self._known.match(found, size)
        if head is None:
            return False
        self._head = None
        self._silent = 0
        self._sink.whole_request(head, data[at:])
        return True

    @property
    def body_left(self) -> int:
        """How many bytes are still to come of a body whose length is known; 0 where there is none, or it is not."""
        head = self._head
        return 0 if head is None or head.content_length is None else head.content_length - self._body_bytes

    def resume(self) -> None:
        """The connection stays HTTP although a WebSocket was asked for: parse what came behind the handshake."""
        early, self.early = self.early, None
        if early:
            self.feed(early)

    def take_early(self) -> bytes:
        """The connection is a tunnel: return what came behind the handshake."""
        early, self.early = self.early, None
        return early or b""

    def close(self) -> None:
        """Break the reference cycles with the parser and the sink: nothing is fed any more."""
        self._parser = None
        self._sink = None  # type: ignore[assignment]

    def _refuse(self, status: int, message: str) -> None:
        """Break out of the parser's callback; ``feed`` finds the error that is kept here."""
        self.error = WireError(status, message)
        raise self.error

    def _after_upgrade(self, rest: bytes) -> bytes:
        """Go on after llhttp took the end of a head for the end of HTTP; return what is still to be parsed.

        Any Upgrade but a WebSocket's is ignored, as RFC 9110 §7.8 allows: a new parser is told the same framing, so
        that the body is parsed as the body that it is.
        """
        self._parser = httptools.HttpRequestParser(self)
        head = self._head
        assert head is not None
        if not self._body_follows_upgrade:
            self.early = rest
            return b""
        self._body_follows_upgrade = False
        framing = b"transfer-encoding: chunked" if head.chunked else b"content-length: %d" % (head.content_length or 0)
        self._ignoring_head = True
        self._parser.feed_data(b"POST / HTTP/1.1\r\n%s\r\n\r\n" % framing)
        return rest

    # llhttp's callbacks

    def on_message_begin(self) -> None:
        if self._ignoring_head:
            return
        self.in_head = True
        self._between = False
        self._progressed = True
        self._head_bytes = 0
        self._body_bytes = 0
        self._head = None
        self._begun.clear()
        self._head_at = self._at
        if self._data[self._at] in b"\r\n" or self._line_begun:
            self._head_at = self._pass_over_empty_lines()
            if self._line_begun:
                self._refuse(400, _BAD_SYNTAX)
        self._target = b""
        self._headers = []

    def _pass_over_empty_lines(self) -> int:
        """Return where the empty lines end that may stand before a request (RFC 9112 §2.2). llhttp takes any CR and LF
        for one there."""
        end = _EMPTY_LINES.match(self._data, self._at).end()  # type: ignore[union-attr]  # it always does
        lines = self._line_begun + self._data[self._at : end]
        if not _WHOLE_LINES.match(lines):
            self._refuse(400, _BAD_SYNTAX)
        self._line_begun = b"\r" if lines.endswith(b"\r") else b""
        return end

    def on_url(self, data: bytes) -> None:
        if self._ignoring_head:
            return
        self._target += data
        if len(self._target) > self._limits.target:
            self._refuse(414, f"The request's target has more than {self._limits.target} bytes.")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.in_head:
            return  # a trailer field, or the head that _after_upgrade makes up: neither is used
        if value[-1:] in (b" ", b"\t") and name.lower() == b"transfer-encoding":
            self._refuse(400, "Transfer-Encoding has a blank behind it.")
        self._headers.append((name, value.rstrip(b" \t")))
        self._head_bytes += len(name) + len(value) + 4
        if len(self._headers) > self._limits.lines or self._head_bytes > self._limits.head:
            lines, size = self._limits.lines, self._limits.head
            self._refuse(431, f"The request's head has more than {lines} lines or {size} bytes.")

    def on_headers_complete(self) -> None:
        if self._ignoring_head:
            self._ignoring_head = False
            return
        self._progressed = True
        self.in_head = False
        method = self._parser.get_method()
        self._check_line(method)
        head = RequestHead(
            method=method,
            target=self._target,
            version=_VERSIONS.get(self._parser.get_http_version(), (0, 0)),
            headers=self._headers,
            fields=fields_of(self._headers),
        )
        try:
            check_request(head)
        except WireError as error:
            self._refuse(error.status, error.message)
        self._body_follows_upgrade = self._parser.should_upgrade() and not head.websocket
        self._chunks = Chunks() if head.chunked else None
        self._head = head
        if self._cut is not None and not self._head_at:
            self._known.learn(self._cut, head, self._limits.head - self._head_bytes)
        self._cut = None
        self._sink.request_begun(head)
        if (head.content_length or 0) > self._limits.body > 0:
            self._refuse_body()

    def _check_line(self, method: bytes) -> None:
        """Refuse a request line that has several spaces in a place, or names RTSP: llhttp takes it for one of HTTP, and
        does not tell. Find where the body begins, too."""
        raw = self._begun + self._data if self._begun else self._data
        if not raw.startswith(b"%s %s HTTP/" % (method, self._target), self._head_at):
            line = raw[self._head_at : raw.index(b"\r\n", self._head_at)]
            if b" RTSP/" in line:
                self._refuse(505, "This is RTSP; only HTTP/1.1 and HTTP/1.0 are spoken here.")
            self._refuse(400, "The parts of the request line must have one space between them.")
        self._at = raw.index(b"\r\n\r\n", self._head_at) + 4 - len(self._begun)

    def _follow(self, chunks: Chunks) -> None:
        """Look at the lines of a chunked body that have come, too."""
        try:
            self._at = chunks.feed(self._data, self._at)
        except WireError as error:
            self._refuse(error.status, error.message)

    def on_body(self, data: bytes) -> None:
        self._progressed = True
        if self._chunks is None:
            self._at += len(data)
        self._body_bytes += len(data)
        if self._body_bytes > self._limits.body > 0:
            self._refuse_body()
        self._sink.body_read(data)

    def _refuse_body(self) -> None:
        self._refuse(413, f"The request's body has more than {self._limits.body} bytes.")

    def on_message_complete(self) -> None:
        self._progressed = True
        if self._body_follows_upgrade:
            return
        chunks, self._chunks = self._chunks, None
        if chunks is not None:
            self._follow(chunks)
            if not chunks.whole:
                self._refuse(400, _BAD_SYNTAX)
        self._between = self._head is not None and self._head.keep_alive
        self._sink.request_read()


def _refusal_of(error: Exception) -> WireError:
    """Say what it is that llhttp refused."""
    if str(error) == _OTHER_VERSION:
        return WireError(505, VERSIONS_SPOKEN)
    return WireError(400, _BAD_SYNTAX)
