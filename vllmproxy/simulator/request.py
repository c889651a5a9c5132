"""One request as it came off the wire, and the little of its body that is kept."""

import hashlib
import uuid
from urllib.parse import unquote

import httptools
from attrs import Factory, define, field

#: A JSON body is kept up to this many bytes; what is longer is read, counted and refused.
BODY_LIMIT = 64 * 1024 * 1024


def split_target(target: bytes) -> tuple[str, str]:
    """Return the path, percent-decoded once as uvicorn does, and the raw query of a request target."""
    try:
        url = httptools.parse_url(target)
    except httptools.HttpParserInvalidURLError:
        return target.decode("latin-1"), ""
    path = (url.path or b"").decode("latin-1")
    return unquote(path), (url.query or b"").decode("latin-1")


@define(slots=True, kw_only=True, eq=False)
class Request:
    """A request whose head is complete.

    :ivar headers: name and value pairs, as they came and in that order.
    :ivar connection: the number of its connection on this server, from 1.
    :ivar number: its own number on that connection, from 1.
    :ivar complete: whether the whole body has come.
    :ivar upgrade: whether the bytes after the head belong to another protocol.
    :ivar length: body bytes so far.
    :ivar digest: a running hash of the body, where one was asked for with :meth:`hash_body`.
    :ivar keep: how many body bytes to keep at most.
    """

    method: str
    target: bytes
    version: str
    headers: tuple[tuple[bytes, bytes], ...]
    keep_alive: bool
    connection: int = 0
    number: int = 0
    complete: bool = False
    upgrade: bool = False
    length: int = 0
    keep: int = 0
    body: bytearray = Factory(bytearray)
    digest: "hashlib._Hash | None" = None
    path: str = field(init=False)
    query: str = field(init=False)
    id: str = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.path, self.query = split_target(self.target)
        self.id = self.header(b"x-request-id") or uuid.uuid4().hex[:16]

    def header(self, name: bytes) -> str:
        """Return the first value under that lower-case name, or an empty string."""
        for key, value in self.headers:
            if key.lower() == name:
                return value.decode("latin-1")
        return ""

    @property
    def websocket(self) -> bool:
        """Whether it asks for a WebSocket; any other upgrade is not heard."""
        named = "upgrade" in self.header(b"connection").lower()
        return named and self.method == "GET" and self.header(b"upgrade").lower() == "websocket"

    def hash_body(self) -> None:
        """Keep a sha256 of the body instead of its bytes."""
        self.digest = hashlib.sha256()

    def feed(self, data: bytes) -> None:
        """Take the next piece of the body."""
        self.length += len(data)
        if self.digest is not None:
            self.digest.update(data)
        if self.length <= self.keep:
            self.body += data
        elif self.body:
            self.body.clear()
