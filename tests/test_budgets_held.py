"""For how long Redis holds of a budget what nobody lets go of, and from which day it lets go; in virtual time."""

import random
import time
from collections.abc import AsyncIterator

import pytest
import pytest_twisted
from _limits import START, TOKEN, RedisBench, virtual_time
from _redis import RedisServer
from twisted.internet import reactor

from vllmproxy.limits.values import Denied, Granted, Rule
from vllmproxy.store.link import Link
from vllmproxy.store.redis import RedisStore
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.sums import Account

DAY = 86_400
MIDNIGHT = START // 10**6 // DAY * DAY + DAY
LIMIT = 1000


def tokens(cost: int, period: int = 0) -> Rule:
    return Rule("budget_tokens", "", LIMIT, cost, period)


def money(cost: int, period: int = 0) -> Rule:
    return Rule("budget", "", LIMIT, cost, period)


class Bench(RedisBench):
    """A key with a budget, and a store that adds what its requests used. It begins an hour before a midnight."""

    def __init__(self, server: RedisServer, link: Link, store: RedisStore) -> None:
        super().__init__(server, link)
        self._store = store
        self._events = 0
        self._writer = f"w{time.monotonic_ns()}"
        self.to(0, hours=-1)

    def to(self, day: int, hours: float = 1.0) -> None:
        """Set the clock to so many hours after a midnight."""
        self.now = round((MIDNIGHT + day * DAY + hours * 3600) * 10**6)
        self._set(self.now)

    async def over(self, began: float, **fields: int) -> None:
        """One request is over that began so many days after the first midnight, by its proxy's clock."""
        self._events += 1
        event = UsageEvent(time=MIDNIGHT + began * DAY, key=TOKEN, **fields)
        await self._store.add_usage(self._writer, self._events, [event])

    async def set_account(self, account: Account) -> None:
        await self._store.set_account(TOKEN, account)

    async def left(self, rule: Rule | None = None) -> int:
        """Return how much is left, by asking for it all."""
        denied = await self.reserve(rule or tokens(LIMIT), Rule("requests", "never", 0, 0))
        assert isinstance(denied, Granted | Denied)
        if isinstance(denied, Denied):
            return denied.left
        await self.settle(f"r{self._ids}", 0, 0)
        return LIMIT


@pytest_twisted.async_yield_fixture
async def bench(server: RedisServer, links: list[Link]) -> AsyncIterator[Bench]:
    store = RedisStore(server.url, reactor)
    await store.open()
    with virtual_time():
        yield Bench(server, links[0], store)
    await store.close()


@pytest.mark.parametrize("rule", [tokens(60), money(60)], ids=str)
@pytest_twisted.ensureDeferred
async def test_what_nobody_lets_go_of_is_held_for_a_day_at_least_and_two_at_most(bench: Bench, rule: Rule) -> None:
    """However busy the key is meanwhile."""
    whole = Rule(rule.kind, "", LIMIT, LIMIT)
    assert isinstance(await bench.reserve(rule), Granted)
    for day in range(5):
        for hours in (1, 22.9):
            bench.to(day, hours)
            assert isinstance(await bench.reserve(rule, id=f"{day} {hours}"), Granted)
            await bench.over(day + hours / 24, held=rule.cost * (rule.kind == "budget"), held_tokens=rule.cost)
            assert await bench.left(whole) == LIMIT - (60 if day == 0 else 0), (day, hours)


@pytest.mark.parametrize("clock", [-1.5, -1, -0.5, 0, 0.5, 1, 1.5, 30], ids=lambda days: f"{days} days off")
@pytest_twisted.ensureDeferred
async def test_it_is_let_go_of_by_whatever_clock_the_proxy_has(bench: Bench, clock: float) -> None:
    """But by one that is a whole day behind Redis's, by which it is held no more."""
    bench.to(1)
    assert isinstance(await bench.reserve(tokens(300)), Granted)
    await bench.over(1.1 + clock, held_tokens=300, completion_tokens=7)
    assert await bench.left() == LIMIT - 7 - (300 if clock < -1.1 else 0)


@pytest_twisted.ensureDeferred
async def test_a_request_that_lasts_past_midnight_is_let_go_of_from_the_day_that_it_was_held_on(bench: Bench) -> None:
    assert isinstance(await bench.reserve(tokens(100)), Granted)
    bench.to(0)
    assert isinstance(await bench.reserve(tokens(30)), Granted)
    assert await bench.left() == LIMIT - 130
    await bench.over(-0.02, held_tokens=100)
    assert await bench.left() == LIMIT - 30
    bench.to(1)
    assert await bench.left() == LIMIT - 30
    bench.to(2)
    assert await bench.left() == LIMIT


@pytest_twisted.ensureDeferred
async def test_one_that_lasts_for_days_takes_nothing_from_what_others_hold(bench: Bench) -> None:
    assert isinstance(await bench.reserve(tokens(100)), Granted)
    bench.to(1)
    assert isinstance(await bench.reserve(tokens(30)), Granted)
    await bench.over(-0.02, held_tokens=100, completion_tokens=5)
    assert await bench.left() == LIMIT - 35


@pytest_twisted.ensureDeferred
async def test_what_was_never_forwarded_is_given_back_after_midnight_as_well(bench: Bench) -> None:
    bench.to(0, hours=-0.001)
    assert isinstance(await bench.reserve(tokens(100), money(50), id="one"), Granted)
    assert isinstance(await bench.reserve(tokens(1), id="other"), Granted)
    bench.to(0, hours=0.001)
    await bench.settle("one", 0, 0)
    assert await bench.left() == LIMIT - 1
    assert await bench.left(money(LIMIT)) == LIMIT


@pytest_twisted.ensureDeferred
async def test_a_clock_that_is_set_back_holds_what_was_held(bench: Bench) -> None:
    bench.to(1)
    assert isinstance(await bench.reserve(tokens(100)), Granted)
    bench.to(0)
    assert isinstance(await bench.reserve(tokens(20)), Granted)
    assert await bench.left() == LIMIT - 120
    bench.to(2)
    assert await bench.left() == LIMIT - 120
    bench.to(3)
    assert await bench.left() == LIMIT


@pytest_twisted.ensureDeferred
async def test_what_is_given_back_of_an_account_that_was_set_to_nothing_is_no_gift(bench: Bench) -> None:
    assert isinstance(await bench.reserve(tokens(600), id="one"), Granted)
    await bench.set_account(Account(0, 0, 0))
    assert await bench.left() == LIMIT
    await bench.settle("one", 0)
    assert await bench.left() == LIMIT


@pytest_twisted.ensureDeferred
async def test_a_period_that_begins_holds_nothing_of_the_one_before(bench: Bench) -> None:
    assert isinstance(await bench.reserve(tokens(600, period=10), id="one"), Granted)
    bench.to(0)
    assert isinstance(await bench.reserve(tokens(100, period=20)), Granted)
    await bench.settle("one", 0)
    await bench.over(0, held_tokens=600, period=10)
    assert await bench.left(tokens(LIMIT, period=20)) == LIMIT - 100
    await bench.over(0, held_tokens=100, period=20)
    assert await bench.left(tokens(LIMIT, period=20)) == LIMIT


@pytest.mark.parametrize("seed", range(12))
@pytest_twisted.ensureDeferred
async def test_what_is_held_is_what_began_today_or_yesterday_and_is_not_over(bench: Bench, seed: int) -> None:
    """Against a list of those that run."""
    choose = random.Random(seed)
    running: list[tuple[int, int]] = []
    hours, spent = -1, 0
    for _ in range(60):
        held = sum(cost for began, cost in running if began // 24 >= hours // 24 - 1)
        step, cost = choose.randrange(4), choose.randint(1, 200)
        if step < 2:
            answer = await bench.reserve(tokens(cost))
            assert isinstance(answer, Granted) is (spent + held + cost <= LIMIT)
            if isinstance(answer, Granted):
                assert answer.remaining == (LIMIT - spent - held - cost,)
                running.append((hours, cost))
        elif step == 2 and running:
            began, cost = running.pop(choose.randrange(len(running)))
            await bench.over(began / 24, held_tokens=cost, completion_tokens=cost // 20)
            spent += cost // 20
        else:
            hours += choose.choice([1, 7, 23, 24, 49])
            bench.to(0, hours)
