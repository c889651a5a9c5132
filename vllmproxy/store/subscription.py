"""Hears from Redis which keys other processes change, over a connection of its own."""

from collections.abc import Callable
from typing import Any, Final

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from txredisapi import RedisError, SubscriberProtocol

from vllmproxy.store.address import RedisAddress
from vllmproxy.store.dialling import EXPECTED, Dialler, Line, describe
from vllmproxy.store.interface import StoreUnavailable

_log = Logger()

#: Where tokens of changed keys are published. Channels belong to no database: those who keep their keys in another
#: one hear of tokens that they do not know.
CHANNEL: Final = b"vllmproxy:changes"

#: Seconds between two questions whether the connection lives. When the answers to two are missing it is dropped.
_BEAT: Final = 1.0
_MISSING: Final = 2
#: Seconds for a connection to be made and to be subscribed, and between attempts.
_CONNECT_SECONDS: Final = 2.0
_PAUSE: Final = 0.5


class Ear(Line, SubscriberProtocol):  # type: ignore[misc]  # txredisapi has no annotations
    """A connection that is told of changes.

    :ivar heard: what is called with the token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heard: Callable[[str], None] = lambda token: None

    def messageReceived(self, pattern: None, channel: bytes, message: bytes) -> None:
        self.heard(message.decode("ascii", "replace"))


class Subscription:
    """Keeps an :class:`Ear`: made again whenever it was lost, dropped when it has gone deaf.

    :param reactor: as for :class:`~vllmproxy.store.dialling.Dialler`.
    :param heard: called with the token of a key that was changed or deleted, by whatever process; with ``None`` when
        changes may have been missed.
    """

    def __init__(self, address: RedisAddress, reactor: Any, heard: Callable[[str | None], None]) -> None:
        self._address = address
        self._reactor = reactor
        self._heard = heard
        self._dialler = Dialler(address, reactor)
        self._closed = True
        self._ear: Ear | None = None
        self._dial: Deferred[Ear] | None = None
        self._due: IDelayedCall | None = None
        self._beating = LoopingCall(self._beat)
        self._beating.clock = reactor
        self._missing = 0
        self._reason: str | None = None

    def open(self) -> None:
        """Subscribe, now and whenever that has ended."""
        self._closed = False
        self._start_dialling()

    async def close(self) -> None:
        """Give everything up and return when no socket is left."""
        self._closed = True
        if self._due is not None and self._due.active():
            self._due.cancel()
        if self._dial is not None:
            self._dial.cancel()
        await self._dialler.close()

    def _start_dialling(self) -> None:
        self._dial = Deferred.fromCoroutine(self._subscribe())
        self._dial.addTimeout(_CONNECT_SECONDS, self._reactor)
        self._dial.addCallbacks(self._subscribed, self._failed)

    async def _subscribe(self) -> Ear:
        ear = await self._dialler.connect(Ear)
        ear.heard = self._heard
        subscribed = False
        try:
            await ear.subscribe([CHANNEL])
            subscribed = True
        except RedisError as error:
            raise StoreUnavailable(self._dialler.clean(ear.why or str(error))) from None
        finally:
            if not subscribed:
                ear.drop()
        return ear

    def _subscribed(self, ear: Ear) -> None:
        self._ear, self._dial = ear, None
        self._missing = 0
        ear.whenDisconnected().addCallback(self._lost)
        self._beating.start(_BEAT, now=False)
        if self._reason is not None:
            _log.info("changes by other processes are heard again from {address}", address=str(self._address))
        self._reason = None
        self._heard(None)

    def _failed(self, failure: Failure) -> None:
        self._dial = None
        if self._closed:
            return
        if not failure.check(*EXPECTED, CancelledError):
            _log.failure("Subscribing to changes failed in an unforeseen way", failure)
        reason, known = describe(failure), self._reason
        self._reason = reason
        if reason != known:
            _log.warn(
                "changes by other processes are not heard, and take as long as keys are cached: {address}: {reason}",
                address=str(self._address),
                reason=reason,
            )
        self._due = self._reactor.callLater(_PAUSE, self._start_dialling)

    def _lost(self, ear: Ear) -> None:
        self._ear = None
        self._beating.stop()
        if not self._closed:
            self._heard(None)
            self._start_dialling()

    def _beat(self) -> None:
        """Ask whether the connection lives: one that is half open brings nothing, and no news is no sign of it."""
        ear = self._ear
        assert ear is not None
        if self._missing >= _MISSING:
            ear.drop()
            return
        self._missing += 1
        ear.ping().addCallbacks(self._answered, lambda failure: failure.trap(RedisError))

    def _answered(self, _: object) -> None:
        self._missing = 0
