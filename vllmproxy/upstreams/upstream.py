"""One vLLM server as a value: where it listens, and what to call it in a request."""

import ipaddress
import os
import re
from typing import Literal, cast
from urllib.parse import unquote_to_bytes

from attrs import frozen

Scheme = Literal["http", "https", "unix"]

_DEFAULT_PORTS = {"http": 80, "https": 443}
#: ``sun_path`` of Linux is 108 bytes, the closing NUL among them.
_MAX_SOCKET_PATH = 107
_URL = re.compile(r"(?P<scheme>https?)://(?P<netloc>[^/?#]*)(?P<path>[^?#]*)(?P<rest>.*)", re.IGNORECASE)
_NETLOC = re.compile(r"(?P<host>\[[^\[\]]*\]|[^\[\]:]*)(?P<port>:.*)?")
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
_SEGMENT = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,=:@-]|%[0-9A-Fa-f]{2})+")


@frozen(kw_only=True)
class Upstream:
    """Where one vLLM server is.

    :ivar host: a name or an address, IPv6 without brackets; ``localhost`` for a UNIX socket.
    :ivar port: 1 to 65535; 0 for a UNIX socket.
    :ivar socket_path: the UNIX socket's path, ``None`` for TCP.
    :ivar base_path: ``b""``, or a path like ``b"/v1"`` that every target is joined to; no slash at its end.
    :ivar authority: the value of the ``Host`` header (RFC 9112 §3.2), without the scheme's own port.
    :ivar origin: what a request URI begins with, ``scheme://authority``; ``http://localhost`` for a socket.
    """

    scheme: Scheme
    host: str
    port: int
    socket_path: str | None
    base_path: bytes
    authority: bytes
    origin: bytes

    @property
    def name(self) -> str:
        """What logs and metrics call it; never a credential, because none is accepted."""
        if self.socket_path is not None:
            return f"unix:{self.socket_path}"
        return (self.origin + self.base_path).decode("ascii")

    @classmethod
    def parse(cls, text: str) -> "Upstream":
        """Return the upstream that ``http://…``, ``https://…`` or ``unix:/path`` names.

        :raises ValueError: with one sentence that does not repeat ``text``, which may hold a password.
        """
        if not text.isprintable():
            raise ValueError("the URL holds a control character; write it on one line, without any")
        if text[:5].lower() == "unix:":
            return _unix(text[5:])
        match = _URL.fullmatch(text)
        if match is None:
            raise ValueError("an upstream begins with http:// or https://, or is unix:/path/to/socket")
        if match["rest"]:
            raise ValueError("an upstream URL has no query and no fragment; leave out what follows ? or #")
        scheme = cast(Scheme, match["scheme"].lower())
        host, port = _host_and_port(match["netloc"], _DEFAULT_PORTS[scheme])
        shown = f"[{host}]" if ":" in host else host
        authority = (shown if port == _DEFAULT_PORTS[scheme] else f"{shown}:{port}").encode("ascii")
        return cls(
            scheme=scheme,
            host=host,
            port=port,
            socket_path=None,
            base_path=_base_path(match["path"]),
            authority=authority,
            origin=scheme.encode("ascii") + b"://" + authority,
        )


def _unix(path: str) -> Upstream:
    """Take ``/path`` or ``///path``; what stands between two and three slashes would be a host."""
    if path.startswith("//"):
        path = path[2:]
    if not path.startswith("/") or path.endswith("/"):
        raise ValueError("a UNIX socket is written unix:/path/to/socket, with an absolute path to a socket")
    if "?" in path or "#" in path:
        raise ValueError("a UNIX socket has no query and no fragment; leave out what follows ? or #")
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        raise ValueError(f"the UNIX socket's path is over {_MAX_SOCKET_PATH} bytes; choose a shorter one")
    return Upstream(
        scheme="unix",
        host="localhost",
        port=0,
        socket_path=path,
        base_path=b"",
        authority=b"localhost",
        origin=b"http://localhost",
    )


def _host_and_port(netloc: str, default_port: int) -> tuple[str, int]:
    if "@" in netloc:
        raise ValueError("an upstream URL holds no user name or password; give vLLM's key with --upstream-key-file")
    match = _NETLOC.fullmatch(netloc)
    if match is None or not match["host"]:
        raise ValueError("the URL names no usable host; write it like http://gpu1:8000 or http://[::1]:8000")
    return _host(match["host"]), _port(match["port"], default_port)


def _port(text: str | None, default: int) -> int:
    if text is None:
        return default
    if not re.fullmatch(r":[0-9]{1,5}", text) or not 1 <= int(text[1:]) <= 65535:
        raise ValueError("the port after the host is a number from 1 to 65535")
    return int(text[1:])


def _host(text: str) -> str:
    try:
        if text.startswith("["):
            if "%" in text:  # a zone has no place in a Host header (RFC 6874 §4)
                raise ValueError
            return str(ipaddress.IPv6Address(text[1:-1]))
        if re.fullmatch(r"[0-9.]+", text):
            return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise ValueError("the host looks like an IP address and is none; check its digits") from None
    if not _NAME.fullmatch(text) or len(text) > 253:
        raise ValueError("the host is not a name of letters, digits, dots, hyphens; use the xn-- form of others")
    return text.lower()


def _base_path(path: str) -> bytes:
    """Return the path to join targets to. It may not hold what no target may: encoded slashes and such."""
    path = path.removesuffix("/")
    for segment in path.split("/")[1:]:
        if not _SEGMENT.fullmatch(segment):
            raise ValueError("the URL's path holds // or a character that has to be percent-encoded; mend it")
        decoded = unquote_to_bytes(segment)
        if decoded in {b".", b".."} or re.search(rb"[/\\;\x00-\x1f\x7f]", decoded):
            raise ValueError("the URL's path holds a dot segment or an encoded slash; write the plain path")
    return path.encode("ascii")
