"""What the wire does below Twisted's transports, and only where that is safe."""

import socket
import struct
from typing import Any

from twisted.internet import tcp, unix

#: The exact classes whose ``socket`` carries our bytes as they are. A TLS transport exposes the raw socket
#: too, and writing there would put plaintext on the wire: subclasses and wrappers do not count.
_PLAIN = frozenset([tcp.Server, tcp.Client, unix.Server, unix.Client])

#: ``tcpi_bytes_acked`` in Linux's ``struct tcp_info`` (linux/tcp.h): eight one-byte fields, twenty-four 32-bit
#: ones, two 64-bit pacing rates, then this 64-bit counter.
_BYTES_ACKED = struct.Struct("=Q")
_BYTES_ACKED_OFFSET = 120


def is_plain(transport: Any) -> bool:
    """Whether bytes written to the transport's socket are the bytes the peer reads."""
    return type(transport) in _PLAIN and not getattr(transport, "TLS", False)


def write_now(transport: Any, data: bytes) -> None:
    """Write to a plain transport: straight to the socket where nothing is queued before it, the rest by queue.

    ``transport.write`` alone costs two ``epoll_ctl`` calls and another turn of the reactor.
    """
    if not (transport.dataBuffer or transport._tempDataBuffer or transport.disconnecting or transport.disconnected):
        try:
            sent = transport.socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            sent = 0  # the queue meets the same error and reports the loss in the reactor's own way
        if sent == len(data):
            return
        if sent:
            data = data[sent:]
    transport.write(data)


def raw_socket(transport: Any) -> socket.socket | None:
    """Return the kernel's socket under a transport and its wrappers, ``None`` where there is none (in memory)."""
    while transport is not None:
        candidate = getattr(transport, "socket", None)
        if isinstance(candidate, socket.socket):
            return candidate
        transport = getattr(transport, "transport", None)
    return None


def bytes_acknowledged(sock: socket.socket | None) -> int | None:
    """Return how many bytes of ours the peer's kernel has taken on this connection, ``None`` where unknown.

    Linux only (``TCP_INFO``, kernel 4.1 and newer); UNIX sockets have no such count.
    """
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED_OFFSET + _BYTES_ACKED.size)
    except OSError:
        return None
    if len(info) < _BYTES_ACKED_OFFSET + _BYTES_ACKED.size:
        return None
    count: int = _BYTES_ACKED.unpack_from(info, _BYTES_ACKED_OFFSET)[0]
    return count
