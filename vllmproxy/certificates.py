"""The certificate of a TLS listener, which can be exchanged while it listens."""

from typing import Any

from OpenSSL import SSL
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IListeningPort, IOpenSSLServerConnectionCreator
from twisted.internet.protocol import Factory
from zope.interface import implementer


class _Parser:
    """Stands where an endpoint expects a reactor, and hears what it would listen with."""

    def listenSSL(self, port: int, factory: None, contextFactory: Any, **where: Any) -> None:
        self.port, self.options, self.where = port, contextFactory, where


def _parse(description: str) -> _Parser:
    parser = _Parser()
    serverFromString(parser, description).listen(None)
    parser.options.getContext()  # reads on: does the key belong to the certificate?
    return parser


@implementer(IOpenSSLServerConnectionCreator)
class Certificate:
    """What one ``ssl:`` endpoint shows its clients.

    :param description: the endpoint's. Where its files cannot be used, that raises ``OSError``, ``ValueError`` and kin,
        or one of OpenSSL's own.
    """

    def __init__(self, description: str) -> None:
        self._description = description
        self._parsed = _parse(description)

    def listen(self, reactor: Any, factory: Factory) -> IListeningPort:
        """Listen. Raises ``CannotListenError``."""
        port: IListeningPort = reactor.listenSSL(self._parsed.port, factory, self, **self._parsed.where)
        return port

    def renew(self) -> None:
        """Read the files again, for connections to come. Raises as above; then the old certificate stays."""
        self._parsed = _parse(self._description)

    def serverConnectionForTLS(self, protocol: Any) -> SSL.Connection:
        connection: SSL.Connection = self._parsed.options.serverConnectionForTLS(protocol)
        return connection
