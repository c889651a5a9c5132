"""What is reserved ahead and taken by nobody is given back, whatever happens, in virtual time."""

import pytest
from _ahead import FAR, LAPSED, House
from _limits import TOKEN, parallel, requests, tokens
from _shared import DEADLINE, LATENCY, now
from twisted.internet.defer import CancelledError
from twisted.logger import LogEvent

from vllmproxy.limits.ahead import AHEAD
from vllmproxy.limits.behind import _TOGETHER, PAUSE, RETRY
from vllmproxy.limits.values import Ask, Denied, Granted, Rule
from vllmproxy.store.interface import StoreUnavailable


def test_what_nobody_takes_is_given_back() -> None:
    house = House()
    house.warm(FAR, parallel(10**5))
    ahead = {each for ids in house.shared.of("ahead") for each in ids}
    assert house.counted["requests", ""] == 2 + len(ahead)
    house.pass_by(LAPSED)
    assert set(house.shared.heard) == ahead
    assert house.counted == {("requests", ""): 2, ("max_parallel_requests", ""): 2}
    house.assert_nothing_is_left()


@pytest.mark.parametrize("under_way", [False, True])
def test_a_refusal_gives_back_what_is_ahead(under_way: bool) -> None:
    house, limit = House(), 1000
    house.warm(tokens(limit, 1))
    if under_way:
        house.shared.mode = "held"
        house.take_all(tokens(limit, 1))
        house.clock.advance(0)
        (more,) = (call for call in house.shared.under_way if call.what == "ahead")
        house.shared.mode = "up"
    refused = house.ask(tokens(limit, limit))
    house.clock.advance(LATENCY)
    assert list(house.ahead._untouched) == []
    house.clock.advance(LATENCY)
    assert isinstance(now(refused), Denied)
    if under_way:
        more.answer()
    house.pass_by(5 * LATENCY)
    assert house.counted == {("tokens", ""): house._ids - 1}
    house.pass_by(LAPSED)
    house.assert_nothing_is_left()


def test_of_several_that_ask_at_once_nobody_is_refused_because_of_what_is_ahead_here() -> None:
    """The first refusal gives it back, and the others' answers are on the way."""
    house, limit = House(), 100_000
    house.ask_often(300, tokens(limit, 64))
    house.pass_by(3 * LATENCY)
    ready = house.ready
    assert ready >= 8
    left = limit - house.counted["tokens", ""]
    house.shared.reserve(Ask(TOKEN, "other", (tokens(limit, left),)))
    house.clock.advance(LATENCY)
    several = [house.ask(tokens(limit, 129)) for _ in range(ready * 64 // 129)]
    house.pass_by(3 * LATENCY)
    assert all(isinstance(now(each), Granted) for each in several)


def test_nobody_is_refused_because_of_what_is_ahead_here() -> None:
    house, limit = House(), 1000
    house.warm(tokens(limit, 1))
    for _ in range(2 * house.ready):
        house.asked(tokens(limit, 1))
    house.pass_by(3 * LATENCY)
    taken = house._ids
    assert house.counted == {("tokens", ""): taken + house.ready}
    last = house.ask(tokens(limit, limit - taken))
    house.pass_by(3 * LATENCY)
    assert now(last) == Granted((0,))
    assert house.counted == {("tokens", ""): limit}
    house.pass_by(LAPSED)
    house.assert_nothing_is_left()


def test_nobody_is_refused_because_of_what_was_asked_for_just_before() -> None:
    house, limit = House(), 100_000
    house.warm(tokens(limit, 512))
    house.shared.mode = "held"
    house.take_all(tokens(limit, 512))
    house.clock.advance(0)
    (lot,) = house.shared.under_way
    assert lot.what == "ahead"
    last = house.ask(tokens(limit, limit - 512 * house._ids))
    for each in list(house.shared.under_way):
        each.run()
    house.shared.mode = "up"
    for each in list(house.shared.under_way):
        each.answer()
    house.pass_by(3 * LATENCY)
    assert now(last) == Granted((0,))
    house.pass_by(LAPSED)
    house.assert_nothing_is_left()


def test_what_is_given_back_goes_together_though_the_store_is_away() -> None:
    house = House()
    house.ask_often(900, FAR)
    ready = house.ready
    assert ready > 2 * _TOGETHER
    house.shared.mode = "away"
    house.ahead._drop(TOKEN)
    kept = house.ahead._behind._kept
    assert sum(len(settlements) for settlements, *_ in kept) >= ready
    assert len(kept) <= ready // _TOGETHER + 2
    house.shared.mode = "up"
    house.pass_by(2 * RETRY)
    assert house.counted == {("requests", ""): 900}
    house.pass_by(LAPSED)
    house.assert_nothing_is_left()


def test_who_would_be_refused_without_that_is_asked_for_once() -> None:
    house, limit = House(), 1000
    house.warm(tokens(limit, 1))
    times = len(house.shared.of("reserve"))
    assert isinstance(house.asked(tokens(limit, limit - house._ids + 1)), Denied)
    assert len(house.shared.of("reserve")) == times + 1
    house.pass_by(LAPSED)
    house.assert_nothing_is_left()


def test_who_is_refused_twice_is_not_asked_for_a_third_time() -> None:
    """Others have had more reserved ahead meanwhile."""
    house, limit = House(), 1000
    house.warm(tokens(limit, 1))
    house.shared.mode = "held"
    refused = house.ask(tokens(limit, limit - house._ids))
    house.shared.under_way[0].answer()
    *settling, second = house.shared.under_way
    house.shared.mode = "up"
    for each in settling:
        each.answer()
    others = [house.asked(tokens(limit, 1)) for _ in range(2)]
    house.pass_by(3 * LATENCY)
    assert house.ready
    for number, other in enumerate(others):
        assert isinstance(other, Granted)
        house.ahead.settle(TOKEN, other.request_id or f"r{house._ids - 1 + number}", (0,))
    house.pass_by(PAUSE + 3 * LATENCY)
    times = len(house.shared.of("reserve"))
    second.answer()
    assert isinstance(now(refused), Denied)
    assert len(house.shared.of("reserve")) == times
    house.pass_by(LAPSED)
    house.assert_nothing_is_left()


def test_some_that_are_refused_give_back_the_rest() -> None:
    """Others took what was left, after it was said that much is."""
    house, limit = House(), 1000
    house.warm(requests(limit))
    house.shared.mode = "held"
    house.take_all(requests(limit))
    house.clock.advance(0)
    (more,) = house.shared.under_way
    others = limit - house.counted["requests", ""] - len(more.ids) + 1
    house.shared.reserve(Ask(TOKEN, "others", (requests(limit, cost=others),)))
    house.shared.under_way[-1].answer()
    house.shared.mode = "up"
    more.answer()
    house.pass_by(5 * LATENCY)
    assert house.counted == {("requests", ""): house._ids + others}
    assert house.ready == 0


def test_one_that_would_take_what_is_left_is_no_good_for_the_next() -> None:
    """As its own reservation may do, where its cost is a guess."""
    house, guess = House(), Rule("tokens", "", 1000, 8, least=1)
    house.warm(guess)
    house.shared.mode = "held"
    house.take_all(guess)
    house.clock.advance(0)
    (more,) = house.shared.under_way
    left = 8 * (len(more.ids) - 1) + 3
    others = 1000 - house.counted["tokens", ""] - left
    house.shared.reserve(Ask(TOKEN, "others", (tokens(1000, others),)))
    house.shared.under_way[-1].answer()
    house.shared.mode = "up"
    more.answer()
    assert house.ready == 0
    house.pass_by(5 * LATENCY)
    assert house.counted["tokens", ""] == 1000 - left


def test_when_limits_change_what_is_ahead_is_given_back() -> None:
    house = House()
    house.warm(requests(1000))
    there = house.ready
    assert house.asked(requests(999)) == Granted((996 - there,))
    house.pass_by(5 * LATENCY)
    assert house.counted == {("requests", ""): 3}
    house.pass_by(LAPSED)
    house.assert_nothing_is_left()


def test_at_the_end_all_is_given_back() -> None:
    house = House()
    house.warm(FAR, parallel(10**5))
    running = now(house.ask(FAR, parallel(10**5)))
    assert isinstance(running, Granted)
    house.ahead.settle(TOKEN, running.request_id, (None, None))
    ended = house.finish()
    assert not ended
    house.pass_by(5 * LATENCY)
    assert ended == [None]
    assert house.counted == {("requests", ""): 3, ("max_parallel_requests", ""): 2}
    house.assert_nothing_is_left()


@pytest.mark.parametrize("ends", ["answer", "fail"])
def test_the_end_waits_for_what_is_asked_for_ahead_just_then(ends: str) -> None:
    house = House()
    house.warm(FAR)
    house.shared.mode = "held"
    house.take_all(FAR)
    house.clock.advance(0)
    (more,) = house.shared.under_way
    more.run()
    ended = house.finish()
    assert not ended
    getattr(more, ends)()
    while house.shared.under_way:
        assert not ended
        house.shared.under_way[0].answer()
    assert ended == [None]
    assert house.counted == {("requests", ""): house._ids}
    house.assert_nothing_is_left()


def test_at_the_end_no_more_is_asked_for_ahead() -> None:
    house = House()
    house.warm(FAR)
    house.take_all(FAR)
    ended = house.finish()
    times = len(house.shared.of("ahead"))
    house.pass_by(5 * LATENCY)
    assert ended == [None]
    assert len(house.shared.of("ahead")) == times
    house.assert_nothing_is_left()


def test_after_the_end_nothing_is_asked_for_ahead() -> None:
    """Requests may still wait for their answer, and end."""
    house = House()
    house.shared.mode = "held"
    asked = [house.ask(FAR) for _ in range(4)]
    assert house.finish() == [None]
    house.shared.mode = "up"
    for call in list(house.shared.under_way):
        call.answer()
    assert [type(now(each)) for each in asked] == [Granted] * 4
    for number in range(4):
        house.ahead.settle(TOKEN, f"r{number + 1}", (None,))
    house.pass_by(5 * LATENCY)
    assert house.shared.of("ahead") == []
    assert house.counted == {("requests", ""): 4}
    house.assert_nothing_is_left()


@pytest.mark.parametrize("mode", ["away", "mute"])
def test_in_an_outage_there_is_no_more_than_was_there(mode: str) -> None:
    house = House()
    house.warm(FAR, parallel(10**5))
    house.shared.mode = mode
    taken = 0
    while house.ready:  # what is left of it is given back when the first call has failed
        assert house.ask(FAR, parallel(10**5)).called
        taken += 1
        house.clock.advance(LATENCY)
    for _ in range(5):
        asked = house.ask(FAR, parallel(10**5))
        house.clock.advance(DEADLINE)
        with pytest.raises(StoreUnavailable):
            now(asked)
    house.shared.mode = "up"
    house.pass_by(3)
    assert house.counted == {("requests", ""): 2 + taken, ("max_parallel_requests", ""): 2 + taken}
    house.assert_nothing_is_left()


@pytest.mark.parametrize("mode", ["away", "mute"])
def test_in_an_outage_what_is_there_is_no_longer_good_than_else(mode: str) -> None:
    house = House()
    house.warm(FAR)
    house.shared.mode = mode
    house.clock.rightNow += AHEAD
    asked = house.ask(FAR)
    house.clock.advance(DEADLINE)
    with pytest.raises(StoreUnavailable):
        now(asked)
    house.shared.mode = "up"
    house.pass_by(3)
    assert house.counted == {("requests", ""): 2}
    assert isinstance(house.asked(FAR), Granted)
    house.pass_by(LAPSED)
    house.assert_nothing_is_left()


def test_when_the_store_does_not_make_more_what_is_there_is_given_back() -> None:
    """It is no good for much longer, and the store may be long away."""
    house = House()
    house.ask_often(300, FAR)
    house.pass_by(3 * LATENCY)
    house.shared.mode = "held"
    while not house.shared.under_way:
        now(house.ask(FAR))
        house.clock.advance(0)
    assert house.ready
    house.shared.mode = "up"
    house.shared.under_way[0].fail()
    assert house.ready == 0
    house.pass_by(5 * LATENCY)
    assert house.counted == {("requests", ""): house._ids}


def test_a_fault_in_asking_ahead_is_told_and_nobody_waits_for_it(logged_errors: list[LogEvent]) -> None:
    house = House()
    house.warm(FAR)
    house.shared.mode = "held"
    house.take_all(FAR)
    house.clock.advance(0)
    house.shared.under_way[0].fail(ZeroDivisionError())
    assert [event["log_failure"].type for event in logged_errors] == [ZeroDivisionError]
    logged_errors.clear()
    house.shared.mode = "up"
    house.warm(FAR)
    house.pass_by(LAPSED)
    house.assert_nothing_is_left()


def test_a_request_that_is_given_up_while_it_waits_leaves_nothing() -> None:
    house = House()
    house.shared.mode = "held"
    asked = house.ask(FAR)
    house.shared.under_way[0].run()
    asked.cancel()
    with pytest.raises(CancelledError):
        now(asked)
    assert house.counted == {}
    house.assert_nothing_is_left()


def test_what_is_settled_is_told_before_more_is_asked_for() -> None:
    house = House()
    house.warm(FAR)
    taken = now(house.ask(FAR))
    assert isinstance(taken, Granted)
    house.ahead.settle(TOKEN, taken.request_id, (0,))
    assert house.shared.of("settle") == []
    house.ask(requests(5))
    assert house.shared.asked[-2:] == [("settle", TOKEN, [taken.request_id]), ("reserve", TOKEN, [f"r{house._ids}"])]


def test_what_is_given_back_is_told_at_once_where_a_limit_is_near() -> None:
    house = House()
    house.asked(parallel(20))
    house.asked(parallel(20))
    house.ahead.settle(TOKEN, "r1", (None,))
    assert house.shared.of("settle") == [["r1"]]
    house.ahead.settle(TOKEN, "r2", (None,))
    assert house.shared.of("settle") == [["r1"], ["r2"]]


def test_what_is_given_back_may_wait_where_limits_are_far() -> None:
    house = House()
    house.warm(parallel(10**5))
    house.ahead.settle(TOKEN, "r1", (None,))
    house.ahead.settle(TOKEN, "r2", (None,))
    house.clock.advance(PAUSE - LATENCY)
    assert house.shared.of("settle") == []
    house.clock.advance(LATENCY)
    assert house.shared.of("settle") == [["r1", "r2"]]
