"""WebSocket (RFC 6455) as the simulated ``/v1/realtime`` speaks it: every frame comes back, unmasked."""

import base64
import hashlib
from email.utils import formatdate

from attrs import define, field

from vllmproxy.simulator.exchange import Exchange

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_CLOSE, _PING, _PONG = 0x8, 0x9, 0xA
PROTOCOL_ERROR = 1002


def accept_key(key: bytes) -> bytes:
    """Return ``Sec-WebSocket-Accept`` for a ``Sec-WebSocket-Key`` (RFC 6455 §4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + _GUID).digest())


def frame(opcode: int, payload: bytes) -> bytes:
    """Return one final, unmasked frame."""
    return _frame_head(0x80 | opcode, len(payload)) + payload


def _frame_head(first: int, length: int) -> bytes:
    if length < 126:
        return bytes((first, length))
    if length < 65536:
        return bytes((first, 126)) + length.to_bytes(2, "big")
    return bytes((first, 127)) + length.to_bytes(8, "big")


def unmask(data: bytes, mask: bytes, offset: int) -> bytes:
    """Return payload bytes without their mask; ``offset`` is where in the frame they begin."""
    size = len(data)
    turned = mask[offset % 4 :] + mask[: offset % 4]
    key = int.from_bytes((turned * (size // 4 + 1))[:size], "big")
    return (int.from_bytes(data, "big") ^ key).to_bytes(size, "big")


@define(slots=True)
class FrameEcho:
    """Turns the bytes a client sends into the bytes of the answer; sans-I/O.

    Data frames come back as they arrive, however long, a ping as a pong, a close as a close.

    :ivar closed: the closing handshake, or a protocol error, is over: nothing more is read.
    """

    closed: bool = False
    _buffer: bytearray = field(factory=bytearray, init=False)
    _opcode: int = field(default=0, init=False)
    _mask: bytes = field(default=b"", init=False)
    _left: int = field(default=0, init=False)
    _offset: int = field(default=0, init=False)

    def feed(self, data: bytes) -> bytes:
        """Return what the client is to be sent for these bytes."""
        self._buffer += data
        out = bytearray()
        while not self.closed:
            piece = self._payload() if self._left else self._head()
            if piece is None:
                break
            out += piece
        return bytes(out)

    def _head(self) -> bytes | None:
        """Take a frame's head off the buffer; ``None`` if it is not all there."""
        if len(self._buffer) < 2:
            return None
        first, second = self._buffer[0], self._buffer[1]
        extra = {126: 2, 127: 8}.get(second & 0x7F, 0)
        size = 2 + extra + 4
        control = first & 0x08
        if not second & 0x80 or first & 0x70 or (control and (extra or not first & 0x80)):
            self.closed = True
            return frame(_CLOSE, PROTOCOL_ERROR.to_bytes(2, "big"))
        length = second & 0x7F
        if len(self._buffer) < size + (length if control else 0):
            return None
        if extra:
            length = int.from_bytes(self._buffer[2 : 2 + extra], "big")
        self._opcode, self._mask = first & 0x0F, bytes(self._buffer[size - 4 : size])
        self._left, self._offset = length, 0
        del self._buffer[:size]
        if control:
            return self._control()
        return _frame_head(first, length)

    def _control(self) -> bytes:
        payload = unmask(bytes(self._buffer[: self._left]), self._mask, 0)
        del self._buffer[: self._left]
        self._left = 0
        if self._opcode == _CLOSE:
            self.closed = True
            return frame(_CLOSE, payload[:2])
        return frame(_PONG, payload) if self._opcode == _PING else b""

    def _payload(self) -> bytes | None:
        data = bytes(self._buffer[: self._left])
        if not data:
            return None
        del self._buffer[: len(data)]
        plain = unmask(data, self._mask, self._offset)
        self._left -= len(data)
        self._offset += len(data)
        return plain


@define(slots=True)
class FrameTunnel:
    """Echoes frames on an upgraded connection, and closes it after a close frame."""

    _exchange: Exchange
    _echo: FrameEcho = field(factory=FrameEcho)

    def feed(self, data: bytes) -> None:
        """Answer the next bytes from the client."""
        if self._echo.closed:
            return
        answer = self._echo.feed(data)
        if answer:
            self._exchange.raw(answer)
        if self._echo.closed:
            self._exchange.channel.close()


@define(slots=True)
class RawTunnel:
    """Echoes bytes on an upgraded connection, whatever they are."""

    _exchange: Exchange

    def feed(self, data: bytes) -> None:
        """Send the bytes back."""
        self._exchange.raw(data)


def accept(exchange: Exchange, *, raw: bool = False) -> None:
    """Answer a WebSocket handshake, with a 101 if it is a good one."""
    request = exchange.request
    if not request.upgrade:
        _plain(exchange, b"426 Upgrade Required", b"Failed to open a WebSocket connection.\n")
        return
    if request.header(b"sec-websocket-version") != "13" or not request.header(b"sec-websocket-key"):
        _plain(exchange, b"400 Bad Request", b"Failed to open a WebSocket connection: bad handshake.\n")
        return
    lines = (
        b"HTTP/1.1 101 Switching Protocols",
        b"Upgrade: websocket",
        b"Connection: Upgrade",
        b"Sec-WebSocket-Accept: " + accept_key(request.header(b"sec-websocket-key").encode("latin-1")),
        b"date: " + _date(exchange),
        b"server: uvicorn",
    )
    tunnel = RawTunnel(exchange) if raw else FrameTunnel(exchange)
    exchange.upgrade(b"\r\n".join((*lines, b"", b"")), tunnel)


def refuse(exchange: Exchange) -> None:
    """Answer a handshake with the 403 that uvicorn gives where no WebSocket is accepted."""
    _plain(exchange, b"403 Forbidden", b"")


def _date(exchange: Exchange) -> bytes:
    return formatdate(exchange.clock.seconds(), usegmt=True).encode()


def _plain(exchange: Exchange, status: bytes, body: bytes) -> None:
    lines = (
        b"HTTP/1.1 " + status,
        b"Date: " + _date(exchange),
        b"Connection: close",
        b"Content-Length: %d" % len(body),
        b"Content-Type: text/plain; charset=utf-8",
    )
    exchange.raw(b"\r\n".join((*lines, b"", body)))
    exchange.close()
