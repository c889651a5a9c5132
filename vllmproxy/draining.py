"""How the proxy stops: it says that it is going to, takes no more, lets what is under way finish, and is over."""

from collections.abc import Callable
from enum import Enum, auto
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

_log = Logger(namespace=__name__)


class State(Enum):
    """How far it is.

    ``ANNOUNCING``: requests are taken still, though whoever asks for readiness is told to send them elsewhere.
    ``FINISHING``: none are taken any more.
    """

    RUNNING = auto()
    ANNOUNCING = auto()
    FINISHING = auto()
    OVER = auto()


class Event(Enum):
    """What moves it on. ``HURRY``: whoever asked it to stop has asked again."""

    STOP = auto()
    ANNOUNCED = auto()
    FINISHED = auto()
    LATE = auto()
    HURRY = auto()


class Draining:
    """The machine; its table is at the end of this file.

    :param take_no_more: stops accepting, and returns what fires when nothing is under way any more.
    """

    def __init__(self, clock: IReactorTime, take_no_more: Callable[[], Deferred[Any]]) -> None:
        self.state = State.RUNNING
        self._clock = clock
        self._take_no_more = take_no_more
        self._over: Deferred[None] = Deferred()
        self._wait: IDelayedCall | None = None
        self._delay = self._timeout = 0.0

    @property
    def has_begun(self) -> bool:
        """Whether it is stopping, or has stopped."""
        return self.state is not State.RUNNING

    def begin(self, delay: float, timeout: float) -> Deferred[None]:
        """Stop. The result fires when it is over; what is under way even so is to be cut off then.

        :param delay: seconds for which requests are taken still; ``timeout``: seconds for those under way after that.
        """
        self._delay, self._timeout = delay, timeout
        self._feed(Event.STOP)
        return self._over

    def hurry(self) -> None:
        """Wait for nothing."""
        self._feed(Event.HURRY)

    def _feed(self, event: Event) -> None:
        """Act on ``event`` as the table says; a pair that is not in it came too late to matter."""
        action = _TABLE.get((self.state, event))
        if action is not None:
            if self._wait is not None and self._wait.active():
                self._wait.cancel()
            action(self)

    def _announce(self) -> None:
        self.state = State.ANNOUNCING
        if self._delay:
            _log.info("Stopping: not ready any more; requests are still taken for {delay} s", delay=self._delay)
            self._wait = self._clock.callLater(self._delay, self._feed, Event.ANNOUNCED)
        else:
            self._finish()

    def _finish(self) -> None:
        self.state = State.FINISHING
        _log.info("Stopping: what is under way has {timeout} s to finish", timeout=self._timeout)
        self._wait = self._clock.callLater(self._timeout, self._feed, Event.LATE)
        self._take_no_more().addCallback(lambda _: self._feed(Event.FINISHED))

    def _late(self) -> None:
        if self._timeout:  # else it was to be cut off
            _log.warn("Stopping: the time is over; what is not is cut off, with the error stopping in the access log")
        self._end()

    def _end(self) -> None:
        self.state = State.OVER
        self._over.callback(None)


_TABLE: dict[tuple[State, Event], Callable[[Draining], None]] = {
    (State.RUNNING, Event.STOP): Draining._announce,
    (State.RUNNING, Event.HURRY): Draining._end,
    (State.ANNOUNCING, Event.ANNOUNCED): Draining._finish,
    (State.ANNOUNCING, Event.HURRY): Draining._end,
    (State.FINISHING, Event.FINISHED): Draining._end,
    (State.FINISHING, Event.LATE): Draining._late,
    (State.FINISHING, Event.HURRY): Draining._end,
}
