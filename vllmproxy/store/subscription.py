"""Hears from Redis which keys other processes change, over a connection of its own."""

from collections.abc import Callable
from typing import Final

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from txredisapi import RedisError, SubscriberProtocol

from vllmproxy.store.dialling import EXPECTED, RECONNECT_SECONDS, Dialler, Line, describe

_log = Logger(namespace=__name__)

#: Where tokens of changed keys are published. Channels belong to no database: those who keep their keys in another
#: one hear of tokens that they do not know.
CHANNEL: Final = b"vllmproxy:changes"

#: Seconds between two questions whether the connection lives. When the answers to two are missing it is dropped.
_BEAT: Final = 1.0
_MISSING: Final = 2
#: Seconds between attempts.
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

    :param dialler: makes the connections; whoever made it closes it.
    :param heard: called with the token of a key that was changed or deleted, by whatever process; with ``None`` when
        changes may have been missed.
    """

    def __init__(self, dialler: Dialler, clock: IReactorTime, heard: Callable[[str | None], None]) -> None:
        self._dialler = dialler
        self._clock = clock
        self._heard = heard
        self._closed = True
        self._ear: Ear | None = None
        self._dial: Deferred[Ear] | None = None
        self._due: IDelayedCall | None = None
        self._beating = LoopingCall(self._beat)
        self._beating.clock = clock
        self._missing = 0
        self._reason: str | None = None

    def open(self) -> None:
        """Subscribe, now and whenever that has ended."""
        self._closed = False
        self._start_dialling()

    def close(self) -> None:
        """Try no more, and be silent when the connection is dropped."""
        self._closed = True
        if self._due is not None and self._due.active():
            self._due.cancel()
        if self._dial is not None:
            self._dial.cancel()

    def _start_dialling(self) -> None:
        self._dial = Deferred.fromCoroutine(self._dialler.connect(Ear, self._subscribe, RECONNECT_SECONDS))
        self._dial.addCallbacks(self._subscribed, self._failed)

    async def _subscribe(self, ear: Ear) -> None:
        ear.heard = self._heard
        await ear.subscribe([CHANNEL])

    def _subscribed(self, ear: Ear) -> None:
        self._ear, self._dial = ear, None
        self._missing = 0
        ear.whenDisconnected().addCallback(self._lost)
        self._beating.start(_BEAT, now=False)
        if self._reason is not None:
            _log.info("changes by other processes are heard again")
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
                "changes by other processes are not heard, and take as long as keys are cached: {reason}",
                reason=reason,
            )
        self._due = self._clock.callLater(_PAUSE, self._start_dialling)

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
