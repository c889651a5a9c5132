"""The three stores, for suites of tests that hold for each of them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from _redis import RedisServer
from twisted.internet import reactor

from vllmproxy.store.interface import AuditEntry, Store, Writes
from vllmproxy.store.opening import make_store
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


async def say_spent(store: Store, token: str, period: int, money: int, *audit: AuditEntry) -> None:
    """Say what a key has spent, whether there is one or not."""
    await store.change_keys([token], lambda _: Writes(spent={token: Spent(period, money)}, audit=audit))
