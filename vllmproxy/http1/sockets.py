"""What the wire does below Twisted's transports, and only where that is safe."""

import select
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from fcntl import ioctl
from termios import TIOCOUTQ
from typing import Any

from attrs import frozen
from twisted.internet.abstract import FileDescriptor
from twisted.internet.error import ConnectionAborted, ConnectionDone
from twisted.python.failure import Failure

#: In Linux's ``struct tcp_info`` (linux/tcp.h): ``tcpi_state``, ``tcpi_bytes_acked`` and, since 4.19,
#: ``tcpi_bytes_sent``.
_TCP_INFO = struct.Struct("=B119xQ72xQ")
_TCP_CLOSE = 7

#: Seconds in which who reads slowly makes room in its buffer, and the most that the kernel counts.
SLOWEST = 300.0
_MOST_MILLISECONDS = 2**31 - 1

#: Bytes that are read at a time of what is known to be long. Each read costs a turn of the reactor.
LONG_READ = 262_144


def read_long(transport: Any, long: bool) -> None:
    """Read more at a time from a plain transport, or as much as Twisted does, which also is how much may be queued in
    it before its producer is paused."""
    transport.bufferSize = LONG_READ if long else FileDescriptor.bufferSize


def reset_now(transport: Any) -> None:
    """Reset a plain connection before anything else happens; its protocol hears of that from within. By itself,
    ``abortConnection`` leaves it to the reactor's next turn, behind all that is yet to be done in this one."""
    transport.abortConnection()
    transport.connectionLost(Failure(ConnectionAborted()))


def close_now(transport: Any) -> None:
    """Close a plain connection before anything else happens; the kernel still sends what it has of it.
    ``loseConnection`` would wait until much of that has left, for as long as the peer likes."""
    transport.connectionLost(Failure(ConnectionDone()))


def forget_after(transport: Any, seconds: float) -> None:
    """Have the kernel drop what it still has of a connection that is closed here, when the peer takes nothing of that
    for so long, five minutes at least; 0: never, as long as the peer goes on saying that it has no room (RFC 9293
    §3.8.6.1). One that reads slowly says so for longer than it takes to read some: until a good part of its buffer is
    free."""
    sock = raw_socket(transport)
    if sock is not None and seconds:
        milliseconds = min(int(max(seconds, SLOWEST) * 1000), _MOST_MILLISECONDS)
        with suppress(OSError):  # it is no TCP
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def raw_socket(transport: Any) -> socket.socket | None:
    """Return the kernel's socket under a transport and its wrappers, ``None`` where there is none (in memory)."""
    while transport is not None:
        candidate = getattr(transport, "socket", None)
        if isinstance(candidate, socket.socket):
            return candidate
        transport = getattr(transport, "transport", None)
    return None


@frozen
class Delivery:
    """What is known of how far our bytes came on one TCP connection. Only differences mean anything.

    :ivar acknowledged: bytes that the peer's kernel has confirmed; the SYN and our FIN count as one each.
    :ivar sent: bytes that have left, those that were sent again included.
    :ivar closed: the connection is over in both directions (``TCP_CLOSE``), as after a reset.
    """

    acknowledged: int
    sent: int
    closed: bool = False


def delivery(sock: socket.socket | None) -> Delivery | None:
    """Return how far our bytes came, ``None`` where that is not known: not TCP, not Linux 4.19 or newer, closed."""
    if sock is None:
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    except OSError:
        return None
    if len(info) < _TCP_INFO.size:
        return None
    state, acknowledged, sent = _TCP_INFO.unpack(info)
    return Delivery(acknowledged, sent, state == _TCP_CLOSE)


def listen_to(sock: socket.socket | None) -> Callable[[int], Sequence[Any]]:
    """Return what, called with 0, has anything to tell where something waits to be read on a connection that should be
    silent: its end, or bytes nobody asked for."""
    if sock is None:
        return lambda _: ()
    ear = select.poll()
    ear.register(sock, select.POLLIN)
    return ear.poll


def remains(transport: Any) -> Iterator[bytes]:
    """Read what the kernel still holds of a plain connection that is being lost: what came before a reset stays there,
    and who finds the reset by writing has not read it yet. At most 1 MiB."""
    for _ in range(16):
        try:
            data = transport.socket.recv(65_536)
        except OSError:
            return
        if not data:
            return
        yield data


def queued_bytes(transport: Any) -> int:
    """Return how many bytes wait for the peer to take them, the kernel's queue included; 0 where there is no socket."""
    sock = raw_socket(transport)
    kernel = 0
    if sock is not None:
        with suppress(OSError):
            kernel = int.from_bytes(ioctl(sock.fileno(), TIOCOUTQ, bytes(4)), sys.byteorder)
    descriptor = _descriptor(transport)
    if descriptor is None:
        return kernel
    return kernel + len(descriptor.dataBuffer) - descriptor.offset + descriptor._tempDataLen


def is_queueing(transport: Any) -> bool:
    """Whether bytes wait in this process for the kernel to take them."""
    descriptor = _descriptor(transport)
    return descriptor is not None and bool(descriptor.dataBuffer or descriptor._tempDataLen)


def is_closing(transport: Any) -> bool:
    """Whether the connection under a transport is being closed. Where that is not our doing, it is TLS's: the peer's
    close_notify came, or a record that is none.

    Nobody tells the protocol. What is queued leaves first; if that had paused a producer, Twisted then resumes it, and
    keeps the connection, reading nothing and dropping all that is written, until the producer is unregistered.
    """
    descriptor = _descriptor(transport)
    return descriptor is not None and bool(descriptor.disconnecting)


def hang_up(transport: Any) -> None:
    """Close the connection under TLS without the peer's close_notify, which need not be waited for (RFC 8446 §6.1)."""
    descriptor = _descriptor(transport)
    assert descriptor is not None
    descriptor.loseConnection()


def _descriptor(transport: Any) -> FileDescriptor | None:
    """Return what the reactor polls, under a transport's wrappers; ``None`` in memory."""
    while transport is not None and not isinstance(transport, FileDescriptor):
        transport = getattr(transport, "transport", None)
    return transport
