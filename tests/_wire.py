"""Raw sockets for black-box tests: send bytes, and read answers without taking anything for granted about them."""

import json
import socket
from types import TracebackType
from typing import Any

from _service import MASTER_KEY, Twistd
from attrs import frozen

Lines = list[tuple[bytes, bytes]]


@frozen(kw_only=True)
class Answer:
    """One answer as it stood on the wire.

    :ivar headers: the header lines, in order and in the case they came in.
    :ivar body: chunked coding removed.
    :ivar interim: the informational answers (1xx) before it.
    :ivar chunks: the sizes of its chunks, the last one (0) left out; ``None`` if it was not chunked.
    """

    version: bytes
    status: int
    reason: bytes
    headers: Lines
    body: bytes = b""
    chunks: tuple[int, ...] | None = None
    interim: "tuple[Answer, ...]" = ()

    def all(self, name: str) -> list[bytes]:
        """Return every value of the header ``name`` (lower case)."""
        return [value for key, value in self.headers if key.lower() == name.encode()]

    def get(self, name: str) -> bytes | None:
        """Return the one value of the header ``name``, or ``None``; it must not come twice."""
        values = self.all(name)
        assert len(values) <= 1, (name, values)
        return values[0] if values else None

    def json(self) -> Any:
        """Return the decoded body."""
        return json.loads(self.body)


class Wire:
    """A connection: bytes out, parsed answers in. Everything has the socket's time limit."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._data = bytearray()

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        """Send all of ``data``."""
        self.sock.sendall(data)

    def answer(self, method: str = "GET") -> Answer:
        """Read one answer, the informational ones before it included.

        :param method: of the request that it answers: HEAD has no body.
        """
        interim: list[Answer] = []
        while (head := self.head()).status < 200:
            interim.append(head)
        body, chunks = self._body(head, method)
        return Answer(
            version=head.version,
            status=head.status,
            reason=head.reason,
            headers=head.headers,
            body=body,
            chunks=chunks,
            interim=tuple(interim),
        )

    def head(self) -> Answer:
        """Read the next head, informational or not."""
        text = self._until(b"\r\n\r\n")
        first, *rest = text.split(b"\r\n")
        version, _, tail = first.partition(b" ")
        status, _, reason = tail.partition(b" ")
        lines = []
        for line in rest:
            name, colon, value = line.partition(b":")
            assert colon, line
            assert name == name.strip(), line
            lines.append((name, value.strip(b" \t")))
        return Answer(version=version, status=int(status), reason=reason, headers=lines)

    def ended(self) -> bool:
        """Return whether the peer closes here, with nothing more to say."""
        return not self._data and not self._fill()

    def rest(self) -> bytes:
        """Return everything up to the end of the connection."""
        while self._fill():
            pass
        return self._take(len(self._data))

    def _body(self, head: Answer, method: str) -> tuple[bytes, tuple[int, ...] | None]:
        if method == "HEAD" or head.status in (204, 304):
            return b"", None
        coding, length = head.get("transfer-encoding"), head.get("content-length")
        assert coding is None or length is None
        if coding is not None:
            assert coding == b"chunked"
            assert head.version == b"HTTP/1.1"
            return self._chunked()
        return (self.rest() if length is None else self._exactly(int(length))), None

    def _chunked(self) -> tuple[bytes, tuple[int, ...]]:
        body, sizes = [], []
        while size := int(self._until(b"\r\n"), 16):
            sizes.append(size)
            body.append(self._exactly(size))
            assert self._exactly(2) == b"\r\n"
        assert self._exactly(2) == b"\r\n"
        return b"".join(body), tuple(sizes)

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._data:
            assert self._fill(), f"the connection ended within {bytes(self._data)!r}"
        text = self._take(self._data.index(mark))
        self._take(len(mark))
        return text

    def _exactly(self, count: int) -> bytes:
        while len(self._data) < count:
            assert self._fill(), f"the connection ended {count - len(self._data)} bytes early"
        return self._take(count)

    def _take(self, count: int) -> bytes:
        data = bytes(self._data[:count])
        del self._data[:count]
        return data

    def _fill(self) -> bool:
        data = self.sock.recv(262144)
        self._data += data
        return bool(data)


def wire(service: Twistd) -> Wire:
    """Return a fresh connection to ``service``."""
    return Wire(service.connect())


def request(
    target: str | bytes,
    *lines: str | bytes,
    method: str = "GET",
    body: bytes | None = None,
    key: str | None = MASTER_KEY,
    host: str = "proxy.example",
    version: str = "1.1",
) -> bytes:
    """Return a request as bytes, with exactly the lines given, besides Host, the key and the body's length.

    :param lines: header lines without their CRLF.
    :param body: sent with ``Content-Length``; ``None`` for no framing at all.
    :param key: sent as ``Authorization: Bearer``, ``None`` for none.
    """
    head = [b"%s %s HTTP/%s" % (method.encode(), _bytes(target), version.encode())]
    head += [b"Host: " + host.encode()] if host else []
    head += [b"Authorization: Bearer " + key.encode()] if key else []
    head += [_bytes(line) for line in lines]
    head += [b"Content-Length: %d" % len(body)] if body is not None else []
    return b"\r\n".join([*head, b"", body or b""])


def ask(service: Twistd, target: str | bytes, *lines: str | bytes, method: str = "GET", **more: Any) -> Answer:
    """Send one request (:func:`request`) on a connection of its own, and return the answer."""
    with wire(service) as connection:
        connection.send(request(target, *lines, method=method, **more))
        return connection.answer(method)


def echo(service: Twistd, target: str | bytes, *lines: str | bytes, **more: Any) -> Any:
    """Return what the simulator received (its ``echo`` directive), and check that it was asked once, and answered."""
    answer = ask(service, target, "X-Vllmsim: echo", *lines, **more)
    assert answer.status == 200, answer
    return answer.json()


def received(echoed: Any) -> list[tuple[str, str]]:
    """Return the header lines that the simulator saw."""
    return [(name, value) for name, value in echoed["headers"]]


def values(echoed: Any, name: str) -> list[str]:
    """Return the values that the simulator saw of the header ``name`` (lower case)."""
    return [value for key, value in received(echoed) if key.lower() == name]


def seen(sim: Twistd) -> Any:
    """Return the simulator's own counters, asked of it directly."""
    return sim.get_json("/vllmsim/stats")


def requests_seen(sim: Twistd) -> int:
    """Return how many requests the simulator was ever asked, those about itself left out."""
    return sum(seen(sim)["requests"].values())


#: Of the hop, not of the message, or different from second to second, or added by the proxy.
_NOT_COMPARED = (b"connection", b"transfer-encoding", b"content-length", b"date", b"x-request-id", b"via")


def compare(ours: Answer, direct: Answer, *, chunked: bool = False) -> None:
    """Check that an answer by way of the proxy is vLLM's own, header by header, and has what is added to it.

    :param chunked: vLLM gave no length, so that the body may be framed in another way.
    """
    assert (ours.status, ours.reason, ours.body) == (direct.status, direct.reason, direct.body)
    kept = [(name, value) for name, value in ours.headers if name.lower() not in _NOT_COMPARED]
    assert kept == [(name, value) for name, value in direct.headers if name.lower() not in _NOT_COMPARED]
    assert ours.get("date")
    assert ours.get("x-request-id")
    assert ours.get("via")
    if not chunked:
        assert ours.get("content-length") == direct.get("content-length")
        assert ours.get("transfer-encoding") is None


def new_key(proxy: Twistd) -> str:
    """Make a virtual key and return it."""
    made = ask(proxy, "/key/generate", "Content-Type: application/json", method="POST", body=b"{}").json()
    return str(made["key"])


def _bytes(text: str | bytes) -> bytes:
    return text.encode("latin-1") if isinstance(text, str) else text
