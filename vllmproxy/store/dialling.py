"""Making a connection to Redis: where it is, TLS, logging in, and whether it is the master.

txredisapi speaks the protocol; its pools and its reconnecting are not used, for they queue calls without end
while Redis is down, give up for good after a failed AUTH, and take the global reactor.
"""

from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from OpenSSL import SSL
from service_identity import VerificationError
from twisted.internet.defer import CancelledError, Deferred, DeferredList, TimeoutError, succeed
from twisted.internet.endpoints import HostnameEndpoint, UNIXClientEndpoint, wrapClientTLS
from twisted.internet.error import ConnectError
from twisted.internet.interfaces import IProtocol, IStreamClientEndpoint
from twisted.internet.protocol import Factory
from twisted.internet.ssl import optionsForClientTLS
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from txredisapi import RedisError, RedisProtocol, ResponseError

from vllmproxy.authorities import Authorities
from vllmproxy.store.address import RedisAddress, place
from vllmproxy.store.interface import StoreUnavailable

_log = Logger(namespace=__name__)

#: Seconds for the first connection to be made and greeted in.
CONNECT_SECONDS: Final = 5.0
#: The same for every later one: a packet that was lost is sent again soon.
RECONNECT_SECONDS: Final = 1.0
#: Seconds between two questions to a sentinel whether the master is still the same.
_LOOK_SECONDS: Final = 1.0

#: Why connecting may fail without a fault of ours; ValueError is a host name or a CA file that is none.
EXPECTED: Final = (
    ConnectError,
    OSError,
    SSL.Error,
    StoreUnavailable,
    TimeoutError,
    ValueError,
)


class Line(RedisProtocol):  # type: ignore[misc]  # txredisapi has no annotations
    """One connection. Strings in replies are bytes; numbers are not guessed at.

    :ivar why: why it was lost.
    :ivar address: of the master that it leads to, ``None`` for a sentinel.
    """

    def __init__(self) -> None:
        super().__init__(charset=None, convertNumbers=False)
        self.why = ""
        self.address: RedisAddress | None = None

    def tryConvertData(self, data: Any) -> Any:
        return data

    def replyReceived(self, reply: Any) -> None:
        super().replyReceived(reply)
        if isinstance(reply, ResponseError):
            self.refused(reply)

    def refused(self, reply: ResponseError) -> None:
        """Redis did not do what it was told."""
        if "READONLY" in str(reply):
            self.drop()  # it has become a replica: who is the master now is asked again

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
        self._sentinels = deque(address.sentinels)
        self._look: Deferred[None] = succeed(None)
        self._looking = LoopingCall(self._look_again)
        self._looking.clock = reactor

    async def connect(self, protocol: type[L], greet: Callable[[L], Awaitable[None]], seconds: float) -> L:
        """Return a connection to the master that is logged in and that ``greet`` returned for.

        :param greet: what else has to succeed on it; it may raise what txredisapi raises.
        :param seconds: for all of it, once a sentinel has answered; each sentinel has a third of that.
        :raises Exception: one of :data:`EXPECTED`, or ``CancelledError``.
        """
        try:
            address = await self._find_master(seconds / 3) if self._sentinels else self._address
            entering = Deferred.fromCoroutine(self._enter(address, protocol, greet))
            line = await entering.addTimeout(seconds, self._reactor)
        except EXPECTED:
            self._sentinels.rotate(-1)  # the one that was believed may be behind the times
            raise
        if self._sentinels and not self._looking.running:
            self._looking.start(_LOOK_SECONDS, now=False)
        return line

    async def close(self) -> None:
        """Drop every connection and return when no socket is left."""
        if self._looking.running:
            self._looking.stop()
        self._look.cancel()
        gone = [line.whenDisconnected() for line in self._lines]
        for line in list(self._lines):
            line.drop()
        await DeferredList(gone)

    def _look_again(self) -> Deferred[None]:
        """Let go of a master that the sentinels have replaced: it may not know for many seconds, and take writes."""
        self._look = Deferred.fromCoroutine(self._leave_old_master())
        return self._look.addErrback(_ignore)

    async def _leave_old_master(self) -> None:
        master = await self._find_master(RECONNECT_SECONDS / 3)
        for line in list(self._lines):
            if line.address not in {None, master}:
                _log.info("the master is {master}, no longer {old}", master=str(master), old=str(line.address))
                line.drop()

    async def _find_master(self, seconds: float) -> RedisAddress:
        """Return where the master is, by the first sentinel that says so; the next time it is asked first."""
        reasons = []
        for _ in range(len(self._sentinels)):
            sentinel = self._sentinels[0]
            try:
                return await Deferred.fromCoroutine(self._ask(*sentinel)).addTimeout(seconds, self._reactor)
            except EXPECTED as error:
                reasons.append(f"{place(*sentinel)}: {describe(Failure(error))}")
                self._sentinels.rotate(-1)
        raise StoreUnavailable("; ".join(reasons))

    async def _ask(self, host: str, port: int) -> RedisAddress:
        """Ask one sentinel for the master. One that wants a password gets the one for Redis."""
        line = await self._reach(self._address.at(host, port), Line)
        try:
            try:
                answer = await line.sentinel_get_master_addr_by_name(self._address.service)
            except ResponseError as error:
                if not str(error).startswith("NOAUTH") or self._address.password is None:
                    raise
                await self._log_in(line)
                answer = await line.sentinel_get_master_addr_by_name(self._address.service)
        except RedisError as error:
            raise self._refusal(line, error) from None
        finally:
            line.drop()
        if answer is None:
            raise StoreUnavailable(f"it knows no master {self._address.service!r}")
        return self._address.at(answer[0].decode("ascii"), int(answer[1]))

    async def _enter(self, address: RedisAddress, protocol: type[L], greet: Callable[[L], Awaitable[None]]) -> L:
        line = await self._reach(address, protocol)
        line.address = address
        entered = False
        try:
            await self._log_in(line)
            await self._check_role(line)
            await greet(line)
            entered = True
        except RedisError as error:
            raise self._refusal(line, error) from None
        finally:
            if not entered:
                line.drop()
        return line

    async def _reach(self, address: RedisAddress, protocol: type[L]) -> L:
        factory = Factory.forProtocol(protocol)
        factory.noisy = False
        line = await _cancellable(make_endpoint(address, self._reactor).connect(factory))
        assert isinstance(line, protocol)
        self._lines.add(line)
        line.whenDisconnected().addCallback(self._lines.discard)
        return line

    async def _log_in(self, line: Line) -> None:
        if self._address.password is not None:
            await line.auth(self._address.password, self._address.username)

    async def _check_role(self, line: Line) -> None:
        """Refuse a replica: what is written there would be lost."""
        try:
            role, *_ = await line.role()
        except ResponseError as error:
            if self._address.sentinels or not str(error).startswith(("NOPERM", "unknown command")):
                raise
            return  # not every service that speaks Redis's protocol can tell, and not every user may ask
        if role != b"master":
            raise StoreUnavailable(f"it is a {role.decode('ascii', 'replace')}, not the master")

    def _refusal(self, line: Line, error: RedisError) -> StoreUnavailable:
        """Return what ``error`` says, without the password: Redis repeats the arguments of an unknown command.

        To be raised "from None": the original has not been cleaned.
        """
        text = line.why or str(error)
        return StoreUnavailable(text.replace(self._address.password, "***") if self._address.password else text)


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
    return wrapClientTLS(optionsForClientTLS(address.host, trustRoot=_trust_root(address.ca)), endpoint)


def _ignore(failure: Failure) -> None:
    failure.trap(*EXPECTED, CancelledError)


def _cancellable(connecting: Deferred[IProtocol]) -> Deferred[IProtocol]:
    """Return the same connection. An endpoint that is cancelled fails as if there were no such host; this does not."""

    def give_up(waiter: Deferred[IProtocol]) -> None:
        waiter.errback(CancelledError())
        connecting.cancel()

    waiter: Deferred[IProtocol] = Deferred(give_up)
    connecting.addBoth(lambda result: None if waiter.called else waiter.callback(result))
    return waiter


def _trust_root(file: Path) -> Any:
    try:
        return Authorities.parse(file.read_text("utf-8", "replace")).trust_root()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


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
