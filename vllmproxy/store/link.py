"""The connection to Redis that all calls share: made again when it was lost, dropped when it is mute."""

from collections import deque
from collections.abc import Callable
from typing import Any

from hiredis import pack_command
from twisted.internet.defer import CancelledError, Deferred, TimeoutError, fail, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure
from txredisapi import ConnectionError, RedisError, ResponseError

from vllmproxy.plain import is_plain, write_now
from vllmproxy.store.address import RedisAddress
from vllmproxy.store.breaker import Breaker
from vllmproxy.store.dialling import CONNECT_SECONDS, EXPECTED, RECONNECT_SECONDS, Dialler, Line, describe
from vllmproxy.store.interface import SCHEMA_VERSION, StoreUnavailable
from vllmproxy.store.redis_schema import OLDER_VERSIONS, SCHEMA_KEY, migrate

_log = Logger(namespace=__name__)

#: Seconds for the answer to a PING.
_PING_SECONDS = 1.0
#: Seconds of silence, with calls unanswered, after which a connection is given up.
_MUTE_SECONDS = 1.0


class Replies:
    """Who waits for a reply, in order: txredisapi's commands, each by a Deferred, and scripts, each by a function."""

    def __init__(self) -> None:
        self.waiting: deque[Callable[[Any], None]] = deque()

    def get(self) -> Deferred[Any]:
        """Return the next reply; what cancels it leaves its place."""
        reply: Deferred[Any] = Deferred(lambda _: None)
        self.waiting.append(lambda value: None if reply.called else reply.callback(value))
        return reply

    def put(self, reply: Any) -> None:
        """A reply has come."""
        self.waiting.popleft()(reply)


class Wire(Line):
    """One connection that calls are made over.

    :ivar offset: the server's clock minus ours, in seconds.
    :ivar has_run: the scripts that Redis knows by their names, as far as this connection has seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.offset = 0.0
        self.replyQueue = Replies()
        self._plain = False
        self.has_run: set[str] = set()
        self._unanswered_since: float | None = None

    def connectionMade(self) -> None:
        super().connectionMade()
        self._plain = is_plain(self.transport)

    def ask(self, words: tuple[bytes | int, ...], answered: Callable[[Any], None], *, now: bool = False) -> None:
        """Send one command. ``answered`` gets the reply, or the ``RedisError`` that it failed with.

        :param now: at once; else it leaves together with others of this turn.
        """
        if not self.connected:
            answered(ConnectionError("Not connected"))
            return
        self.replyQueue.waiting.append(answered)
        command = pack_command(words)  # type: ignore[arg-type]  # its stubs
        if now and self._plain:
            write_now(self.transport, command)
        else:
            self.transport.write(command)

    def dataReceived(self, data: bytes, unpause: bool = False) -> None:
        """Do what txredisapi does, without what it does for transactions."""
        self._unanswered_since = None
        reader, waiting = self._reader, self.replyQueue.waiting
        reader.feed(data)
        while (reply := reader.gets()) is not False:
            waiting.popleft()(reply)
            if isinstance(reply, ResponseError):
                self.refused(reply)

    def unanswered(self, started: float, now: float) -> None:
        """A call ``started`` then has had no answer by ``now``. A connection that stays mute is dropped."""
        since = self._unanswered_since = min(started, self._unanswered_since or started)
        if now - since >= _MUTE_SECONDS:
            self.drop()


class Link:
    """Hands out the one :class:`Wire`, which all calls share: Redis answers in order.

    A lost connection is made again at once, and calls wait for that. When it cannot be made, or a call has had no
    answer in time, the breaker opens: calls fail at once, until Redis has answered a probe.

    :param reactor: what Twisted's client endpoints need: it connects, resolves names, and tells the time.
    :ivar dialler: for other connections to the same Redis; :meth:`close` drops them too.
    """

    def __init__(self, address: RedisAddress, reactor: Any) -> None:
        self._address = address
        self._reactor = reactor
        self.dialler = Dialler(address, reactor)
        self._breaker = Breaker(reactor, lambda: Deferred.fromCoroutine(self._probe()))
        self._patience = CONNECT_SECONDS
        self._wire: Wire | None = None
        self._dial: Deferred[Wire] | None = None
        self._waiting: dict[Deferred[Wire], None] = {}  # in order: what asks last must not be asked first

    def open(self) -> None:
        """Allow connections; the first call makes one."""
        self._patience = CONNECT_SECONDS
        self._breaker.start()

    async def close(self) -> None:
        """Give everything up and return when no socket is left."""
        self._breaker.end()
        if self._dial is not None:
            self._dial.cancel()
        await self.dialler.close()

    @property
    def ready(self) -> Wire | None:
        """The connection, where there is one and calls may be made; else :meth:`get` says why, or when."""
        return self._wire if self._breaker.reason is None else None

    def get(self) -> Deferred[Wire]:
        """Return the connection; it may be cancelled, which disturbs nobody else.

        :raises StoreUnavailable: there is none, and it is known or has just turned out why.
        """
        reason = self._breaker.reason
        return self._reach() if reason is None else fail(StoreUnavailable(reason))

    def late(self, wire: Wire | None, started: float) -> None:
        """A call ``started`` then has had no answer in time, over ``wire`` if it had come so far."""
        if wire is not None:
            wire.unanswered(started, self._reactor.seconds())
        self._breaker.trip(f"{self._address} did not answer in time")

    def _reach(self) -> Deferred[Wire]:
        if self._wire is not None:
            return succeed(self._wire)
        waiter: Deferred[Wire] = Deferred(self._gave_up)
        self._waiting[waiter] = None
        self._start_dialling()
        return waiter

    def _gave_up(self, waiter: Deferred[Wire]) -> None:
        self._waiting.pop(waiter, None)

    async def _probe(self) -> None:
        wire = self._wire
        if wire is None:
            await self._reach()
            return
        started = self._reactor.seconds()
        try:
            await wire.ping().addTimeout(_PING_SECONDS, self._reactor)
        except TimeoutError:
            wire.unanswered(started, self._reactor.seconds())
            raise StoreUnavailable(f"{self._address} did not answer in time") from None
        except RedisError as error:
            raise StoreUnavailable(f"{self._address}: {wire.why or error}") from error

    def _start_dialling(self) -> None:
        if self._dial is None:
            self._dial = Deferred.fromCoroutine(self.dialler.connect(Wire, self._greet, self._patience))
            self._dial.addCallbacks(self._connected, self._failed)

    async def _greet(self, wire: Wire) -> None:
        """Choose the database, check the schema, compare clocks."""
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
        if version != str(SCHEMA_VERSION).encode():
            raise StoreUnavailable(
                f"it holds schema version {version!r}, and this vllmproxy reads version {SCHEMA_VERSION}: "
                "name another database in --store, or run the vllmproxy that wrote this one"
            )
        wire.offset = int(seconds) + int(microseconds) / 1e6 - self._reactor.seconds()

    def _connected(self, wire: Wire) -> None:
        self._dial = None
        self._patience = RECONNECT_SECONDS
        self._wire = wire
        wire.whenDisconnected().addCallback(self._lost)
        waiting, self._waiting = self._waiting, {}
        for waiter in waiting:
            waiter.callback(wire)

    def _failed(self, failure: Failure) -> None:
        self._dial = None
        reason = f"{self._address}: {describe(failure)}"
        if not failure.check(*EXPECTED, CancelledError):
            _log.failure("Connecting to Redis failed in an unforeseen way", failure)
        waiting, self._waiting = self._waiting, {}
        self._breaker.trip(reason)
        for waiter in waiting:
            waiter.errback(StoreUnavailable(reason))

    def _lost(self, wire: Wire) -> None:
        self._wire = None
        _log.info("lost {address}: {why}", address=str(self._address), why=wire.why)
        if self._breaker.reason is None:
            self._start_dialling()
