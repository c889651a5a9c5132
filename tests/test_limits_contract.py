"""What both limiters promise, in virtual time: the same on memory and on a real Redis, and one beside the other."""

from collections.abc import AsyncIterator

import pytest
import pytest_twisted
from _limits import (
    TOKEN,
    Bench,
    MemoryBench,
    RedisBench,
    close_link,
    make_link,
    parallel,
    requests,
    tokens,
    virtual_time,
)
from _redis import RedisServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllmproxy.limits.values import Denied, DuplicateRequest, Granted, Rule


@pytest_twisted.async_yield_fixture
async def benches(redis: RedisServer) -> AsyncIterator[list[Bench]]:
    redis.command("FLUSHALL")
    link = make_link(redis)
    with virtual_time():
        yield [MemoryBench(), RedisBench(redis, link)]
    await close_link(link)


@pytest.fixture(params=["memory", "redis"])
def bench(request: pytest.FixtureRequest, benches: list[Bench]) -> Bench:
    return benches[request.param == "redis"]


async def admitted(bench: Bench, *rules: Rule, times: int) -> int:
    """Ask so many times and return how often it was granted."""
    return sum([isinstance(await bench.reserve(*rules), Granted) for _ in range(times)])


@pytest_twisted.ensureDeferred
async def test_the_limit_is_the_limit_and_the_wait_is_exact(bench: Bench) -> None:
    assert [await bench.reserve(requests(3)) for _ in range(3)] == [Granted((2,)), Granted((1,)), Granted((0,))]
    bench.advance(20)
    refusal = await bench.reserve(requests(3))
    assert refusal == Denied(0, 40.0, (bench.now + 40_000_000) / 1e6)
    bench.advance(39.999999)
    assert await bench.reserve(requests(3)) == Denied(0, 0.000001, (bench.now + 1) / 1e6)
    bench.advance(0.000001)
    assert await bench.reserve(requests(3)) == Granted((2,))


@pytest_twisted.ensureDeferred
async def test_what_is_taken_within_half_a_second_leaves_together(bench: Bench) -> None:
    """A bucket is open for 60/126 s and leaves as a whole, when the last of it does."""
    for pause in (0, 0.47619, 0.000001, 0.476191):
        bench.advance(pause)
        assert isinstance(await bench.reserve(requests(4)), Granted)
    bench.advance(60 - 2 * 0.476191)
    for cost, retry_after in ((1, 0.47619), (2, 0.47619), (3, 0.476191), (4, 0.952382)):
        refusal = await bench.reserve(requests(4, cost))
        assert isinstance(refusal, Denied)
        assert refusal.retry_after == retry_after


@pytest_twisted.ensureDeferred
async def test_no_double_at_the_edge_of_a_minute(bench: Bench) -> None:
    """59 s after the epoch's minute began, and 2 s later: a fixed window would let twice as many in."""
    bench.advance(59 - bench.now / 1e6 % 60)
    assert await admitted(bench, requests(50), times=60) == 50
    bench.advance(2)
    assert await admitted(bench, requests(50), times=60) == 0
    bench.advance(58)
    assert await admitted(bench, requests(50), times=60) == 50


@pytest_twisted.ensureDeferred
async def test_all_or_none(bench: Bench) -> None:
    """Whichever of the rules refuses, nothing of the others is taken."""
    full = (requests(10), tokens(100, 100), parallel(10), requests(10, scope="m"), tokens(1000, 100, "m"))
    assert await bench.reserve(*full, id="first") == Granted((9, 0, 9, 9, 900))
    for _ in range(20):
        refusal = await bench.reserve(requests(10), parallel(10), tokens(100, 1), requests(10, scope="m"))
        assert isinstance(refusal, Denied)
        assert refusal.rule == 2
    await bench.settle("first", None, 0)
    assert await bench.reserve(*full) == Granted((8, 0, 9, 8, 800))


@pytest_twisted.ensureDeferred
async def test_the_rule_that_takes_longest_is_named(bench: Bench) -> None:
    await bench.reserve(requests(1))
    bench.advance(10)
    await bench.reserve(tokens(5, 5))
    await bench.reserve(parallel(1))
    refusal = await bench.reserve(parallel(1), requests(1), tokens(5, 5))
    assert isinstance(refusal, Denied)
    assert (refusal.rule, refusal.retry_after) == (2, 60.0)
    refusal = await bench.reserve(parallel(1), requests(1))
    assert isinstance(refusal, Denied)
    assert (refusal.rule, refusal.retry_after) == (1, 50.0)
    refusal = await bench.reserve(parallel(1))
    assert isinstance(refusal, Denied)
    assert (refusal.rule, refusal.retry_after) == (0, 1.0)


@pytest_twisted.ensureDeferred
async def test_more_than_there_ever_is_says_never(bench: Bench) -> None:
    never = {"retry_after": 60.0, "reset_at": (bench.now + 60_000_000) / 1e6, "never": True}
    assert await bench.reserve(requests(5), tokens(100, 101)) == Denied(1, **never)
    assert await bench.reserve(requests(0)) == Denied(0, **never)
    assert await bench.reserve(requests(5), parallel(0)) == Denied(1, **never)
    assert await bench.reserve(requests(5), tokens(100, 100)) == Granted((4, 0))
    assert await bench.reserve(tokens(0, 0)) == Denied(0, 60.0, (bench.now + 60_000_000) / 1e6)
    assert await bench.reserve(tokens(0, 0, "m")) == Granted((0,))


@pytest_twisted.ensureDeferred
async def test_keys_kinds_and_scopes_are_apart(bench: Bench) -> None:
    odd = "мо:дель }{ \ud800"
    for key in (TOKEN, "cd" * 32):
        for rule in (
            requests(1),
            requests(1, scope=odd),
            tokens(1, 1),
            tokens(1, 1, odd),
            parallel(1),
            parallel(1, odd),
        ):
            assert await bench.reserve(rule, key=key) == Granted((0,))
            assert isinstance(await bench.reserve(rule, key=key), Denied)


@pytest_twisted.ensureDeferred
async def test_nothing_asked_is_granted(bench: Bench) -> None:
    assert await bench.reserve() == Granted(())
    await bench.settle("r1")


@pytest_twisted.ensureDeferred
async def test_settling_gives_back_what_was_not_used(bench: Bench) -> None:
    rules = requests(10), tokens(100, 60), parallel(1)
    assert await bench.reserve(*rules, id="one") == Granted((9, 40, 0))
    bench.advance(5)
    await bench.settle("one", None, 25, None)
    assert await bench.reserve(*rules, id="two") == Granted((8, 15, 0))
    await bench.settle("two", 0, 0)
    assert await bench.reserve(*rules, id="three") == Granted((8, 15, 0))
    await bench.settle("three")
    assert await bench.reserve(requests(10), tokens(100, 0), parallel(1)) == Granted((7, 15, 0))


@pytest_twisted.ensureDeferred
async def test_settling_adds_what_was_used_above_the_estimate(bench: Bench) -> None:
    await bench.reserve(tokens(100, 10), id="one")
    bench.advance(10)
    await bench.settle("one", 250)
    assert await bench.reserve(tokens(100, 0)) == Denied(0, 50.0, (bench.now + 50_000_000) / 1e6)
    assert await bench.reserve(tokens(1000, 0)) == Granted((750,))
    bench.advance(50)
    assert await bench.reserve(tokens(100, 100)) == Granted((0,))


@pytest_twisted.ensureDeferred
async def test_what_a_settlement_says_is_bounded(bench: Bench) -> None:
    await bench.reserve(tokens(100, 10), id="one")
    await bench.settle("one", -(10**40))
    assert await bench.reserve(tokens(100, 10), id="two") == Granted((90,))
    await bench.settle("two", 10**40)
    assert isinstance(await bench.reserve(tokens(2**40, 1)), Denied)
    bench.advance(60)
    assert await bench.reserve(tokens(2**40, 2**40)) == Granted((0,))


@pytest_twisted.ensureDeferred
async def test_only_the_first_settlement_counts(bench: Bench) -> None:
    rules = requests(10), tokens(100, 60), parallel(2)
    await bench.reserve(*rules, id="one")
    await bench.reserve(*rules[2:], id="other")
    for _ in range(3):
        await bench.settle("one", None, 20)
        await bench.settle("one", 0, 0)
        await bench.settle("unknown", 0, 0)
        await bench.settle("one", 0, 0, key="cd" * 32)
    assert await bench.reserve(*rules) == Granted((8, 20, 0))


@pytest_twisted.ensureDeferred
async def test_a_settlement_after_the_window_changes_nothing(bench: Bench) -> None:
    await bench.reserve(requests(5), tokens(100, 50), id="one")
    bench.advance(59)
    assert await bench.reserve(requests(5), tokens(100, 50)) == Granted((3, 0))
    bench.advance(2)
    await bench.settle("one", 0, 10_000)
    assert await bench.reserve(requests(5), tokens(100, 50)) == Granted((3, 0))


@pytest_twisted.ensureDeferred
async def test_a_request_id_is_taken_once(bench: Bench) -> None:
    await bench.reserve(requests(5), parallel(5), id="one")
    with pytest.raises(DuplicateRequest):
        await bench.reserve(requests(5), parallel(5), id="one")
    await bench.settle("one")
    with pytest.raises(DuplicateRequest):
        await bench.reserve(requests(5), parallel(5), id="one")
    assert await bench.reserve(requests(5), parallel(5), id="two") == Granted((3, 4))


@pytest_twisted.ensureDeferred
async def test_a_refused_request_may_ask_again(bench: Bench) -> None:
    await bench.reserve(requests(1))
    assert isinstance(await bench.reserve(requests(1), id="again"), Denied)
    await bench.settle("again", 0)
    bench.advance(60)
    assert await bench.reserve(requests(1), id="again") == Granted((0,))


@pytest_twisted.ensureDeferred
async def test_a_lease_ends_within_a_minute_when_its_holder_is_gone(bench: Bench) -> None:
    assert await admitted(bench, parallel(3), times=5) == 3
    bench.advance(44.999999)
    assert await admitted(bench, parallel(3), times=5) == 0
    bench.advance(0.000001)
    assert await admitted(bench, parallel(3), times=5) == 3


@pytest_twisted.ensureDeferred
async def test_a_renewed_lease_lasts(bench: Bench) -> None:
    rules = parallel(1), parallel(9, "m"), tokens(100, 10)
    await bench.reserve(*rules, id="long")
    for _ in range(20):
        bench.advance(15)
        assert await bench.renew("long") == []
        assert isinstance(await bench.reserve(*rules), Denied)
    await bench.settle("long", None, None, 99)
    assert await bench.renew("long") == ["long"]
    assert await bench.reserve(*rules) == Granted((0, 8, 90))


@pytest_twisted.ensureDeferred
async def test_renewing_tells_which_leases_are_gone(bench: Bench) -> None:
    assert await bench.renew() == []
    assert await bench.renew("unknown") == ["unknown"]
    for name in ("kept", "settled", "lapsed"):
        await bench.reserve(parallel(10), id=name)
    await bench.reserve(requests(10), id="without")
    await bench.settle("settled")
    bench.advance(44)
    assert await bench.renew("unknown", "kept", "settled", "without") == ["unknown", "settled", "without"]
    bench.advance(1)
    assert await bench.renew("lapsed", "kept") == ["lapsed"]
    assert await bench.reserve(parallel(10)) == Granted((8,))


@pytest_twisted.ensureDeferred
async def test_a_clock_that_is_set_back_stops_nobody_for_long(bench: Bench) -> None:
    """No time has passed while it was set back: not a request too many, and after a minute all are let in."""
    rules = requests(2), parallel(4)
    assert await admitted(bench, *rules, times=3) == 2
    bench.advance(10)
    assert await admitted(bench, *rules, times=1) == 0
    for _ in range(5):
        bench.advance(-3600)
        assert await admitted(bench, *rules, times=1) == 0
    refusal = await bench.reserve(*rules)
    assert refusal == Denied(0, 50.0, (bench.now + 50_000_000) / 1e6)
    bench.advance(49.999999)
    assert await admitted(bench, *rules, times=1) == 0
    bench.advance(0.000001)
    assert await admitted(bench, *rules, times=3) == 2


@pytest_twisted.ensureDeferred
async def test_a_clock_that_is_set_on_lets_at_most_as_many_in_again(bench: Bench) -> None:
    assert await admitted(bench, requests(5), times=9) == 5
    bench.advance(86400)
    assert await admitted(bench, requests(5), times=9) == 5
    assert await admitted(bench, requests(5), times=9) == 0


@pytest_twisted.ensureDeferred
async def test_another_limit_counts_from_the_next_request_on(bench: Bench) -> None:
    assert await admitted(bench, requests(10), times=10) == 10
    assert await admitted(bench, requests(12), times=10) == 2
    assert isinstance(await bench.reserve(requests(5)), Denied)
    bench.advance(60)
    assert await admitted(bench, requests(5), times=10) == 5


@pytest_twisted.ensureDeferred
async def test_steady_demand_is_admitted(bench: Bench) -> None:
    """Twice the limit, evenly spread: 99 % of the limit at least after the first window, never more than it in any."""
    limit, times = 60, []
    for _ in range(4 * 2 * limit):
        if isinstance(await bench.reserve(requests(limit)), Granted):
            times.append(bench.now)
        bench.advance(0.5)
    assert all(sum(start <= each < start + 60_000_000 for each in times) <= limit for start in times)
    after = [each for each in times if each >= times[0] + 60_000_000]
    assert len(after) >= 0.99 * 3 * limit


rules = st.lists(
    st.one_of(
        st.builds(requests, st.integers(0, 6), st.integers(0, 2), st.sampled_from(["", "m"])),
        st.builds(tokens, st.sampled_from([0, 50, 60]), st.integers(0, 55), st.sampled_from(["", "m"])),
        st.builds(parallel, st.integers(0, 4), st.sampled_from(["", "m"])),
    ),
    max_size=4,
    unique_by=lambda rule: (rule.kind, rule.scope),
)
pauses = st.sampled_from([0, 0.000001, 0.4, 0.476190, 0.476191, 0.5, 7, 14.999999, 15, 30, 45, 59.9, 60, -1, -90])
costs = st.lists(st.none() | st.integers(-2, 80), max_size=4)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), rules),
        st.tuples(st.just("reserve"), st.just([requests(6), tokens(60, 20), parallel(4)])),
        st.tuples(st.just("advance"), pauses),
        st.tuples(st.just("settle"), st.tuples(st.integers(0, 5), costs)),
        st.tuples(st.just("renew"), st.integers(0, 5)),
        st.tuples(st.just("again"), st.integers(0, 1)),
    ),
    max_size=40,
)
runs = 0


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
@pytest_twisted.ensureDeferred
async def test_memory_and_redis_answer_the_same(benches: list[Bench], steps: list[tuple[str, object]]) -> None:
    """Any order of calls and any course of the clock, a key of its own for each."""
    global runs  # noqa: PLW0603
    runs += 1
    key = f"key{runs}"
    answers: list[list[object]] = []
    for bench in benches:
        heard: list[object] = [f"r{number}" for number in range(5)]
        answers.append(heard)
        for number, (step, given_to) in enumerate(steps):
            heard.append(await act(bench, key, number, step, given_to))
    assert answers[0] == answers[1]


async def act(bench: Bench, key: str, number: int, step: str, argument: object) -> object:
    """Do one step; the requests of the last few steps are settled and renewed, whatever those steps were."""
    if step == "advance":
        assert isinstance(argument, int | float)
        await bench.renew("nobody", key=key)  # so that both know the time before it is set back
        return bench.advance(argument)
    if step == "reserve":
        assert isinstance(argument, list)
        return await bench.reserve(*argument, id=f"{key}-{number}", key=key)
    if step == "settle":
        assert isinstance(argument, tuple)
        return await bench.settle(f"{key}-{number - argument[0]}", *argument[1], key=key)
    assert isinstance(argument, int)
    request_id = f"{key}-{number - argument}"
    if step == "renew":
        return await bench.renew(request_id, key=key)
    try:
        return await bench.reserve(requests(6), id=request_id, key=key)
    except DuplicateRequest:
        return "duplicate"
