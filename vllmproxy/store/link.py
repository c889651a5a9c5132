"""The connection to Redis: made when a call needs it, made again after it was lost, dropped when it is mute.

txredisapi speaks the protocol; its pools and its reconnecting are not used, for they queue calls without end
while Redis is down, give up for good after a failed AUTH, and take the global reactor.
"""

import re
from pathlib import Path
from typing import Any

from OpenSSL import SSL, crypto
from service_identity import VerificationError
from twisted.internet.defer import CancelledError, Deferred, DeferredList, TimeoutError, fail, succeed
from twisted.internet.endpoints import HostnameEndpoint, UNIXClientEndpoint, wrapClientTLS
from twisted.internet.error import ConnectError, ConnectingCancelledError
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Factory
from twisted.internet.ssl import Certificate, optionsForClientTLS, trustRootFromCertificates
from twisted.logger import Logger
from twisted.python.failure import Failure
from txredisapi import RedisError, RedisProtocol

from vllmproxy.store.address import RedisAddress
from vllmproxy.store.interface import SCHEMA_VERSION, StoreUnavailable
from vllmproxy.store.redis_schema import OLDER_VERSIONS, SCHEMA_KEY, migrate

_log = Logger()

#: Seconds for a whole connection: TCP, TLS, AUTH, SELECT and the schema.
_CONNECT_SECONDS = 5.0
#: Seconds after a failed attempt in which calls fail at once instead of trying again.
_PAUSE_SECONDS = 0.5
#: Seconds of silence, with calls unanswered, after which a connection is given up.
_MUTE_SECONDS = 1.0

#: Why connecting may fail without a fault of ours; ValueError is a host name or a CA file that is none.
_EXPECTED = (
    CancelledError,
    ConnectError,
    ConnectingCancelledError,
    OSError,
    SSL.Error,
    StoreUnavailable,
    TimeoutError,
    ValueError,
)


class Wire(RedisProtocol):  # type: ignore[misc]  # txredisapi has no annotations
    """One connection. Strings in replies are bytes; numbers are not guessed at.

    :ivar why: why it was lost.
    :ivar offset: the server's clock minus ours, in seconds.
    """

    def __init__(self) -> None:
        super().__init__(charset=None, convertNumbers=False)
        self.why = ""
        self.offset = 0.0
        self._unanswered_since: float | None = None

    def dataReceived(self, data: bytes, unpause: bool = False) -> None:
        self._unanswered_since = None
        super().dataReceived(data, unpause)

    def connectionLost(self, why: Failure) -> None:
        self.why = describe(why)
        super().connectionLost(why)

    def drop(self) -> None:
        """Let go at once; what is still to be written is not waited for."""
        self.transport.abortConnection()

    def unanswered(self, started: float, now: float) -> None:
        """A call ``started`` then has had no answer by ``now``. A connection that stays mute is dropped."""
        since = self._unanswered_since = min(started, self._unanswered_since or started)
        if now - since >= _MUTE_SECONDS:
            self.drop()


class Link:
    """Hands out the one :class:`Wire`, which all calls share: Redis answers in order.

    :param reactor: what Twisted's client endpoints need: it connects, resolves names, and tells the time.
    """

    def __init__(self, address: RedisAddress, reactor: Any) -> None:
        self._address = address
        self._reactor = reactor
        self._closed = True
        self._wire: Wire | None = None
        self._wires: set[Wire] = set()
        self._dial: Deferred[Wire] | None = None
        self._waiting: set[Deferred[Wire]] = set()
        self._reason: str | None = None
        self._try_again = 0.0

    def open(self) -> None:
        """Allow connections; the first call makes one."""
        self._closed = False
        self._reason = None

    async def close(self) -> None:
        """Give everything up and return when no socket is left."""
        self._closed = True
        if self._dial is not None:
            self._dial.cancel()
        gone = [wire.whenDisconnected() for wire in self._wires]
        for wire in self._wires:
            wire.drop()
        await DeferredList(gone)

    def get(self) -> Deferred[Wire]:
        """Return the connection; it may be cancelled, which disturbs nobody else.

        :raises StoreUnavailable: there is none, and it is known or has just turned out why.
        """
        if self._closed:
            return fail(StoreUnavailable("the store is closed"))
        if self._wire is not None:
            return succeed(self._wire)
        if self._dial is None and self._reason is not None and self._reactor.seconds() < self._try_again:
            return fail(StoreUnavailable(self._reason))
        waiter: Deferred[Wire] = Deferred(self._waiting.discard)
        self._waiting.add(waiter)
        if self._dial is None:
            self._start_dialling()
        return waiter

    def _start_dialling(self) -> None:
        self._dial = Deferred.fromCoroutine(self._connect())
        self._dial.addTimeout(_CONNECT_SECONDS, self._reactor)
        self._dial.addCallbacks(self._connected, self._failed)

    async def _connect(self) -> Wire:
        factory = Factory.forProtocol(Wire)
        factory.noisy = False
        endpoint = make_endpoint(self._address, self._reactor)
        wire = await endpoint.connect(factory)
        assert isinstance(wire, Wire)
        self._wires.add(wire)
        wire.whenDisconnected().addCallback(self._lost)
        greeted = False
        try:
            await self._greet(wire)
            greeted = True
        finally:
            if not greeted:
                wire.drop()
        return wire

    async def _greet(self, wire: Wire) -> None:
        """Log in, choose the database, check the schema, compare clocks."""
        try:
            if self._address.password is not None:
                await wire.auth(self._address.password, self._address.username)
            if self._address.database:
                await wire.select(self._address.database)
            version = await wire.get(SCHEMA_KEY)
            if version is None:
                await wire.setnx(SCHEMA_KEY, SCHEMA_VERSION)
                version = await wire.get(SCHEMA_KEY)
            if version in OLDER_VERSIONS:
                await migrate(wire, version)
                version = await wire.get(SCHEMA_KEY)
            seconds, microseconds = await wire.execute_command("TIME")
        except RedisError as error:
            # "from None": what it says has been cleaned, the original has not.
            raise StoreUnavailable(self._clean(wire.why or str(error))) from None
        if version != str(SCHEMA_VERSION).encode():
            raise StoreUnavailable(
                f"it holds schema version {version!r}, and this vllmproxy reads version {SCHEMA_VERSION}: "
                "name another database in --store, or run the vllmproxy that wrote this one"
            )
        wire.offset = int(seconds) + int(microseconds) / 1e6 - self._reactor.seconds()

    def _clean(self, text: str) -> str:
        """Return ``text`` without the password: Redis repeats the arguments of a command it does not know."""
        return text.replace(self._address.password, "***") if self._address.password else text

    def _connected(self, wire: Wire) -> None:
        self._dial = self._reason = None
        self._wire = wire
        waiting, self._waiting = self._waiting, set()
        for waiter in waiting:
            waiter.callback(wire)

    def _failed(self, failure: Failure) -> None:
        self._dial = None
        self._try_again = self._reactor.seconds() + _PAUSE_SECONDS
        reason, known = f"{self._address}: {describe(failure)}", self._reason
        self._reason = reason
        waiting, self._waiting = self._waiting, set()
        for waiter in waiting:
            waiter.errback(StoreUnavailable(reason))
        if not isinstance(failure.value, _EXPECTED):
            _log.failure("Connecting to Redis failed in an unforeseen way", failure)
        elif reason != known and not self._closed:
            _log.warn("no connection to {reason}", reason=reason)

    def _lost(self, wire: Wire) -> None:
        self._wires.discard(wire)
        if self._wire is wire:
            self._wire = None
            _log.info("lost {address}: {why}", address=str(self._address), why=wire.why)


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
        return f"no connection within {_CONNECT_SECONDS:g} s"
    return failure.getErrorMessage() or type(error).__name__
