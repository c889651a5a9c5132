"""The Redis limiter in real time: shared, stopped, killed, cancelled, late; and what it leaves behind."""

import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import pytest_twisted
from _limits import START, TOKEN, RedisBench, close_link, limiter_on, parallel, requests, tokens, virtual_time
from _reactor import until
from _redis import RedisServer, held_tokens, too_late
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.task import Clock, deferLater

from vllmproxy.limits.values import Ask, Denied, Granted, Lot, Rule
from vllmproxy.store.interface import StoreUnavailable
from vllmproxy.store.limits_lua import RESERVE
from vllmproxy.store.limits_memory import MemoryLimiter
from vllmproxy.store.limits_redis import RedisLimiter
from vllmproxy.store.link import Link
from vllmproxy.store.scripts import LATE
from vllmproxy.store.settling_lua import RENEW, SETTLE
from vllmproxy.usage.sums import Account

RULES = requests(10), tokens(1000, 100), parallel(10)
FIRST = Granted((9, 900, 9))

#: Seconds after which a call has hung, on however busy a machine; its deadline is 0.2.
HUNG = 20.0


def ask(request_id: str, *rules: Rule) -> Ask:
    return Ask(TOKEN, request_id, rules or RULES)


async def eventually(limiter: RedisLimiter, name: str) -> Granted | Denied:
    """Ask until Redis answers, every time for another request."""
    give_up = time.monotonic() + HUNG
    for number in range(10_000):
        started = time.monotonic()
        try:
            return await limiter.reserve(ask(f"{name}-{number}"))
        except StoreUnavailable:
            assert time.monotonic() - started < HUNG
            assert time.monotonic() < give_up
            await deferLater(reactor, 0.02)
    raise AssertionError


async def unheard(server: RedisServer, link: Link, call: Callable[[], Any]) -> None:
    """Make a call that a stalled Redis runs in time, by the clocks, and answers late."""
    wire = await link.get()
    server.stall()
    try:
        wire.offset += 3600  # the not-after time is in an hour
        with pytest.raises(StoreUnavailable):
            await call()
    finally:
        server.resume()


def left_behind(server: RedisServer) -> dict[str, int]:
    """Return the milliseconds that every key has to live, -1 for ever; the schema's version aside."""
    names = [word for word in server.command("KEYS", "*").decode().split("\r\n") if word.startswith("vllmproxy")]
    assert "vllmproxy:schema" in names
    names.remove("vllmproxy:schema")
    return {name: int(server.command("PTTL", name)[1:]) for name in names}


def all_of(lot: Lot) -> list[Granted]:
    """Return what each of a lot's requests was granted."""
    return [lot.take() for _ in range(lot.granted)]


def is_settled(server: RedisServer, reservation: str, unit: str = "") -> bool:
    """Tell whether Redis knows a reservation, and as settled."""
    settled = server.command("HGET", f"vllmproxy:{{{TOKEN}}}:request:{reservation}", "settled").split(b"\r\n")
    return len(settled) > 1 and settled[1][int(unit or 0)] == ord("1")


def runs_of(server: RedisServer) -> int:
    """Return how many scripts it has been asked to run."""
    stats = server.command("INFO", "commandstats").decode()
    return sum(int(calls) for calls in re.findall(r"cmdstat_eval(?:sha)?:calls=(\d+)", stats))


@pytest_twisted.ensureDeferred
async def test_everything_has_a_time_to_live_and_one_hash_tag(server: RedisServer, links: list[Link]) -> None:
    limiter = limiter_on(links[0])
    full = (*RULES, requests(9, scope="m"), tokens(9, 1, "m"), parallel(9, "m"))
    for name in ("open", "settled", "renewed"):
        assert isinstance(await limiter.reserve(ask(name, *full)), Granted)
    assert isinstance(await limiter.reserve(ask("refused", requests(1))), Denied)
    await limiter.settle_all([(TOKEN, "settled", (None, 5000, None, 0, 0))])
    assert await limiter.renew(TOKEN, ["renewed", "settled", "unknown"]) == ["settled", "unknown"]
    kept = left_behind(server)
    counters = [f"{kind}:{scope}" for kind in ("requests", "tokens", "places") for scope in ("", "m")]
    held = ["clock", *counters, *(f"request:{name}" for name in ("open", "settled", "renewed"))]
    assert sorted(kept) == sorted(f"vllmproxy:{{{TOKEN}}}:{name}" for name in held)
    assert all(0 < milliseconds <= 62_000 for milliseconds in kept.values())
    # Nothing is let go of before it has left the window, and a settled request soon after.
    assert all(kept[f"vllmproxy:{{{TOKEN}}}:{name}"] > 60_476 - HUNG * 1000 for name in ("clock", *counters))
    assert kept[f"vllmproxy:{{{TOKEN}}}:request:settled"] <= 5000


@pytest_twisted.ensureDeferred
async def test_what_a_window_says_of_its_oldest_bucket_may_be_missing_or_too_early(
    server: RedisServer, links: list[Link]
) -> None:
    """As in one that an older version keeps as well, which does not write it."""
    name = f"vllmproxy:{{{TOKEN}}}:requests:"
    with virtual_time():
        bench = RedisBench(server, links[0])
        assert await bench.reserve(requests(2)) == Granted((1,))
        bench.advance(30)
        assert await bench.reserve(requests(2)) == Granted((0,))
        server.command("HDEL", name, "leaves")
        bench.advance(29.9)
        assert isinstance(await bench.reserve(requests(2)), Denied)
        bench.advance(0.2)
        assert await bench.reserve(requests(2)) == Granted((0,))
        server.command("HSET", name, "leaves", str(START))
        bench.advance(29.8)
        assert isinstance(await bench.reserve(requests(2)), Denied)
        assert server.command("HGET", name, "leaves") == b"$16\r\n%d\r\n" % (START + 90_000_000)
        bench.advance(0.2)
        assert await bench.reserve(requests(2)) == Granted((0,))


@pytest_twisted.ensureDeferred
async def test_places_of_leases_that_ended_are_cleared_away(server: RedisServer, links: list[Link]) -> None:
    name = f"vllmproxy:{{{TOKEN}}}:places:"
    with virtual_time():
        bench = RedisBench(server, links[0])
        for _ in range(3):
            assert isinstance(await bench.reserve(parallel(3)), Granted)
        assert server.command("HLEN", name) == b":5\r\n"
        bench.advance(45)
        assert await bench.reserve(parallel(3)) == Granted((2,))
        assert await bench.reserve(parallel(3)) == Granted((1,))
        assert server.command("HLEN", name) == b":4\r\n"


@pytest_twisted.ensureDeferred
async def test_places_that_are_renewed_are_kept_when_others_are_cleared_away(
    server: RedisServer, links: list[Link]
) -> None:
    """Those of several that are alike are held by one lease, until the last of them is settled."""
    with virtual_time():
        bench = RedisBench(server, links[0])
        limiter = bench.limiter
        assert isinstance(await bench.reserve(parallel(9)), Granted)
        first, *others = all_of(await limiter.reserve_ahead(TOKEN, (parallel(9),), "some", 4, 0.0))
        await limiter.settle_all([(TOKEN, each.request_id, (None,)) for each in others[:2]])
        bench.advance(30)
        assert await limiter.renew(TOKEN, [first.request_id, others[0].request_id]) == [others[0].request_id]
        bench.advance(15)
        assert await bench.reserve(parallel(9)) == Granted((6,))
        await limiter.settle_all([(TOKEN, each.request_id, (None,)) for each in (first, others[2])])
        assert await bench.reserve(parallel(9)) == Granted((7,))
        bench.advance(45)
        assert await limiter.renew(TOKEN, [first.request_id]) == [first.request_id]
        assert await bench.reserve(parallel(9)) == Granted((8,))


@pytest_twisted.ensureDeferred
async def test_of_very_many_leases_not_each_that_ends_has_all_looked_through(
    server: RedisServer, links: list[Link]
) -> None:
    name, many = f"vllmproxy:{{{TOKEN}}}:places:", 1200
    with virtual_time():
        bench = RedisBench(server, links[0])
        for _ in range(many):
            bench.advance(0.001)
            assert isinstance(await bench.reserve(parallel(2 * many)), Granted)
        bench.advance(45.001 - many / 1000)  # the first ends now
        assert await bench.reserve(parallel(2 * many)) == Granted((many,))
        bench.advance(0.02)  # and twenty more
        assert await bench.reserve(parallel(2 * many)) == Granted((many - 1,))
        bench.advance(0.02)
        assert await bench.reserve(parallel(2 * many)) == Granted((many + 38,))
        assert server.command("HLEN", name) == b":%d\r\n" % (many - 38 + 2)


@pytest_twisted.ensureDeferred
async def test_settling_and_renewing_revive_nothing(server: RedisServer, links: list[Link]) -> None:
    """What Redis has let go of stays away: a counter without a time to live would count for ever."""
    limiter = limiter_on(links[0])
    assert await limiter.reserve(ask("one")) == FIRST
    for kind in ("requests", "tokens", "places"):
        server.command("DEL", f"vllmproxy:{{{TOKEN}}}:{kind}:")
    assert await limiter.renew(TOKEN, ["one"]) == ["one"]
    await limiter.settle_all([(TOKEN, "one", (0, 5000))])
    assert set(left_behind(server)) == {f"vllmproxy:{{{TOKEN}}}:{name}" for name in ("clock", "request:one")}
    assert await limiter.reserve(ask("two")) == FIRST


@pytest_twisted.ensureDeferred
async def test_a_stopped_redis_costs_the_deadline_and_takes_nothing(server: RedisServer, links: list[Link]) -> None:
    """What was asked while it was stopped is run late, hence not at all."""
    limiter = limiter_on(links[0])
    await limiter.reserve(ask("before", requests(10)))
    server.stall()
    try:
        started = time.monotonic()
        pending = [limiter.reserve(ask(f"late-{number}")) for number in range(20)]
        for call in pending:
            with pytest.raises(StoreUnavailable, match=r"0\.2 s"):
                await call
        assert 0.15 < time.monotonic() - started < HUNG
        with pytest.raises(StoreUnavailable):
            await limiter.settle_all([(TOKEN, "before", (0,))])
        with pytest.raises(StoreUnavailable):
            await limiter.renew(TOKEN, ["before"])
    finally:
        server.resume()
    answer = await eventually(limiter, "after")
    assert answer == Granted((8, 900, 9))  # "before" was not settled either


@pytest_twisted.ensureDeferred
async def test_what_was_taken_unheard_is_given_back(server: RedisServer, links: list[Link]) -> None:
    """Redis ran it in time, by the clocks, and its answer came late."""
    limiter = limiter_on(links[0])
    await limiter.settle_all([(TOKEN, "unknown", ())])
    await unheard(server, links[0], lambda: limiter.reserve(ask("unheard")))
    assert await eventually(limiter, "after") == FIRST
    # It did run: its id is known, as settled.
    assert is_settled(server, "unheard")


@pytest_twisted.ensureDeferred
async def test_what_was_taken_unheard_is_given_back_over_the_next_connection(
    server: RedisServer, links: list[Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis ran it, and the connection was lost before its answer came. What a budget holds has no time to live."""
    limiter = limiter_on(links[0])
    wire = await links[0].get()
    ask_it = wire.ask

    def lose(words: tuple[Any, ...], answered: Callable[[Any], None], *, now: bool) -> None:
        monkeypatch.undo()
        ask_it(words, lambda _: wire.drop(), now=now)

    monkeypatch.setattr(wire, "ask", lose)
    with pytest.raises(StoreUnavailable):
        await limiter.reserve(ask("unheard", requests(10), Rule("budget_tokens", "", 100, 60)))
    assert held_tokens(server, TOKEN) == 60
    await until(lambda: not held_tokens(server, TOKEN))
    assert await eventually(limiter, "after") == FIRST


@pytest_twisted.ensureDeferred
async def test_one_that_is_cancelled_because_of_another_of_its_call_is_given_back(links: list[Link]) -> None:
    limiter = limiter_on(links[0])
    first, one, other = (limiter.reserve(ask(name)) for name in ("first", "one", "other"))
    one.addCallback(lambda granted: other.cancel() or granted)
    assert await first == FIRST
    assert await one == Granted((8, 800, 8))
    with pytest.raises(CancelledError):
        await other
    await deferLater(reactor, 0)
    assert await limiter.reserve(ask("next")) == Granted((7, 700, 7))


@pytest_twisted.ensureDeferred
async def test_what_was_given_back_too_late_is_given_back_again(server: RedisServer, links: list[Link]) -> None:
    """Redis's clock was set on meanwhile, by which the script that gives back is late."""
    limiter = limiter_on(links[0])
    wire = await links[0].get()
    ask_it = wire.ask

    def lose(words: tuple[Any, ...], answered: Callable[[Any], None], *, now: bool) -> None:
        wire.ask = late  # type: ignore[method-assign]
        ask_it(words, lambda _: None, now=now)  # nobody hears of it

    def late(words: tuple[Any, ...], answered: Callable[[Any], None], *, now: bool) -> None:
        wire.ask = ask_it  # type: ignore[method-assign]
        ask_it(too_late(words), answered, now=now)

    wire.ask = lose  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailable):
        await limiter.reserve(ask("unheard", Rule("budget_tokens", "", 100, 60)))
    await until(lambda: not held_tokens(server, TOKEN))
    assert is_settled(server, "unheard")


@pytest_twisted.ensureDeferred
async def test_a_renewal_makes_nobody_forget_what_is_held_of_a_budget(server: RedisServer, links: list[Link]) -> None:
    limiter = limiter_on(links[0])
    await limiter.reserve(ask("one", parallel(3), Rule("budget_tokens", "", 100, 60)))
    assert await limiter.renew(TOKEN, ["one"]) == []
    assert int(server.command("PTTL", f"vllmproxy:{{{TOKEN}}}:request:one")[1:]) > 86_000_000


@pytest_twisted.ensureDeferred
async def test_one_account_that_is_none_takes_nothing_of_another(server: RedisServer, links: list[Link]) -> None:
    """Both are asked for in one call, which fails: nothing was written, and giving back finds nothing."""
    limiter = limiter_on(links[0])
    budget = Rule("budget_tokens", "", 1000, 100)
    assert await limiter.reserve(ask("before", budget)) == Granted((900,))
    server.command("SET", "vllmproxy:{other}:budget", "garbage")
    calls = [limiter.reserve(each) for each in (ask("first", budget), Ask("other", "second", (budget,)))]
    waits = limiter.reserve(ask("third", budget)), limiter.reserve(Ask("other", "fourth", (budget,)))
    for call in (*calls, *waits):
        with suppress(StoreUnavailable):
            await call
    await limiter.settle_all([(TOKEN, id, (0,)) for id in ("first", "third")])
    assert held_tokens(server, TOKEN) == 100


@pytest_twisted.ensureDeferred
async def test_a_cancelled_reservation_is_given_back(server: RedisServer, links: list[Link]) -> None:
    limiter = limiter_on(links[0])
    await limiter.settle_all([(TOKEN, "unknown", ())])
    for number in range(5):
        call = limiter.reserve(ask(f"gone-{number}"))
        call.cancel()
        with pytest.raises(CancelledError):
            await call
    await (await links[0].get()).ping()  # whatever text of a script had to be sent first has been sent
    assert await limiter.reserve(ask("next")) == FIRST
    assert is_settled(server, "gone-0")


@pytest_twisted.ensureDeferred
async def test_a_late_script_does_nothing(server: RedisServer, links: list[Link]) -> None:
    limiter = limiter_on(links[0])
    await limiter.reserve(ask("one"))
    wire = await links[0].get()
    name = f"vllmproxy:{{{TOKEN}}}:request:one"
    late = round((time.time() - 0.001) * 1e6)
    before = server.command("HGETALL", name)
    lengths, rules = [60_000_000, 476_191, 45_000_000, 1_000_000, 61_000], '["requests",10,1,0,1]'
    calls = [
        (RESERVE, ["clock", "fresh", "counter"], [late, *lengths, 0, "fresh", 0, rules]),
        (SETTLE, [name], [late, 5000, "one", "[[-1],[0],[0]]"]),
        (RENEW, ["clock", name], [late, 45_000_000, 61_000, "one", -1]),
    ]
    for script, names, arguments in calls:
        what, told = await wire.eval(script, names, arguments)
        assert what == LATE
        assert abs(told / 1e6 - time.time()) < HUNG
    assert server.command("EXISTS", "clock", "fresh", "counter") == b":0\r\n"
    assert server.command("HGETALL", name) == before
    assert await limiter.reserve(ask("two")) == Granted((8, 800, 8))


@pytest.mark.parametrize("error", [-3600.0, -0.3, 0.3, 3600.0])
@pytest_twisted.ensureDeferred
async def test_a_clock_that_was_set_is_noticed(links: list[Link], error: float) -> None:
    """Neither is everything late from then on, nor nothing any more."""
    limiter = limiter_on(links[0])
    wire = await links[0].get()
    true = wire.offset
    wire.offset += error
    assert await limiter.reserve(ask("one")) == FIRST
    assert abs(wire.offset - true) < 0.2
    assert await limiter.reserve(ask("two")) == Granted((8, 800, 8))


@pytest_twisted.ensureDeferred
async def test_a_redis_that_died_is_used_again(server: RedisServer, links: list[Link]) -> None:
    limiter = limiter_on(links[0])
    assert await limiter.reserve(ask("one")) == FIRST
    server.kill()
    for number in range(5):
        with pytest.raises(StoreUnavailable):
            await limiter.reserve(ask(f"dead-{number}"))
    with pytest.raises(StoreUnavailable):
        await limiter.settle_all([(TOKEN, "one", ())])
    server.start()
    assert await eventually(limiter, "after") == FIRST  # it came back without its data


@pytest_twisted.ensureDeferred
async def test_a_redis_that_forgot_the_scripts_is_told_again(server: RedisServer, links: list[Link]) -> None:
    limiter = limiter_on(links[0])
    for number in range(3):
        assert await limiter.reserve(ask(f"r{number}")) == Granted((9 - number, 900 - 100 * number, 9 - number))
        server.command("SCRIPT", "FLUSH")
    await limiter.settle_all([(TOKEN, "r1", (0, 0))])
    server.command("SCRIPT", "FLUSH")
    assert await limiter.renew(TOKEN, ["r0", "r1"]) == ["r1"]
    assert await limiter.reserve(ask("last")) == Granted((7, 700, 7))


@pytest_twisted.ensureDeferred
async def test_a_refusing_redis_is_unavailable_and_lets_nobody_in(server: RedisServer, links: list[Link]) -> None:
    limiter = limiter_on(links[0])
    name = f"vllmproxy:{{{TOKEN}}}:requests:"
    server.command("SET", name, "something else")
    with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
        await limiter.reserve(ask("one"))
    server.command("DEL", name)
    server.command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(StoreUnavailable):
        await limiter.reserve(ask("two"))
    server.command("REPLICAOF", "NO", "ONE")
    assert await eventually(limiter, "after") == FIRST


@pytest_twisted.ensureDeferred
async def test_closing_fails_what_is_pending(server: RedisServer, links: list[Link]) -> None:
    limiter = limiter_on(links[0])
    pending = limiter.reserve(ask("one"))
    limiter.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await pending


@pytest_twisted.ensureDeferred
async def test_leases_end_when_a_proxy_vanishes(links: list[Link]) -> None:
    vanishing = limiter_on(links[0], lease=0.4)
    other = limiter_on(links[1], lease=0.4)
    taken = time.monotonic()
    for number in range(3):
        assert isinstance(await vanishing.reserve(ask(f"held-{number}", parallel(3))), Granted)
    last = time.monotonic()
    await close_link(links[0])
    number = 0
    while isinstance(await other.reserve(ask(f"next-{number}", parallel(3))), Denied):
        number += 1
        assert time.monotonic() - last < HUNG
        await deferLater(reactor, 0.01)
    assert time.monotonic() - taken >= 0.4


@pytest_twisted.ensureDeferred
async def test_many_askers_on_two_proxies_get_the_limit_and_no_more(links: list[Link]) -> None:
    """64 askers, a window of 1 s: in no such second are more than the limit admitted, and nearly all of it is."""
    limit, window, windows = 300, 1.0, 5
    limiters = [limiter_on(link, window=window, timeout=HUNG) for link in links]
    granted: list[tuple[float, float]] = []
    ends = time.monotonic() + windows * window

    async def keep_asking(number: int) -> None:
        count = 0
        while time.monotonic() < ends:
            count += 1
            sent = time.monotonic()
            call = limiters[number % 2].reserve(ask(f"{number}-{count}", requests(limit), tokens(limit * 7, 7)))
            answer = await call
            if isinstance(answer, Granted):
                granted.append((sent, time.monotonic()))
            else:
                await deferLater(reactor, min(answer.retry_after, 0.02))

    await gatherResults([Deferred.fromCoroutine(keep_asking(number)) for number in range(64)])
    # A request was admitted between its asking and its answer: those that were surely within a second are counted.
    for start, _ in granted:
        assert sum(start <= sent and heard < start + window for sent, heard in granted) <= limit
    assert len(granted) <= limit * (windows + 1)
    # 99 % of it in virtual time (test_limits_contract); here askers also come late, on a machine that is busy.
    assert len(granted) >= 0.8 * limit * windows


def test_memory_of_idle_keys_is_let_go() -> None:
    clock = Clock()
    limiter = MemoryLimiter(clock)
    for number in range(1000):
        limiter.reserve(Ask(f"key-{number}", f"r{number}", RULES))
        clock.advance(0.1)
    assert 600 <= len(limiter) <= 610
    for _ in range(10):
        clock.advance(15)
        assert limiter.renew("key-999", ["r999"]) == []
    assert len(limiter) == 1
    for number in range(500):
        assert limiter.reserve(Ask(f"none-{number}", f"n{number}", (requests(0),))) != Granted((0,))
    assert len(limiter) == 1
    clock.advance(61)
    assert len(limiter) == 0


@pytest_twisted.ensureDeferred
async def test_what_comes_together_is_decided_as_one_by_one(server: RedisServer, links: list[Link]) -> None:
    """While one call for a key is under way, the next requests gather, and go in one call."""
    limiter, alone = limiter_on(links[0]), MemoryLimiter(Clock())
    asks = [ask(f"r{n}", requests(9), tokens(1000, 300 if n % 3 else 10), parallel(6)) for n in range(150)]
    together = await gatherResults([limiter.reserve(each) for each in asks])
    for each, decided in zip(asks, together, strict=True):
        expected = alone.reserve_now(each)
        if isinstance(expected, Granted):
            assert (decided, decided.taken) == (expected, expected.taken)
        else:
            assert isinstance(decided, Denied)
            assert (decided.rule, decided.never, decided.left) == (expected.rule, expected.never, expected.left)
    assert {type(each) for each in together} == {Granted, Denied}
    await gatherResults([limiter.settle_all([(TOKEN, each.request_id, (0, 0, 0))]) for each in asks])
    assert await limiter.reserve(ask("after", requests(9), tokens(1000, 1000), parallel(6))) == Granted((8, 0, 5))


@pytest_twisted.ensureDeferred
async def test_what_comes_together_is_of_its_own_key_each(server: RedisServer, links: list[Link]) -> None:
    """Requests of different keys go in one call as well, and nothing of one is another's."""
    limiter, alone = limiter_on(links[0]), MemoryLimiter(Clock())
    budget = Rule("budget_tokens", "", 500, 60)
    rules = (
        (requests(4), tokens(1000, 300)),
        (parallel(3),),
        (requests(9), parallel(5), budget),
        (requests(2, scope="m"),),
    )
    asks = [Ask(f"key-{n % 4}", f"r{n}", rules[n % 4]) for n in range(100)]
    for key in ("key-0", "key-1", "key-2", "key-3"):
        alone.accounts.open(key, Account())
    together = await gatherResults([limiter.reserve(each) for each in asks])
    for each, decided in zip(asks, together, strict=True):
        expected = alone.reserve_now(each)
        assert type(decided) is type(expected)
        if isinstance(decided, Granted) and isinstance(expected, Granted):
            assert (decided.remaining, decided.taken) == (expected.remaining, expected.taken)
    assert sum(isinstance(each, Granted) for each in together) == 3 + 3 + 5 + 2
    assert runs_of(server) < len(asks)
    await gatherResults([limiter.settle_all([(each.key, each.request_id, (0,) * 3)]) for each in asks])
    assert await limiter.reserve(Ask("key-1", "after", (parallel(3),))) == Granted((2,))
    assert await limiter.reserve(Ask("key-0", "after", (tokens(1000, 1000),))) == Granted((0,))
    assert held_tokens(server, "key-2") == 0


@pytest.mark.parametrize(
    "answers", [[], [None], [[]], [[1]], [[0, 1]], ["text"], [[1, 9, 900, None, 1, 100, 1, 0]]], ids=str
)
@pytest_twisted.ensureDeferred
async def test_an_answer_that_makes_no_sense_is_a_failure_and_given_back(
    server: RedisServer, links: list[Link], monkeypatch: pytest.MonkeyPatch, answers: list[Any]
) -> None:
    limiter = limiter_on(links[0])
    wire = await links[0].get()
    ask_it = wire.ask

    def garble(words: tuple[Any, ...], answered: Callable[[Any], None], *, now: bool) -> None:
        monkeypatch.undo()
        ask_it(words, lambda reply: answered([*reply[:2], *answers]), now=now)

    monkeypatch.setattr(wire, "ask", garble)
    with pytest.raises(StoreUnavailable):
        await limiter.reserve(ask("odd"))
    assert await limiter.reserve(ask("next")) == FIRST


@pytest_twisted.ensureDeferred
async def test_what_is_reserved_ahead_counts_from_when_its_requests_may_come(
    server: RedisServer, links: list[Link]
) -> None:
    with virtual_time():
        bench = RedisBench(server, links[0])
        limiter = bench.limiter
        assert isinstance(limiter, RedisLimiter)
        made = all_of(await limiter.reserve_ahead(TOKEN, (requests(4), parallel(9)), "some", 2, 0.5))
        assert made == [Granted((3, 8)), Granted((2, 7))]
        assert [each.request_id for each in made] == ["some:0", "some:1"]
        bench.advance(0.1)
        assert await bench.reserve(requests(4)) == Granted((1,))  # which does not make that bucket leave sooner
        bench.advance(0.8)
        assert await bench.reserve(requests(4)) == Granted((0,))
        assert isinstance(await bench.reserve(requests(4)), Denied)
        bench.advance(60.5 - 0.9 - 0.000001)
        refusal = await bench.reserve(requests(4))
        assert isinstance(refusal, Denied)
        assert refusal.retry_after == 0.000001
        bench.advance(0.000001)
        assert await bench.reserve(requests(4)) == Granted((2,))
        bench.advance(0.4)
        assert await bench.reserve(requests(4)) == Granted((2,))  # that of 0.9 s has left 60 s after


@pytest_twisted.ensureDeferred
async def test_of_what_is_reserved_ahead_some_may_be_granted(links: list[Link]) -> None:
    limiter = limiter_on(links[0])
    made = all_of(await limiter.reserve_ahead(TOKEN, (requests(3),), "some", 4, 0.5))
    assert [each.request_id for each in made] == ["some:0", "some:1", "some:2"]
    assert (await limiter.reserve_ahead(TOKEN, (requests(3),), "more", 4, 0.5)).granted == 0
    await limiter.settle_all([(TOKEN, each.request_id, (0,)) for each in made])
    assert await limiter.reserve(ask("one", requests(3))) == Granted((2,))


@pytest_twisted.ensureDeferred
async def test_each_of_what_is_reserved_ahead_is_settled_once_and_for_itself(
    server: RedisServer, links: list[Link]
) -> None:
    limiter = limiter_on(links[0])
    lot = await limiter.reserve_ahead(TOKEN, (tokens(1000, 100), parallel(9)), "some", 3, 0.5)
    one, two, three = all_of(lot)
    assert (one.taken, three.taken) == ((100, 1), (100, 1))
    for _ in range(2):
        await limiter.settle_all([(TOKEN, one.request_id, (7, 0)), (TOKEN, one.request_id, (0, 0))])
        await limiter.settle_all([(TOKEN, three.request_id, (130, 0)), (TOKEN, "some:9", (0, 0)), (TOKEN, "some", ())])
        await limiter.settle_all([(TOKEN, f"some:{odd}", (0, 0)) for odd in ("x", "-1", "00", "0x1", "1.0", "1e0")])
    assert await limiter.reserve(ask("between", tokens(1000, 1), parallel(9))) == Granted((1000 - 237 - 1, 7))
    assert int(server.command("PTTL", f"vllmproxy:{{{TOKEN}}}:request:some")[1:]) > 60_000 - HUNG * 1000
    assert await limiter.renew(TOKEN, [each.request_id for each in (one, two, three)]) == ["some:0", "some:2"]
    await limiter.settle_all([(TOKEN, two.request_id, (None, None))])
    assert await limiter.reserve(ask("after", tokens(1000, 1), parallel(9))) == Granted((1000 - 237 - 2, 7))
    assert 0 < int(server.command("PTTL", f"vllmproxy:{{{TOKEN}}}:request:some")[1:]) <= 5000


@pytest.mark.parametrize("seed", range(20))
@pytest_twisted.ensureDeferred
async def test_several_alike_are_decided_as_one_after_the_other(links: list[Link], seed: int) -> None:
    choose, limiter, alone = random.Random(seed), limiter_on(links[0]), MemoryLimiter(Clock())
    alone.accounts.open(TOKEN, Account())
    running: list[tuple[str, int]] = []
    for round in range(12):
        cost = choose.choice([1, 7, 30, 0])
        some = requests(40), tokens(900, cost), Rule("budget_tokens", "", 800, cost), parallel(20, "m")
        rules = tuple(choose.sample(some, choose.randint(1, 4)))
        name, count = f"r{round}", choose.choice([1, 2, 5, 16])
        made = all_of(await limiter.reserve_ahead(TOKEN, rules, name, count, 0.0))
        expected = [alone.reserve_now(Ask(TOKEN, f"{name}:{number}", rules)) for number in range(count)]
        granted = [each for each in expected if isinstance(each, Granted)]
        assert [(each.remaining, each.taken) for each in made] == [(each.remaining, each.taken) for each in granted]
        running += [(each.request_id, len(rules)) for each in made]
        choose.shuffle(running)
        ended, running = running[:4], running[4:]
        settled = [(TOKEN, id, tuple(choose.choice([None, 0, 3, 50]) for _ in range(count))) for id, count in ended]
        await limiter.settle_all(settled)
        for each in settled:
            alone.settle(*each)


@pytest_twisted.ensureDeferred
async def test_what_was_reserved_ahead_unheard_is_given_back(server: RedisServer, links: list[Link]) -> None:
    limiter = limiter_on(links[0])
    await limiter.settle_all([(TOKEN, "unknown", ())])
    await unheard(server, links[0], lambda: limiter.reserve_ahead(TOKEN, RULES, "some", 2, 0.5))
    assert await eventually(limiter, "after") == FIRST
    assert is_settled(server, "some", unit="0")
    assert is_settled(server, "some", unit="1")
