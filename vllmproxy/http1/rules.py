"""What llhttp does not check, on heads as values (RFC 9110, RFC 9112). Pure.

llhttp is strict about framing by itself as long as no leniency is switched on; it leaves Host, the request target,
the version, Transfer-Encoding codings, look-alike names and Expect to its user.
"""

import re
from ipaddress import AddressValueError, IPv6Address

from vllmproxy.http1.message import BadAnswer, RequestHead, ResponseHead, WireError, without_length

METHODS = frozenset([b"GET", b"HEAD", b"OPTIONS", b"POST", b"PUT", b"PATCH", b"DELETE"])

#: Lines that name the hop, not the message (RFC 9110 §7.6.1), and those older software knows as such.
HOP_BY_HOP = frozenset(
    [
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    ]
)

#: What tells whether a connection ends: llhttp takes the second, which older software sends, for the first.
CONNECTION = frozenset([b"connection", b"proxy-connection"])

#: Names that decide something here or at the upstream: spelt with an underscore they would reach WSGI- and
#: CGI-like readers as the same name, so the look-alike is refused.
_GUARDED = frozenset(
    [
        b"host",
        b"content-length",
        b"transfer-encoding",
        b"connection",
        b"upgrade",
        b"expect",
        b"authorization",
        b"proxy-authorization",
        b"api-key",
        b"x-api-key",
        b"x-litellm-api-key",
        b"content-type",
        b"content-encoding",
        b"x-request-id",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-port",
        b"x-forwarded-prefix",
        b"x-forwarded-proto",
        b"x-forwarded-server",
        b"x-real-ip",
        b"x-data-parallel-rank",
        b"x-session-id",
        b"x-vllm-priority",
    ]
)

VERSIONS_SPOKEN = "Only HTTP/1.1 and HTTP/1.0 are spoken here."

_NAME = rb"[A-Za-z0-9._~!$&'()*+,;=-]*"
_HOST = re.compile(rb"(?:(?!:)%s(?:%%[0-9A-Fa-f]{2}%s)*|\[([0-9A-Fa-f:.]+)\])(?::([0-9]{0,5}))?\Z" % (_NAME, _NAME))
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?#]*)(.*)\Z", re.DOTALL)
_TARGET = re.compile(rb"[\x21\x22\x24-\x7e]+\Z")
#: Of a Content-Length.
MOST_DIGITS = 18
_DIGITS = re.compile(rb"[0-9]{1,%d}\Z" % MOST_DIGITS)


def check_request(head: RequestHead) -> None:
    """Fill in what the framing and the connection header say, or refuse.

    :raises WireError: with the status and the sentence to answer.
    """
    if head.version not in ((1, 0), (1, 1)):
        raise WireError(505, VERSIONS_SPOKEN)
    if head.method not in METHODS:
        raise WireError(405, "This method is not supported.")
    _check_names(head)
    _check_framing(head)
    _check_target(head)
    if b"expect" in head.fields:
        _check_expect(head)
    if head.version == (1, 0) or not CONNECTION.isdisjoint(head.fields):
        _read_connection(head)


def _check_names(head: RequestHead) -> None:
    for name in head.fields:
        if b"_" in name and name.replace(b"_", b"-") in _GUARDED:
            raise WireError(400, "A header name with an underscore imitates a header that decides something.")


def _check_framing(head: RequestHead) -> None:
    codings = head.fields.get(b"transfer-encoding")
    lengths = head.fields.get(b"content-length")
    if codings is not None:
        if head.version == (1, 0):
            raise WireError(400, "Transfer-Encoding does not exist in HTTP/1.0.")
        if lengths is not None:
            raise WireError(400, "Content-Length and Transfer-Encoding exclude each other.")
        if len(codings) != 1:
            raise WireError(400, "Transfer-Encoding is given more than once.")
        if codings[0].lower() != b"chunked":
            raise WireError(501, "The only transfer coding understood is chunked.")
        head.chunked = True
    elif lengths is not None:
        if len(lengths) != 1 or not _DIGITS.match(lengths[0]):
            raise WireError(400, "Content-Length is not one plain decimal number.")
        _take_length(head, lengths[0])


def _take_length(head: RequestHead | ResponseHead, length: bytes) -> None:
    """Have the length beside the header lines, so that heads that differ in it only share those."""
    head.content_length = int(length)
    head.headers = without_length(head.headers)
    del head.fields[b"content-length"]


def _check_target(head: RequestHead) -> None:
    hosts = head.fields.get(b"host", [])
    if len(hosts) > 1 or (not hosts and head.version == (1, 1)):
        raise WireError(400, "A request needs exactly one Host header.")
    if hosts and hosts[0]:
        host = _HOST.match(hosts[0])
        if host is None or (host.lastindex and not _could_be(*host.groups(b""))):
            raise WireError(400, "The Host header is malformed.")
    if not _TARGET.match(head.target):
        raise WireError(400, "The request target has a character that must be percent-encoded.")
    if head.target.startswith(b"/"):
        return
    absolute = _ABSOLUTE.match(head.target)
    if absolute is None:
        raise WireError(400, "The request target must be a path that begins with a slash.")
    authority, rest = absolute.groups()
    if not hosts or not authority or authority.lower() != hosts[0].lower():
        raise WireError(400, "The request target names another host than the Host header.")
    head.target = rest if rest.startswith(b"/") else b"/" + rest


def _could_be(address: bytes, port: bytes) -> bool:
    """Tell whether what stood in the brackets of a Host is an IPv6 address, and what stood behind its colon a port."""
    try:
        return int(port or b"0") <= 65535 and (not address or bool(IPv6Address(address.decode("ascii"))))
    except AddressValueError:
        return False


def _check_expect(head: RequestHead) -> None:
    expect = head.fields[b"expect"]
    if head.version == (1, 0):
        return
    if len(expect) != 1 or expect[0].lower() != b"100-continue":
        raise WireError(417, "The only expectation understood is 100-continue.")
    head.expects_continue = head.has_body


def _read_connection(head: RequestHead) -> None:
    options = connection_options(head.fields)
    closes = b"close" in options or b"close" in _options(head.fields.get(b"proxy-connection", []))
    head.keep_alive = not closes and (head.version == (1, 1) or b"keep-alive" in options)
    upgrade = head.fields.get(b"upgrade")
    if upgrade is None or b"upgrade" not in options or head.version == (1, 0):
        return
    if head.method == b"GET" and [value.strip().lower() for value in upgrade] == [b"websocket"]:
        if head.has_body:
            raise WireError(400, "A WebSocket handshake has no body.")
        head.websocket = True


def connection_options(fields: dict[bytes, list[bytes]]) -> frozenset[bytes]:
    """Return the options that Connection names, lower case (RFC 9110 §7.6.1)."""
    values = fields.get(b"connection")
    return frozenset() if values is None else _options(values)


def _options(values: list[bytes]) -> frozenset[bytes]:
    return frozenset(option.strip().lower() for value in values for option in value.split(b","))


def check_response(head: ResponseHead, method: bytes) -> None:
    """Fill in the answer's framing as RFC 9112 §6.3 has it.

    :raises BadAnswer: where two readers could disagree about where the body ends.
    """
    if not 100 <= head.status <= 599:
        raise BadAnswer(f"status {head.status}")
    fields = head.fields
    codings, lengths = fields.get(b"transfer-encoding"), fields.get(b"content-length")
    if codings and lengths:
        raise BadAnswer("Content-Length with Transfer-Encoding")
    if codings:
        if head.version == b"1.0":
            raise BadAnswer("Transfer-Encoding in HTTP/1.0")
        if len(codings) != 1 or codings[0].lower() != b"chunked":
            raise BadAnswer("a transfer coding other than chunked")
        head.chunked = True
    elif lengths:
        if len(lengths) != 1 or not _DIGITS.match(lengths[0]):
            raise BadAnswer("a Content-Length that is not one plain decimal number")
        _take_length(head, lengths[0])
    head.bodiless = method == b"HEAD" or head.status in (204, 304) or head.status < 200
