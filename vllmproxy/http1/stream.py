"""One request and its answer on a server connection."""

from typing import TYPE_CHECKING, Any, Literal, Protocol

from attrs import define, field
from twisted.python.failure import Failure

from vllmproxy.http1.message import RequestHead, WireError

if TYPE_CHECKING:
    from vllmproxy.http1.server import ServerChannel

#: How the body of an answer ends: by its length, by the last chunk, with the connection, or there is none.
Framing = Literal["length", "chunked", "close", "none"]


class Receiver(Protocol):
    """Takes a request's body and its end. Called in the reactor's thread."""

    def body_received(self, data: bytes) -> None:
        """A piece of the request's body, chunked coding removed."""

    def body_complete(self) -> None:
        """The request is whole."""

    def body_failed(self, error: WireError) -> None:
        """The body broke its framing or stopped coming. The receiver answers with ``error``; nothing else follows."""

    def client_gone(self, reason: Failure) -> None:
        """The client closed or reset. Nothing that is written arrives."""

    def tunnel_received(self, data: bytes) -> None:
        """Bytes from the client after :meth:`Stream.start_tunnel`."""

    def tunnel_half_closed(self) -> None:
        """The client will send no more, but still reads (plain sockets only)."""


class Producer(Protocol):
    """What fills the answer: paused while the client does not read."""

    def pauseProducing(self) -> None: ...

    def resumeProducing(self) -> None: ...


@define(slots=True, eq=False)
class Stream:
    """A request that is being answered. Its handler sets ``receiver``, then calls :meth:`read_body` when it wants
    the body, and answers with :meth:`start_response`, :meth:`write`, :meth:`finish` (or :meth:`respond`).

    :ivar complete: the request's body has arrived whole.
    :ivar bytes_in: body bytes given to the receiver.
    :ivar bytes_out: answer body bytes written, framing not counted.
    :ivar status: of the answer begun, 0 before.
    """

    head: RequestHead
    channel: "ServerChannel"
    receiver: Receiver | None = None
    producer: Producer | None = None
    complete: bool = False
    flowing: bool = False
    paused: bool = False
    over: bool = False
    status: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    closes: bool = False
    held: list[bytes] = field(factory=list)
    held_bytes: int = 0
    _framing: Framing = "none"
    _pending: bytes = b""
    _continued: bool = False

    # the request's body

    @property
    def awaits_continue(self) -> bool:
        """Whether the client waits to be told that its body is wanted."""
        return self.head.expects_continue and not self._continued and not self.bytes_in and not self.held

    def read_body(self) -> None:
        """Let the body flow to the receiver, what was held of it first; answer ``Expect: 100-continue``."""
        self.flowing = True
        if self.head.expects_continue and not self.complete and not self.held and not self._continued:
            self._continued = True
            self.channel.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.deliver()
        self.channel.update_reading()

    def take_body(self) -> bytes | None:
        """Return all of the body, where all of it has come already; then nothing of it goes to the receiver. ``None``
        where it has not, or some of it went there."""
        if not self.complete or self.flowing or self.bytes_in:
            return None
        data = self.held[0] if len(self.held) == 1 else b"".join(self.held)
        self.held, self.held_bytes, self.bytes_in = [], 0, len(data)
        return data

    def deliver(self) -> None:
        """Hand on what is held, if the handler wants it, and the end of the request after it."""
        if not self.flowing or self.over:
            return
        held, self.held, self.held_bytes = self.held, [], 0
        receiver = self.receiver
        assert receiver is not None
        for data in held:
            if self.over:
                return
            self.bytes_in += len(data)
            receiver.body_received(data)
        if self.complete and not self.over:
            self.flowing = False
            receiver.body_complete()

    def pause_body(self) -> None:
        """Take no more of the body from the socket for now."""
        self.paused = True
        self.channel.update_reading()

    def resume_body(self) -> None:
        """Take the body again."""
        self.paused = False
        self.channel.update_reading()

    # the answer

    def set_producer(self, producer: Producer) -> None:
        """Name what is to be paused while the client does not read."""
        self.producer = producer
        if self.channel.congested:
            producer.pauseProducing()

    def inform(self, status: int, reason: bytes, lines: bytes) -> None:
        """Pass an informational answer (RFC 9110 §15.2); HTTP/1.0 clients know none."""
        if self.head.version == (1, 1) and not self.status:
            self.channel.send(b"HTTP/1.1 %d %s\r\n%s\r\n" % (status, reason, lines))

    def start_response(
        self, status: int, reason: bytes, lines: bytes, *, length: int | None, bodiless: bool = False
    ) -> None:
        """Begin the answer. The head leaves with the first :meth:`write`, :meth:`flush` or :meth:`finish`.

        :param lines: header lines with their CRLF, without Connection and without framing.
        :param length: bytes of the body where known; else it is chunked, or ends with the connection (HTTP/1.0).
        :param bodiless: no body follows; a ``length`` is then only told (HEAD, 304).
        """
        self.status = status
        if bodiless:
            self._framing = "none"
        elif length is not None:
            self._framing = "length"
        else:
            self._framing = "chunked" if self.head.version == (1, 1) else "close"
        self.closes = not self.head.keep_alive or not self.complete or self._framing == "close" or self.channel.is_last
        if length is not None and status != 204:  # RFC 9110 §8.6
            lines += b"content-length: %d\r\n" % length
        elif self._framing == "chunked":
            lines += b"transfer-encoding: chunked\r\n"
        if self.closes:
            lines += b"connection: close\r\n"
        elif self.head.version == (1, 0):
            lines += b"connection: keep-alive\r\n"
        self._pending = b"HTTP/1.1 %d %s\r\n%s\r\n" % (status, reason, lines)

    def flush(self) -> None:
        """Send the head now if it has not left yet."""
        if self._pending:
            head, self._pending = self._pending, b""
            self.channel.send(head)

    def write(self, data: bytes, last: bool = False) -> None:
        """Write a piece of the body; ``last`` also ends the answer, in the same segment where it fits."""
        if not data:  # as a chunk it would be the last one
            return self.finish() if last else None
        self.bytes_out += len(data)
        if last:
            self.producer = None  # whoever produced is done; its connection may serve another already
        if self._framing == "chunked":
            end = b"\r\n0\r\n\r\n" if last else b"\r\n"
            data = b"%s%x\r\n%s%s" % (self._pending, len(data), data, end)
            self._pending = b""
        elif self._pending:
            data = self._pending + data
            self._pending = b""
        self.channel.send(data)
        if last:
            self._end()

    def finish(self) -> None:
        """End the answer."""
        tail = self._pending + (b"0\r\n\r\n" if self._framing == "chunked" else b"")
        self._pending = b""
        if tail:
            self.channel.send(tail)
        self._end()

    def respond(self, status: int, reason: bytes, lines: bytes, body: bytes) -> None:
        """Give a whole answer of the proxy's own."""
        bodiless = self.head.method == b"HEAD"
        self.start_response(status, reason, lines, length=len(body), bodiless=bodiless)
        if body and not bodiless:
            self.write(body, last=True)
        else:
            self.finish()

    def abort(self) -> None:
        """Reset the connection, so that a truncated answer cannot be taken for a whole one."""
        if not self.over:
            self.over = True
            self.channel.abort()

    def _end(self) -> None:
        self.over = True
        self.producer = None
        self.channel.finished(self)

    # the tunnel

    def start_tunnel(self, reason: bytes, lines: bytes) -> None:
        """Answer 101 and pass bytes both ways from here on (RFC 9110 §7.8)."""
        self.status = 101
        self.channel.send(b"HTTP/1.1 101 %s\r\n%s\r\n" % (reason, lines))
        self.channel.start_tunnel()

    def write_raw(self, data: bytes) -> None:
        """Send tunnel bytes to the client."""
        self.bytes_out += len(data)
        self.channel.send(data)

    def half_close(self) -> None:
        """Send no more; where the transport cannot half-close (TLS), close."""
        self.channel.half_close()

    def close(self) -> None:
        """Close after what was written has left."""
        self.over = True
        self.channel.lose()

    # about the connection

    @property
    def peer(self) -> Any:
        """The client's address as Twisted has it (IPv4Address, IPv6Address, UNIXAddress)."""
        return self.channel.peer

    @property
    def is_congested(self) -> bool:
        """Whether the client takes too little of what is written."""
        return self.channel.congested

    @property
    def is_secure(self) -> bool:
        """Whether the client speaks TLS to us."""
        return self.channel.is_secure
