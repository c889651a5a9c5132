"""Notice that a peer hung up although nothing is being read from it.

A transport paused for reading, with nothing to write, is in no epoll set of Twisted's: neither FIN nor RST is
seen. A second epoll, itself a reader in the reactor, watches just those sockets for EPOLLRDHUP.
"""

import select
from collections.abc import Callable
from contextlib import suppress

from twisted.internet.interfaces import IReactorFDSet, IReadDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

_log = Logger(namespace=__name__)

_RESETS = select.EPOLLERR | select.EPOLLONESHOT
_EVENTS = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR | select.EPOLLONESHOT


@implementer(IReadDescriptor)
class HangupWatcher:
    """Calls back once for each watched socket whose peer closes or resets."""

    def __init__(self, reactor: IReactorFDSet) -> None:
        self._reactor = reactor
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[Callable[[], None], bool]] = {}
        reactor.addReader(self)

    def watch(self, fd: int, hung_up: Callable[[], None], *, resets_only: bool = False) -> None:
        """Call ``hung_up`` once when the peer of ``fd`` closes or resets; at once where it already has.

        :param resets_only: the peer may close its side and still read.
        """
        self.forget(fd)
        self._epoll.register(fd, _RESETS if resets_only else _EVENTS)
        self._watched[fd] = hung_up, resets_only

    def forget(self, fd: int) -> None:
        """Stop watching. Needed before ``fd`` is closed, as the number will be used again."""
        if self._watched.pop(fd, None) is not None:
            with suppress(OSError):  # the kernel drops it with the last close of the socket
                self._epoll.unregister(fd)

    def close(self) -> None:
        """Stop watching everything."""
        self._reactor.removeReader(self)
        self._watched.clear()
        self._epoll.close()

    def fileno(self) -> int:
        """The epoll's own descriptor, readable while one of the watched sockets has hung up."""
        return self._epoll.fileno()

    def doRead(self) -> None:
        for fd, events in self._epoll.poll(0):
            hung_up, resets_only = self._watched.get(fd, (None, False))
            self.forget(fd)
            if hung_up is None or (resets_only and not events & select.EPOLLERR):
                continue
            try:
                hung_up()
            except Exception:  # nothing is awaited here; the reactor would drop the watcher, and every watch with it
                _log.failure("Telling of a hang-up failed")

    def connectionLost(self, reason: Failure) -> None:
        """The reactor is shutting down."""

    def logPrefix(self) -> str:
        return "hangup"
