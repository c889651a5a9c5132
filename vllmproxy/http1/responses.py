"""Turns the bytes of an upstream connection into answers, with the same suspicion as requests. No sockets."""

import re
from collections.abc import Callable
from typing import Any

import httptools

from vllmproxy.http1.message import BadAnswer, Limits, ResponseHead
from vllmproxy.http1.rules import CONNECTION, check_response
from vllmproxy.http1.templates import AnswerTemplate

#: Informational answers that one request may have. There are two kinds in use, and each needs but one.
_MOST_INFORMED = 32
_BLANKS = (b" ", b"\t")
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class ResponseReader:
    """Parses one answer after the other; :meth:`begin` says what the next one is an answer to.

    :ivar head: of the answer, once it is complete and checked.
    :ivar pieces: of its body, or of the tunnel, for the owner to take.
    :ivar whole: the answer is complete.
    :ivar extra: more came than the answer: the connection is not to be used again.
    :ivar reusable: as far as the head says.
    :ivar tunnel: the answer was a 101 that was asked for; all that follows is raw.
    :ivar fed: bytes taken while no final head is complete.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._parser: Any = None
        self._template = AnswerTemplate()
        self.begin(b"", upgrade=False, inform=None)

    def begin(self, method: bytes, *, upgrade: bool, inform: Callable[[ResponseHead], None] | None) -> None:
        """The next bytes answer a request of ``method``.

        :param upgrade: it asked for a tunnel.
        :param inform: takes informational answers.
        """
        self._method = method
        self._upgrade = upgrade
        self._inform = inform
        self._reason = b""
        self._data = b""
        self._begun = bytearray()  # what earlier reads brought while no final head was complete
        self._head_at = 0  # where in that and the read of now the current head begins
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = self._overhead = self._informed = 0
        self._error: BadAnswer | None = None
        self.head: ResponseHead | None = None
        self.pieces: list[bytes] = []
        self.whole = self.extra = self.reusable = self.tunnel = False
        self.fed = 0
        if self._parser is None:
            self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Parse the next bytes.

        :raises BadAnswer: when they are no answer that may be passed on.
        """
        if self.tunnel:
            self.pieces.append(data)
            return
        if self.whole:
            self.extra = True
            return
        if self.head is None and self._take_alike(data):
            return
        self._data = data
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._switch(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._broke()
        if self.head is None:
            self._begun += data
            self.fed += len(data)
            if self.fed > self._limits.answer_head:
                raise BadAnswer("a head that is too large")
        elif self.whole:
            if self.head.bodiless:
                self._parser = None  # llhttp waits for a body that does not come (HEAD): take a fresh one next time
        elif self.pieces:
            self._overhead = 0
        else:
            self._overhead += len(data)
            if self._overhead > self._limits.answer_head:
                raise BadAnswer("a chunk extension or a trailer without end")

    def _take_alike(self, data: bytes) -> bool:
        """Take ``data`` if it is one whole answer whose head is that of the one before but for its length."""
        found = None if self.fed or self._method == b"HEAD" else self._template.match(data)
        if found is None:
            return False
        self.head, body = found
        self.pieces.append(body)
        self._inform = None
        self.whole = self.reusable = True
        return True

    def _broke(self) -> None:
        """llhttp refused something. Behind a whole answer that only discards the connection."""
        if not self.whole:
            raise self._error or BadAnswer("malformed HTTP") from None
        self.extra = True

    def take(self) -> bytes:
        """Return the body's bytes that came since the last call."""
        pieces, self.pieces = self.pieces, []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    @property
    def ends_with_connection(self) -> bool:
        """Whether only the connection's end tells where the body, or the tunnel, ends (RFC 9112 §6.3, rule 8)."""
        head = self.head
        return head is not None and (self.tunnel or (not head.chunked and head.content_length is None))

    def _switch(self, rest: bytes) -> None:
        """llhttp left HTTP: the tunnel begins."""
        if self.head is None or self.head.status != 101:
            raise BadAnswer("an Upgrade that nobody asked for")
        self.tunnel = True
        if rest:
            self.pieces.append(rest)

    def _reject(self, message: str) -> None:
        """Break out of the parser's callback; ``feed`` raises what is kept here."""
        self._error = BadAnswer(message)
        raise self._error

    # llhttp's callbacks

    def on_message_begin(self) -> None:
        if self.whole:
            self.extra = True

    def on_status(self, reason: bytes) -> None:
        if not self.whole:
            self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.head is not None:
            if not self.whole and name.lower() in (b"transfer-encoding", b"content-length"):
                self._reject("a trailer that frames")  # RFC 9110 §6.5.1
            return
        if value[-1:] in _BLANKS and name.lower() == b"transfer-encoding":
            self._reject("a blank behind the transfer coding")  # llhttp would read another coding than we
        self._headers.append((name, value.rstrip(b" \t")))
        self._head_bytes += len(name) + len(value) + 4
        if len(self._headers) > self._limits.answer_lines or self._head_bytes > self._limits.answer_head:
            self._reject("a head that is too large")

    def on_headers_complete(self) -> None:
        if self.whole:
            return
        raw = self._begun + self._data if self._begun else self._data
        if not raw.startswith(b"HTTP/", self._head_at):  # llhttp does not tell
            self._reject("RTSP, Icecast, or an empty line before HTTP")
        version = self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            self._reject("an unknown HTTP version")
        if _CONTROL.search(self._reason):
            self._reject("a control character in the reason phrase")
        head = ResponseHead(self._parser.get_status_code(), self._reason, self._headers, version.encode())
        try:
            check_response(head, self._method)
        except BadAnswer as error:
            self._reject(str(error))
        if head.status == 101:
            if not self._upgrade:
                self._reject("101 to a request that did not ask for it")
        elif head.status < 200:
            self._informed += 1
            if head.chunked or head.content_length or self._informed > _MOST_INFORMED:
                self._reject("an informational answer with a body, or too many of them")
            if self._inform is not None:
                self._inform(head)
            self._headers, self._reason, self._head_bytes = [], b"", 0
            self._head_at = raw.index(b"\r\n\r\n", self._head_at) + 4
            return
        self.head = head
        # After HEAD, an upstream that sends the body it announced would answer the next request with it.
        bodiless_for_sure = not (self._method == b"HEAD" and (head.content_length or head.chunked))
        self._inform = None
        self.reusable = (
            version == "1.1" and bodiless_for_sure and (CONNECTION.isdisjoint(head.fields) or not _says_close(head))
        )
        self.whole = head.bodiless and head.status != 101
        if self.reusable:
            self._template.learn(head, raw, self._head_at, self._limits.answer_head - self._head_bytes)

    def on_body(self, data: bytes) -> None:
        if self.whole:
            self.extra = True
        elif self.head is None:
            self._reject("an informational answer with a body")
        else:
            self.pieces.append(data)

    def on_message_complete(self) -> None:
        if self.head is not None and self.head.status != 101:
            self.whole = True


def _says_close(head: ResponseHead) -> bool:
    return any(b"close" in value.lower() for name in CONNECTION for value in head.fields.get(name, ()))
