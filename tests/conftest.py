"""Fixtures that more than one file uses: leak checks for every test, a proxy in front of a simulator, and stores."""

import gc
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_twisted
from _api import House
from _limits import close_link, make_link
from _raw import Upstream
from _reactor import left_since, pending
from _redis import RedisServer, redis_server
from _service import Start, Twistd, start_proxy, start_simulator
from _stores import KINDS, every_url, opened, url_of
from hypothesis import settings
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.logger import LogEvent, LogLevel, eventAsText, globalLogPublisher

from vllmproxy.store.interface import Store
from vllmproxy.store.link import Link
from vllmproxy.store.redis import RedisStore

# Who runs the tests in the background may have SIGINT ignored, which the services that they start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
# No test judges speed: a machine that is busy must not fail one.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def logged_errors() -> Iterator[list[LogEvent]]:
    """Fail a test that logged an error it did not expect; one that does expect it clears the list."""
    events: list[LogEvent] = []

    def observe(event: LogEvent) -> None:
        if event.get("log_level") in (LogLevel.error, LogLevel.critical):
            events.append(event)

    globalLogPublisher.addObserver(observe)
    yield events
    globalLogPublisher.removeObserver(observe)
    failures = [str(event.get("log_failure") or event.get("log_format")) for event in events]
    assert not failures


@pytest.fixture(autouse=True)
def reactor_is_left_clean(logged_errors: list[LogEvent]) -> Iterator[None]:
    """Fail a test that leaves something on the reactor, and have what it left to the collector collected: a Deferred
    logs a failure that nobody took when it is freed.

    What there was before is frozen, so that only what the test made is looked at; that takes no time.
    """
    before = pending()
    gc.freeze()
    yield
    left = pytest_twisted.blockon(Deferred.fromCoroutine(left_since(before)))
    gc.collect()
    gc.unfreeze()
    assert not left


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """All that is logged, as text and with all of its fields."""
    lines: list[str] = []

    def observe(event: LogEvent) -> None:
        lines.append(eventAsText(event, includeTimestamp=False) + repr(event))

    globalLogPublisher.addObserver(observe)
    yield lines
    globalLogPublisher.removeObserver(observe)


@pytest.fixture(scope="session")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twistd]:
    """A simulated vLLM in a process of its own."""
    service = start_simulator(tmp_path_factory.mktemp("sim"))
    yield service
    service.stop()


@pytest.fixture(scope="session")
def proxy(sim: Twistd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twistd]:
    """A proxy in front of :func:`sim`, with a master key (``_service.MASTER_KEY``)."""
    service = start_proxy(tmp_path_factory.mktemp("proxy"), sim.url)
    yield service
    status = service.stop()
    assert "Traceback" not in service.log
    assert status in (0, -15, 143)


@pytest.fixture
def start(sim: Twistd, tmp_path: Path) -> Iterator[Start]:
    """Start proxies, each in its own directory unless one is named, and stop them all at the end."""
    started: list[Twistd] = []

    def begin(*options: str, upstream: str = sim.url, directory: str | None = None) -> Twistd:
        started.append(start_proxy(tmp_path / (directory or str(len(started))), upstream, *options))
        return started[-1]

    yield begin
    for service in started:
        service.stop()
        assert "Traceback" not in service.log


@pytest.fixture(params=["memory:", "sqlite:keys.sqlite3", "redis"])
def stored(request: pytest.FixtureRequest, start: Start) -> Twistd:
    """A proxy with each of the stores; Redis is :func:`server`."""
    return start("--store", request.getfixturevalue("server").url if request.param == "redis" else request.param)


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    """An upstream that plays what a test tells it to, byte by byte."""
    scripted = Upstream()
    yield scripted
    scripted.stop()


@pytest.fixture(scope="module")
def scripted_proxy(
    upstream: Upstream, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Twistd]:
    """A proxy in front of :func:`upstream`, started with the module's ``PROXY_OPTIONS``, if it has any."""
    options = getattr(request.module, "PROXY_OPTIONS", ())
    service = start_proxy(tmp_path_factory.mktemp("scripted"), upstream.url, *options)
    yield service
    service.stop()
    assert "Traceback" not in service.log


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """A Redis that the module has to itself."""
    with redis_server() as server:
        yield server


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A Redis that the test has to itself, and may stop and kill."""
    with redis_server() as started:
        yield started


@pytest.fixture
def durable() -> Iterator[RedisServer]:
    """A Redis that the test has to itself: what it keeps is still there after a kill -9."""
    with redis_server("--appendonly", "yes", "--appendfsync", "always") as started:
        yield started


@pytest_twisted.async_yield_fixture
async def links(server: RedisServer) -> AsyncIterator[list[Link]]:
    """Two connections to :func:`server`, as two proxies have them."""
    made = [make_link(server), make_link(server)]
    for link in made:
        await link.get()
    yield made
    for link in made:
        await close_link(link)


@pytest_twisted.async_yield_fixture
async def redis_store(server: RedisServer) -> AsyncIterator[RedisStore]:
    """A store at :func:`server`, open."""
    made = RedisStore(server.url, reactor, timeout=20.0, lookup_timeout=20.0)  # no test of it judges speed
    await made.open()
    yield made
    await made.close()


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store, one kind after the other."""
    return url_of(request, tmp_path)


@pytest_twisted.async_yield_fixture
async def store(url: str) -> AsyncIterator[Store]:
    """The store at :func:`url`, open."""
    async with opened(url) as (made,):
        yield made


@pytest_twisted.async_yield_fixture
async def every_store(redis: RedisServer, tmp_path: Path) -> AsyncIterator[list[Store]]:
    """A store of each kind, open and empty."""
    async with opened(*every_url(redis, tmp_path)) as stores:
        yield stores


@pytest_twisted.async_yield_fixture
async def house() -> AsyncIterator[House]:
    """The API, open, with a memory store and a master key."""
    made = House()
    await made.open()
    yield made
    await made.close()
