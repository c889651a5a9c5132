"""One of the workers, whichever process it is just now: started, watched, started again, stopped."""

import signal
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, Final, Protocol

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from vllmproxy.workers.backoff import Backoff
from vllmproxy.workers.channel import Channel, ChannelLost
from vllmproxy.workers.process import Ending

_log = Logger(namespace=__name__)

#: Seconds from its start to its first sign of life.
STARTING: Final = 60.0
#: Seconds after SIGABRT, which shows where it stood, to SIGKILL.
ABORTING: Final = 5.0
#: Seconds to SIGKILL for one that is to end at once; it may have its last words with a slow Redis.
HURRYING: Final = 10.0


class State(Enum):
    """How it is. ``LEAVING``: somebody else has asked it to stop. ``WAITING``: it died, and is started again in a
    while."""

    IDLE = auto()
    STARTING = auto()
    READY = auto()
    LEAVING = auto()
    WAITING = auto()
    STOPPING = auto()
    OVER = auto()


class Event(Enum):
    """What moves it on. ``START``: for the first time, or again."""

    START = auto()
    ACCEPTS = auto()
    CLOSED = auto()
    DIED = auto()
    STOP = auto()


class Running(Protocol):
    """What a seat needs of a process."""

    channel: Channel

    @property
    def pid(self) -> int: ...

    def kill(self, number: signal.Signals) -> None: ...


class Seat:
    """The machine; its table is at the end of this file.

    :param launch: starts a process for the seat. Raises ``OSError``.
    :param changed: called when the state is another.
    :param limit: seconds that it may show no sign of life.
    :ivar number: from 1.
    :ivar shown: the metrics of this process, as far as they are known; the parent takes those of one that has ended.
    :ivar restarts: how often it was started again.
    :ivar ending: how the last process ended.
    """

    def __init__(
        self,
        number: int,
        clock: IReactorTime,
        launch: Callable[["Seat"], Running],
        changed: Callable[["Seat"], object],
        limit: float,
    ) -> None:
        self.number = number
        self.state = State.IDLE
        self.shown: Any = []
        self.restarts = 0
        self.ending: Ending | None = None
        self.deaf: Deferred[Any] = succeed(None)
        self._clock = clock
        self._launch = launch
        self._changed = changed
        self._limit = limit
        self._backoff = Backoff()
        self._process: Running | None = None
        self._wait: IDelayedCall | None = None
        self._started = self._heard = 0.0
        self._has_beaten = False
        self._aborted: float | None = None

    @property
    def channel(self) -> Channel | None:
        """Where to talk to it; ``None`` while there is no process."""
        return None if self._process is None else self._process.channel

    def start(self) -> None:
        """Start it."""
        self._feed(Event.START)

    def stop(self) -> Deferred[Any]:
        """Stop it as its settings say; the result fires when it takes no new connections."""
        self._feed(Event.STOP)
        return self.deaf

    def hurry(self) -> None:
        """End it at once; it is killed if that takes longer."""
        if self._process is not None:
            self._process.channel.tell("hurry")
            self._clock.callLater(HURRYING, self._kill, self._process)

    def _kill(self, process: Running) -> None:
        if self._process is process:
            process.kill(signal.SIGKILL)

    def accepts(self) -> None:
        """It says that it accepts."""
        self._feed(Event.ACCEPTS)

    def accepts_no_more(self) -> None:
        """It says that it takes no new connections."""
        self._feed(Event.CLOSED)

    def beat(self, shown: Any) -> None:
        """It lives, and shows its metrics."""
        self.shown = shown
        self._heard = self._clock.seconds()
        self._has_beaten = True

    def ended(self, ending: Ending) -> None:
        """Its process is no more."""
        self.ending = ending
        self._process = None
        self._feed(Event.DIED)

    def forgive(self) -> None:
        """Count from now on: it was not listened to."""
        self._heard = self._clock.seconds()

    def look(self) -> bool:
        """End it if it has shown no sign of life for too long; false where even that was in vain."""
        if self._process is None:
            return True
        now = self._clock.seconds()
        silent = now - self._heard
        if self._aborted is None and silent > (self._limit if self._has_beaten else max(self._limit, STARTING)):
            self._aborted = now
            _log.error(
                "Worker {number} (process {pid}) has not moved for {silent} s: it is ended",
                number=self.number,
                pid=self._process.pid,
                silent=round(silent),
            )
            self._process.kill(signal.SIGABRT)
        elif self._aborted is not None and now - self._aborted >= ABORTING:
            self._process.kill(signal.SIGKILL)
            return now - self._aborted < 2 * ABORTING
        return True

    def _feed(self, event: Event) -> None:
        """Act on ``event`` as the table says; a pair that is not in it came too late to matter."""
        action = _TABLE.get((self.state, event))
        if action is not None:
            action(self)
            self._changed(self)

    def _start(self) -> None:
        self.state = State.STARTING
        self._started = self._heard = self._clock.seconds()
        self._has_beaten, self._aborted = False, None
        self.shown = []
        try:
            self._process = self._launch(self)
        except OSError as error:  # no memory, say
            self._clock.callLater(0, self.ended, Ending(None, f"before it began: {error}"))

    def _ready(self) -> None:
        self.state = State.READY

    def _leave(self) -> None:
        self.state = State.LEAVING

    def _died(self) -> None:
        self.state = State.WAITING
        assert self.ending is not None
        delay = self._backoff.died(self._clock.seconds() - self._started)
        when = f"in {delay:g} s" if delay else "now"
        _log.error(
            "Worker {number} ended {how}; another is started {when}", number=self.number, how=self.ending.how, when=when
        )
        self.restarts += 1
        self._wait = self._clock.callLater(delay, self._feed, Event.START)

    def _stop(self) -> None:
        self.state = State.STOPPING
        if self.channel is not None:  # or it could not be started, and is about to hear that
            self.deaf = self.channel.ask("stop").addErrback(lambda failure: failure.trap(ChannelLost) and None)

    def _stop_waiting(self) -> None:
        self.state = State.OVER
        if self._wait is not None:
            self._wait.cancel()

    def _over(self) -> None:
        self.state = State.OVER


_TABLE: dict[tuple[State, Event], Callable[[Seat], None]] = {
    (State.IDLE, Event.START): Seat._start,
    (State.IDLE, Event.STOP): Seat._over,
    (State.STARTING, Event.ACCEPTS): Seat._ready,
    (State.STARTING, Event.DIED): Seat._died,
    (State.STARTING, Event.STOP): Seat._stop,
    (State.READY, Event.CLOSED): Seat._leave,
    (State.READY, Event.DIED): Seat._died,
    (State.READY, Event.STOP): Seat._stop,
    (State.LEAVING, Event.DIED): Seat._died,
    (State.LEAVING, Event.STOP): Seat._stop,
    (State.WAITING, Event.START): Seat._start,
    (State.WAITING, Event.STOP): Seat._stop_waiting,
    (State.STOPPING, Event.DIED): Seat._over,
}
