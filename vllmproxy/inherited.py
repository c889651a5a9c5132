"""Listening on UNIX sockets that somebody else has made."""

from typing import Any

from twisted.internet import tcp, unix


class InheritedUNIXPort(unix.Port):
    """The path, its mode, the queue and the end of the socket are the business of whoever made it.

    Twisted's own would let everybody write to it, cut the queue to 50, and on stopping remove the path and shut the
    socket down, for all that share it. (Its TCP ports do nothing of the kind.)
    """

    def startListening(self) -> None:
        port: Any = self  # Twisted is half typed
        tcp._reservedFD.reserve()
        port._shouldShutdown = False
        port.factory.doStart()
        port.socket, port._preexistingSocket = port._preexistingSocket, None
        port.connected = True
        port.fileno = port.socket.fileno
        port.numberAccepts = 100  # as Twisted's begin
        port.startReading()

    def connectionLost(self, reason: Any) -> None:
        tcp.Port.connectionLost(self, reason)
