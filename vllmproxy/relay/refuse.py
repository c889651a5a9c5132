"""The proxy's own answers: what a refusal or a failure looks like on the wire."""

from http import HTTPStatus
from time import time
from wsgiref.handlers import format_date_time

from vllmproxy.errors import ApiError, body_of, error_body
from vllmproxy.http1.message import WireError, header_lines
from vllmproxy.http1.rules import METHODS
from vllmproxy.http1.stream import Stream
from vllmproxy.relay.headers import SERVER

_JSON = b"content-type: application/json\r\n"


def reason_of(status: int) -> bytes:
    """Return the reason phrase that RFC 9110 §15 gives a status."""
    return HTTPStatus(status).phrase.encode()


def refusal_lines(request_id: bytes) -> bytes:
    """Return the header lines of a refusal: it does not come from vLLM and does not say that it does."""
    date = b"date: %s\r\n" % format_date_time(time()).encode()
    return date + SERVER + b"x-request-id: %s\r\n" % request_id + _JSON


def refuse(stream: Stream, error: ApiError, request_id: bytes, *, anthropic: bool = False) -> None:
    """Answer ``stream`` with ``error``, in the shape that the route's SDK reads."""
    lines = refusal_lines(request_id) + header_lines(list(error.headers))
    stream.respond(error.status, reason_of(error.status), lines, body_of(error, anthropic=anthropic))


def refuse_body(stream: Stream, error: WireError, request_id: bytes, *, anthropic: bool = False) -> None:
    """Answer ``stream`` with what is wrong with its body."""
    body = wire_body(error, anthropic=anthropic)
    stream.respond(error.status, reason_of(error.status), refusal_lines(request_id), body)


def wire_refusal(error: WireError, request_id: bytes) -> bytes:
    """Return the whole answer to a request that is no HTTP; its connection is closed afterwards."""
    body = wire_body(error)
    lines = refusal_lines(request_id) + b"content-length: %d\r\nconnection: close\r\n" % len(body)
    if error.status == 405:
        lines += b"allow: %s\r\n" % b", ".join(sorted(METHODS))
    return b"HTTP/1.1 %d %s\r\n%s\r\n%s" % (error.status, reason_of(error.status), lines, body)


def wire_body(error: WireError, *, anthropic: bool = False) -> bytes:
    """Return the JSON body for a request refused by the wire."""
    return error_body(error.status, "invalid_request_error", "None", error.message, anthropic=anthropic)
