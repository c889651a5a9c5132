"""Writing straight to the socket, where the bytes on it are the bytes that the peer reads."""

from typing import Any, Final

from twisted.internet import tcp, unix

#: The exact classes whose ``socket`` carries our bytes as they are. A TLS transport exposes the raw socket
#: too, and writing there would put plaintext on the wire: subclasses and wrappers do not count.
PLAIN: Final = frozenset([tcp.Server, tcp.Client, unix.Server, unix.Client])


def is_plain(transport: Any) -> bool:
    """Whether bytes written to the transport's socket are the bytes the peer reads."""
    return type(transport) in PLAIN and not getattr(transport, "TLS", False)


def write_now(transport: Any, data: bytes | memoryview) -> None:
    """Write to a plain transport: straight to the socket where nothing is queued before it, the rest by queue.

    ``transport.write`` alone costs two ``epoll_ctl`` calls and another turn of the reactor.
    """
    if not (transport.dataBuffer or transport._tempDataBuffer or transport.disconnecting or transport.disconnected):
        try:
            sent = transport.socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            sent = 0
            # Writing what is queued meets an error, too, and reports the loss in the reactor's own way. Reading would
            # meet none, but an end that looks like the peer's FIN: the kernel tells of a reset only once.
            if not transport._writeDisconnected:
                transport.stopReading()
        if sent == len(data):
            return
        if sent:
            data = data[sent:]
    transport.write(bytes(data))
