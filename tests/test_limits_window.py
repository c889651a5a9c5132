"""The sliding window against an exact log of what was taken."""

from collections import deque

import pytest
from attrs import define
from hypothesis import given, settings
from hypothesis import strategies as st

from vllmproxy.limits.values import Rule
from vllmproxy.limits.window import Window, bucket_width

MINUTE = 60_000_000


@define
class Taken:
    time: int
    amount: int
    bucket: int
    settled: bool = False


@define
class Log:
    """What a window was made to do, and how much of it counts, exactly."""

    length: int
    taken: list[Taken]

    def within(self, start: int, end: int) -> int:
        """Return what was taken from ``start`` on and before ``end``."""
        return sum(each.amount for each in self.taken if start <= each.time < end)


steps = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from([0, 1, 7, 8, 9, 999, 1000, 1001, 1007, 1008]),
            st.integers(0, 40),
            st.integers(0, 2500),
        ),
        st.sampled_from(["take", "take", "take", "settle"]),
        st.integers(0, 30),
    ),
    max_size=300,
)


@settings(max_examples=300)
@given(steps=steps, limit=st.integers(0, 60))
def test_no_window_wherever_it_begins_holds_more_than_the_limit(steps: list[tuple[int, str, int]], limit: int) -> None:
    length = 1000
    window, log, now = Window(length), Log(length, []), 10**9
    for pause, step, amount in steps:
        now += pause
        if step == "settle":
            settle(window, log, amount)
            continue
        wait = window.wait(now, limit, amount)
        if wait == 0:
            # What was settled meanwhile counts as what it did cost.
            assert log.within(now - length + 1, now + 1) + amount <= limit
            log.taken.append(Taken(now, amount, window.take(now, amount)))
        elif wait is None:
            assert amount > limit
        else:
            assert log.within(now - length - bucket_width(length) + 1, now + 1) + amount > limit
            assert 0 < wait <= length
        assert len(window) <= 128
        assert 0 <= window.total <= limit
    # All have settled for what they took or less: so at any offset, with hindsight too.
    for each in log.taken:
        assert log.within(each.time, each.time + length) <= limit
        assert log.within(each.time - length + 1, each.time + 1) <= limit
    window.prune(now + length)
    assert (len(window), window.total) == (0, 0)


def settle(window: Window, log: Log, place: int) -> None:
    """Give back a part of one of the latest reservations."""
    for each in log.taken[-1 - place : len(log.taken) - place]:
        if not each.settled:
            used = each.amount // (1 + place % 3)
            window.settle(each.bucket, used - each.amount)
            each.amount, each.settled = used, True


@settings(max_examples=200)
@given(
    pauses=st.lists(st.integers(0, 200), min_size=1, max_size=60),
    limit=st.integers(1, 50),
    cost=st.integers(0, 50),
    data=st.data(),
)
def test_the_wait_is_exact(pauses: list[int], limit: int, cost: int, data: st.DataObject) -> None:
    window, now = Window(1000), 10**9
    for pause in pauses:
        now += pause
        amount = data.draw(st.integers(0, limit))
        if window.wait(now, limit, amount) == 0:
            window.take(now, amount)
    wait = window.wait(now, limit, cost)
    if cost > limit:
        assert wait is None
    elif wait:
        assert window.wait(now + wait - 1, limit, cost) == 1
        assert window.wait(now + wait, limit, cost) == 0


@pytest.mark.parametrize("limit", [1, 2, 7, 60, 126, 127, 128, 500, 3000])
@pytest.mark.parametrize("times", [1.0, 1.003, 1.5, 4.0])
def test_steady_demand_is_admitted(limit: int, times: float) -> None:
    """At ``times`` the limit, evenly spread, for twenty windows after the first: 99 % of what can be admitted."""
    window, log, demand = Window(MINUTE), deque[int](), limit * times
    admitted = possible = 0
    for number in range(int(demand * 21)):
        now = round(number * MINUTE / demand)
        if window.wait(now, limit, 1) == 0:
            window.take(now, 1)
            admitted += now >= MINUTE
        while log and log[0] + MINUTE <= now:
            log.popleft()
        if len(log) < limit:
            log.append(now)
            possible += now >= MINUTE
    assert admitted >= 0.99 * possible
    if limit >= 500:  # who asks at a distance misses the moment by up to that distance, whoever counts
        assert admitted >= 0.99 * limit * 20


@pytest.mark.parametrize("limit", [1, 2, 10, 126, 1000, 5000])
def test_unending_demand_is_admitted(limit: int) -> None:
    """Who takes what there is at the worst of moments, where buckets begin and end, gets 126/127 of it at least."""
    window, width = Window(MINUTE), bucket_width(MINUTE)
    now, admitted, share, opens = 0, 0, -(-limit // 252), True
    while now < 21 * MINUTE:
        wait = window.wait(now, limit, 1)
        if wait:
            now += wait
            continue
        for _ in range(share):
            if window.wait(now, limit, 1) == 0:
                window.take(now, 1)
                admitted += now >= MINUTE
        now, opens = now + (width - 1 if opens else 1), not opens
    assert admitted >= 0.99 * limit * 20 - 1


def test_amounts_are_admitted_as_steadily() -> None:
    """Tokens: 100 000 a minute, asked for by the hundred, twice as fast as they are to be had."""
    window, admitted = Window(MINUTE), 0
    for now in range(0, 11 * MINUTE, 30_000):
        if window.wait(now, 100_000, 100) == 0:
            window.take(now, 100)
            admitted += 100 if now >= MINUTE else 0
    assert admitted >= 0.99 * 100_000 * 10


@pytest.mark.parametrize("pause", [1, bucket_width(MINUTE) - 1, bucket_width(MINUTE), bucket_width(MINUTE) + 1])
def test_state_is_bounded(pause: int) -> None:
    window, now, most = Window(MINUTE), 0, 0
    for _ in range(300 if pause > 1 else 5000):
        window.take(now, 1)
        now += pause
        most = max(most, len(window))
    assert most <= 128


@settings(max_examples=100)
@given(pauses=st.lists(st.sampled_from([0, 1, 2, 7, 8, 9, 15, 16, 17]), min_size=200, max_size=400))
def test_state_is_bounded_however_it_is_spread(pauses: list[int]) -> None:
    window, now = Window(1000), 0
    for pause in pauses:
        now += pause
        window.take(now, 1)
        assert len(window) <= 128


def test_a_bucket_counts_until_the_last_of_it_has_left() -> None:
    window = Window(1260)
    window.take(0, 1)
    window.take(9, 1)
    window.take(10, 1)
    assert len(window) == 2
    assert window.wait(1259, 3, 1) == 10
    assert window.wait(1268, 3, 1) == 1
    assert window.wait(1269, 3, 1) == 0
    assert window.wait(1269, 3, 3) == 1


def test_a_settlement_counts_where_the_reservation_did() -> None:
    window = Window(1000)
    early = window.take(0, 10)
    late = window.take(500, 10)
    window.settle(early, -9)
    window.settle(late, 40)
    assert window.total == 51
    window.prune(1000)
    assert window.total == 50
    window.settle(early, 1000)  # it has left, and what is said of it is too late
    assert window.total == 50
    window.prune(1500)
    assert window.total == 0
    window.settle(late, -40)
    assert window.total == 0
    assert window.take(1500, 1) not in (early, late)


def test_after_a_settlement_above_the_limit_nothing_fits() -> None:
    window = Window(1000)
    window.settle(window.take(0, 10), 90)
    assert window.wait(1, 50, 0) == 999
    assert window.wait(1, 50, 50) == 999
    assert window.wait(1000, 50, 50) == 0


def test_values_that_make_no_sense_are_refused() -> None:
    for rule in (("requests", "", -1, 1), ("tokens", "", 1, -1), ("tokens", "", 2**41, 1), ("tokens", "", 1, 2**41)):
        with pytest.raises(ValueError, match="must be"):
            Rule(*rule)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one place"):
        Rule("max_parallel_requests", "", 5, 2)
