"""The parent: it has the listeners and accepts nothing, starts the workers that do, and answers for all of them."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from prometheus_client import PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList, gatherResults, maybeDeferred
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory
from twisted.internet.task import LoopingCall
from twisted.logger import Logger, LogLevel

from vllmproxy.exposure import judge_start
from vllmproxy.failing import CannotStart, complain, end_with_failure, refusal
from vllmproxy.listening import CannotListen, Listener, listen
from vllmproxy.notify import Notifier
from vllmproxy.reloading import read_again
from vllmproxy.said import Said
from vllmproxy.settings import Settings
from vllmproxy.signals import Signals
from vllmproxy.simulated import base_url
from vllmproxy.workers.loads import Loads
from vllmproxy.workers.process import WorkerProcess
from vllmproxy.workers.seat import Seat, State
from vllmproxy.workers.sums import Sums, shown
from vllmproxy.workers.task import Task

_log = Logger(namespace=__name__)

#: Seconds that a worker may be stuck for, where systemd does not say.
STUCK: Final = 30.0
#: Seconds between two looks at the workers, and that one may take to show its metrics, or to reload.
_LOOKING: Final = 1.0
_SHOWING: Final = 1.0
_RELOADING: Final = 10.0

#: States in which a worker can show its metrics.
_SHOWN: Final = (State.READY, State.LEAVING, State.STOPPING)
_COMPLAINT: Final = "vllmproxy: "
#: The name of the parent, where others have a number.
_PARENT: Final = "parent"


class _Nobody(Factory):
    """Of connections that are never accepted."""

    noisy = False


class Parent(Service):
    """The service that twistd runs where there are several workers.

    :param said: what ``settings`` are made of; the workers are told.
    :param read: reads both again. Raises :class:`~vllmproxy.settings.SettingsError`.
    """

    def __init__(self, said: Said, settings: Settings, read: Callable[[], tuple[Said, Settings]], reactor: Any) -> None:
        self._first = self._said = said
        self._settings = settings
        self._read = read
        self._reactor = reactor
        self._listeners: list[Listener] = []
        self._notifier = Notifier(os.environ, reactor, self._is_well)
        self._signals = Signals(reactor, lambda: bool(self.running), reload=self._reload, hurry=self._hurry)
        limit = self._notifier.watchdog or STUCK
        self._seats = [
            Seat(number, reactor, self._launch, self._changed, limit) for number in range(1, settings.workers + 1)
        ]
        self._loads = Loads.make(settings.workers)
        self._complaints: dict[int, list[str]] = {}
        self._has_been_ready = self._has_failed = False
        self._ended = Sums()
        self._looking = LoopingCall(self._look)
        self._looking.clock = reactor
        self._looked = reactor.seconds()
        self._unkillable = False
        self._over: Deferred[None] = Deferred()

    # starting

    def privilegedStartService(self) -> None:
        """Bind, while the process may still bind low ports."""
        self._signals.hear_reloads()  # who finds it listening may send one
        try:
            self._listeners = listen(self._reactor, self._settings.listen, _Nobody())
            judge_start(self._addresses(), self._settings)
        except (CannotStart, CannotListen, OSError, ValueError) as error:
            raise refusal(error) from None

    def _addresses(self) -> list[IAddress]:
        return [listener.port.getHost() for listener in self._listeners]

    def startService(self) -> None:
        """Start the workers when the reactor runs."""
        super().startService()  # type: ignore[no-untyped-call]  # Twisted is half typed
        if not self._listeners:
            self.privilegedStartService()
        self._reactor.callWhenRunning(self._start)

    def _start(self) -> None:
        self._signals.hear_stops()
        for seat in self._seats:
            seat.start()
        self._looking.start(_LOOKING)

    def _launch(self, seat: Seat) -> WorkerProcess:
        name = type(self._reactor).__module__
        return WorkerProcess(
            self._reactor,
            Task(seat.number, self._first, self._said, name),
            self._loads.descriptor,
            [listener.port.fileno() for listener in self._listeners],  # type: ignore[attr-defined]
            handler=lambda kind, body: self._hear(seat, kind, body),
            complained=lambda line: self._complained(seat, line),
            ended=lambda ending: self._process_ended(seat, ending),
        )

    def _changed(self, seat: Seat) -> None:
        """A worker is in another state."""
        ready = self._count(State.READY)
        for each in self._seats:
            if each.channel is not None:
                each.channel.tell("count", [ready, len(self._seats)])
        if seat.state is State.READY and ready == len(self._seats) and not self._has_been_ready:
            self._has_been_ready = True
            self._all_ready()
        if self._count(State.OVER) == len(self._seats) and not self._over.called:
            self._over.callback(None)

    def _count(self, state: State) -> int:
        return sum(seat.state is state for seat in self._seats)

    def _all_ready(self) -> None:
        self._notifier.ready()
        assert self._settings.upstream is not None
        for listener in self._listeners:
            _log.info(
                "Listening on {url}, for {upstream}, with {count} workers",
                url=base_url(listener.port.getHost(), listener.description),
                upstream=self._settings.upstream.name,
                count=len(self._seats),
            )
        for number in list(self._complaints):
            self._log_complaints(number)

    # what workers say

    def _hear(self, seat: Seat, kind: str, body: Any) -> Any:
        if kind == "beat":
            seat.beat(body)
        elif kind == "ready":
            seat.accepts()
        elif kind == "closed":
            seat.accepts_no_more()
        elif kind == "log":
            level, namespace, text = body
            system = {} if namespace else {"log_system": "-"}
            emit = partial(Logger(namespace or __name__).emit, LogLevel.levelWithName(level))
            emit("worker {number}: {text}", number=seat.number, text=text, **system)
        elif kind == "metrics":
            seat.beat(body)
            return self._metrics(seat)
        return None

    def _complained(self, seat: Seat, line: str) -> None:
        self._complaints.setdefault(seat.number, []).append(line)
        if self._has_been_ready:
            self._log_complaints(seat.number)

    def _log_complaints(self, number: int) -> None:
        for line in self._complaints.pop(number, []):
            _log.error("worker {number}: {line}", number=number, line=line)

    def _process_ended(self, seat: Seat, ending: Any) -> None:
        self._loads.leave(seat.number)
        self._ended.keep(seat.shown)
        seat.shown = []
        if not self._has_been_ready and ending.status and self.running:
            self._fail(seat.number)
            seat.stop()  # or it would be started again
        seat.ended(ending)

    def _fail(self, number: int) -> None:
        """A worker cannot do its work, and so nor could another: end as it did, with what it said."""
        if self._has_failed:
            return
        self._has_failed = True
        lines = self._complaints.pop(number, [])
        said = [line.removeprefix(_COMPLAINT) for line in lines if line.startswith(_COMPLAINT)]
        for line in lines:
            if not line.startswith(_COMPLAINT):
                _log.error("worker {number}: {line}", number=number, line=line)
        complain(said[-1] if said else f"worker {number} ended before it was ready; the log has what it said")
        end_with_failure(self._reactor)

    # watching

    def _look(self) -> None:
        now = self._reactor.seconds()
        if now - self._looked > 3 * _LOOKING:  # what they said meanwhile has not been heard yet
            for seat in self._seats:
                seat.forgive()
        self._looked = now
        self._unkillable = sum(not seat.look() for seat in self._seats) > 0

    def _is_well(self) -> bool:
        """Whether systemd may leave the workers to the parent: it looks at them, and ends those that are stuck."""
        return not self._unkillable and self._reactor.seconds() - self._looked < STUCK

    # metrics

    def _metrics(self, asked: Seat) -> Deferred[list[str]]:
        """Fire with the content type and the text of the metrics of all workers; those that do not show theirs in time
        count as they did a moment ago."""
        waiting = [
            seat.channel.ask("shown", within=(_SHOWING, self._reactor)).addCallback(seat.beat)
            for seat in self._seats
            if seat is not asked and seat.state in _SHOWN and seat.channel is not None
        ]
        return DeferredList(waiting, consumeErrors=True).addCallback(lambda _: self._metrics_text())

    def _metrics_text(self) -> list[str]:
        sums = Sums()
        sums.add(self._ended.shown(), "")
        for seat in self._seats:
            sums.add(seat.shown, str(seat.number))
        own = [*ProcessCollector(registry=None).collect(), *PlatformCollector(registry=None).collect()]
        sums.add(shown(own), _PARENT)
        ready = GaugeMetricFamily("vllmproxy_workers", "Workers that accept", self._count(State.READY))
        restarts = CounterMetricFamily(
            "vllmproxy_worker_restarts", "Workers that were started again", labels=["worker"]
        )
        for seat in self._seats:
            restarts.add_metric([str(seat.number)], seat.restarts)
        sums.add(shown([ready, restarts]), "")
        return [CONTENT_TYPE_LATEST, generate_latest(sums).decode()]

    # reloading

    def _reload(self) -> None:
        """After SIGHUP: the settings are read here, once, and every worker takes them; or none does."""
        if not self.running:
            return
        if self._has_been_ready:
            self._notifier.reloading()
        try:
            settings = read_again(self._settings, self._read_settings, self._addresses())
            if settings is not None:
                self._settings, self._said = settings, self._newest
        finally:
            # Where nothing changes they still open the access log anew, and read certificates.
            said = self._said.as_json()
            waiting = [
                seat.channel.ask("reload", said, within=(_RELOADING, self._reactor))
                for seat in self._seats
                if seat.channel is not None
            ]
            DeferredList(waiting, consumeErrors=True).addCallback(self._reloaded)

    def _reloaded(self, _: object) -> None:
        if self._has_been_ready and self.running:
            self._notifier.ready()

    def _read_settings(self) -> Settings:
        self._newest, settings = self._read()
        return settings

    # stopping

    def stopService(self) -> Deferred[None]:
        """Have every worker stop as the settings say. The reactor turns on until they have."""
        super().stopService()  # type: ignore[no-untyped-call]  # Twisted is half typed
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        self._notifier.stopping()
        deaf = DeferredList([seat.stop() for seat in self._seats])
        if self._has_failed:
            self._hurry()
        await deaf
        listeners, self._listeners = self._listeners, []
        await gatherResults([maybeDeferred(listener.port.stopListening) for listener in listeners])
        await self._over
        if self._looking.running:
            self._looking.stop()
        self._notifier.close()

    def _hurry(self) -> None:
        for seat in self._seats:
            seat.hurry()
