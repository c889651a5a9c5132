"""Accepting from sockets that other processes accept from, too."""

import socket
from collections.abc import Callable, Sequence
from typing import Any, Final

from twisted.internet import tcp
from twisted.internet.protocol import Factory

from vllmproxy.inherited import InheritedUNIXPort
from vllmproxy.listening import Listener, secured
from vllmproxy.workers.loads import Turns

#: Seconds for which a worker leaves new connections to another.
_MOMENT: Final = 0.002


class _Shared:
    """Takes as many connections as it is its turn for, and leaves the others."""

    turns: Turns
    reactor: Any
    _take = 1

    @property
    def numberAccepts(self) -> int:
        return self._take

    @numberAccepts.setter
    def numberAccepts(self, _: int) -> None:
        """Twisted raises it under load."""

    def doRead(self) -> None:
        port: Any = super()
        self._take = self.turns.take()
        if self._take:
            port.doRead()
        else:
            port.stopReading()
            self.reactor.callLater(_MOMENT, self._go_on)

    def _go_on(self) -> None:
        port: Any = self
        if port.connected and not port.disconnecting:
            port.startReading()


class _TCPPort(_Shared, tcp.Port):
    pass


class _UNIXPort(_Shared, InheritedUNIXPort):
    pass


def inherit(
    reactor: Any,
    descriptions: Sequence[str],
    descriptors: Sequence[int],
    factory: Factory,
    turns: Callable[[], Turns],
) -> list[Listener]:
    """Take over listening sockets, and accept nothing yet, as :func:`~vllmproxy.listening.listen` does.

    :param descriptors: of the sockets, in the order of ``descriptions``.
    :param turns: makes what tells one of them how many connections to take.
    :raises CannotListen: a certificate cannot be used.
    """
    return [_inherit(reactor, *each, factory, turns()) for each in zip(descriptions, descriptors, strict=True)]


def _inherit(reactor: Any, description: str, descriptor: int, factory: Factory, turns: Turns) -> Listener:
    _, wrapped, certificate = secured(description, factory)
    with socket.socket(fileno=descriptor) as sock:  # Twisted's is a copy
        where = () if sock.family == socket.AF_UNIX else (sock.family,)
        kind: Any = _TCPPort if where else _UNIXPort
        port = kind._fromListeningDescriptor(reactor, descriptor, *where, wrapped)
    port.turns = turns
    port.startListening()
    port.stopReading()
    return Listener(description, port, certificate)
