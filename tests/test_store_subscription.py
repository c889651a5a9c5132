"""Who hears of a change, through a real Redis, and what happens when nobody can."""

from collections.abc import AsyncIterator

import attrs
import pytest
import pytest_twisted
from _reactor import until
from _redis import RedisServer, redis_server
from _stores import add_key, delete_keys, update_key
from twisted.internet import reactor
from twisted.internet.task import deferLater

from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.store.interface import AliasTaken, CannotOpenStore, Writes
from vllmproxy.store.redis import RedisStore

ONE = VirtualKey(token=hash_key("sk-one"), key_name="sk-...-one", key_alias="one")
TWO = VirtualKey(token=hash_key("sk-two"), key_name="sk-...-two", key_alias="two")


class Watching:
    """A store that notes what it hears."""

    def __init__(self, url: str) -> None:
        self.heard: list[str | None] = []
        self.store = RedisStore(url, reactor)
        self.store.watch_keys(self.heard.append)

    async def open(self) -> None:
        await self.store.open()
        await until(lambda: self.heard == [None])
        self.heard.clear()


@pytest_twisted.async_yield_fixture
async def watching(server: RedisServer) -> AsyncIterator[Watching]:
    made = Watching(server.url)
    await made.open()
    yield made
    await made.store.close()


@pytest.fixture
def other(redis_store: RedisStore) -> RedisStore:
    return redis_store


@pytest_twisted.ensureDeferred
async def test_every_change_is_heard_and_in_order(watching: Watching, other: RedisStore) -> None:
    await add_key(other, ONE)
    await update_key(other, ONE.token, lambda key: attrs.evolve(key, blocked=True))
    await other.change_keys([ONE.token, TWO.token], lambda _: Writes(put=(TWO,), remove=(ONE.token,)))
    await delete_keys(other, [TWO.token])
    await until(lambda: len(watching.heard) == 5)
    assert watching.heard == [ONE.token, ONE.token, ONE.token, TWO.token, TWO.token]
    await add_key(watching.store, ONE)  # its own twice: when it is done, and as all hear of it
    await until(lambda: watching.heard[5:] == [ONE.token, ONE.token])


@pytest_twisted.ensureDeferred
async def test_what_changes_nothing_is_not_told(watching: Watching, other: RedisStore) -> None:
    await add_key(other, ONE)
    await delete_keys(other, [TWO.token])
    with pytest.raises(AliasTaken):
        await add_key(other, attrs.evolve(TWO, key_alias="one"))
    await add_key(other, TWO)
    await until(lambda: TWO.token in watching.heard)
    assert watching.heard == [ONE.token, TWO.token]


@pytest_twisted.ensureDeferred
async def test_a_lost_subscription_is_told_and_made_again(
    server: RedisServer, watching: Watching, other: RedisStore
) -> None:
    assert server.command("CLIENT", "KILL", "TYPE", "pubsub") == b":1\r\n"
    await until(lambda: watching.heard == [None, None])  # when it was lost, and when nothing is missed any more
    await add_key(other, ONE)
    await until(lambda: watching.heard == [None, None, ONE.token])


@pytest.mark.parametrize("outage", ["killed", "stopped"])
@pytest_twisted.ensureDeferred
async def test_an_outage_is_noticed_and_ends_by_itself(
    server: RedisServer, watching: Watching, other: RedisStore, outage: str
) -> None:
    wire = other._link.ready
    assert wire is not None
    if outage == "killed":
        server.kill()
    else:
        server.stall()  # the connection stays, and is silent
    await until(lambda: watching.heard == [None])
    if outage == "killed":
        server.start()
        await until(lambda: other._link.ready not in (None, wire))  # it may have been dialled in vain until now
    else:
        server.resume()
        await until(lambda: other._link.ready is not None)
    await until(lambda: watching.heard == [None, None])
    await add_key(other, ONE)
    await until(lambda: watching.heard == [None, None, ONE.token])


@pytest_twisted.ensureDeferred
async def test_whoever_may_not_publish_changes_keys_all_the_same(logged: list[str]) -> None:
    acl = ("--user", "me", "on", ">secret", "~vllmproxy:*", "+@all", "resetchannels")
    with redis_server(*acl) as server:
        watching = Watching(f"redis://me:secret@127.0.0.1:{server.port}")
        await watching.store.open()
        await add_key(watching.store, ONE)
        assert watching.heard == [ONE.token]
        assert await watching.store.get_key(ONE.token) == ONE
        assert await watching.store.find_aliases(["one"]) == {"one": ONE.token}
        await until(lambda: any("NOPERM" in line for line in logged))
        await deferLater(reactor, 1.2)  # it was tried again, and not told of again
        assert sum("not heard" in line for line in logged) == 1
        assert watching.heard == [ONE.token]
        await watching.store.close()


@pytest_twisted.ensureDeferred
async def test_foreign_messages_do_no_harm(server: RedisServer, watching: Watching, other: RedisStore) -> None:
    server.command("PUBLISH", "vllmproxy:changes", "é no token")
    await add_key(other, ONE)
    await until(lambda: ONE.token in watching.heard)
    assert None not in watching.heard


@pytest_twisted.ensureDeferred
async def test_a_store_that_cannot_be_opened_does_not_listen() -> None:
    with redis_server() as server:
        watching = Watching(server.url)
        server.kill()
        with pytest.raises(CannotOpenStore):
            await watching.store.open()
        server.start()
        await deferLater(reactor, 1)
        assert b"connected_clients:1\r\n" in server.command("INFO", "clients")  # who asks
    await watching.store.close()
    assert watching.heard == []
