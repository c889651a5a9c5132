"""Whether the store may be asked just now. After a failure nobody waits for it until it has answered a probe."""

from collections.abc import Callable
from enum import Enum
from typing import Any, Final

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from vllmproxy.store.interface import StoreUnavailable

_log = Logger(namespace=__name__)

#: Seconds between a probe that failed and the next one.
PAUSE: Final = 0.25


class State(Enum):
    """Where a breaker is."""

    ENDED = "nothing may be asked, and nothing is tried"
    CLOSED = "calls pass"
    OPEN = "calls fail at once; a probe comes soon"
    PROBING = "calls fail at once; a probe is under way"


class Event(Enum):
    """What can happen to a breaker from outside."""

    STARTED = "it is used from now on"
    FAILED = "a call had no answer in time, or there was no connection to be had"
    DUE = "the pause is over"
    ANSWERED = "the probe was answered"
    UNANSWERED = "the probe failed"
    STOPPED = "it is not used any more"


class Breaker:
    """Opens at the first failure, and closes by itself at the first answer to a probe; no caller is needed for that.

    :param probe: asks the store whether it is there. It ends within its own deadline, and fails with
        :class:`StoreUnavailable`, which says why.
    :ivar reason: why calls fail at once, ``None`` while they may be made.
    """

    def __init__(self, clock: IReactorTime, probe: Callable[[], Deferred[Any]]) -> None:
        self._clock = clock
        self._probe = probe
        self._state = State.ENDED
        self._due: IDelayedCall | None = None
        self._probing: Deferred[Any] | None = None
        self.reason: str | None = _ENDED

    def start(self) -> None:
        """Let calls pass, until one fails."""
        self._happened(Event.STARTED)

    def trip(self, reason: str) -> None:
        """A call failed in a way that the next one would share. Does nothing while that is known."""
        self._happened(Event.FAILED, reason)

    def end(self) -> None:
        """Probe no more; calls fail."""
        self._happened(Event.STOPPED)

    def _happened(self, event: Event, *details: str) -> None:
        handler = _TABLE.get((self._state, event))
        if handler is not None:
            handler(self, *details)

    def _close(self) -> None:
        if self._state is State.PROBING:
            _log.info("the store answers again")
        self._state, self.reason = State.CLOSED, None

    def _open(self, reason: str) -> None:
        _log.warn("the store is not asked for now: {reason}", reason=reason)
        self.reason = reason
        self._send_probe()

    def _send_probe(self) -> None:
        self._state = State.PROBING
        self._probing = self._probe()
        self._probing.addCallbacks(lambda _: self._happened(Event.ANSWERED), self._probe_failed)

    def _probe_failed(self, failure: Failure) -> None:
        if failure.check(StoreUnavailable, CancelledError) is None:
            _log.failure("Asking whether the store is there failed in an unforeseen way", failure)
        self._happened(Event.UNANSWERED, failure.getErrorMessage())

    def _wait(self, reason: str) -> None:
        self._state, self.reason = State.OPEN, reason
        self._due = self._clock.callLater(PAUSE, self._happened, Event.DUE)

    def _end(self) -> None:
        self._state, self.reason = State.ENDED, _ENDED
        if self._due is not None and self._due.active():
            self._due.cancel()
        if self._probing is not None:
            self._probing.cancel()


_ENDED = "the store is closed"

_TABLE: dict[tuple[State, Event], Callable[..., None]] = {
    (State.ENDED, Event.STARTED): Breaker._close,
    (State.CLOSED, Event.FAILED): Breaker._open,
    (State.CLOSED, Event.STOPPED): Breaker._end,
    (State.OPEN, Event.DUE): Breaker._send_probe,
    (State.OPEN, Event.STOPPED): Breaker._end,
    (State.PROBING, Event.ANSWERED): Breaker._close,
    (State.PROBING, Event.UNANSWERED): Breaker._wait,
    (State.PROBING, Event.STOPPED): Breaker._end,
}
