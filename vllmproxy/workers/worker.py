"""A worker's side of the channel: what it hears from its parent, tells it, and asks it."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Final, Protocol

from prometheus_client.core import Metric
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.error import ReactorNotRunning
from twisted.internet.task import LoopingCall
from twisted.logger import LogEvent, Logger, LogLevel, formatEvent

from vllmproxy.errors import Internal
from vllmproxy.said import Said
from vllmproxy.workers.channel import Channel, ChannelLost
from vllmproxy.workers.loads import Loads, Turns
from vllmproxy.workers.sums import shown
from vllmproxy.workers.task import LISTENERS, LOADS, Task

_log = Logger(namespace=__name__)

#: Seconds between two signs of life.
BEAT: Final = 1.0
#: Seconds that the parent may take to add up the metrics, or to receive the last ones.
_PATIENCE: Final = 5.0
#: Where Twisted puts what comes from its older log, which its own files show as a dash.
_LEGACY: Final = "log_legacy"


class Served(Protocol):
    """What a worker needs of the service that it runs."""

    def reload(self) -> object: ...

    def hurry(self) -> object: ...


class Worker:
    """Stands for the parent in the process of a worker, and for systemd: see :class:`~vllmproxy.notify.Notifier`.

    :ivar said: what settings are made of that hold since the last reload.
    :ivar channel: to the parent.
    """

    def __init__(self, task: Task, listeners: int, reactor: Any) -> None:
        self.said: Said = task.now
        self.sockets = range(LISTENERS, LISTENERS + listeners)
        self.channel = Channel(self._hear, self._orphaned)
        self._reactor = reactor
        self._served: Served | None = None
        self._families: Callable[[], Iterable[Metric]] = list
        self._number = task.number
        self._loads = Loads(LOADS)
        self._count = (0, 0)
        self._stops = False
        self._listens_no_more: Deferred[None] = Deferred()
        self._beating = LoopingCall(self._beat)
        self._beating.clock = reactor

    def serve(self, served: Served) -> None:
        """Begin, when the reactor runs: show signs of life, and have ``served`` do what the parent says."""
        self._served = served
        self._beating.start(BEAT)

    def shows(self, families: Callable[[], Iterable[Metric]]) -> None:
        """Have the parent know these metrics."""
        self._families = families

    def turns(self, connections: Callable[[], int]) -> Turns:
        """Return what tells a listener when to accept.

        :param connections: how many this process has.
        """
        return Turns(self._loads, self._number, connections)

    def log(self, event: LogEvent) -> None:
        """Have the parent log an event of this process."""
        text = formatEvent(event)
        failure = event.get("log_failure")
        if failure is not None:
            text = f"{text}\n{failure.getTraceback()}"
        level = event.get("log_level", LogLevel.info)
        namespace = event.get("log_namespace", _LEGACY)
        self.channel.tell("log", [level.name, "" if namespace == _LEGACY else namespace, text])

    # what the API asks

    def count(self) -> tuple[int, int]:
        """Return how many workers are at work, and of how many."""
        return self._count

    def metrics(self) -> Deferred[tuple[bytes, bytes]]:
        """Fire with the content type and the body of the metrics of all workers."""
        asking = self.channel.ask("metrics", self._shown(), within=(_PATIENCE, self._reactor))
        return asking.addCallbacks(_encoded, _unanswered)

    def _shown(self) -> Any:
        return shown(self._families())

    # what the parent wants to know

    def ready(self) -> None:
        """It accepts."""
        self.channel.tell("ready")

    def reloading(self) -> None:
        """The parent knows."""

    def stopping(self) -> None:
        """The parent knows, or will."""

    def listening_no_more(self) -> None:
        """It takes no new connections: when none of the workers does, the parent lets go of the listeners."""
        self._loads.leave(self._number)
        if not self._listens_no_more.called:
            self.channel.tell("closed")
            self._listens_no_more.callback(None)

    def close(self) -> Deferred[Any]:
        """Have the parent know the last numbers, before the process ends."""
        if self._beating.running:
            self._beating.stop()
        telling = self.channel.ask("beat", self._shown(), within=(_PATIENCE, self._reactor))
        return telling.addErrback(_nobody_hears)

    def _beat(self) -> Deferred[Any]:
        """The next one waits until this one was heard, so that they do not pile up."""
        return self.channel.ask("beat", self._shown()).addErrback(_nobody_hears)

    # what the parent says

    def _hear(self, kind: str, body: Any) -> Any:
        answer: Any = None
        if kind == "shown":
            answer = self._shown()
        elif kind == "count":
            self._count = body[0], body[1]
        elif kind == "reload":
            self.said = Said.of_json(body)
            if self._served is not None:
                self._served.reload()
        elif kind == "stop":
            self.stop()
            answer = self._listens_no_more
        elif kind == "hurry" and self._served is not None:
            self._served.hurry()
        return answer

    def stop(self) -> None:
        """Stop as the settings say. Idempotent."""
        if not self._stops:
            self._stops = True
            self._reactor.callWhenRunning(self._stop_reactor)

    def _stop_reactor(self) -> None:
        with suppress(ReactorNotRunning):  # it stops already
            self._reactor.stop()

    def _orphaned(self) -> None:
        if not self._stops:
            _log.error("The parent is gone")
            self.stop()


def _encoded(texts: list[str]) -> tuple[bytes, bytes]:
    return texts[0].encode(), texts[1].encode()


def _nobody_hears(failure: Any) -> None:
    failure.trap(ChannelLost, TimeoutError)


def _unanswered(failure: Any) -> Any:
    failure.trap(ChannelLost, TimeoutError)
    raise Internal("The metrics of the other workers cannot be had just now; ask again.")
