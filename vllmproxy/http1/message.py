"""Heads as values: what the parsers produce and the rules and the relay read."""

from collections.abc import Callable
from typing import Any, Final, TypeVar

from attrs import Factory, define, field, frozen

Result = TypeVar("Result")
Head = TypeVar("Head", "RequestHead", "ResponseHead")


#: The header that names a request, which is another for each; and the names, as a pattern, that are taken over.
REQUEST_ID: Final = b"x-request-id"
SANE_ID: Final = rb"[A-Za-z0-9._:-]{1,128}"

#: Statuses of what is not malformed, but came too slowly, or was too much.
_KINDS: Final = {408: "too_slow", 413: "too_large", 414: "too_large", 431: "too_large"}


class WireError(Exception):
    """A request that RFC 9110/9112 or a size limit forbids. It is answered, and the connection closed.

    :ivar status: the HTTP status of the answer.
    :ivar message: one sentence for the caller.
    :ivar kind: what a record calls it.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = _KINDS.get(status, "malformed_request")


class BadAnswer(Exception):
    """The upstream's answer is not HTTP that may be passed on (RFC 9112 §6.3, or a size limit)."""


@frozen
class Limits:
    """What one message may cost, in bytes and in lines.

    :ivar head: bytes of the header lines of a request.
    :ivar lines: header lines.
    :ivar target: bytes of the request target.
    :ivar body: bytes of a request's body; 0 for any number.
    :ivar answer_head: bytes of an upstream's answer head; vLLM's ``metadata`` header alone takes tens of KiB.
    :ivar answer_lines: header lines of an answer.
    """

    head: int = 65_536
    lines: int = 128
    target: int = 16_384
    body: int = 0
    answer_head: int = 1_048_576
    answer_lines: int = 512


@define(slots=True)
class RequestHead:
    """A request's head, checked by :func:`vllmproxy.http1.rules.check_request`.

    :ivar target: origin-form (RFC 9112 §3.2.1), byte for byte as sent (an absolute-form is reduced to it).
    :ivar version: ``(1, 0)`` or ``(1, 1)``.
    :ivar headers: the lines as sent, in order, without Content-Length.
    :ivar fields: lower-case name → values, in order, of the same.
    :ivar content_length: bytes of the body, ``None`` where no Content-Length was sent.
    :ivar chunked: the body is in the chunked coding.
    :ivar websocket: the request asks to become a WebSocket tunnel (RFC 6455 §4.1).
    :ivar memo: of :func:`once`; ``None`` where no other head is expected to be alike.
    """

    method: bytes
    target: bytes
    version: tuple[int, int]
    headers: list[tuple[bytes, bytes]]
    fields: dict[bytes, list[bytes]] = field(factory=dict)
    content_length: int | None = None
    chunked: bool = False
    keep_alive: bool = True
    websocket: bool = False
    expects_continue: bool = False
    memo: dict[Any, Any] | None = field(default=None, eq=False, repr=False)

    @property
    def has_body(self) -> bool:
        """Whether the framing announces a body, an empty chunked one included (RFC 9112 §6)."""
        return self.chunked or bool(self.content_length)

    @property
    def is_plain(self) -> bool:
        """Whether it asks for nothing out of the ordinary: the body, if any, is as long as Content-Length says."""
        asks_more = self.chunked or self.websocket or self.expects_continue
        return self.version == (1, 1) and self.keep_alive and not asks_more

    def again(self, length: int, request_id: bytes) -> "RequestHead":
        """Return the same head, which :attr:`is_plain`, with another Content-Length, and where it has an X-Request-ID
        with another one of those."""
        headers, fields = self.headers, self.fields
        if request_id:
            headers = [(name, request_id if name.lower() == REQUEST_ID else value) for name, value in headers]
            fields = {**fields, REQUEST_ID: [request_id]}
        return RequestHead(self.method, self.target, self.version, headers, fields, length, memo=self.memo)


@define(slots=True)
class ResponseHead:
    """An answer's head.

    :ivar headers: the lines as sent, in order, without Content-Length.
    :ivar fields: lower-case name → values, in order, of the same.
    :ivar content_length: ``None`` where none was sent.
    :ivar chunked: the body is in the chunked coding; neither this nor a length: it ends with the connection.
    :ivar bodiless: no body follows, whatever the head says (HEAD, 1xx, 204, 304: RFC 9112 §6.3).
    :ivar memo: of :func:`once`; ``None`` where no other head is expected to be alike.
    """

    status: int
    reason: bytes
    headers: list[tuple[bytes, bytes]]
    version: bytes = b"1.1"
    fields: dict[bytes, list[bytes]] = field(
        default=Factory(lambda self: fields_of(self.headers), takes_self=True), kw_only=True
    )
    content_length: int | None = None
    chunked: bool = False
    bodiless: bool = False
    memo: dict[Any, Any] | None = field(default=None, eq=False, repr=False)

    @property
    def is_plain(self) -> bool:
        """Whether a body follows that is as long as Content-Length says, or else ends with the connection."""
        return not (self.chunked or self.bodiless)

    def with_length(self, length: int) -> "ResponseHead":
        """Return the same head, which :attr:`is_plain`, with another Content-Length."""
        return ResponseHead(
            self.status, self.reason, self.headers, self.version, length, fields=self.fields, memo=self.memo
        )

    def get(self, name: bytes) -> bytes | None:
        """Return the first value of the header ``name`` (lower case)."""
        values = self.fields.get(name)
        return None if values is None else values[0]


def once(head: Head, work: Callable[..., Result], *more: Any) -> Result:
    """Return what ``work`` makes of a head: done once for all that are alike.

    :param work: depends on the head, but not on its length nor on its X-Request-ID, and never returns ``None``.
    :param more: its other arguments, which are the same for all of these.
    """
    memo = head.memo
    if memo is None:
        return work(head, *more)
    found: Result | None = memo.get(work)
    if found is None:
        found = memo[work] = work(head, *more)
    return found


def fields_of(headers: list[tuple[bytes, bytes]]) -> dict[bytes, list[bytes]]:
    """Return lower-case name → values, in order."""
    fields: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        lower = name.lower()
        if lower in fields:
            fields[lower].append(value)
        else:
            fields[lower] = [value]
    return fields


def without_length(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the lines without Content-Length."""
    return [line for line in headers if line[0].lower() != b"content-length"]


def header_lines(headers: list[tuple[bytes, bytes]]) -> bytes:
    """Return the header lines as they stand on the wire, each with its CRLF."""
    return b"".join([b"%s: %s\r\n" % line for line in headers])
