"""For the corpus: an upstream that counts every byte, and a client that hears all that a proxy has to say."""

import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from _raw import LAST_CHUNK, OK, PATIENCE, Ended, Message, Wire


class Witness:
    """The script of an upstream (:class:`_raw.Upstream`) that writes down what it is asked, and answers what is whole.

    :ivar whole: the requests that came complete, chunked coding removed.
    :ivar bytes: everything that came, counted when its connection ends; ``read``: what of it belongs to a complete
        request.
    :ivar began: a byte has come.
    :ivar endings: how each connection ended, ``fin`` or ``reset``.
    """

    def __init__(self) -> None:
        self.whole: list[Message] = []
        self.bytes = 0
        self.read = 0
        self.raw = b""
        self.endings: list[str] = []
        self.began = False

    @property
    def partial(self) -> int:
        """Bytes that belong to no complete request."""
        return self.bytes - self.read

    def __call__(self, wire: Wire) -> None:
        counted: Any = CountedSocket(wire.sock)
        wire = Wire(counted)
        done = 0
        try:
            self.began = wire.readable(PATIENCE) or self.began
            while True:
                message = wire.message()
                read = counted.bytes - len(wire._buffer)
                self.read += read - done
                done = read
                self.whole.append(message)
                wire.send(OK.removesuffix(b"ok") if message.start.startswith(b"HEAD ") else OK)
        except Ended as ended:
            self.endings.append(ended.how)
        finally:
            self.bytes += counted.bytes
            self.raw += bytes(counted.raw)


class CountedSocket:
    """A socket that keeps what is read from it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.raw = bytearray()

    @property
    def bytes(self) -> int:
        return len(self.raw)

    def recv(self, size: int) -> bytes:
        data = self._sock.recv(min(size, 1 << 20))
        self.raw += data
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def converse(sock: socket.socket, data: bytes, done: Callable[[bytes], bool], seconds: float) -> tuple[bytes, str]:
    """Send ``data`` and read what comes meanwhile and afterwards, as far as the peer takes it and gives it.

    :returns: what came, and how it ended: ``done`` (said the caller), ``fin``, ``reset``, or ``late``.
    """
    deadline = time.monotonic() + seconds
    sock.setblocking(False)
    heard, view = bytearray(), memoryview(data)
    while time.monotonic() < deadline:
        readable, writable, _ = select.select([sock], [sock] if view else [], [], deadline - time.monotonic())
        if writable:
            with suppress(BlockingIOError):
                try:
                    view = view[sock.send(view) :]
                except (BrokenPipeError, ConnectionResetError):
                    view = memoryview(b"")
        if readable:
            try:
                piece = sock.recv(262_144)
            except ConnectionResetError:
                return bytes(heard), "reset"
            if not piece:
                return bytes(heard), "fin"
            heard += piece
            if done(bytes(heard)):
                return bytes(heard), "done"
    return bytes(heard), "late"


def answers_in(data: bytes, *, bodiless: bool = False, ended: bool = False) -> tuple[list[Message], bytes]:
    """Return the final answers (1xx left out) that are whole in ``data``, and the bytes that are not.

    :param bodiless: they answer HEAD.
    :param ended: the connection has ended, and so has a body that neither has a length nor is chunked.
    """
    answers = []
    while data:
        head, blank, rest = data.partition(b"\r\n\r\n")
        if not blank:
            break
        answer = Message(head)
        if answer.status < 200:
            data = rest
            continue
        body = _body_in(answer, rest, bodiless or answer.status in (204, 304), ended)
        if body is None:
            break
        size, content = body
        answers.append(Message(head, content))
        data = rest[size:]
    return answers, data


def _body_in(answer: Message, rest: bytes, bodiless: bool, ended: bool) -> tuple[int, bytes] | None:
    """Return the bytes that a body takes, and what it says; ``None`` where it is not whole."""
    length = answer.get(b"content-length")
    if bodiless:
        return 0, b""
    if answer.get(b"transfer-encoding"):
        return _chunks_in(rest)
    if not length:
        return (len(rest), rest) if ended else None
    return (int(length), rest[: int(length)]) if len(rest) >= int(length) else None


def _chunks_in(rest: bytes) -> tuple[int, bytes] | None:
    at, pieces = 0, []
    while (end := rest.find(b"\r\n", at)) >= 0:
        size = int(rest[at:end], 16)
        if not size:
            last = end - 1
            return (last + len(LAST_CHUNK), b"".join(pieces)) if rest[last:].startswith(LAST_CHUNK) else None
        if len(rest) < end + 2 + size + 2:
            return None
        pieces.append(rest[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return None
