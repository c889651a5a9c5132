"""Puts the rooms together into the service that twistd runs. Decides nothing else."""

import atexit
import os
import signal
import sys
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IAddress, IListeningPort
from twisted.logger import Logger

from vllmproxy import __version__
from vllmproxy.api.app import Api
from vllmproxy.api.branch import ApiBranch
from vllmproxy.exposure import judge
from vllmproxy.http1.factory import ServerFactory
from vllmproxy.http1.hangup import HangupWatcher
from vllmproxy.http1.message import Limits, RequestHead, WireError
from vllmproxy.http1.places import Places
from vllmproxy.http1.stream import Stream
from vllmproxy.keys.cache import KeyCache
from vllmproxy.keys.gate import Gate
from vllmproxy.keys.masterkey import MasterKey
from vllmproxy.keys.routes import KNOWN_ROUTES
from vllmproxy.limits.fallback import FallbackLimiter
from vllmproxy.listening import CannotListen, accept, listen
from vllmproxy.observers.fanout import FanOut
from vllmproxy.observers.jsonlines import JsonLines, open_access_log
from vllmproxy.observers.metrics import MetricsObserver
from vllmproxy.observers.occupancy import Occupancy, OccupancyCollector
from vllmproxy.observers.record import RequestRecord
from vllmproxy.openfiles import capacity, raise_open_files
from vllmproxy.relay.exchange import Exchange
from vllmproxy.relay.headers import TrustedProxies, fresh_id
from vllmproxy.relay.line import Line
from vllmproxy.relay.quotas import Quotas
from vllmproxy.relay.refuse import wire_refusal
from vllmproxy.relay.relay import Relay
from vllmproxy.relay.revocation import Revocation
from vllmproxy.relay.targets import is_under_prefix
from vllmproxy.relay.waits import Timeouts
from vllmproxy.settings import Settings, SettingsError
from vllmproxy.simulated import base_url, key_file, start_simulator, what_to_try
from vllmproxy.store.interface import CannotOpenStore
from vllmproxy.store.limits_memory import MemoryLimiter
from vllmproxy.store.opening import make_store
from vllmproxy.upstreams.probe import Probe
from vllmproxy.upstreams.server import make_server
from vllmproxy.usage.bookkeeper import Bookkeeper

_log = Logger()


class CannotStart(Exception):
    """The proxy cannot do its work; the text says why and what to do."""


class Proxy:
    """Everything that is running, wired."""

    def __init__(self, settings: Settings, reactor: Any) -> None:
        assert settings.upstream is not None
        limits = Limits(settings.max_head, settings.max_headers, settings.max_target)
        most = _connections(settings)
        self._reactor = reactor
        self.store = make_store(settings.store, reactor=reactor, state_directory=settings.state_directory)
        self.access_log = _open_access_log(settings.access_log, reactor)
        metrics = MetricsObserver(known_routes=KNOWN_ROUTES)
        self.observer = FanOut([self.access_log, metrics])
        master = MasterKey(settings.master_key.reveal()) if settings.master_key else None
        cache = KeyCache(reactor, ttl=settings.key_cache_ttl, max_stale=settings.key_max_stale)
        gate = Gate(self.store, cache, master, reactor)
        self.store.watch_keys(gate.changed)
        trusted = TrustedProxies(settings.trusted_proxy)
        server = make_server(
            reactor,
            settings.upstream,
            key=settings.upstream_key.reveal() if settings.upstream_key else None,
            connect_timeout=settings.connect_timeout,
            idle_timeout=settings.upstream_idle_timeout,
            write_timeout=settings.write_timeout,
            limits=limits,
        )
        # Where keys are forgotten with the process, so is what they used.
        journals = None if settings.store == "memory:" else settings.state_directory / "usage"
        self.books = Bookkeeper(self.store, reactor, journals)
        limiter = self.store.limiter(reactor)
        if settings.store_outage == "local":
            limiter = FallbackLimiter(limiter, MemoryLimiter(reactor), settings.local_share)
        self.relay = Relay(
            reactor,
            gate,
            server,
            self.observer,
            trusted,
            Quotas(limiter, reactor, settings.budget_status),
            self.books,
            settings.prices,
            _timeouts(settings),
            settings.usage,
            settings.max_inspected_body,
            settings.max_held_bodies,
            line=Line(_places(settings, most)),
        )
        if settings.cut_revoked:
            gate.watch(Revocation(gate, self.relay).changed)
        api = Api(
            gate,
            self.store,
            reactor,
            metrics_text=metrics.text,
            open_metrics=settings.open_metrics,
            version=__version__,
            is_well=Probe(server, reactor).is_well,
            priced=settings.prices is not None,
        )
        self.api = ApiBranch(reactor, api.site(), api.routes, self.observer, trusted, settings.max_api_body)
        self.hangups = HangupWatcher(reactor)
        self.factory = ServerFactory(
            reactor,
            self.handle,
            self.refuse_wire,
            self.hangups,
            limits=limits,
            head_timeout=settings.head_timeout,
            idle_timeout=settings.idle_timeout,
            body_timeout=settings.body_timeout,
            min_body_rate=settings.min_body_rate,
            write_timeout=settings.write_timeout,
            max_connections=most,
            per_client=settings.max_connections_per_client,
            client_of=trusted.client_of_peer,
        )
        metrics.add(OccupancyCollector(self._occupancy))

    def _occupancy(self) -> Occupancy:
        factory, line = self.factory, self.relay.line
        return Occupancy(
            factory.connections.taken,
            factory.evicted,
            line.places.taken,
            line.places.waiting,
            factory.refused,
            line.refused,
        )

    def handle(self, stream: Stream) -> None:
        """Send a request down its branch of the tree."""
        if is_under_prefix(stream.head.target):
            self.relay.handle(stream)
        else:
            self.api.handle(stream)

    def refuse_wire(self, error: WireError, head: RequestHead | None, peer: IAddress | None) -> bytes:
        """Report and render the refusal of a request that is no HTTP."""
        id = fresh_id()
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
                error="malformed_request",
            )
        )
        return wire_refusal(error, id)

    async def open(self) -> None:
        """Open what has to be, before the first request. Raises :class:`CannotOpenStore`."""
        await self.store.open()
        try:
            self.books.open()
        except OSError as error:
            raise CannotOpenStore(f"the journal of usage cannot be written: {error}") from error

    async def close(self) -> None:
        """Reset what is connected and let go of everything."""
        self.relay.line.close()  # or those that wait would be sent on in the turn of those that end
        await self.factory.close()
        await self.relay.close()
        await self.books.close()
        self.hangups.close()
        self.access_log.close()
        await self.store.close()


class ProxyService(Service):
    """The proxy under twistd: it listens, opens its store, then accepts; or the process ends with status 1."""

    def __init__(self, settings: Settings, reactor: Any) -> None:
        self._settings = settings
        self._reactor = reactor
        self._ports: list[IListeningPort] = []
        self._proxy: Proxy | None = None
        self._opening: Deferred[None] | None = None

    def privilegedStartService(self) -> None:
        """Bind, while the process may still bind low ports. A process that cannot do its work does not start."""
        try:
            self._bind()
        except (CannotStart, CannotListen, SettingsError, OSError, ValueError) as error:
            _complain(str(error))
            # twistd cleans up behind an exception, tells a waiting parent, and lets it end the process with status 1;
            # what it would print has been said already, and better.
            sys.excepthook = lambda *_: None
            raise CannotStart(str(error)) from None

    def _bind(self) -> None:
        settings = self._settings
        if settings.simulate:
            try:
                port, settings = start_simulator(self._reactor, settings)
            except OSError as error:
                where = f"{str(settings.state_directory)!r}: {error.strerror}"
                raise CannotStart(f"--state-directory: cannot write in {where}; name another directory") from None
            self._ports.append(port)
        proxy = Proxy(settings, self._reactor)
        ports = listen(self._reactor, settings.listen, proxy.factory)
        verdict = judge([port.getHost() for port in ports], master_key=settings.master_key, open=settings.open)
        if verdict.refusal is not None:
            raise CannotStart(verdict.refusal)
        for warning in verdict.warnings:
            _log.warn("{warning}", warning=warning)
        self._settings, self._proxy = settings, proxy
        self._ports = [*self._ports, *ports]
        self._listeners = ports

    def _reopen_log(self) -> None:
        """After SIGHUP, as logrotate sends it."""
        if self._proxy is not None:
            try:
                self._proxy.access_log.reopen()
            except OSError as error:
                _log.error("The access log goes on in the old file: {error}", error=str(error))

    def startService(self) -> None:
        """Begin to accept once the store is open."""
        super().startService()  # type: ignore[no-untyped-call]  # Twisted is half typed
        if self._proxy is None:
            self.privilegedStartService()
        signal.signal(signal.SIGHUP, lambda *_: self._reactor.callFromThread(self._reopen_log))
        self._reactor.callWhenRunning(self._open)

    def _open(self) -> None:
        assert self._proxy is not None
        self._opening = Deferred.fromCoroutine(self._proxy.open())
        self._opening.addCallbacks(self._opened, self._not_opened)

    def _opened(self, _: None) -> None:
        accept(self._listeners)
        assert self._settings.upstream is not None
        addresses = [port.getHost() for port in self._listeners]
        urls = [base_url(*each) for each in zip(addresses, self._settings.listen, strict=True)]
        for url in urls:
            _log.info("Listening on {url}, for {upstream}", url=url, upstream=self._settings.upstream.name)
        if self._settings.simulate:
            text = what_to_try(urls[0], key_file(self._settings))
            os.write(1, text.encode())  # not print: twistd would make log lines of it

    def _not_opened(self, reason: Any) -> None:
        if not self.running:
            return
        if reason.check(CannotOpenStore) is None:
            _log.failure("Opening the store failed", reason)
        _complain(reason.getErrorMessage())
        # A reactor that was stopped returns as if all were well, and twistd would exit with 0.
        atexit.register(_exit_with_failure)
        self._reactor.stop()

    async def _stop(self) -> None:
        for port in self._ports:
            await maybeDeferred(port.stopListening)
        if self._proxy is not None:
            await self._proxy.close()

    def stopService(self) -> Deferred[None]:
        """Stop listening and let go of everything."""
        super().stopService()  # type: ignore[no-untyped-call]  # Twisted is half typed
        if self._opening is not None:
            self._opening.cancel()
        return Deferred.fromCoroutine(self._stop())


def _timeouts(settings: Settings) -> Timeouts:
    return Timeouts(
        first_byte=settings.first_byte_timeout,
        first_byte_for=settings.first_byte_timeout_for,
        between_bytes=settings.between_bytes_timeout,
        tunnel_idle=settings.tunnel_idle_timeout,
        line=settings.waiting_timeout,
        total=settings.total_timeout,
    )


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


def _complain(message: str) -> None:
    """Say why the process ends: to whoever started it, wherever the log goes; in the log where nobody is left."""
    if os.path.sameopenfile(2, os.open(os.devnull, os.O_WRONLY)):
        _log.critical("{message}", message=message)
    os.write(2, f"vllmproxy: {message}\n".encode())


def _exit_with_failure() -> None:
    sys.stdout.flush()
    os._exit(1)


def build_service(settings: Settings, reactor: Any) -> ProxyService:
    """Return the service for ``settings``."""
    return ProxyService(settings, reactor)
