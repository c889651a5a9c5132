"""What the Redis store does about usage of its own: what is held, how long things are kept, servers that stall."""

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import pytest_twisted
from _redis import RedisServer, too_late
from _stores import add_key, last_usage, say_spent
from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.task import deferLater
from twisted.logger import LogEvent

from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.store.interface import StoreUnavailable, Writes
from vllmproxy.store.redis import RedisStore
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.ledger import KEPT_DAYS
from vllmproxy.usage.sums import Account, Spent, UsageQuery

TOKEN, HEIR = hash_key("sk-one"), hash_key("sk-two")
TIME, DAY = 1_795_521_600.0, "2026-11-24"
HELD_ON = 20_700
KEY = VirtualKey(token=TOKEN, key_name="sk-...one")
QUERY = UsageQuery(since=DAY, until=DAY)
BUDGET = f"vllmproxy:{{{TOKEN}}}:budget"
SUMS = f"vllmproxy:{{{TOKEN}}}:usage:{DAY}"


@pytest.fixture
def store(redis_store: RedisStore) -> RedisStore:
    return redis_store


def event(**fields: object) -> UsageEvent:
    return UsageEvent(**{"time": TIME, "key": TOKEN, "held_on": HELD_ON, **fields})  # type: ignore[arg-type]


def fields(server: RedisServer, name: str) -> dict[str, str]:
    words = re.findall(r"\$\d+\r\n([^\r]*)\r\n", server.command("HGETALL", name).decode())
    return dict(zip(words[::2], words[1::2], strict=True))


def number(server: RedisServer, *words: str) -> int:
    return int(server.command(*words)[1:])


def account(server: RedisServer, name: str = BUDGET) -> tuple[int, ...]:
    """Return its period, spend, tokens, and what is held of money and of tokens."""
    found = {field: int(value) for field, value in fields(server, name).items()}
    holds = [sum(found.get(f"{kind}{side}", 0) for side in "01") for kind in ("held", "held_tokens")]
    return found["period"], found["spend"], found["tokens"], *holds


def hold(server: RedisServer, *numbers: int) -> None:
    """Make an account of what :func:`account` is to return."""
    period, spend, tokens, held, held_tokens = numbers
    values = {"period": period, "spend": spend, "tokens": tokens, "day": HELD_ON}
    values |= {f"held{HELD_ON % 2}": held, f"held_tokens{HELD_ON % 2}": held_tokens}
    server.command("HSET", BUDGET, *(str(word) for pair in values.items() for word in pair))


@pytest_twisted.ensureDeferred
async def test_what_was_held_is_let_go_of_when_it_is_spent(server: RedisServer, store: RedisStore) -> None:
    hold(server, 50, 5, 7, 100, 1000)
    await store.add_usage("w", 1, [event(period=50, held=30, held_tokens=300, spend=9, prompt_tokens=2)])
    assert account(server) == (50, 14, 9, 70, 700)
    await store.add_usage("w", 1, [event(period=50, held=30, held_tokens=300, spend=9, prompt_tokens=2)])
    assert account(server) == (50, 14, 9, 70, 700)
    await store.add_usage("w", 2, [event(period=50, requests=0, held=10), event(period=50, held=500, held_tokens=1)])
    assert account(server) == (50, 14, 9, 0, 699)
    await store.add_usage("w", 4, [event(period=40, held=1, held_tokens=1, spend=1)])
    assert account(server) == (50, 14, 9, 0, 699)
    await store.add_usage("w", 5, [event(period=60, held=1, held_tokens=1, spend=1)])
    assert account(server) == (60, 1, 0, 0, 0)


@pytest_twisted.ensureDeferred
async def test_what_is_held_stays_so_when_an_account_is_set(server: RedisServer, store: RedisStore) -> None:
    hold(server, 50, 5, 7, 100, 1000)
    await say_spent(store, TOKEN, 50, 9)
    assert account(server) == (50, 9, 7, 100, 1000)
    await say_spent(store, TOKEN, 60, 1)
    assert fields(server, BUDGET) == {"period": "60", "spend": "1"}
    assert await store.read_account(TOKEN) == Account(60, 1, 0)
    await store.add_usage("w", 1, [event(period=60, held=1, spend=1, prompt_tokens=2)])
    assert account(server) == (60, 2, 2, 0, 0)
    hold(server, 60, 5, 7, 100, 1000)
    await say_spent(store, TOKEN, 60, 0)
    assert fields(server, BUDGET) == {"period": "60", "spend": "0"}


@pytest_twisted.ensureDeferred
async def test_nothing_is_written_where_something_else_is_in_an_accounts_place(
    server: RedisServer, store: RedisStore
) -> None:
    server.command("SET", BUDGET, "garbage")
    made = VirtualKey(token=HEIR, key_name="new")
    with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
        await store.change_keys([HEIR], lambda _: Writes((made,), spent={TOKEN: Spent(0, 1)}))
    assert await store.get_key(HEIR) is None


@pytest_twisted.ensureDeferred
async def test_an_heir_takes_over_what_is_spent_and_not_what_is_held(server: RedisServer, store: RedisStore) -> None:
    await add_key(store, VirtualKey(token=TOKEN, key_name="old"))
    hold(server, 50, 5, 7, 100, 1000)
    heir = VirtualKey(token=HEIR, key_name="new")
    await store.change_keys([TOKEN, HEIR], lambda _: Writes((heir,), (TOKEN,), inherits={HEIR: TOKEN}))
    assert account(server, f"vllmproxy:{{{HEIR}}}:budget") == (50, 5, 7, 0, 0)
    assert number(server, "EXISTS", BUDGET) == 0


@pytest_twisted.ensureDeferred
async def test_how_long_things_are_kept(server: RedisServer, store: RedisStore) -> None:
    await store.change_keys([TOKEN], lambda found: Writes(put=(KEY,)))
    await store.add_usage("w", 1, [event(model="m", end_user="u", spend=1)])
    year = [f"vllmproxy:usage:{DAY}", SUMS, f"{SUMS}:models", f"{SUMS}:end_users"]
    spans = {name: number(server, "TTL", name) for name in (*year, "vllmproxy:usage:writer:w", BUDGET)}
    days = {name: -(-span // 86_400) for name, span in spans.items()}
    assert days == {**dict.fromkeys(year, 400), "vllmproxy:usage:writer:w": 90, BUDGET: 0}
    assert spans[BUDGET] == -1
    for name in spans:
        server.command("EXPIRE", name, "100")
    await store.add_usage("w", 1, [event()])  # all of it known: only the writer was heard of again
    assert [number(server, "TTL", name) > 100 for name in spans] == [False] * 4 + [True, False]
    await store.add_usage("w", 2, [event(model="m", end_user="u")])
    assert [number(server, "TTL", name) > 100 for name in year] == [True] * 4
    assert fields(server, SUMS) == {"1:mu": "2 0 0 0 0 0 0 1"}
    await store.forget_writer("w")
    assert number(server, "EXISTS", "vllmproxy:usage:writer:w") == 0


@pytest_twisted.ensureDeferred
async def test_what_runs_after_its_time_does_nothing(server: RedisServer, store: RedisStore) -> None:
    await store.add_usage("v", 1, [event(spend=5, prompt_tokens=5)])
    before = number(server, "DBSIZE")
    for call in (
        lambda: store.add_usage("w", 1, [event(spend=1)]),
        lambda: store.forget_writer("w"),
        lambda: store.read_usage(QUERY),
    ):
        await call_late(store, call)
    assert number(server, "DBSIZE") == before
    assert await store.read_account(TOKEN) == Account(0, 5, 5)


async def call_late(store: RedisStore, call: object) -> None:
    """Have a call be late for good: a clock that is only wrong is noticed and the call is made again."""
    wire = await store._link.get()
    sent = wire.ask

    def slow(words: tuple[Any, ...], answered: Callable[[object], None], *, now: bool) -> None:
        sent(too_late(words), answered, now=now)

    wire.ask = slow
    try:
        with pytest.raises(StoreUnavailable, match="late"):
            await call()  # type: ignore[operator]
    finally:
        del wire.ask


@pytest_twisted.ensureDeferred
async def test_a_clock_that_was_set_is_noticed(server: RedisServer, store: RedisStore) -> None:
    wire = await store._link.get()
    wire.offset -= 3600
    await store.add_usage("w", 1, [event(spend=1)])
    assert await store.read_account(TOKEN) == Account(0, 1, 0)


@pytest_twisted.ensureDeferred
async def test_what_a_stalled_server_did_not_answer_can_be_sent_again(server: RedisServer) -> None:
    hasty = RedisStore(server.url, reactor, timeout=0.3)
    await hasty.open()
    events = [event(spend=1) for _ in range(300)]
    await hasty.add_usage("w", 1, events[:10])
    server.stall()
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            await hasty.add_usage("w", 1, events)
    await deferLater(reactor, 0.1)
    server.resume()
    give_up = time.monotonic() + 20
    while await last(hasty) < 300:
        assert time.monotonic() < give_up
        await add(hasty, events)
    (found,) = await hasty.read_usage(QUERY)
    assert found.requests == 300
    assert await hasty.read_account(TOKEN) == Account(0, 300, 0)
    await hasty.close()


async def last(store: RedisStore) -> int:
    try:
        return await last_usage(store, "w")
    except StoreUnavailable:
        return 0


async def add(store: RedisStore, events: list[UsageEvent]) -> None:
    try:
        await store.add_usage("w", 1, events)
    except StoreUnavailable:
        await deferLater(reactor, 0.05)


@pytest_twisted.ensureDeferred
async def test_proxies_add_to_the_same_sums(server: RedisServer, store: RedisStore) -> None:
    other = RedisStore(server.url, reactor)
    await other.open()
    hold(server, 0, 0, 0, 10_000, 0)
    calls = [
        each.add_usage(f"w{proxy}", first, [event(model=f"m{first % 3}", spend=2, held=3) for _ in range(9)])
        for first in range(1, 200, 9)
        for proxy, each in enumerate((store, other))
    ]
    await DeferredList([Deferred.fromCoroutine(call) for call in calls], fireOnOneErrback=True)
    count = 2 * 23 * 9
    (found,) = await other.read_usage(QUERY)
    assert (found.requests, found.spend) == (count, 2 * count)
    assert account(server) == (0, 2 * count, 0, 10_000 - 3 * count, 0)
    await other.close()


@pytest_twisted.ensureDeferred
async def test_a_hash_that_grows_while_it_is_read_counts_once(server: RedisServer, store: RedisStore) -> None:
    """Its rows are read in pieces, and its table is made larger meanwhile, which shows some of them twice."""
    events = [event(model=f"m{number % 40}", end_user=f"u{number // 40}") for number in range(12_000)]
    await store.add_usage("w", 1, events[:6000])
    reading = Deferred.fromCoroutine(store.read_usage(QUERY))
    await store.add_usage("w", 6001, events[6000:])
    (found,) = await reading
    assert 6000 <= found.requests <= 12_000
    (found,) = await store.read_usage(QUERY)
    assert found.requests == 12_000


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(
    "garbage",
    [
        ("SET", BUDGET, "no hash"),
        ("HSET", BUDGET, "period", "soon"),
        ("HSET", BUDGET, "period", "0", "spend", "much"),
        ("SET", SUMS, "no hash"),
        ("SET", f"{SUMS}:models", "no set"),
        ("SET", f"{SUMS}:end_users", "no set"),
    ],
)
async def test_garbage_at_one_key_costs_no_other_key(
    server: RedisServer, store: RedisStore, logged_errors: list[LogEvent], garbage: tuple[str, ...]
) -> None:
    server.command(*garbage)
    other = hash_key("sk-three")
    keys = (TOKEN, other, HEIR)
    await store.add_usage("w", 1, [event(key=key, model="m", end_user="u", spend=5) for key in keys])
    assert [(await store.read_account(key)).spend for key in (other, HEIR)] == [5, 5]
    for key in (other, HEIR):
        (found,) = await store.read_usage(UsageQuery(since=DAY, until=DAY, key=key))
        assert (found.requests, found.spend) == (1, 5)
    (said,) = logged_errors
    assert said["name"] == (BUDGET if BUDGET in garbage else SUMS)
    assert re.search("wrong kind of value|compare|arithmetic", said["why"])
    logged_errors.clear()
    await store.add_usage("w", 1, [event(key=key, spend=5) for key in keys])  # as it does where no answer came
    assert (await store.read_account(other)).spend == 5


@pytest_twisted.ensureDeferred
async def test_what_a_deleted_key_used_is_not_kept_for_ever(server: RedisServer, store: RedisStore) -> None:
    await store.change_keys([TOKEN], lambda found: Writes(put=(KEY,)))
    await store.add_usage("w", 1, [event(spend=1)])
    assert number(server, "TTL", BUDGET) == -1
    await store.change_keys([TOKEN], lambda found: Writes(remove=(TOKEN,)))
    assert number(server, "EXISTS", BUDGET) == 0
    await store.add_usage("w", 2, [event(spend=2)])  # it was under way meanwhile
    assert 0 < number(server, "TTL", BUDGET) <= KEPT_DAYS * 86_400
    await store.change_keys([TOKEN], lambda found: Writes(put=(KEY,)))
    await store.add_usage("w", 3, [event(spend=3)])
    assert number(server, "TTL", BUDGET) == -1
    assert (await store.read_account(TOKEN)).spend == 3


@pytest_twisted.ensureDeferred
async def test_foreign_values_are_no_sums(server: RedisServer, store: RedisStore) -> None:
    server.command("SADD", f"vllmproxy:usage:{DAY}", TOKEN)
    for row, numbers in (("1:mu", "many"), ("no length", "1 0 0 0 0 0 0 0"), ("1:mu", "1 2")):
        server.command("DEL", SUMS)
        server.command("HSET", SUMS, row, numbers)
        with pytest.raises(StoreUnavailable, match="sums"):
            await store.read_usage(QUERY)
    server.command("HSET", BUDGET, "spend", "much")
    with pytest.raises(StoreUnavailable, match="account"):
        await store.read_account(TOKEN)
