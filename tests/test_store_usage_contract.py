"""What every store promises about usage; the same tests on memory, on SQLite and on a real Redis."""

from collections.abc import Sequence
from typing import Any

import attrs
import pytest
import pytest_twisted
from _redis import RedisServer
from _stores import add_key, delete_keys, last_usage, say_spent, update_key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredList

from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.store.interface import AliasTaken, AuditEntry, Store, StoreUnavailable, Writes
from vllmproxy.store.memory import MemoryStore
from vllmproxy.store.opening import make_store
from vllmproxy.store.sqlite import SqliteStore
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.ledger import MOST_END_USERS, MOST_GROUPS, MOST_MODELS, OTHER, TooManySums
from vllmproxy.usage.sums import GROUPS, NUMBERS, Account, Spent, UsageQuery, UsageSum

DAY = 86_400.0
#: 2026-11-24 to 2026-11-26, noon.
NOON = [1_795_521_600.0 + DAY * number for number in range(3)]
DAYS = ["2026-11-24", "2026-11-25", "2026-11-26"]
ONE, TWO = hash_key("sk-one"), hash_key("sk-two")


def event(day: int = 0, key: str = ONE, **fields: Any) -> UsageEvent:
    return UsageEvent(time=NOON[day], key=key, **fields)


async def read(store: Store, *group_by: Any, **fields: Any) -> list[UsageSum]:
    query = {"since": DAYS[0], "until": DAYS[2], "group_by": group_by, **fields}
    return await store.read_usage(UsageQuery(**query))


async def requests(store: Store, **fields: Any) -> int:
    return sum(each.requests for each in await read(store, **fields))


MIXED = [
    event(0, model="a", end_user="u", prompt_tokens=10, completion_tokens=3, cached_tokens=4, spend=7),
    event(0, model="a", end_user="u", prompt_tokens=1, quality="unknown"),
    event(1, model="a", prompt_tokens=100, quality="estimated"),
    event(2, model="b", end_user="u", audio_ms=1500, quality="reported"),
    event(2, TWO, model="b", end_user="v", completion_tokens=2, spend=5),
    event(1, "master", model="b"),
    event(1, ""),
]


@pytest_twisted.ensureDeferred
async def test_sums_have_all_numbers(store: Store) -> None:
    await store.add_usage("w", 1, MIXED)
    assert await read(store, *GROUPS, key=ONE) == [
        UsageSum(
            group=(DAYS[0], ONE, "a", "u"),
            requests=2,
            unknown=1,
            prompt_tokens=11,
            completion_tokens=3,
            cached_tokens=4,
            spend=7,
        ),
        UsageSum(group=(DAYS[1], ONE, "a", ""), requests=1, estimated=1, prompt_tokens=100),
        UsageSum(group=(DAYS[2], ONE, "b", "u"), requests=1, audio_ms=1500),
    ]


@pytest.mark.parametrize(
    ("group_by", "groups"),
    [
        ((), {(): 7}),
        (("day",), {(DAYS[0],): 2, (DAYS[1],): 3, (DAYS[2],): 2}),
        (("key",), {("",): 1, (ONE,): 4, (TWO,): 1, ("master",): 1}),
        (("model",), {("",): 1, ("a",): 3, ("b",): 3}),
        (
            ("end_user", "model"),
            {("", ""): 1, ("", "a"): 1, ("", "b"): 1, ("u", "a"): 2, ("u", "b"): 1, ("v", "b"): 1},
        ),
        (
            ("model", "day"),
            {("", DAYS[1]): 1, ("a", DAYS[0]): 2, ("a", DAYS[1]): 1, ("b", DAYS[1]): 1, ("b", DAYS[2]): 2},
        ),
    ],
)
@pytest_twisted.ensureDeferred
async def test_groups_are_those_asked_for_and_in_order(
    store: Store, group_by: tuple[str, ...], groups: dict[tuple[str, ...], int]
) -> None:
    await store.add_usage("w", 1, MIXED)
    found = await read(store, *group_by)
    assert {each.group: each.requests for each in found} == groups
    assert [each.group for each in found] == sorted(groups)


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 7),
        ({"since": DAYS[1]}, 5),
        ({"until": DAYS[1]}, 5),
        ({"since": DAYS[1], "until": DAYS[1]}, 3),
        ({"since": DAYS[2], "until": DAYS[0]}, 0),
        ({"since": "2026-10-01", "until": "2026-11-23"}, 0),
        ({"key": ONE}, 4),
        ({"key": ""}, 1),
        ({"key": "nobody"}, 0),
        ({"model": "b"}, 3),
        ({"model": ""}, 1),
        ({"end_user": "u"}, 3),
        ({"end_user": ""}, 3),
        ({"key": ONE, "model": "a", "end_user": "u", "since": DAYS[0], "until": DAYS[0]}, 2),
    ],
)
@pytest_twisted.ensureDeferred
async def test_filters(store: Store, fields: dict[str, Any], count: int) -> None:
    await store.add_usage("w", 1, MIXED)
    for group_by in ((), ("day",), GROUPS):
        assert await requests(store, group_by=group_by, **fields) == count
    assert len(await read(store, **fields)) == (count > 0)


@pytest_twisted.ensureDeferred
async def test_nothing_yet(store: Store) -> None:
    assert await read(store) == await read(store, "key") == []
    assert await store.read_account(ONE) == Account()
    assert await last_usage(store, "w") == 0
    await store.forget_writer("w")
    await store.add_usage("w", 1, [])
    assert await last_usage(store, "w") == 0


@pytest_twisted.ensureDeferred
async def test_what_is_sent_again_counts_once(store: Store) -> None:
    events = [event(spend=1, prompt_tokens=2) for _ in range(10)]
    for first, count, last in ((1, 4, 4), (1, 4, 4), (1, 2, 4), (3, 5, 7), (5, 1, 7), (8, 3, 10), (1, 10, 10)):
        await store.add_usage("w", first, events[:count])
        assert await last_usage(store, "w") == last
        assert await requests(store) == last
        assert await store.read_account(ONE) == Account(0, last, 2 * last)
    await store.add_usage("w", 21, events)  # 11 to 20 are lost
    assert (await last_usage(store, "w"), await requests(store)) == (30, 20)


@pytest_twisted.ensureDeferred
async def test_writers_count_apart(store: Store) -> None:
    for writer in ("a", "b", "ключ \ud800", ""):
        await store.add_usage(writer, 1, [event()])
        await store.add_usage(writer, 1, [event()])
        assert await last_usage(store, writer) == 1
    assert await requests(store) == 4
    await store.forget_writer("a")
    assert [await last_usage(store, writer) for writer in ("a", "b")] == [0, 1]
    await store.add_usage("a", 1, [event()])
    assert await requests(store) == 5


@pytest_twisted.ensureDeferred
async def test_at_once_each_event_counts_once(store: Store) -> None:
    """Every writer sends batches that overlap, all of them at the same time and some of them twice."""
    numbers = [(first, first + length) for first in range(1, 40, 3) for length in (2, 5)] + [(1, 42)]
    calls = [
        store.add_usage(f"w{writer}", first, [event(spend=1) for _ in range(first, end)])
        for first, end in numbers
        for writer in range(4)
    ]
    await DeferredList([Deferred.fromCoroutine(call) for call in calls], fireOnOneErrback=True)
    assert [await last_usage(store, f"w{writer}") for writer in range(4)] == [41] * 4
    # Which comes first is not said, so some may be skipped over, as where numbers are missing; none counts twice.
    count = await requests(store)
    assert 4 <= count <= 4 * 41
    assert await store.read_account(ONE) == Account(0, count, 0)


@pytest_twisted.ensureDeferred
async def test_writers_at_once_lose_nothing(store: Store) -> None:
    calls = [
        store.add_usage(f"w{writer}", 1, [event(number % 3, model=f"m{number % 7}", spend=1) for number in range(30)])
        for writer in range(20)
    ]
    await DeferredList([Deferred.fromCoroutine(call) for call in calls], fireOnOneErrback=True)
    assert await requests(store) == 600
    assert await store.read_account(ONE) == Account(0, 600, 0)


@pytest_twisted.ensureDeferred
async def test_what_was_not_forwarded_is_in_no_sum(store: Store) -> None:
    await store.add_usage("w", 1, [event(requests=0, held=5, quality="estimated"), event(1)])
    assert [(each.group, each.requests, each.estimated) for each in await read(store, "day")] == [((DAYS[1],), 1, 0)]
    assert await last_usage(store, "w") == 2


@pytest_twisted.ensureDeferred
async def test_an_event_that_is_none_leaves_nothing_of_its_batch(store: Store) -> None:
    with pytest.raises((OverflowError, ValueError)):
        await store.add_usage("w", 1, [event(spend=1), attrs.evolve(event(), time=1e20)])
    assert await last_usage(store, "w") == 0
    assert await read(store) == []
    assert await store.read_account(ONE) == Account()


@pytest.mark.parametrize(
    ("periods", "account"),
    [
        ([0, 0], Account(0, 3, 30)),
        ([0, 50], Account(50, 2, 20)),
        ([50, 0], Account(50, 1, 10)),
        ([50, 60, 50, 60, 0], Account(60, 2 + 8, 100)),
        ([60, 50], Account(60, 1, 10)),
        ([50, 50, 60], Account(60, 4, 40)),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_newer_period_begins_anew(store: Store, periods: list[int], account: Account) -> None:
    events = [event(period=period, spend=2**n, prompt_tokens=10 * 2**n) for n, period in enumerate(periods)]
    await store.add_usage("together", 1, events)
    assert await store.read_account(ONE) == account
    assert await requests(store) == len(periods)
    for number, each in enumerate(events, 1):
        await store.add_usage("one by one", number, [attrs.evolve(each, key=TWO)])
    assert await store.read_account(TWO) == account


@pytest_twisted.ensureDeferred
async def test_only_virtual_keys_have_accounts(store: Store) -> None:
    await store.add_usage("w", 1, [event(0, "", spend=1), event(0, "master", spend=1), event(0, TWO, spend=1)])
    assert [await store.read_account(key) for key in ("", "master", TWO)] == [Account(), Account(), Account(0, 1, 0)]


def key(name: str, alias: str | None = None) -> VirtualKey:
    return VirtualKey(token=hash_key(name), key_name=name, key_alias=alias)


@pytest_twisted.ensureDeferred
async def test_an_account_goes_with_its_key(store: Store) -> None:
    await add_key(store, key("sk-one"))
    await add_key(store, key("sk-two"))
    await store.add_usage("w", 1, [event(spend=1), event(0, TWO, spend=1)])
    await update_key(store, ONE, lambda found: attrs.evolve(found, blocked=True))
    assert await store.read_account(ONE) == Account(0, 1, 0)
    await delete_keys(store, [ONE])
    assert await store.read_account(ONE) == Account()
    await store.add_usage("w", 3, [event(spend=9)])  # of a request that was under way
    await add_key(store, key("sk-one"))
    assert await store.read_account(ONE) == Account()
    assert await store.read_account(TWO) == Account(0, 1, 0)
    assert await requests(store) == 3


@pytest.mark.parametrize("grace", [True, False])
@pytest_twisted.ensureDeferred
async def test_an_heir_has_spent_what_was_spent(store: Store, grace: bool) -> None:
    await add_key(store, key("sk-one", "a"))
    await store.add_usage("w", 1, [event(period=50, spend=7, prompt_tokens=70), event(0, TWO, spend=1000)])
    kept = (key("sk-one"),) if grace else ()

    def replace(found: Any) -> Writes:
        return Writes((key("sk-two", "a"), *kept), () if grace else (ONE,), inherits={TWO: ONE})

    await store.change_keys([ONE, TWO], replace)
    assert await store.read_account(TWO) == Account(50, 7, 70)
    assert await store.read_account(ONE) == (Account(50, 7, 70) if grace else Account())
    await store.add_usage("w", 3, [event(0, TWO, period=50, spend=1)])
    assert await store.read_account(TWO) == Account(50, 8, 70)
    assert (await store.read_account(ONE)).spend == (7 if grace else 0)


@pytest_twisted.ensureDeferred
async def test_an_heir_of_nothing_has_nothing(store: Store) -> None:
    await add_key(store, key("sk-one"))
    await store.add_usage("w", 1, [event(0, TWO, spend=1)])
    await store.change_keys([ONE, TWO], lambda _: Writes((key("sk-two"),), (ONE,), inherits={TWO: ONE}))
    assert await store.read_account(TWO) == Account()
    # Nor has one that was there before.
    await add_key(store, key("sk-one"))
    await store.add_usage("w", 2, [event(0, TWO, spend=1)])
    await store.change_keys([ONE, TWO], lambda _: Writes((key("sk-two"),), inherits={TWO: ONE}))
    assert await store.read_account(TWO) == Account()


@pytest_twisted.ensureDeferred
async def test_a_change_that_fails_moves_no_account(store: Store) -> None:
    await add_key(store, key("sk-one"))
    await add_key(store, key("sk-other", "taken"))
    await store.add_usage("w", 1, [event(spend=7, prompt_tokens=70)])
    with pytest.raises(AliasTaken):
        await store.change_keys([ONE, TWO], lambda _: Writes((key("sk-two", "taken"),), (ONE,), inherits={TWO: ONE}))
    assert [await store.read_account(token) for token in (ONE, TWO)] == [Account(0, 7, 70), Account()]


@pytest_twisted.ensureDeferred
async def test_an_account_is_set_and_that_is_written_down(store: Store) -> None:
    await store.add_usage("w", 1, [event(period=50, spend=5, prompt_tokens=3)])
    entry = AuditEntry(time=1.0, actor="master", action="/key/{key}/reset_spend", target=ONE, before={"spend": 5})
    await say_spent(store, ONE, 50, 1, entry)
    assert await store.read_account(ONE) == Account(50, 1, 3)
    assert [each.fields for each in await store.list_audit(9)] == [attrs.asdict(entry)]
    await store.add_usage("w", 2, [event(period=50, spend=5)])
    assert await store.read_account(ONE) == Account(50, 6, 3)
    await say_spent(store, ONE, 60, 9)
    assert await store.read_account(ONE) == Account(60, 9, 0)
    await say_spent(store, ONE, 0, 0)
    assert await store.read_account(ONE) == Account()
    assert len(await store.list_audit(9)) == 1


@pytest_twisted.ensureDeferred
async def test_tokens_that_are_used_while_the_money_is_set_stay(store: Store) -> None:
    await store.add_usage("w", 1, [event(spend=5, prompt_tokens=3)])
    calls: list[Any] = [store.add_usage(f"w{number}", 1, [event(prompt_tokens=1)]) for number in range(20)]
    calls.insert(10, say_spent(store, ONE, 0, 8))
    await DeferredList([Deferred.fromCoroutine(call) for call in calls], fireOnOneErrback=True)
    assert await store.read_account(ONE) == Account(0, 8, 23)


@pytest_twisted.ensureDeferred
async def test_a_new_key_begins_with_what_it_is_said_to_have_spent(store: Store) -> None:
    await store.add_usage("w", 1, [event(period=50, spend=5, prompt_tokens=3)])  # of one that was deleted
    said = {ONE: Spent(50, 7), TWO: Spent(0, 9)}
    await store.change_keys([ONE], lambda _: Writes((key("sk-one", "taken"),), spent=said))
    assert [await store.read_account(token) for token in (ONE, TWO)] == [Account(50, 7, 0), Account(0, 9, 0)]
    with pytest.raises(AliasTaken):
        await store.change_keys([TWO], lambda _: Writes((key("sk-two", "taken"),), spent={ONE: Spent(50, 1)}))
    assert await store.read_account(ONE) == Account(50, 7, 0)


@pytest_twisted.ensureDeferred
async def test_names_come_back_whatever_they_are(store: Store) -> None:
    names = ["", "3:x", "x", ":", "é", "e\u0301", "\ud800", "\0", " ", "10", OTHER, "a b", "'\"%{}"]
    events = [event(model=model, end_user=end_user) for model in names for end_user in names]
    await store.add_usage("w", 1, events)
    found = await read(store, "model", "end_user")
    assert [each.group for each in found] == sorted((model, end_user) for model in names for end_user in names)
    assert {each.requests for each in found} == {1}
    for name in names:
        assert await requests(store, model=name) == await requests(store, end_user=name) == len(names)


@pytest.mark.parametrize(("field", "most"), [("end_user", MOST_END_USERS), ("model", MOST_MODELS)])
@pytest_twisted.ensureDeferred
async def test_so_many_names_have_sums_of_their_own(store: Store, field: Any, most: int) -> None:
    names = [f"n{number}" for number in range(most + 20)]
    events = [event(spend=1, **{field: name}) for name in names]
    events += [event(), event(**{field: names[0]}), event(**{field: names[-1]}), event(1, **{field: names[-1]})]
    events.append(event(0, TWO, **{field: names[-1]}))
    for start in range(0, len(events), 150):
        await store.add_usage("w", start + 1, events[start : start + 150])
    found = {each.group[0]: each.requests for each in await read(store, field, key=ONE, until=DAYS[0])}
    assert found == {"": 1, **dict.fromkeys(names[:most], 1), names[0]: 2, OTHER: 21}
    # Another day and another key have their own.
    assert await requests(store, **{field: names[-1]}) == 2
    assert await requests(store) == len(events)
    assert await store.read_account(ONE) == Account(0, most + 20, 0)


@pytest_twisted.ensureDeferred
async def test_a_long_batch_and_a_month_of_rows(store: Store) -> None:
    first = NOON[0] - 30 * DAY
    events = [
        UsageEvent(time=first + DAY * (number % 31), key=f"k{number % 97}", model="m", end_user=f"u{number % 900}")
        for number in range(9000)
    ]
    for start in range(0, len(events), 1500):
        await store.add_usage("w", start + 1, events[start : start + 1500])
    rows = {(each.day, each.key, each.end_user) for each in events}
    assert len(rows) > 8900
    found = await store.read_usage(UsageQuery(since="2026-10-01", until=DAYS[2], group_by=("day", "key", "end_user")))
    assert {each.group for each in found} == rows
    assert sum(each.requests for each in found) == 9000
    by_key = await store.read_usage(UsageQuery(since="2026-10-01", until=DAYS[2], key="k5", group_by=("key",)))
    assert [each.requests for each in by_key] == [sum(each.key == "k5" for each in events)]


@pytest_twisted.ensureDeferred
async def test_only_so_many_groups_are_answered(store: Store) -> None:
    for number in range(11):
        events = [event(number % 3, f"k{number}", end_user=f"u{user}") for user in range(MOST_GROUPS // 10)]
        await store.add_usage("w", number * len(events) + 1, events)
    with pytest.raises(TooManySums):
        await read(store, "key", "end_user")
    assert len(await read(store, "key")) == 11
    assert len(await read(store, "key", "end_user", since=DAYS[1])) == 7 * MOST_GROUPS // 10
    await store.ping()


@pytest_twisted.ensureDeferred
async def test_numbers_stay_exact_and_a_mad_one_harms_nobody(store: Store) -> None:
    await store.add_usage("w", 1, [event(spend=2**40, prompt_tokens=2**40) for _ in range(1000)])
    await store.add_usage("w", 1001, [event(spend=1, prompt_tokens=2**80, completion_tokens=-5)])
    (found,) = await read(store)
    assert (found.spend, found.prompt_tokens, found.completion_tokens) == (1000 * 2**40 + 1, 1001 * 2**40, 0)
    assert await store.read_account(ONE) == Account(0, 1000 * 2**40 + 1, 1001 * 2**40)


@pytest_twisted.ensureDeferred
async def test_a_closed_store_is_unavailable(url: str) -> None:
    store = make_store(url, reactor=reactor)
    await store.open()
    await store.add_usage("w", 1, [event()])
    await store.close()
    for call in (
        store.add_usage("w", 2, [event()]),
        store.add_usage("w", 2, []),
        store.forget_writer("w"),
        store.read_usage(UsageQuery(since=DAYS[0], until=DAYS[2])),
        store.read_account(ONE),
        say_spent(store, ONE, 0, 0),
    ):
        with pytest.raises(StoreUnavailable):
            await call
    await store.close()


class Model:
    """Event by event, as it is said."""

    def __init__(self) -> None:
        self.last: dict[str, int] = {}
        self.added: list[UsageEvent] = []
        self.accounts: dict[str, Account] = {}

    def add(self, writer: str, first: int, events: Sequence[UsageEvent]) -> None:
        for number, each in enumerate(events, first):
            if number > self.last.get(writer, 0):
                self.last[writer] = number
                self.added.append(each)
                if each.key not in ("", "master"):
                    self.charge(each)

    def charge(self, each: UsageEvent) -> None:
        account = self.accounts.get(each.key, Account())
        if each.period > account.period:
            account = Account(each.period)
        if each.period == account.period:
            account = Account(account.period, account.spend + each.spend, account.tokens + each.tokens)
        self.accounts[each.key] = account

    def sums(self, query: UsageQuery) -> list[UsageSum]:
        groups: dict[tuple[str, ...], list[UsageEvent]] = {}
        for each in self.added:
            wanted = {"key": query.key, "model": query.model, "end_user": query.end_user}
            matches = all(value in (None, getattr(each, name)) for name, value in wanted.items())
            if each.requests and matches and query.since <= each.day <= query.until:
                groups.setdefault(tuple(getattr(each, name) for name in query.group_by), []).append(each)
        return [UsageSum(group=group, **self.numbers(groups[group])) for group in sorted(groups)]

    def numbers(self, events: list[UsageEvent]) -> dict[str, int]:
        counted = {name: [each for each in events if each.quality == name] for name in ("estimated", "unknown")}
        return {
            name: len(counted[name]) if name in counted else sum(getattr(each, name) for each in events)
            for name in NUMBERS
        }


async def clear(store: Store, redis: RedisServer) -> None:
    """Have ``store`` as new."""
    if isinstance(store, MemoryStore):
        await store.close()
        await store.open()
    elif isinstance(store, SqliteStore):
        tables = ("usage", "usage_names", "usage_writers", "accounts")
        await store._run(lambda transaction: [transaction.execute(f"DELETE FROM {table}") for table in tables])
    else:
        redis.command("FLUSHALL")


amounts = st.integers(0, 10**9)
few = st.sampled_from(["", "a", "b:c", "\ud800"])
any_event = st.builds(
    UsageEvent,
    time=st.floats(NOON[0], NOON[2]),
    key=st.sampled_from([ONE, TWO, "master", ""]),
    model=few,
    end_user=few,
    requests=st.integers(0, 1),
    prompt_tokens=amounts,
    completion_tokens=amounts,
    cached_tokens=amounts,
    audio_ms=amounts,
    spend=amounts,
    quality=st.sampled_from(["reported", "estimated", "unknown", "none"]),
    period=st.sampled_from([0, 50, 60]),
    held=amounts,
    held_tokens=amounts,
)
batches = st.lists(
    st.tuples(st.sampled_from(["w", "v"]), st.integers(1, 8), st.lists(any_event, max_size=6)), max_size=6
)
queries = st.builds(
    UsageQuery,
    since=st.sampled_from(DAYS),
    until=st.sampled_from(DAYS),
    key=st.none() | st.sampled_from([ONE, ""]),
    model=st.none() | few,
    end_user=st.none() | few,
    group_by=st.permutations(GROUPS).flatmap(lambda names: st.integers(0, 4).map(lambda n: tuple(names[:n]))),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=batches, asked=st.lists(queries, min_size=1, max_size=3))
@pytest_twisted.ensureDeferred
async def test_every_store_counts_as_a_simple_model_does(
    every_store: list[Store], redis: RedisServer, sent: Any, asked: list[UsageQuery]
) -> None:
    model = Model()
    for store in every_store:
        await clear(store, redis)
    for writer, first, events in sent:
        model.add(writer, first, events)
        for store in every_store:
            await store.add_usage(writer, first, events)
    for store in every_store:
        assert {writer: await last_usage(store, writer) for writer in ("w", "v")} == {"w": 0, "v": 0, **model.last}
        for token in (ONE, TWO):
            assert await store.read_account(token) == model.accounts.get(token, Account())
        for query in (*asked, UsageQuery(since=DAYS[0], until=DAYS[2], group_by=GROUPS)):
            assert await store.read_usage(query) == model.sums(query)
