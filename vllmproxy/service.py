"""Puts the rooms together into the service that twistd runs. Decides nothing else."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred, gatherResults, maybeDeferred
from twisted.internet.interfaces import IAddress, IListeningPort
from twisted.logger import Logger

from vllmproxy import __version__
from vllmproxy.api.app import Api
from vllmproxy.api.branch import ApiBranch
from vllmproxy.build import VERSION
from vllmproxy.draining import Draining
from vllmproxy.exposure import judge_start
from vllmproxy.failing import CannotStart, complain, end_with_failure, refusal
from vllmproxy.garbage import settle_in
from vllmproxy.http1.factory import ServerFactory
from vllmproxy.http1.hangup import HangupWatcher
from vllmproxy.http1.message import RequestHead, WireError
from vllmproxy.http1.places import Places
from vllmproxy.ids import fresh_id
from vllmproxy.keys.cache import KeyCache
from vllmproxy.keys.gate import Gate
from vllmproxy.keys.masterkey import MasterKey
from vllmproxy.keys.routes import KNOWN_ROUTES
from vllmproxy.limits.fallback import FallbackLimiter
from vllmproxy.listening import CannotListen, Listener, accept, listen, renew_certificates
from vllmproxy.notify import Notifier
from vllmproxy.observers.fanout import FanOut
from vllmproxy.observers.jsonlines import JsonLines, open_access_log
from vllmproxy.observers.metrics import MetricsObserver
from vllmproxy.observers.occupancy import Occupancy, OccupancyCollector
from vllmproxy.observers.record import RequestRecord
from vllmproxy.openfiles import capacity, raise_open_files
from vllmproxy.polling import lighten
from vllmproxy.relay.exchange import Exchange
from vllmproxy.relay.headers import TrustedProxies, request_id_in
from vllmproxy.relay.line import Line
from vllmproxy.relay.quotas import Quotas
from vllmproxy.relay.refuse import wire_refusal
from vllmproxy.relay.relay import Relay
from vllmproxy.relay.revocation import Revocation
from vllmproxy.reloading import limits_of, reload, timeouts_of
from vllmproxy.settings import Settings, SettingsError
from vllmproxy.settings_table import TABLE
from vllmproxy.signals import Signals
from vllmproxy.simulated import base_url, start_simulator, what_to_try
from vllmproxy.store.interface import CannotOpenStore
from vllmproxy.store.limits_memory import MemoryLimiter
from vllmproxy.store.opening import make_store
from vllmproxy.tree import Tree
from vllmproxy.turn import turn
from vllmproxy.upstreams.probe import Probe
from vllmproxy.upstreams.server import Server, make_server
from vllmproxy.usage.bookkeeper import Bookkeeper
from vllmproxy.workers.ports import inherit
from vllmproxy.workers.worker import Worker

_log = Logger(namespace=__name__)


class Proxy:
    """Everything that is running, wired.

    :param worker: what this process is one of, if there are several.
    """

    def __init__(
        self, settings: Settings, reactor: Any, is_stopping: Callable[[], bool], worker: Worker | None = None
    ) -> None:
        assert settings.upstream is not None
        most = _connections(settings)
        self._reactor = reactor
        self._is_stopping = is_stopping
        self._worker = worker
        in_state = settings.store == TABLE["store"].default
        self._store_setting = "--state-directory" if in_state else "--store"
        self.store = make_store(settings.store, reactor=reactor, state_directory=settings.state_directory)
        self.access_log = _open_access_log(settings.access_log, reactor)
        self._metrics = MetricsObserver(known_routes=KNOWN_ROUTES)
        self.observer = FanOut([self.access_log, self._metrics], soon=turn.before_writing)
        master = MasterKey(settings.master_key.reveal()) if settings.master_key else None
        self.cache = KeyCache(reactor, ttl=settings.key_cache_ttl, max_stale=settings.key_max_stale)
        self.gate = Gate(self.store, self.cache, master, reactor)
        self.store.watch_keys(self.gate.changed)
        trusted = TrustedProxies(settings.trusted_proxy)
        server = self.make_server(settings)
        self.probe = Probe(server, reactor)
        # Where keys are forgotten with the process, so is what they used.
        journals = None if settings.store == "memory:" else settings.state_directory / "usage"
        self.books = Bookkeeper(self.store, reactor, journals, soon=turn.before_writing)
        limiter = self.store.limiter(reactor)
        if settings.store_outage == "local":
            limiter = FallbackLimiter(limiter, MemoryLimiter(reactor), settings.local_share)
        self.relay = Relay(
            reactor,
            self.gate,
            server,
            self.observer,
            trusted,
            Quotas(limiter, reactor, settings.budget_status),
            self.books,
            settings.prices,
            timeouts_of(settings),
            settings.usage,
            settings.max_inspected_body,
            settings.max_held_bodies,
            line=Line(_places(settings, most)),
        )
        self.revocation = Revocation(self.gate, self.relay, cuts=settings.cut_revoked)
        self.gate.watch(self.revocation.changed)
        api = self.make_api(settings)
        self.api = ApiBranch(
            reactor,
            self.gate,
            api.site(),
            api.routes,
            self.observer,
            trusted,
            settings.max_api_body,
            settings.max_held_api_bodies,
        )
        self.hangups = HangupWatcher(reactor)
        self.factory = ServerFactory(
            reactor,
            Tree(self.relay.handle, self.api.handle).handle,
            self.refuse_wire,
            self.hangups,
            limits=limits_of(settings),
            head_timeout=settings.head_timeout,
            idle_timeout=settings.idle_timeout,
            body_timeout=settings.body_timeout,
            min_body_rate=settings.min_body_rate,
            write_timeout=settings.write_timeout,
            max_connections=most,
            per_client=settings.max_connections_per_client,
            client_of=trusted.client_of_peer,
        )
        self._metrics.add(OccupancyCollector(self._occupancy))
        if worker is not None:
            worker.shows(self._metrics.families)

    def _occupancy(self) -> Occupancy:
        factory, line = self.factory, self.relay.line
        return Occupancy(
            factory.connections.taken,
            factory.evicted,
            line.places.taken,
            line.places.waiting,
            self.books.size,
            factory.refused,
            line.refused,
        )

    def make_server(self, settings: Settings) -> Server:
        """Return the upstream that ``settings`` name."""
        assert settings.upstream is not None
        return make_server(
            self._reactor,
            settings.upstream,
            key=settings.upstream_key.reveal() if settings.upstream_key else None,
            authorities=settings.upstream_ca,
            connect_timeout=settings.connect_timeout,
            idle_timeout=settings.upstream_idle_timeout,
            write_timeout=settings.write_timeout,
        )

    def make_api(self, settings: Settings) -> Api:
        """Return the API as ``settings`` have it."""
        return Api(
            self.gate,
            self.store,
            self._reactor,
            metrics_text=self._metrics.text if self._worker is None else self._worker.metrics,
            open_metrics=settings.open_metrics,
            version=__version__,
            is_well=self._is_well,
            is_stopping=self._is_stopping,
            priced=settings.prices is not None,
            tell_usage=self.books.tell,
            workers=None if self._worker is None else self._worker.count,
        )

    def _is_well(self) -> Deferred[bool]:
        return self.probe.is_well()

    def refuse_wire(self, error: WireError, head: RequestHead | None, peer: IAddress | None) -> bytes:
        """Report and render the refusal of a request that is no HTTP."""
        id = (head and request_id_in(head.fields)) or fresh_id()
        self.observer.started()
        self.observer.finished(
            RequestRecord(
                time=self._reactor.seconds(),
                request_id=id.decode("ascii"),
                method=head.method.decode("ascii") if head else "",
                route="",
                client=getattr(peer, "host", ""),
                status=error.status,
                ended="refused",
                error=error.kind,
            )
        )
        return wire_refusal(error, id)

    async def open(self) -> None:
        """Open what has to be, before the first request. Raises :class:`CannotOpenStore`."""
        try:
            await self.store.open()
        except CannotOpenStore as error:
            raise CannotOpenStore(f"{self._store_setting}: {error}") from error
        try:
            self.books.open()
        except OSError as error:
            raise CannotOpenStore(
                f"--state-directory: the journal of usage cannot be written: {error}; name another directory"
            ) from error

    async def close(self) -> None:
        """Reset what is connected and let go of everything."""
        self.api.is_ending = True
        self.relay.end()  # or those that wait would be sent on in the turn of those that end
        await self.factory.close()
        self.revocation.close()
        await self.relay.close()
        await self.books.close()
        self.hangups.close()
        self.observer.flush()
        self.access_log.close()
        await self.store.close()


class ProxyService(Service):
    """The proxy in its process: it listens, opens its store, then accepts; or the process ends with status 1.

    :param worker: has the listeners, and hears what systemd else does; ``None`` where there is one process only.
    """

    def __init__(
        self, settings: Settings, load: Callable[[], Settings], reactor: Any, worker: Worker | None = None
    ) -> None:
        self._settings = settings
        self._load = load
        self._reactor = reactor
        self._listeners: list[Listener] = []
        self._simulator: IListeningPort | None = None
        self._proxy: Proxy | None = None
        self._opening: Deferred[None] | None = None
        self._made_key = settings.simulate and settings.master_key is None
        self._accepting = False
        self._reloads_later = False
        self._draining = Draining(reactor, self._take_no_more)
        self._worker = worker
        self._notifier = Notifier(os.environ, reactor) if worker is None else worker
        self._signals = Signals(reactor, lambda: bool(self.running), reload=self.reload, hurry=self.hurry)

    def privilegedStartService(self) -> None:
        """Bind, while the process may still bind low ports. A process that cannot do its work does not start."""
        if self._worker is None:
            self._signals.hear_reloads()  # who finds it listening may send one
        try:
            self._bind()
        except (CannotStart, CannotListen, SettingsError, OSError, ValueError) as error:
            raise refusal(error) from None

    def _bind(self) -> None:
        settings = self._settings
        if settings.simulate:
            try:
                self._simulator, settings = start_simulator(self._reactor, settings)
            except OSError as error:
                where = f"{str(settings.state_directory)!r}: {error.strerror}"
                raise CannotStart(f"--state-directory: cannot write in {where}; name another directory") from None
        proxy = Proxy(settings, self._reactor, lambda: self._draining.has_begun, self._worker)
        if self._worker is None:
            self._listeners = listen(self._reactor, settings.listen, proxy.factory)
            judge_start(self._addresses(), settings)
        else:
            turns = partial(self._worker.turns, proxy.factory.channels.__len__)
            self._listeners = inherit(self._reactor, settings.listen, self._worker.sockets, proxy.factory, turns)
        self._settings, self._proxy = settings, proxy

    def _addresses(self) -> list[IAddress]:
        return [listener.port.getHost() for listener in self._listeners]

    def reload(self) -> None:
        """After SIGHUP, as systemd and logrotate send it."""
        proxy = self._proxy
        if proxy is None:
            return
        try:
            proxy.access_log.reopen()
        except OSError as error:
            _log.error("The access log goes on in the old file: {error}", error=str(error))
        self._reloads_later = not self._accepting
        if self._accepting and self.running:
            self._notifier.reloading()
            try:
                for problem in renew_certificates(self._listeners):
                    _log.error("Reloading: {problem}", problem=problem)
                self._settings = reload(proxy, self._settings, self._load, self._addresses())
            finally:
                self._notifier.ready()

    def startService(self) -> None:
        """Begin to accept once the store is open."""
        super().startService()  # type: ignore[no-untyped-call]  # Twisted is half typed
        if self._proxy is None:
            self.privilegedStartService()
        self._reactor.callWhenRunning(self._open)

    def _open(self) -> None:
        assert self._proxy is not None
        if self._worker is None:
            self._signals.hear_stops()
        self._opening = Deferred.fromCoroutine(self._proxy.open())
        self._opening.addCallbacks(self._opened, self._not_opened)

    def _opened(self, _: None) -> None:
        settle_in()
        lighten(self._reactor)
        accept(self._listeners)
        self._accepting = True
        self._notifier.ready()
        assert self._settings.upstream is not None
        urls = [base_url(listener.port.getHost(), listener.description) for listener in self._listeners]
        if self._worker is None:
            for url in urls:
                _log.info(
                    "vllmproxy {version}: Listening on {url}, for {upstream}",
                    version=VERSION,
                    url=url,
                    upstream=self._settings.upstream.name,
                )
            if self._settings.upstream.base_path.endswith(b"/v1"):
                _log.warn(
                    "The upstream's URL ends in /v1, which goes before every path: /vllm/v1/models asks it for "
                    "/v1/v1/models. Leave /v1 out, unless it is meant so"
                )
        if self._settings.simulate:
            text = what_to_try(urls[0], self._settings.kept_master_key if self._made_key else None)
            os.write(1, text.encode())  # not print: twistd would make log lines of it
        if self._reloads_later:
            self.reload()

    def _not_opened(self, reason: Any) -> None:
        if not self.running:
            return
        if reason.check(CannotOpenStore) is None:
            _log.failure("Opening the store failed", reason)
        complain(reason.getErrorMessage())
        end_with_failure(self._reactor)

    def hurry(self) -> None:
        """Wait for nothing that is under way."""
        self._draining.hurry()

    def _take_no_more(self) -> Deferred[Any]:
        assert self._proxy is not None
        return gatherResults([self._stop_listening(), self._proxy.factory.drain()])

    def _stop_listening(self) -> Deferred[Any]:
        listeners, self._listeners = self._listeners, []
        stopping = gatherResults([maybeDeferred(listener.port.stopListening) for listener in listeners])
        return stopping.addCallback(lambda _: self._notifier.listening_no_more())

    async def _stop(self) -> None:
        self._notifier.stopping()
        if self._accepting:
            await self._draining.begin(self._settings.drain_delay, self._settings.drain_timeout)
        await self._stop_listening()
        if self._proxy is not None:
            await self._proxy.close()
        if self._simulator is not None:
            await maybeDeferred(self._simulator.stopListening)
        await maybeDeferred(self._notifier.close)

    def stopService(self) -> Deferred[None]:
        """Stop as the settings say, then let go of everything. The reactor turns on until that is done."""
        super().stopService()  # type: ignore[no-untyped-call]  # Twisted is half typed
        if self._opening is not None:
            self._opening.cancel()
        return Deferred.fromCoroutine(self._stop())


def _connections(settings: Settings) -> int:
    """Return how many connections are taken; says so where they are fewer than they should be."""
    found = capacity(raise_open_files(), settings.max_connections)
    if found.warning is not None:
        _log.warn("{warning}", warning=found.warning)
    return found.connections


def _places(settings: Settings, connections: int) -> Places[Exchange]:
    """Return the places for requests. Those that wait hold a connection each, so the line is no longer than what the
    requests under way leave of these."""
    most = min(settings.max_requests or connections, connections)
    line = min(settings.max_waiting, connections - most)
    return Places(most, line=line, per_client=settings.max_requests_per_client)


def _open_access_log(target: str, reactor: Any) -> JsonLines:
    try:
        return open_access_log(target, reactor)
    except OSError as error:
        raise CannotStart(f"--access-log: {target!r} cannot be written ({error.strerror}); name another file") from None
