"""For how long Redis holds of a budget what nobody lets go of, and from which day it lets go; in virtual time."""

import random
import time
from collections.abc import Iterator

import pytest
import pytest_twisted
from _limits import START, TOKEN, RedisBench, virtual_time
from _redis import RedisServer
from _stores import say_spent

from vllmproxy.limits.values import Denied, Granted, Rule
from vllmproxy.store.link import Link
from vllmproxy.store.redis import RedisStore
from vllmproxy.usage.event import UsageEvent

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

    async def over(self, held_on: int, **fields: int) -> None:
        """One request is over that was held on that day, by whatever clock its proxy has."""
        self._events += 1
        event = UsageEvent(time=MIDNIGHT + 1e6 * self._events, key=TOKEN, held_on=held_on, **fields)
        await self._store.add_usage(self._writer, self._events, [event])

    async def hold(self, *rules: Rule, id: str | None = None) -> int:
        """Reserve, and return the day that it is held on."""
        granted = await self.reserve(*rules, id=id)
        assert isinstance(granted, Granted)
        return granted.day

    async def reset(self) -> None:
        """It is said that nothing was spent."""
        await say_spent(self._store, TOKEN, 0, 0)

    async def left(self, rule: Rule | None = None) -> int:
        """Return how much is left, by asking for it all."""
        denied = await self.reserve(rule or tokens(LIMIT), Rule("requests", "never", 0, 0))
        assert isinstance(denied, Granted | Denied)
        if isinstance(denied, Denied):
            return denied.left
        await self.settle(f"r{self._ids}", 0, 0)
        return LIMIT


@pytest.fixture
def bench(server: RedisServer, links: list[Link], redis_store: RedisStore) -> Iterator[Bench]:
    with virtual_time():
        yield Bench(server, links[0], redis_store)


@pytest.mark.parametrize("rule", [tokens(60), money(60)], ids=str)
@pytest_twisted.ensureDeferred
async def test_what_nobody_lets_go_of_is_held_for_a_day_at_least_and_two_at_most(bench: Bench, rule: Rule) -> None:
    """However busy the key is meanwhile."""
    whole = Rule(rule.kind, "", LIMIT, LIMIT)
    assert isinstance(await bench.reserve(rule), Granted)
    for day in range(5):
        for hours in (1, 22.9):
            bench.to(day, hours)
            held_on = await bench.hold(rule, id=f"{day} {hours}")
            await bench.over(held_on, held=rule.cost * (rule.kind == "budget"), held_tokens=rule.cost)
            assert await bench.left(whole) == LIMIT - (60 if day == 0 else 0), (day, hours)


@pytest_twisted.ensureDeferred
async def test_a_request_that_lasts_past_midnight_is_let_go_of_from_the_day_that_it_was_held_on(bench: Bench) -> None:
    held_on = await bench.hold(tokens(100))
    bench.to(0)
    assert await bench.hold(tokens(30)) == held_on + 1
    assert await bench.left() == LIMIT - 130
    await bench.over(held_on, held_tokens=100)
    assert await bench.left() == LIMIT - 30
    bench.to(1)
    assert await bench.left() == LIMIT - 30
    bench.to(2)
    assert await bench.left() == LIMIT


@pytest.mark.parametrize("is_first", [False, True])
@pytest_twisted.ensureDeferred
async def test_a_proxy_whose_clock_is_ahead_opens_no_period_and_closes_none(bench: Bench, is_first: bool) -> None:
    """What it does counts where the others are; once it is mended, nothing of it is left."""
    now, ahead = MIDNIGHT - DAY, MIDNIGHT + 2 * DAY
    if not is_first:
        await bench.over(0, period=now, completion_tokens=100)
        await bench.hold(tokens(10, period=now))
    held_on = await bench.hold(tokens(30, period=ahead))
    await bench.over(held_on, period=ahead, held_tokens=30, completion_tokens=20)
    whole = tokens(LIMIT, period=now)
    assert await bench.left(whole) == LIMIT - (0 if is_first else 130)
    await bench.over(0, period=now, completion_tokens=5)
    assert await bench.left(whole) == LIMIT - (5 if is_first else 135)
    bench.to(2)
    assert await bench.left(tokens(LIMIT, period=ahead)) == LIMIT


@pytest.mark.parametrize("minutes", [5, 60])
@pytest_twisted.ensureDeferred
async def test_a_budget_that_begins_by_a_clock_that_is_ahead_is_kept(bench: Bench, minutes: int) -> None:
    """A key's budget begins when it is made, by the clock of the proxy that makes it."""
    begin = MIDNIGHT - 3600 + 60 * minutes
    for used in (300, 600, 900):
        held_on = await bench.hold(tokens(300, begin))
        await bench.over(held_on, period=begin, held_tokens=300, completion_tokens=300)
        assert await bench.left(tokens(LIMIT, begin)) == LIMIT - used
    assert await bench.hold(tokens(100, begin))
    assert isinstance(await bench.reserve(tokens(1, begin)), Denied)
    bench.to(0, hours=1)
    assert await bench.left(tokens(LIMIT, begin)) == 0


@pytest_twisted.ensureDeferred
async def test_what_is_spent_stays_spent_when_redis_s_clock_is_set_back_over_the_beginning(bench: Bench) -> None:
    bench.to(0, hours=1)
    await bench.over(0, period=MIDNIGHT, completion_tokens=900)
    await bench.hold(tokens(10, MIDNIGHT))
    bench.to(0, hours=-1)
    assert await bench.left(tokens(LIMIT, MIDNIGHT)) == 90
    await bench.over(0, period=MIDNIGHT, completion_tokens=5)
    await bench.over(0, period=MIDNIGHT - DAY, completion_tokens=500)  # it began the day before
    assert await bench.left(tokens(LIMIT, MIDNIGHT)) == 85
    bench.to(0, hours=1)
    assert await bench.left(tokens(LIMIT, MIDNIGHT)) == 85


@pytest_twisted.ensureDeferred
async def test_one_that_lasts_for_days_takes_nothing_from_what_others_hold(bench: Bench) -> None:
    held_on = await bench.hold(tokens(100))
    bench.to(1)
    assert await bench.hold(tokens(30)) == held_on + 2
    await bench.over(held_on, held_tokens=100, completion_tokens=5)
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


@pytest.mark.parametrize("days", [1, 2, 30])
@pytest_twisted.ensureDeferred
async def test_a_clock_that_is_set_back_holds_what_was_held_from_then_on(bench: Bench, days: int) -> None:
    """And what it holds next is let go of, though the account was of a day that is to come."""
    bench.to(days)
    ahead = await bench.hold(tokens(100))
    lost = await bench.hold(tokens(40))
    bench.to(0)
    assert await bench.left() == LIMIT - 140
    for _ in range(3):
        await bench.over(await bench.hold(tokens(20)), held_tokens=20)
    assert await bench.left() == LIMIT - 140
    bench.to(1)
    assert await bench.left() == LIMIT - 140
    await bench.over(ahead, held_tokens=100)
    assert await bench.left() == LIMIT - 40
    assert lost == ahead
    bench.to(2)
    assert await bench.left() == LIMIT


@pytest_twisted.ensureDeferred
async def test_what_was_never_forwarded_is_given_back_though_the_clock_was_set_back(bench: Bench) -> None:
    bench.to(1)
    await bench.hold(tokens(100), money(50), id="one")
    bench.to(0)
    await bench.hold(tokens(30))
    await bench.settle("one", 0, 0)
    assert await bench.left() == LIMIT - 30
    assert await bench.left(money(LIMIT)) == LIMIT


@pytest_twisted.ensureDeferred
async def test_what_is_given_back_of_an_account_that_was_set_to_nothing_is_no_gift(bench: Bench) -> None:
    assert isinstance(await bench.reserve(tokens(600), id="one"), Granted)
    await bench.reset()
    assert await bench.left() == LIMIT
    await bench.settle("one", 0)
    assert await bench.left() == LIMIT


@pytest_twisted.ensureDeferred
async def test_a_period_that_begins_holds_nothing_of_the_one_before(bench: Bench) -> None:
    old = await bench.hold(tokens(600, period=10), id="one")
    bench.to(0)
    new = await bench.hold(tokens(100, period=20))
    await bench.settle("one", 0)
    await bench.over(old, held_tokens=600, period=10)
    assert await bench.left(tokens(LIMIT, period=20)) == LIMIT - 100
    await bench.over(new, held_tokens=100, period=20)
    assert await bench.left(tokens(LIMIT, period=20)) == LIMIT


@pytest.mark.parametrize("seed", range(12))
@pytest_twisted.ensureDeferred
async def test_what_is_held_is_what_began_today_or_yesterday_and_is_not_over(bench: Bench, seed: int) -> None:
    """Against a list of those that run."""
    choose = random.Random(seed)
    running: list[tuple[int, int]] = []
    hours, spent, today = -1, 0, MIDNIGHT // DAY - 1
    for _ in range(60):
        held = sum(cost for held_on, cost in running if held_on >= today - 1)
        step, cost = choose.randrange(4), choose.randint(1, 200)
        if step < 2:
            answer = await bench.reserve(tokens(cost))
            assert isinstance(answer, Granted) is (spent + held + cost <= LIMIT)
            if isinstance(answer, Granted):
                assert answer.remaining == (LIMIT - spent - held - cost,)
                assert answer.day == today
                running.append((today, cost))
        elif step == 2 and running:
            held_on, cost = running.pop(choose.randrange(len(running)))
            await bench.over(held_on, held_tokens=cost, completion_tokens=cost // 20)
            spent += cost // 20
        else:
            hours += choose.choice([1, 7, 23, 24, 49])
            bench.to(0, hours)
            today = MIDNIGHT // DAY + hours // 24
