"""Making a connection to Redis: where it is, TLS, logging in, and whether it is the master.

txredisapi speaks the protocol; its pools and its reconnecting are not used, for they queue calls without end
while Redis is down, give up for good after a failed AUTH, and take the global reactor.
"""

import re
from pathlib import Path
from typing import Any, Final, TypeVar

from OpenSSL import SSL, crypto
from service_identity import VerificationError
from twisted.internet.defer import DeferredList, TimeoutError
from twisted.internet.endpoints import HostnameEndpoint, UNIXClientEndpoint, wrapClientTLS
from twisted.internet.error import ConnectError, ConnectingCancelledError
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Factory
from twisted.internet.ssl import Certificate, optionsForClientTLS, trustRootFromCertificates
from twisted.python.failure import Failure
from txredisapi import RedisError, RedisProtocol

from vllmproxy.store.address import RedisAddress
from vllmproxy.store.interface import StoreUnavailable

#: Why connecting may fail without a fault of ours; ValueError is a host name or a CA file that is none.
EXPECTED: Final = (
    ConnectError,
    ConnectingCancelledError,
    OSError,
    SSL.Error,
    StoreUnavailable,
    TimeoutError,
    ValueError,
)


class Line(RedisProtocol):  # type: ignore[misc]  # txredisapi has no annotations
    """One connection. Strings in replies are bytes; numbers are not guessed at.

    :ivar why: why it was lost.
    """

    def __init__(self) -> None:
        super().__init__(charset=None, convertNumbers=False)
        self.why = ""

    def connectionLost(self, why: Failure) -> None:
        self.why = describe(why)
        super().connectionLost(why)

    def drop(self) -> None:
        """Let go at once; what is still to be written is not waited for."""
        self.transport.abortConnection()


L = TypeVar("L", bound=Line)


class Dialler:
    """Makes connections, and knows those that there are.

    :param reactor: what Twisted's client endpoints need: it connects, resolves names, and tells the time.
    """

    def __init__(self, address: RedisAddress, reactor: Any) -> None:
        self._address = address
        self._reactor = reactor
        self._lines: set[Line] = set()

    async def connect(self, protocol: type[L]) -> L:
        """Return a connection that is logged in. Whoever asks bounds the wait, by cancelling.

        :raises Exception: one of :data:`EXPECTED`.
        """
        line = await self._reach(self._address, protocol)
        entered = False
        try:
            await self._log_in(line)
            entered = True
        finally:
            if not entered:
                line.drop()
        return line

    def clean(self, text: str) -> str:
        """Return ``text`` without the password: Redis repeats the arguments of a command it does not know."""
        return text.replace(self._address.password, "***") if self._address.password else text

    async def close(self) -> None:
        """Drop every connection and return when no socket is left."""
        gone = [line.whenDisconnected() for line in self._lines]
        for line in self._lines:
            line.drop()
        await DeferredList(gone)

    async def _reach(self, address: RedisAddress, protocol: type[L]) -> L:
        factory = Factory.forProtocol(protocol)
        factory.noisy = False
        line = await make_endpoint(address, self._reactor).connect(factory)
        assert isinstance(line, protocol)
        self._lines.add(line)
        line.whenDisconnected().addCallback(self._lines.discard)
        return line

    async def _log_in(self, line: Line) -> None:
        try:
            if self._address.password is not None:
                await line.auth(self._address.password, self._address.username)
        except RedisError as error:
            # "from None": what it says has been cleaned, the original has not.
            raise StoreUnavailable(self.clean(line.why or str(error))) from None


def make_endpoint(address: RedisAddress, reactor: Any) -> IStreamClientEndpoint:
    """Return where to connect to; under TLS the certificate and the host's name in it are verified."""
    if address.path is not None:
        return UNIXClientEndpoint(reactor, address.path)
    # Also how long a refused connection takes to be told, which must be well within a lookup's deadline.
    endpoint = HostnameEndpoint(reactor, address.host, address.port, attemptDelay=0.05)
    if not address.tls:
        return endpoint
    if address.ca is None:
        return wrapClientTLS(optionsForClientTLS(address.host), endpoint)
    trust = trustRootFromCertificates(_certificates(address.ca))
    return wrapClientTLS(optionsForClientTLS(address.host, trustRoot=trust), endpoint)


def _certificates(file: Path) -> list[Certificate]:
    found = re.findall(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", file.read_bytes(), re.DOTALL)
    if not found:
        raise ValueError(f"{file} holds no PEM certificate")
    try:
        return [Certificate.loadPEM(pem) for pem in found]
    except crypto.Error as error:
        raise ValueError(f"{file} holds a damaged certificate") from error


def describe(failure: Failure) -> str:
    """Return in words why a connection failed or ended."""
    error = failure.value
    if isinstance(error, VerificationError):
        return "its TLS certificate is for another host"
    if isinstance(error, SSL.Error) and error.args and isinstance(error.args[0], list):
        return "TLS: " + ", ".join(str(problem[-1]) for problem in error.args[0])
    if isinstance(error, TimeoutError):
        return "no connection in time"
    return failure.getErrorMessage() or type(error).__name__
