"""Raw sockets for black-box tests: a client that sends just what it is told, and an upstream that plays a script."""

import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from _service import MASTER_KEY, Twistd
from attrs import define, field, frozen

#: Generous: nothing here takes so long unless it hangs.
PATIENCE = 30.0
AUTH = b"Authorization: Bearer " + MASTER_KEY.encode()
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
MiB = 1024 * 1024


class Ended(Exception):
    """The peer ended the connection in the middle of something.

    :ivar how: ``fin`` or ``reset``.
    :ivar data: what had come of it.
    """

    def __init__(self, how: str, data: bytes = b"") -> None:
        super().__init__(f"{how} after {data[-200:]!r}")
        self.how = how
        self.data = data


@frozen
class Message:
    """A request or an answer. ``head`` is as it came, without the empty line."""

    head: bytes
    body: bytes = b""

    @property
    def start(self) -> bytes:
        """The first line."""
        return self.head.partition(b"\r\n")[0]

    @property
    def status(self) -> int:
        """Of an answer."""
        return int(self.start.split(b" ")[1])

    @property
    def target(self) -> bytes:
        """Of a request."""
        return self.start.split(b" ")[1]

    def all(self, name: bytes) -> list[bytes]:
        """Return every value of a header; the name in lower case."""
        lines = [line.partition(b":") for line in self.head.split(b"\r\n")[1:]]
        return [value.strip() for key, _, value in lines if key.lower() == name]

    def get(self, name: bytes) -> bytes:
        """Return the first value of a header, or nothing."""
        return next(iter(self.all(name)), b"")


@define(eq=False)
class Wire:
    """A connected blocking socket, with a reader for HTTP/1.1 that believes nothing.

    :ivar sent: bytes that :meth:`pour` got rid of.
    """

    sock: socket.socket
    sent: int = 0
    _buffer: bytearray = field(factory=bytearray)

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    # out

    def send(self, data: bytes) -> None:
        """Send all of it."""
        self.sock.sendall(data)

    def pour(self, block: bytes, count: int) -> None:
        """Send ``block`` ``count`` times, counting as it goes."""
        for _ in range(count):
            view = memoryview(block)
            while view:
                size = self.sock.send(view)
                self.sent += size
                view = view[size:]

    def half_close(self) -> None:
        """Send FIN and go on reading."""
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close: FIN, or what the kernel makes of it where bytes were not read."""
        self.sock.close()

    def reset(self) -> None:
        """Close with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    # in

    def some(self, limit: int = 65536) -> bytes:
        """Return the next bytes; ``b""`` at FIN.

        :raises Ended: at a reset.
        """
        if self._buffer:
            data = bytes(self._buffer[:limit])
            del self._buffer[:limit]
            return data
        try:
            return self.sock.recv(limit)
        except (ConnectionResetError, BrokenPipeError):
            raise Ended("reset") from None

    def exactly(self, size: int) -> bytes:
        """Return that many bytes."""
        data = bytearray()
        while len(data) < size:
            piece = self._more(bytes(data), size - len(data))
            data += piece
        return bytes(data)

    def line(self) -> bytes:
        """Return the next line without its CRLF."""
        return self._until(b"\r\n")

    def _until(self, end: bytes) -> bytes:
        while end not in self._buffer:
            held = bytes(self._buffer)
            self._buffer.clear()
            self._buffer += held + self._more(held)
        data, _, rest = bytes(self._buffer).partition(end)
        self._buffer = bytearray(rest)
        return data

    def _more(self, had: bytes, limit: int = 65536) -> bytes:
        try:
            data = self.some(limit)
        except Ended as ended:
            raise Ended(ended.how, had) from None
        if not data:
            raise Ended("fin", had)
        return data

    def head(self) -> Message:
        """Return the next message's head."""
        return Message(self._until(b"\r\n\r\n"))

    def chunk(self) -> bytes:
        """Return the next chunk's data; ``b""`` for the last, its trailers taken off."""
        size = int(self.line().partition(b";")[0], 16)
        if not size:
            while self.line():
                pass
            return b""
        data = self.exactly(size)
        assert self.exactly(2) == b"\r\n"
        return data

    def message(self, *, bodiless: bool = False) -> Message:
        """Return the next whole request, or an answer that is framed by a length or by chunks."""
        head = self.head()
        if bodiless:
            return head
        if head.get(b"transfer-encoding"):
            return Message(head.head, b"".join(iter(self.chunk, b"")))
        return Message(head.head, self.exactly(int(head.get(b"content-length") or 0)))

    def rest_or_message(self) -> tuple[bytes, str]:
        """Return the raw bytes of an answer that is whole by its length or its last chunk, else see :meth:`rest`."""
        data = bytearray()
        while True:
            head, blank, body = bytes(data).partition(b"\r\n\r\n")
            length = Message(head).get(b"content-length")
            if blank and (len(body) >= int(length) if length else body.endswith(LAST_CHUNK)):
                return bytes(data), "whole"
            try:
                piece = self.some()
            except Ended as ended:
                return bytes(data), ended.how
            if not piece:
                return bytes(data), "fin"
            data += piece

    def rest(self) -> tuple[bytes, str]:
        """Return everything up to the end of the connection, and how it ended: ``fin`` or ``reset``."""
        data = bytearray()
        try:
            while piece := self.some():
                data += piece
        except Ended as ended:
            return bytes(data), ended.how
        return bytes(data), "fin"

    def readable(self, seconds: float) -> bool:
        """Whether bytes (or an end) come within that time."""
        return bool(self._buffer) or bool(select.select([self.sock], [], [], seconds)[0])

    def gone_at(self, seconds: float = PATIENCE) -> float:
        """Wait for the peer's FIN or RST, bytes unread or not, and return when it was seen (``monotonic``)."""
        poll = select.poll()
        poll.register(self.sock, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
        if not poll.poll(seconds * 1000):
            raise AssertionError(f"the peer did not close within {seconds} s")
        return time.monotonic()


Script = Callable[[Wire], None]


class Upstream:
    """A listener on loopback whose connections each play the script of the moment in a thread of their own."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self._script: Script | None = None
        self._wires: list[Wire] = []
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []
        self._lock = threading.Lock()  # a connection is taken whole, or not at all
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """``http://127.0.0.1:port``."""
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """Listen no more."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    @contextmanager
    def playing(self, script: Script) -> Iterator[None]:
        """Play ``script`` on each connection accepted meanwhile; an assertion that fails in it fails the test.

        A script that returns leaves its connection open until the end of the block; one that was cut off by it
        is ended, and what it was doing then is no failure.
        """
        self._errors, self._wires, self._threads = [], [], []
        self.connections, self._script = 0, script
        try:
            yield
        finally:
            with self._lock:
                self._script = None
            for wire in self._wires:
                with suppress(OSError):
                    wire.sock.shutdown(socket.SHUT_RDWR)
            for thread in self._threads:
                thread.join(PATIENCE)
            for wire in self._wires:
                wire.close()
        failures = [error for error in self._errors if isinstance(error, AssertionError | TimeoutError | ValueError)]
        if failures:
            raise failures[0]

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._take(sock)

    def _take(self, sock: socket.socket) -> None:
        script = self._script
        if script is None:
            sock.close()
            return
        sock.settimeout(PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire = Wire(sock)
        self.connections += 1
        self._wires.append(wire)
        thread = threading.Thread(target=self._play, args=(script, wire), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _play(self, script: Script, wire: Wire) -> None:
        try:
            script(wire)
        except (Ended, OSError, AssertionError, ValueError) as error:
            self._errors.append(error)


def each_request(answer: bytes = OK) -> Script:
    """Return a script that answers every request alike."""

    def script(wire: Wire) -> None:
        with suppress(Ended):
            while True:
                wire.message()
                wire.send(answer)

    return script


def connect(service: Twistd) -> Wire:
    """Connect to a process, with a generous time limit."""
    sock = service.connect()
    sock.settimeout(PATIENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Wire(sock)


def request(
    method: bytes, target: bytes, *lines: bytes, body: bytes | None = None, version: bytes = b"1.1", key: bytes = AUTH
) -> bytes:
    """Return a request with Host, a good key, and a Content-Length where there is a body."""
    lines = (b"Host: proxy.test", key, *lines)
    if body is not None:
        lines += (b"Content-Type: application/json", b"Content-Length: %d" % len(body))
    return b"%s %s HTTP/%s\r\n%s\r\n\r\n%s" % (method, target, version, b"\r\n".join(lines), body or b"")


def chunk(data: bytes) -> bytes:
    """Return ``data`` as one chunk."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def settled(value: Callable[[], int], seconds: float = 1.0) -> int:
    """Wait until a number has stayed the same for ``seconds``, and return it."""
    deadline = time.monotonic() + PATIENCE
    last, since = value(), time.monotonic()
    while time.monotonic() < deadline:
        time.sleep(0.05)
        now = value()
        if now != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since >= seconds:
            return now
    raise AssertionError(f"still moving after {PATIENCE} s: {last}")


def written(service: Twistd) -> int:
    """Bytes a process has written to files (``write`` calls; what it sends on sockets does not count)."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{service.process.pid}/io").read_text().splitlines())
    return int(fields["wchar"])


def open_files(service: Twistd) -> set[str]:
    """Return the names of the regular files that a process has open, deleted ones included."""
    names = set()
    for entry in Path(f"/proc/{service.process.pid}/fd").iterdir():
        with suppress(OSError):
            name = str(entry.readlink())
            if name.startswith("/") and not name.startswith("/dev/"):
                names.add(name)
    return names
