"""Two proxies that reserve ahead of budgets, over midnights, on a real Redis in virtual time.

A call that the clock is set on for twice while it is on its way, as on a busy machine, has failed: it came too late.
"""

import random
from contextlib import suppress

import pytest
import pytest_twisted
from _limits import START, TOKEN, RedisBench, limiter_on, virtual_time
from _redis import RedisServer
from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredLock, gatherResults, maybeDeferred
from twisted.internet.task import deferLater

from vllmproxy.ids import fresh_id
from vllmproxy.limits.ahead import Ahead
from vllmproxy.limits.values import MAX_AMOUNT, Ask, Denied, Granted, Rule
from vllmproxy.store.interface import StoreUnavailable
from vllmproxy.store.limits_redis import RedisLimiter
from vllmproxy.store.link import Link
from vllmproxy.store.redis import RedisStore
from vllmproxy.usage.event import UsageEvent

DAY = 86_400


def rules(money: int, tokens: int, *costs: int) -> tuple[Rule, ...]:
    return Rule("budget", "", money, costs[0]), Rule("budget_tokens", "", tokens, costs[1])


class Proxy:
    """One of them: its limiter, and its events, which reach the store in their order."""

    def __init__(self, limiter: RedisLimiter, store: RedisStore, name: str) -> None:
        self.limiter = Ahead(limiter, reactor)
        self._store = store
        self._name = name
        self._events = 0
        self._turns = DeferredLock()

    async def add(self, event: UsageEvent) -> None:
        async with self._turns:
            self._events += 1
            while True:  # as a bookkeeper does
                with suppress(StoreUnavailable):
                    await self._store.add_usage(self._name, self._events, [event])
                    return


class Crowd:
    """Requests at both, some of which are never forwarded.

    :ivar holds: what those under way hold, of money and of tokens; ``spent``: what the others did cost.
    :ivar ahead: how many needed not wait.
    """

    def __init__(self, proxies: list[Proxy], choose: random.Random, limits: tuple[int, int]) -> None:
        self._proxies = proxies
        self._choose = choose
        self._limits = limits
        self.holds, self.spent = [0, 0], [0, 0]
        self.ahead = 0

    async def ask(self, proxy: Proxy) -> None:
        choose = self._choose
        costs = choose.choice([10, 20, 60]), choose.choice([30, 50, 90])
        asked = Ask(TOKEN, fresh_id().decode(), rules(*self._limits, *costs))
        try:
            granted = await maybeDeferred(proxy.limiter.reserve, asked)
        except StoreUnavailable:
            return
        if isinstance(granted, Denied):
            return
        self.ahead += bool(granted.request_id)
        self._hold(granted, 1)
        for limit, spent, held in zip(self._limits, self.spent, self.holds, strict=True):
            assert spent + held <= limit
        await deferLater(reactor, choose.choice([0, 0.001, 0.004]))
        is_forwarded = choose.random() < 0.7
        costs_of_it = (None, None) if is_forwarded else (0, 0)
        if not is_forwarded:
            self._hold(granted, -1)
        proxy.limiter.settle(TOKEN, granted.request_id or asked.request_id, costs_of_it)
        if is_forwarded:
            await self._spend(proxy, granted)

    async def _spend(self, proxy: Proxy, granted: Granted) -> None:
        (money, tokens), day = granted.taken, granted.day
        used = self._choose.randint(0, money // 3), self._choose.randint(0, tokens // 3)
        fields = {"spend": used[0], "completion_tokens": used[1]}
        event = UsageEvent(time=0.0, key=TOKEN, held=money, held_tokens=tokens, held_on=day, **fields)
        await proxy.add(event)
        self._hold(granted, -1)
        self.spent = [spent + more for spent, more in zip(self.spent, used, strict=True)]

    def _hold(self, granted: Granted, sign: int) -> None:
        self.holds = [held + sign * taken for held, taken in zip(self.holds, granted.taken, strict=True)]

    async def ask_on(self, times: int) -> None:
        for _ in range(times):
            await self.ask(self._choose.choice(self._proxies))


@pytest.mark.parametrize("limits", [(10**6, 10**6), (30_000, 60_000), (10**6, 40_000)], ids=str)
@pytest.mark.parametrize("seed", range(3))
@pytest_twisted.ensureDeferred
async def test_no_budget_is_exceeded_and_in_the_end_nothing_is_held(
    server: RedisServer, links: list[Link], redis_store: RedisStore, limits: tuple[int, int], seed: int
) -> None:
    choose = random.Random(seed)
    with virtual_time():
        bench = RedisBench(server, links[0])
        bench.advance(DAY - START / 1e6 % DAY - 3600)  # an hour before a midnight
        limiters = [limiter_on(link, timeout=20.0) for link in links]
        proxies = [Proxy(limiter, redis_store, f"w{number}") for number, limiter in enumerate(limiters)]
        crowd = Crowd(proxies, choose, limits)
        for _ in range(5):
            asking = gatherResults([Deferred.fromCoroutine(crowd.ask_on(15)) for _ in range(10)])
            await deferLater(reactor, choose.choice([0.005, 0.02]))
            bench.advance(3600 * choose.choice([1, 5, 13]))  # while they run
            await asking
            bench.advance(3600 * choose.choice([0, 1, 13]))
        for proxy in proxies:
            await proxy.limiter.finish()
        assert crowd.ahead
        assert crowd.holds == [0, 0]
        rest = await bench.reserve(*rules(MAX_AMOUNT, MAX_AMOUNT, 0, 0))
        assert rest == Granted(tuple(MAX_AMOUNT - spent for spent in crowd.spent))
