"""The link to a real Redis through its breaker: who waits, who does not, and coming back without being asked."""

import time
from collections.abc import AsyncIterator

import pytest
import pytest_twisted
from _limits import close_link, make_link
from _reactor import until
from _redis import RedisServer
from twisted.internet import reactor
from twisted.internet.task import deferLater

from vllmproxy.store.interface import StoreUnavailable
from vllmproxy.store.link import Link


@pytest_twisted.async_yield_fixture
async def link(server: RedisServer) -> AsyncIterator[Link]:
    made = make_link(server)
    await made.get()
    yield made
    await close_link(made)


def at_once(link: Link) -> str:
    """Return why there is no connection, which must be known already; ``""``: there is one."""
    caught: list[str] = []
    asked = link.get().addErrback(lambda failure: caught.append(str(failure.value)))
    assert asked.called
    return "".join(caught)


def is_up(link: Link) -> bool:
    """Whether it is up, without asking it for anything that would have to wait."""
    return link._breaker.reason is None and link._wire is not None


@pytest_twisted.ensureDeferred
async def test_a_killed_server_is_known_and_found_again_without_a_caller(server: RedisServer, link: Link) -> None:
    server.kill()
    await until(lambda: not is_up(link))
    await deferLater(reactor, 0.3)  # the first attempt has failed
    assert "redis.sock" in at_once(link)
    server.start()
    await until(lambda: is_up(link))
    assert at_once(link) == ""


@pytest_twisted.ensureDeferred
async def test_a_late_call_opens_the_breaker_and_a_ping_closes_it(server: RedisServer, link: Link) -> None:
    wire = await link.get()
    server.stall()
    link.late(wire, time.time())
    assert "did not answer in time" in at_once(link)
    server.resume()
    await until(lambda: is_up(link))
    assert await link.get() is wire


@pytest_twisted.ensureDeferred
async def test_a_mute_connection_is_replaced_without_a_caller(server: RedisServer, link: Link) -> None:
    wire = await link.get()
    server.stall()
    link.late(wire, time.time())
    await wire.whenDisconnected().addTimeout(20, reactor)
    assert at_once(link)
    server.resume()
    await until(lambda: is_up(link))
    assert await link.get() is not wire


@pytest_twisted.ensureDeferred
async def test_a_call_waits_for_a_connection_that_is_made_again(server: RedisServer, link: Link) -> None:
    """One connection that is lost, as an idle one may be, is no outage."""
    wire = await link.get()
    gone = wire.whenDisconnected()
    server.command("CLIENT", "KILL", "TYPE", "normal")
    await gone
    again = link.get()
    assert not again.called
    assert await again is not wire


@pytest_twisted.ensureDeferred
async def test_closing_ends_the_probes(server: RedisServer, link: Link) -> None:
    server.stall()
    link.late(await link.get(), time.time())
    await close_link(link)
    assert "closed" in at_once(link)
    with pytest.raises(StoreUnavailable):
        await link.get()
    server.resume()
    await deferLater(reactor, 0.5)
    assert link._wire is None
    assert not link.dialler._lines


@pytest_twisted.ensureDeferred
async def test_who_waits_may_leave(server: RedisServer, link: Link) -> None:
    wire = await link.get()
    gone = wire.whenDisconnected()
    server.command("CLIENT", "KILL", "TYPE", "normal")
    await gone
    leaving, staying = link.get(), link.get()
    left: list[object] = []
    leaving.addErrback(left.append)
    leaving.cancel()
    assert len(left) == 1
    assert await staying is not wire
