"""Writing straight to the socket, where the bytes on it are the bytes that the peer reads; and what that waits for."""

from collections.abc import Callable
from typing import Any, Final

from twisted.internet import tcp, unix

#: The exact classes whose ``socket`` carries our bytes as they are. A TLS transport exposes the raw socket
#: too, and writing there would put plaintext on the wire: subclasses and wrappers do not count.
_PLAIN: Final = frozenset([tcp.Server, tcp.Client, unix.Server, unix.Client])

#: Bytes from which on a piece is not kept for the end of a turn: who sends it is to hear whether the peer takes it.
_LONG: Final = 16_384
#: Connections that may have something kept: a reader should not wait for many others' requests to be acted on.
_MOST: Final = 32


def is_plain(transport: Any) -> bool:
    """Whether bytes written to the transport's socket are the bytes the peer reads."""
    return type(transport) in _PLAIN and not getattr(transport, "TLS", False)


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


class Turn:
    """What one poll has told of. What is written while several events are acted on is kept, and written when they are.

    Each write by itself wakes its reader up, who is done and asleep again before the next; of writes in a row only the
    first does, and the code of the kernel that they share stays in the processor's cache.
    """

    def __init__(self) -> None:
        #: Descriptors that the last poll told of and nobody has acted on yet, with their events.
        self.told: dict[int, int] = {}
        self._keeps = False
        self._kept: dict[Any, list[bytes | memoryview]] = {}
        self._before: list[Callable[[], None]] = []

    def begin(self, told: dict[int, int]) -> None:
        """These events are about to be acted on, and taken out of ``told`` one after the other."""
        self.told = told
        self._keeps = len(told) > 1

    def end(self) -> None:
        """They are."""
        self._keeps = False
        self._prepare()
        self._write_kept()

    def before_writing(self, work: Callable[[], None]) -> None:
        """Call ``work``, which raises nothing, before anything that is written from now on leaves."""
        if self._keeps:
            self._before.append(work)
        else:
            work()

    def write(self, transport: Any, data: bytes | memoryview) -> None:
        """Write to a plain transport, that is only written to in this way, as :func:`write_now` does, at the end of
        this turn at the latest."""
        kept = self._kept.get(transport)
        if not self._keeps or len(data) >= _LONG:
            self._prepare()
            if kept is not None:
                del self._kept[transport]
                write_now(transport, b"".join(kept))
            write_now(transport, data)
        elif kept is not None:
            kept.append(data)
        elif transport.dataBuffer or transport._tempDataBuffer:
            # It may be polled for writing, in this turn too: if it is to be closed behind what is queued, it would be.
            self._prepare()
            write_now(transport, data)
        else:
            self._kept[transport] = [data]
            if len(self._kept) >= _MOST:
                self._write_kept()

    def _prepare(self) -> None:
        while self._before:
            self._before.pop()()

    def _write_kept(self) -> None:
        for transport in list(self._kept):
            kept = self._kept.pop(transport, None)
            if kept is not None and not transport._aborting:  # what was given up since must not reach the peer any more
                self._prepare()  # that of the first, and what a write brings about
                write_now(transport, kept[0] if len(kept) == 1 else b"".join(kept))


#: That of the reactor, of which there is one.
turn: Final = Turn()
