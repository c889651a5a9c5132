"""Finding the master through real sentinels, and finding the next one."""

import time
from collections.abc import Iterator

import pytest
import pytest_twisted
from _reactor import until
from _redis import RedisServer, redis_server
from _sentinel import NAME, Group, replica_of, sentinel_group
from _stores import add_key, delete_keys
from twisted.internet import reactor
from twisted.internet.task import deferLater

from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.store.interface import CannotOpenStore, StoreUnavailable
from vllmproxy.store.redis import RedisStore

KEY = VirtualKey(token=hash_key("sk-one"), key_name="sk-...-one", key_alias="one")
OTHER = VirtualKey(token=hash_key("sk-two"), key_name="sk-...-two")
CANARY = "canary-s3cret"

#: Seconds after which something has hung, on however busy a machine.
HUNG = 30.0


@pytest.fixture
def group() -> Iterator[Group]:
    with sentinel_group() as started:
        yield started


async def until_written(store: RedisStore, key: VirtualKey) -> None:
    give_up = time.monotonic() + HUNG
    while True:
        try:
            await delete_keys(store, [key.token])
            await add_key(store, key)
        except StoreUnavailable:
            assert time.monotonic() < give_up
            await deferLater(reactor, 0.05)
        else:
            return


def holds(server: RedisServer, key: VirtualKey) -> bool:
    return server.command("EXISTS", f"vllmproxy:{{{key.token}}}:key") == b":1\r\n"


def master_port(store: RedisStore) -> int:
    assert store._link._wire is not None
    return int(store._link._wire.transport.getPeer().port)


@pytest_twisted.ensureDeferred
async def test_the_master_is_found_and_after_a_failover_the_next_one(group: Group, logged: list[str]) -> None:
    heard: list[str | None] = []
    store = RedisStore(f"{group.url}/0", reactor)
    store.watch_keys(heard.append)
    await store.open()
    await add_key(store, KEY)
    assert master_port(store) == group.master.port
    await until(lambda: holds(group.replica, KEY) and None in heard)
    group.fail_over()
    await until(lambda: store._link._wire is not None and master_port(store) == group.replica.port)
    assert any("no longer" in line for line in logged)  # the sentinels said so; the old master did not yet
    await until_written(store, OTHER)
    assert holds(group.replica, OTHER)
    assert await store.get_key(KEY.token) == KEY
    await until(lambda: heard.count(None) >= 3)
    heard.clear()
    await delete_keys(store, [KEY.token])
    await until(lambda: KEY.token in heard)
    await store.close()


@pytest_twisted.ensureDeferred
async def test_a_killed_master_is_replaced(group: Group) -> None:
    store = RedisStore(group.url, reactor)
    await store.open()
    await add_key(store, KEY)
    await until(lambda: holds(group.replica, KEY))
    group.master.kill()
    await until(lambda: store._link._breaker.reason is not None)
    with pytest.raises(StoreUnavailable):
        await store.get_key(KEY.token)
    await until(lambda: store._link._breaker.reason is None)
    assert master_port(store) == group.replica.port
    assert await store.get_key(KEY.token) == KEY
    await store.close()


@pytest_twisted.ensureDeferred
async def test_a_sentinel_that_is_mute_or_gone_or_knows_nothing_is_passed_over(group: Group) -> None:
    with redis_server() as stalled, redis_server() as gone, redis_server() as clueless:
        gone.kill()
        stalled.stall()
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in (stalled, gone, clueless, *group.sentinels))
        store = RedisStore(f"redis+sentinel://{hosts}/{NAME}", reactor)
        await store.open()
        assert master_port(store) == group.master.port
        await store.close()
        stalled.resume()


@pytest_twisted.ensureDeferred
async def test_why_no_master_is_found(group: Group) -> None:
    for url, why in (
        (group.url.replace(NAME, "another"), "it knows no master 'another'"),
        (f"redis+sentinel://127.0.0.1:{group.master.port}/{NAME}", "unknown command"),
    ):
        with pytest.raises(CannotOpenStore, match=why):
            await RedisStore(url, reactor).open()


@pytest_twisted.ensureDeferred
async def test_a_sentinel_that_is_behind_the_times_is_not_believed_for_ever(group: Group) -> None:
    """It names a replica; another one knows better."""
    with replica_of(group.master) as replica:
        behind = group.sentinels[0]
        behind.command("SENTINEL", "REMOVE", NAME)
        behind.command("SENTINEL", "MONITOR", NAME, "127.0.0.1", str(replica.port), "9")
        store = RedisStore(group.url, reactor)
        with pytest.raises(CannotOpenStore, match="it is a slave"):
            await store.open()
        await store.open()  # as a probe would
        assert master_port(store) == group.master.port
        await store.close()


@pytest_twisted.ensureDeferred
async def test_a_master_that_becomes_a_replica_is_left(group: Group) -> None:
    """Without a word, and with the connection kept: its refusal to write tells."""
    store = RedisStore(group.url, reactor)
    await store.open()
    for sentinel in group.sentinels:
        sentinel.stall()  # or they would make it a master again
    group.replica.command("REPLICAOF", "NO", "ONE")
    group.master.command("REPLICAOF", "127.0.0.1", str(group.replica.port))
    with pytest.raises(StoreUnavailable, match="READONLY"):
        await add_key(store, KEY)
    await until(lambda: store._link._breaker.reason is not None)
    for sentinel in group.sentinels:
        sentinel.kill()
        sentinel.configure(group.replica.port)
        sentinel.start()
    await until_written(store, KEY)
    assert master_port(store) == group.replica.port
    await store.close()


@pytest_twisted.ensureDeferred
async def test_a_sentinel_that_wants_a_password_gets_the_one_for_redis(group: Group) -> None:
    group.master.command("CONFIG", "SET", "requirepass", CANARY)
    for sentinel, password in zip(group.sentinels, ("another", CANARY), strict=True):
        sentinel.kill()
        sentinel.configure(group.master.port, f"requirepass {password}", f"sentinel auth-pass {NAME} {CANARY}")
        sentinel.start()
    store = RedisStore(group.url.replace("://", f"://:{CANARY}@"), reactor)
    await store.open()  # the first sentinel does not let us in
    assert master_port(store) == group.master.port
    await store.close()
    wrong = RedisStore(group.url.replace("://", f"://:wrong-{CANARY}@"), reactor)
    with pytest.raises(CannotOpenStore, match="WRONGPASS") as caught:
        await wrong.open()
    assert CANARY not in str(caught.value)


@pytest_twisted.ensureDeferred
async def test_closing_leaves_no_sentinel_s_connection(group: Group) -> None:
    for sentinel in group.sentinels:
        sentinel.stall()
    store = RedisStore(group.url, reactor)
    with pytest.raises(CannotOpenStore, match="no connection in time"):
        await store.open()
    assert store._link.dialler._lines == set()
    for sentinel in group.sentinels:
        sentinel.resume()
