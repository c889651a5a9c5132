"""Limiters in virtual time, in memory and on a real Redis, behind one face."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from _redis import RedisServer
from twisted.internet import reactor
from twisted.internet.defer import maybeDeferred
from twisted.internet.task import Clock

from vllmproxy.limits.values import Ask, Denied, Granted, Rule
from vllmproxy.store import limits_redis, usage_redis
from vllmproxy.store.address import parse_redis_url
from vllmproxy.store.limits_memory import MemoryLimiter
from vllmproxy.store.limits_redis import RedisLimiter
from vllmproxy.store.link import Link

TOKEN = "ab" * 32

#: When virtual time begins, in microseconds since the epoch.
START = 1_500_000_000_000_000

#: Who is to be closed with a link.
_LIMITERS: dict[Link, list[RedisLimiter]] = {}

_TIME = "local time = redis.call('TIME')\nlocal now = time[1] * 1000000 + time[2]"
_VIRTUAL = "local now = tonumber(redis.call('GET', 'vllmproxy:test:now'))"


def requests(limit: int, cost: int = 1, scope: str = "") -> Rule:
    return Rule("requests", scope, limit, cost)


def tokens(limit: int, cost: int, scope: str = "") -> Rule:
    return Rule("tokens", scope, limit, cost)


def parallel(limit: int, scope: str = "") -> Rule:
    return Rule("max_parallel_requests", scope, limit, 1)


class Bench:
    """A limiter whose time the test sets.

    :ivar now: microseconds since the epoch, on the limiter's clock.
    """

    def __init__(self, limiter: MemoryLimiter | RedisLimiter) -> None:
        self.limiter = limiter
        self.now = START
        self._ids = 0
        self.advance(0)

    def advance(self, seconds: float) -> None:
        """Set the clock on, or back."""
        self.now += round(seconds * 1e6)
        self._set(self.now)

    def _set(self, now: int) -> None:
        raise NotImplementedError

    async def reserve(self, *rules: Rule, id: str | None = None, key: str = TOKEN) -> Granted | Denied:
        self._ids += 1
        return await maybeDeferred(self.limiter.reserve, Ask(key, id or f"r{self._ids}", rules))

    async def settle(self, id: str, *costs: int | None, key: str = TOKEN) -> None:
        if isinstance(self.limiter, RedisLimiter):
            await self.limiter.settle_all([(key, id, costs)])
        else:
            self.limiter.settle(key, id, costs)

    async def renew(self, *ids: str, key: str = TOKEN) -> list[str]:
        return await maybeDeferred(self.limiter.renew, key, ids)


class MemoryBench(Bench):
    def __init__(self, **options: float) -> None:
        self._clock = Clock()
        super().__init__(MemoryLimiter(self._clock, **options))

    def _set(self, now: int) -> None:
        self._clock.rightNow = now / 1e6


class RedisBench(Bench):
    """Real Lua in a real Redis; only ``TIME`` is the test's."""

    def __init__(self, server: RedisServer, link: Link, **options: float) -> None:
        self._server = server
        super().__init__(limiter_on(link, timeout=20.0, **options))

    def _set(self, now: int) -> None:
        self._server.command("SET", "vllmproxy:test:now", str(now))


@contextmanager
def virtual_time() -> Iterator[None]:
    """Let the scripts take the time from a key."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (limits_redis, "RESERVE"),
            (limits_redis, "SETTLE"),
            (limits_redis, "RENEW"),
            (usage_redis, "ADD"),
        ):
            text = getattr(module, name)
            assert text.count(_TIME) == 1
            patch.setattr(module, name, text.replace(_TIME, _VIRTUAL))
        yield


def make_link(server: RedisServer) -> Link:
    link = Link(parse_redis_url(server.unix_url), reactor)
    link.open()
    return link


def limiter_on(link: Link, **options: float) -> RedisLimiter:
    """Return a limiter that is closed with its link."""
    made = RedisLimiter(link, reactor, **options)
    _LIMITERS.setdefault(link, []).append(made)
    return made


async def close_link(link: Link) -> None:
    for limiter in _LIMITERS.pop(link, ()):
        limiter.close()
    await link.close()
