"""The three stores, for suites of tests that hold for each of them."""

import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from _redis import RedisServer
from twisted.enterprise.adbapi import Connection, ConnectionPool
from twisted.internet import reactor

from vllmproxy.keys.key import VirtualKey
from vllmproxy.store import usage_sqlite
from vllmproxy.store.interface import AuditEntry, Store, TokenTaken, Writes
from vllmproxy.store.memory import MemoryStore
from vllmproxy.store.opening import make_store
from vllmproxy.store.redis import RedisStore
from vllmproxy.store.sqlite import SqliteStore
from vllmproxy.usage.sums import Spent

#: What a fixture is parametrized by; :func:`url_of` makes a URL of each.
KINDS = ("memory", "sqlite", "redis")


def url_of(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty store of the kind ``request.param``; Redis is the one of the fixture ``redis``."""
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis")
        server.command("FLUSHALL")
        return server.url
    return {"memory": "memory:", "sqlite": f"sqlite:{tmp_path / 'keys.sqlite3'}"}[request.param]


@asynccontextmanager
async def opened(*urls: str) -> AsyncIterator[list[Store]]:
    """Open stores, and close them afterwards."""
    stores = [make_store(url, reactor=reactor) for url in urls]
    for store in stores:
        await store.open()
    yield stores
    for store in stores:
        await store.close()


def every_url(redis: RedisServer, tmp_path: Path) -> list[str]:
    """Return the URL of an empty store of each kind."""
    redis.command("FLUSHALL")
    return ["memory:", f"sqlite:{tmp_path / 'every'}", redis.unix_url]


async def add_key(store: Store, key: VirtualKey) -> None:
    """Keep a new key. Raises :class:`TokenTaken` where there is one already."""

    def add(found: Mapping[str, VirtualKey]) -> Writes:
        if found:
            raise TokenTaken
        return Writes(put=(key,))

    await store.change_keys([key.token], add)


async def update_key(store: Store, token: str, change: Callable[[VirtualKey], VirtualKey]) -> VirtualKey | None:
    """Replace a key by what ``change`` makes of it, and return that; ``None`` when there is none."""
    written = await store.change_keys([token], lambda found: Writes(put=tuple(map(change, found.values()))))
    return written.put[0] if written.put else None


async def delete_keys(store: Store, tokens: Sequence[str]) -> list[str]:
    """Delete those that exist, and return their tokens."""
    written = await store.change_keys(tokens, lambda found: Writes(remove=tuple(found)))
    return list(written.remove)


async def last_usage(store: Store, writer: str) -> int:
    """Return the number of the last event that was added of ``writer``, 0: none."""
    if isinstance(store, MemoryStore):
        return store._usage.last(writer)
    if isinstance(store, SqliteStore):
        return await store._run(usage_sqlite.last, writer)
    assert isinstance(store, RedisStore)
    return await store._usage.last(writer)


async def say_spent(store: Store, token: str, period: int, money: int, *audit: AuditEntry) -> None:
    """Say what a key has spent, whether there is one or not."""
    await store.change_keys([token], lambda _: Writes(spent={token: Spent(period, money)}, audit=audit))


def hold_commits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Have SQLite stores commit nothing until what is returned is set."""
    held = threading.Event()

    class Held(Connection):  # type: ignore[misc]  # adbapi has no annotations
        def commit(self) -> None:
            assert not self._connection.in_transaction or held.wait(10)  # what only reads is in none
            self._connection.commit()

    monkeypatch.setattr(ConnectionPool, "connectionFactory", Held)
    return held
