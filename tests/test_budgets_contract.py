"""Budgets, from the reservation to the account: the same on memory, on SQLite and on a real Redis."""

import random
from collections.abc import AsyncIterator

import pytest
import pytest_twisted
from _stores import add_key, delete_keys, opened, say_spent
from attrs import evolve
from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredList, maybeDeferred

from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.limits.values import MAX_AMOUNT, Ask, Denied, Granted, Rule
from vllmproxy.store.interface import Store, Writes
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.sums import Account

NOW = 1_795_521_600.0
TOKEN = hash_key("sk-one")


class Bench:
    """A key with a budget, at one store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.limiter = store.limiter(reactor)
        self._ids = 0
        self._events = 0
        self._day = 0

    async def reserve(self, *rules: Rule, key: str = TOKEN, id: str | None = None) -> Granted | Denied:
        self._ids += 1
        decision = await maybeDeferred(self.limiter.reserve, Ask(key, id or f"r{self._ids}", rules))
        if isinstance(decision, Granted):
            self._day = decision.day
        return decision

    async def settle(self, id: str, *costs: int | None) -> None:
        self.limiter.settle(TOKEN, id, costs)  # told in order, before what is asked next

    async def over(self, key: str = TOKEN, **fields: int) -> None:
        """A request is over, and written down."""
        self._events += 1
        event = UsageEvent(time=NOW, key=key, held_on=self._day, **fields)
        await self.store.add_usage("w", self._events, [event])


@pytest_twisted.async_yield_fixture
async def bench(url: str) -> AsyncIterator[Bench]:
    async with opened(url) as (store,):
        made = Bench(store)
        yield made
        await made.limiter.finish()


def money(limit: int, cost: int, period: int = 0) -> Rule:
    return Rule("budget", "", limit, cost, period)


def tokens(limit: int, cost: int, period: int = 0) -> Rule:
    return Rule("budget_tokens", "", limit, cost, period)


def requests(limit: int) -> Rule:
    return Rule("requests", "", limit, 1)


@pytest_twisted.ensureDeferred
async def test_what_is_held_and_what_is_spent_count_together(bench: Bench) -> None:
    assert await bench.reserve(money(100, 60)) == Granted((40,))
    refusal = await bench.reserve(money(100, 41))
    assert isinstance(refusal, Denied)
    assert (refusal.rule, refusal.never) == (0, True)
    assert await bench.reserve(money(100, 40)) == Granted((0,))
    await bench.over(held=60, spend=10)
    assert await bench.reserve(money(100, 50)) == Granted((0,))
    await bench.over(held=40, spend=40)
    await bench.over(held=50, spend=0)
    assert await bench.store.read_account(TOKEN) == Account(0, 50, 0)
    assert await bench.reserve(money(100, 50)) == Granted((0,))


@pytest_twisted.ensureDeferred
async def test_tokens_are_a_budget_of_their_own(bench: Bench) -> None:
    both = (money(100, 1), tokens(1000, 600))
    assert await bench.reserve(*both) == Granted((99, 400))
    refusal = await bench.reserve(*both)
    assert isinstance(refusal, Denied)
    assert refusal.rule == 1
    await bench.over(held=1, held_tokens=600, spend=3, prompt_tokens=100, completion_tokens=50)
    assert await bench.store.read_account(TOKEN) == Account(0, 3, 150)
    assert await bench.reserve(money(100, 97), tokens(1000, 850)) == Granted((0, 0))


@pytest_twisted.ensureDeferred
async def test_the_least_that_will_do(bench: Bench) -> None:
    """As much as is left is taken, of budgets and of windows, and given back as much."""
    guess = (Rule("budget", "", 100, 80, 0, 5), Rule("tokens", "", 100, 80, 0, 5))
    for taken, left in ((80, 20), (20, 0)):
        granted = await bench.reserve(*guess, id=f"guess {taken}")
        assert granted == Granted((left, left))
        assert isinstance(granted, Granted)
        assert granted.taken == (taken, taken)
    for refused in (*guess, Rule("budget", "", 4, 80, 0, 5)):
        refusal = await bench.reserve(refused)
        assert isinstance(refusal, Denied)
        assert refusal.left in (0, 4)
    await bench.settle("guess 20", 4, 4)
    for refused in guess:
        refusal = await bench.reserve(evolve(refused, least=17))
        assert isinstance(refusal, Denied)
        assert refusal.left == 16
    assert await bench.reserve(*guess) == Granted((0, 0))


@pytest_twisted.ensureDeferred
async def test_a_request_may_cost_more_than_was_held(bench: Bench) -> None:
    await bench.reserve(money(100, 1))
    await bench.over(held=1, spend=150)
    assert isinstance(await bench.reserve(money(100, 0)), Denied)
    assert await bench.store.read_account(TOKEN) == Account(0, 150, 0)


@pytest_twisted.ensureDeferred
async def test_all_or_none(bench: Bench) -> None:
    """What another rule refuses holds nothing, and a budget that refuses takes nothing from the others."""
    assert isinstance(await bench.reserve(requests(0), money(100, 100)), Denied)
    assert isinstance(await bench.reserve(requests(1), money(100, 101)), Denied)
    assert await bench.reserve(requests(1), money(100, 100)) == Granted((0, 0))


@pytest_twisted.ensureDeferred
async def test_what_was_never_forwarded_is_given_back_once(bench: Bench) -> None:
    await bench.reserve(money(100, 60), tokens(100, 60), id="lost")
    for _ in range(3):
        await bench.settle("lost", 0, 0)
    assert await bench.reserve(money(100, 100), tokens(100, 100)) == Granted((0, 0))


@pytest_twisted.ensureDeferred
async def test_a_settlement_that_knows_nothing_leaves_it_held(bench: Bench) -> None:
    await bench.reserve(money(100, 60), id="over")
    await bench.settle("over", None)
    assert isinstance(await bench.reserve(money(100, 41)), Denied)


@pytest_twisted.ensureDeferred
async def test_a_later_period_begins_with_nothing(bench: Bench) -> None:
    await bench.reserve(money(100, 100, 1000))
    await bench.over(held=100, spend=100, period=1000)
    assert isinstance(await bench.reserve(money(100, 1, 1000)), Denied)
    assert await bench.reserve(money(100, 70, 2000)) == Granted((30,))
    # One that began in the period before spends nothing of this one; nor does it hold anything.
    await bench.over(held=100, spend=1000, period=1000)
    assert isinstance(await bench.reserve(money(100, 31, 2000)), Denied)
    assert await bench.reserve(money(100, 30, 2000)) == Granted((0,))
    await bench.over(held=70, spend=1, period=2000)
    assert await bench.store.read_account(TOKEN) == Account(2000, 1, 0)


@pytest_twisted.ensureDeferred
async def test_who_still_thinks_it_is_the_period_before_is_counted_in_this_one(bench: Bench) -> None:
    await bench.reserve(money(100, 60, 2000))
    assert isinstance(await bench.reserve(money(100, 41, 1000)), Denied)
    assert isinstance(await bench.reserve(money(100, 40, 1000), id="late"), Granted)
    await bench.settle("late", 0)
    assert await bench.reserve(money(100, 40, 2000)) == Granted((0,))


@pytest_twisted.ensureDeferred
async def test_what_was_spent_before_the_first_request_counts(bench: Bench) -> None:
    await bench.over(spend=90)
    asked = [Deferred.fromCoroutine(bench.reserve(money(100, 5))) for _ in range(5)]
    answers = [answer for _, answer in await DeferredList(asked, fireOnOneErrback=True)]
    assert sum(isinstance(answer, Granted) for answer in answers) == 2


@pytest_twisted.ensureDeferred
async def test_spend_that_is_set_counts_at_once(bench: Bench) -> None:
    await bench.reserve(money(100, 10))
    await say_spent(bench.store, TOKEN, 0, 90)
    assert isinstance(await bench.reserve(money(100, 1)), Denied)
    await say_spent(bench.store, TOKEN, 0, 5)
    assert await bench.reserve(money(100, 85)) == Granted((0,))
    await say_spent(bench.store, TOKEN, 0, 0)  # to nothing, with all that was held
    assert await bench.reserve(money(100, 100)) == Granted((0,))


@pytest_twisted.ensureDeferred
async def test_a_key_in_the_place_of_another_has_spent_what_that_had(bench: Bench) -> None:
    old = VirtualKey(token=TOKEN, key_name="sk-...-one", max_budget=100)
    new = evolve(old, token=hash_key("sk-two"))
    await add_key(bench.store, old)
    await bench.reserve(money(100, 60))
    await bench.over(held=60, spend=60)
    await bench.reserve(money(100, 30))  # under way: it lets go of that at the old key, and not at the new one
    await bench.reserve(money(100, 1), key=new.token)  # known here before it has the other's account
    await bench.store.change_keys(
        [old.token, new.token], lambda _: Writes((new,), (old.token,), inherits={new.token: old.token})
    )
    assert isinstance(await bench.reserve(money(100, 41), key=new.token), Denied)
    assert await bench.reserve(money(100, 40), key=new.token) == Granted((0,))


@pytest_twisted.ensureDeferred
async def test_a_key_that_was_deleted_and_made_again_has_spent_nothing(bench: Bench) -> None:
    key = VirtualKey(token=TOKEN, key_name="sk-...-one", max_budget=100)
    await add_key(bench.store, key)
    await bench.reserve(money(100, 100))
    await delete_keys(bench.store, [TOKEN])
    await add_key(bench.store, key)
    assert await bench.reserve(money(100, 100)) == Granted((0,))


@pytest_twisted.ensureDeferred
async def test_many_at_once_never_hold_more_than_there_is(bench: Bench) -> None:
    asked = [Deferred.fromCoroutine(bench.reserve(money(100, 7))) for _ in range(64)]
    answers = [answer for _, answer in await DeferredList(asked, fireOnOneErrback=True)]
    assert sum(isinstance(answer, Granted) for answer in answers) == 14


@pytest_twisted.ensureDeferred
async def test_the_largest_amounts(bench: Bench) -> None:
    assert await bench.reserve(money(MAX_AMOUNT, MAX_AMOUNT)) == Granted((0,))
    await bench.over(held=MAX_AMOUNT, spend=MAX_AMOUNT)
    assert isinstance(await bench.reserve(money(MAX_AMOUNT, 1)), Denied)


@pytest.mark.parametrize("seed", range(6))
@pytest_twisted.ensureDeferred
async def test_held_and_spent_never_pass_the_limit_by_admission(bench: Bench, seed: int) -> None:
    """Against a model: what is admitted fits beside what is spent and held, and nothing that fits is refused."""
    dice = random.Random(seed)
    spent, held, running = 0, 0, []
    for _ in range(60):
        if running and dice.random() < 0.5:
            cost = running.pop(dice.randrange(len(running)))
            used = dice.randrange(cost + 2)
            await bench.over(held=cost, spend=used)
            held, spent = held - cost, spent + used
        cost = dice.randrange(20)
        answer = await bench.reserve(money(100, cost))
        assert isinstance(answer, Granted) is (spent + held + cost <= 100)
        if isinstance(answer, Granted):
            held += cost
            running.append(cost)
    assert (await bench.store.read_account(TOKEN)).spend == spent


@pytest_twisted.ensureDeferred
async def test_what_is_said_to_be_spent_holds_for_a_period_that_is_not_the_latest(bench: Bench) -> None:
    """A clock may have been ahead."""
    assert isinstance(await bench.reserve(tokens(100, 60, period=2000)), Granted)
    await bench.over(period=2000, completion_tokens=60, held_tokens=60)
    await say_spent(bench.store, TOKEN, 1000, 0)
    assert isinstance(await bench.reserve(tokens(100, 100, period=1000)), Granted)
    await bench.over(period=1000, completion_tokens=70, held_tokens=100)
    denied = await bench.reserve(tokens(100, 31, period=1000))
    assert isinstance(denied, Denied)
    assert denied.left == 30
