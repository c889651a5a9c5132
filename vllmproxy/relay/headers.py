"""Which header lines pass, which are added and which are taken: the table in ``docs/headers.rst``, as code. Pure."""

import re
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address

from attrs import define, frozen
from twisted.internet.interfaces import IAddress

from vllmproxy import PRODUCT
from vllmproxy.http1.message import REQUEST_ID, SANE_ID, RequestHead, ResponseHead, once
from vllmproxy.http1.places import client_named
from vllmproxy.http1.rules import HOP_BY_HOP, connection_options
from vllmproxy.keys.credentials import CREDENTIAL_HEADERS
from vllmproxy.relay.targets import local_location
from vllmproxy.upstreams.upstream import Upstream

SERVER = b"server: %s\r\n" % PRODUCT

#: What vLLM obeys and only an operator may set (vLLM ``entrypoints/openai``: data-parallel routing and priority).
_FORBIDDEN = frozenset([b"x-data-parallel-rank", b"x-session-id", b"x-vllm-priority"])

#: What says where a request came from: believed only from a trusted proxy.
FORWARDED = frozenset(
    [
        b"forwarded",
        b"via",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-port",
        b"x-forwarded-proto",
        b"x-forwarded-prefix",
        b"x-forwarded-server",
        b"x-real-ip",
    ]
)

#: Made anew for the upstream, whatever the client sent.
_REPLACED = frozenset([b"host", b"content-length", b"expect", REQUEST_ID, *CREDENTIAL_HEADERS])

_DROPPED = HOP_BY_HOP | _FORBIDDEN | _REPLACED
_DROPPED_UNTRUSTED = _DROPPED | FORWARDED
_DROPPED_TRUSTED = _DROPPED | {b"x-forwarded-for", b"via"}

_DROPPED_ANSWER = HOP_BY_HOP | {b"content-length", REQUEST_ID}

_SANE_ID = re.compile(SANE_ID + rb"\Z")


@frozen
class Client:
    """Who is at the other end.

    :ivar address: text, behind a trusted proxy the one that it names; empty for a UNIX socket.
    :ivar peer: text of the connection's own address.
    :ivar trusted: the connection comes from a trusted proxy.
    """

    address: str
    peer: str
    trusted: bool


class TrustedProxies:
    """Whose ``X-Forwarded-For`` counts."""

    def __init__(self, networks: tuple[IPv4Network | IPv6Network, ...]) -> None:
        self._networks = networks

    def client(self, peer: str, head: RequestHead) -> Client:
        """Return who the client is: the right-most address in ``X-Forwarded-For`` that is not a trusted proxy."""
        if not self._networks or not self._trusts(peer):
            return _direct(peer)
        chain = [part.strip() for value in head.fields.get(b"x-forwarded-for", ()) for part in value.split(b",")]
        for part in reversed(chain):
            address = part.decode("ascii", "replace")
            if not self._trusts(address):
                return Client(address if _is_address(address) else peer, peer, True)
        return Client(peer, peer, True)

    def client_of_peer(self, peer: IAddress | None) -> str:
        """Return what a connection is counted as: a trusted proxy's as nobody's in particular."""
        host = getattr(peer, "host", "")
        return "" if self._trusts(host) else client_named(host)

    def _trusts(self, text: str) -> bool:
        try:
            address = ip_address(text)
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self._networks)


@lru_cache(maxsize=1024)
def _direct(peer: str) -> Client:
    return Client(peer, peer, False)


def _is_address(text: str) -> bool:
    if "%" in text:  # a zone may hold anything, and means nothing on another machine
        return False
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def request_id_in(fields: dict[bytes, list[bytes]]) -> bytes | None:
    """Return the caller's own request id, if it is a sane token."""
    given = fields.get(REQUEST_ID)
    return given[0] if given is not None and len(given) == 1 and _SANE_ID.match(given[0]) else None


@define  # not frozen, which takes three times as long to make
class Around:
    """Header lines for the upstream, with their CRLF: those before the framing and the request id, and those after."""

    before: bytes
    after: bytes


def around_of(head: RequestHead, client: Client, secure: bool, authorization: bytes, *, host: bytes) -> Around:
    """Return what is the same for each head that is alike.

    :param secure: the client speaks TLS to us.
    :param authorization: the upstream's own key as a whole header line, or empty.
    :param host: the upstream's authority.
    """
    dropped = _DROPPED_TRUSTED if client.trusted else _DROPPED_UNTRUSTED
    nominated = connection_options(head.fields)
    lines = [b"host: %s\r\n" % host]
    for name, value in head.headers:
        lower = name.lower()
        if lower not in dropped and lower not in nominated:
            lines.append(b"%s: %s\r\n" % (name, value))
    fields = {name: head.fields[name] for name in FORWARDED & head.fields.keys() - nominated} if client.trusted else {}
    after = authorization + b"".join(_forwarded_lines(head, fields, client, secure))
    return Around(b"".join(lines), after)


def request_lines(head: RequestHead, around: Around, id: bytes, length: int | None = None) -> bytes:
    """Return the header lines for the upstream, with their CRLF.

    :param length: bytes of the body where it is not as the client sent it.
    """
    framing = b""
    if head.chunked:
        framing = b"transfer-encoding: chunked\r\n"
    elif head.content_length is not None:
        framing = b"content-length: %d\r\n" % (head.content_length if length is None else length)
    if head.websocket:
        framing += b"connection: Upgrade\r\nupgrade: websocket\r\n"
    return b"%b%bx-request-id: %b\r\n%b" % (around.before, framing, id, around.after)


def _forwarded_lines(head: RequestHead, fields: dict[bytes, list[bytes]], client: Client, secure: bool) -> list[bytes]:
    """Return Via and X-Forwarded-*: ours alone, or with ours behind those in ``fields``, a trusted proxy's."""
    peer = client.peer.encode() or b"unknown"
    version = b"%d.%d" % head.version
    via, chain = b"%s vllmproxy" % version, peer
    lines = []
    if b"via" in fields:
        via = b", ".join([*fields[b"via"], via])
    if b"x-forwarded-for" in fields:
        chain = b", ".join([*fields[b"x-forwarded-for"], chain])
    if b"x-forwarded-proto" not in fields:
        lines.append(b"x-forwarded-proto: %s\r\n" % (b"https" if secure else b"http"))
    if b"x-forwarded-host" not in fields and b"host" in head.fields:
        lines.append(b"x-forwarded-host: %s\r\n" % head.fields[b"host"][0])
    lines.append(b"x-forwarded-for: %s\r\nvia: %s\r\n" % (chain, via))
    return lines


def answer_lines(head: ResponseHead, id: bytes, upstream: Upstream) -> bytes:
    """Return the header lines for the client: vLLM's, less the hop's own, with the request id and Via added.

    :param upstream: whose answer it is.
    """
    lines = once(head, _passing_lines, upstream)
    return b"%bx-request-id: %b\r\nvia: %b vllmproxy\r\n" % (lines, id, head.version)


def _passing_lines(head: ResponseHead, upstream: Upstream) -> bytes:
    nominated = connection_options(head.fields)
    lines = []
    for name, value in head.headers:
        lower = name.lower()
        if lower == b"location":
            lines.append(b"%s: %s\r\n" % (name, local_location(value, upstream.authority, upstream.base_path)))
        elif lower not in _DROPPED_ANSWER and lower not in nominated:
            lines.append(b"%s: %s\r\n" % (name, value))
    if head.status == 101:
        lines.append(b"connection: Upgrade\r\nupgrade: websocket\r\n")
    return b"".join(lines)
