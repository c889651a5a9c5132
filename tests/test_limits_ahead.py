"""What is reserved ahead, for whom, and who takes it, in virtual time."""

import pytest
from _ahead import FAR, LAPSED, House
from _limits import TOKEN, parallel, requests, tokens
from _shared import LATENCY, now
from attrs import evolve
from twisted.internet.defer import Deferred, maybeDeferred

from vllmproxy.keys.key import VirtualKey
from vllmproxy.limits.ahead import AHEAD, MOST
from vllmproxy.limits.behind import PAUSE
from vllmproxy.limits.values import Ask, Granted, Rule
from vllmproxy.relay.demand import Demand
from vllmproxy.relay.quotas import Quotas, Reservation


def test_one_that_is_asked_for_once_has_nothing_ahead() -> None:
    house = House()
    assert house.asked(FAR) == Granted((10**6 - 1,))
    house.pass_by(LAPSED)
    assert house.shared.of("ahead") == []
    house.assert_nothing_is_left()
    house.asked(FAR)  # nor does it when the last time is long ago
    house.pass_by(LAPSED)
    assert house.shared.of("ahead") == []
    house.assert_nothing_is_left()


def test_one_that_is_asked_for_again_need_not_wait() -> None:
    house = House()
    house.warm(FAR)
    reserved = len(house.shared.of("reserve"))
    granted = now(house.ask(FAR))
    assert isinstance(granted, Granted)
    assert granted.request_id in house.shared.of("ahead")[0]
    assert (granted.remaining, granted.taken) == ((10**6 - 3,), (1,))
    assert len(house.shared.of("reserve")) == reserved


def test_there_are_more_the_more_are_asked_for_and_never_too_many() -> None:
    house = House()
    most = 0
    for _ in range(600):
        house.asked(FAR)
        house.clock.advance(LATENCY / 4)
        most = max(most, house.ready)
    assert MOST // 2 < most <= MOST
    assert len(house.shared.of("reserve")) < 20
    house.pass_by(2 * LATENCY)
    assert house.counted == {("requests", ""): 600 + house.ready}


@pytest.mark.parametrize("limit", [64, 150, 200, 600, 2000])
def test_no_more_than_a_small_part_of_a_limit_is_ahead_and_that_always(limit: int) -> None:
    """However many want some at once, some of them find one as long as the limit is far."""
    house = House()
    found = 0
    for _ in range(limit // 2 // 8):
        burst = [house.ask(parallel(limit), requests(10**6)) for _ in range(8)]
        found = sum(asked.called for asked in burst)
        house.pass_by(3 * LATENCY)
        assert house.ready <= limit // 32
        granted = [each for each in map(now, burst) if isinstance(each, Granted)]
        assert len(granted) == 8
        if len(house.shared.of("reserve")) > 8:
            assert found
        for each, number in zip(granted, range(house._ids - 7, house._ids + 1), strict=True):
            house.ahead.settle(TOKEN, each.request_id or f"r{number}", (None, None))
        house.pass_by(2 * PAUSE)


@pytest.mark.parametrize(
    "rules",
    [
        (requests(31),),
        (parallel(31),),
        (tokens(31 * 16, 16),),
        (tokens(63 * 16, 17),),  # 17 would be 32
        (FAR, tokens(10**6, 10), parallel(20)),
        (FAR, requests(20, scope="m")),
        (Rule("budget", "", 31 * 16, 16, 5),),
        (FAR, Rule("budget_tokens", "", 10**6, 40_000, 5)),
    ],
    ids=str,
)
def test_nothing_is_ahead_of_a_small_limit(rules: tuple[Rule, ...]) -> None:
    house = House()
    for _ in range(10):
        assert isinstance(house.asked(*rules), Granted)
        house.pass_by(2 * LATENCY)
    assert house.shared.of("ahead") == []
    house.pass_by(LAPSED)
    house.assert_nothing_is_left()


@pytest.mark.parametrize(
    "rule",
    [tokens(10**6, 500_000), tokens(1000, 501), Rule("budget", "", 1000, 501), Rule("budget_tokens", "", 1000, 501, 7)],
    ids=str,
)
def test_nothing_is_ahead_where_half_is_used(rule: Rule) -> None:
    house = House()
    house.asked(rule)
    cheap = evolve(rule, cost=1)
    for _ in range(10):
        assert isinstance(house.asked(cheap), Granted)
        house.pass_by(2 * LATENCY)
    assert house.shared.of("ahead") == []


def test_no_more_is_asked_for_when_half_is_used_meanwhile() -> None:
    """By others: each answer tells how much is left."""
    house, limit = House(), 1000
    house.warm(requests(limit))
    house.shared.reserve(Ask(TOKEN, "others", (requests(limit, cost=501),)))
    house.clock.advance(LATENCY)
    for _ in range(20):
        assert isinstance(house.asked(requests(limit)), Granted)
        house.pass_by(2 * LATENCY)
    ahead = len(house.shared.of("ahead"))
    for _ in range(20):
        assert isinstance(house.asked(requests(limit)), Granted)
        house.pass_by(2 * LATENCY)
    assert len(house.shared.of("ahead")) == ahead
    assert house.ready == 0


def test_nothing_is_asked_for_that_has_become_too_much() -> None:
    """Between the wish for more and the asking, another answer says that little is left."""
    house, limit = House(), 1000
    house.warm(requests(limit))
    house.shared.mode = "held"
    house.shared.reserve(Ask(TOKEN, "others", (requests(limit, cost=501),)))
    house.take_all(requests(limit))
    waits = house.ask(requests(limit))
    house.shared.under_way[0].run()  # half is used
    ahead = len(house.shared.of("ahead"))
    house.shared.under_way[-1].answer()
    assert isinstance(now(waits), Granted)
    house.clock.advance(0)
    assert len(house.shared.of("ahead")) == ahead


@pytest.mark.parametrize(
    ("rules", "finds"),
    [
        ((FAR, tokens(10**6, 100, "m")), True),
        ((FAR, tokens(10**6, 128, "m")), True),
        ((FAR, tokens(10**6, 0, "m")), True),
        ((FAR, Rule("tokens", "m", 10**6, 100, least=1)), True),
        ((FAR, tokens(10**6, 129, "m")), False),
        ((FAR, tokens(10**6 - 1, 100, "m")), False),
        ((requests(10**6 + 1), tokens(10**6, 100, "m")), False),
        ((FAR, tokens(10**6, 100)), False),
        ((FAR, tokens(10**6, 100, "other")), False),
        ((tokens(10**6, 100, "m"), FAR), False),
        ((FAR, requests(10**6, scope="m")), False),
        ((FAR,), False),
        ((FAR, tokens(10**6, 100, "m"), parallel(10**6)), False),
        ((FAR, Rule("budget", "", 10**6, 100)), False),
    ],
    ids=str,
)
def test_a_request_takes_only_what_was_made_for_the_like_of_it(rules: tuple[Rule, ...], finds: bool) -> None:
    house = House()
    house.warm(FAR, tokens(10**6, 100, "m"))
    asked = house.ask(*rules)
    assert asked.called == finds
    house.clock.advance(LATENCY)
    granted = now(asked)
    assert isinstance(granted, Granted)
    assert all(taken >= rule.cost for rule, taken in zip(rules, granted.taken, strict=True))
    assert bool(granted.request_id) == finds
    house.pass_by(3 * LATENCY)
    assert bool(house.ready) == finds  # what is for others is given back


@pytest.mark.parametrize(
    ("rule", "finds"),
    [
        (Rule("budget", "", 10**6, 100, 7), True),
        (Rule("budget", "", 10**6, 128, 7), True),
        (Rule("budget", "", 10**6, 100, 7, least=1), True),
        (Rule("budget", "", 10**6, 129, 7), False),
        (Rule("budget", "", 10**6, 100, 8), False),
        (Rule("budget_tokens", "", 10**6, 100, 7), False),
    ],
    ids=str,
)
def test_of_a_budget_a_request_takes_only_what_was_made_in_its_period(rule: Rule, finds: bool) -> None:
    house = House()
    house.warm(Rule("budget", "", 10**6, 100, 7))
    asked = house.ask(rule)
    assert asked.called == finds
    house.clock.advance(LATENCY)
    granted = now(asked)
    assert isinstance(granted, Granted)
    assert granted.taken == ((128,) if finds else (rule.cost,))
    house.pass_by(3 * LATENCY)
    assert bool(house.ready) == finds


def test_one_that_wants_none_that_was_reserved_before_has_one_of_its_own_and_leaves_the_others() -> None:
    house = House()
    house.warm(FAR)
    ready = house.ready
    alone = maybeDeferred(house.ahead.reserve, Ask(TOKEN, "alone", (FAR,), ahead=False))
    assert not alone.called
    house.clock.advance(LATENCY)
    granted = now(alone)
    assert isinstance(granted, Granted)
    assert (granted.request_id, house.ready) == ("", ready)


def test_nothing_is_ahead_for_those_that_want_none() -> None:
    house = House()
    for number in range(10):
        asked = maybeDeferred(house.ahead.reserve, Ask(TOKEN, f"alone-{number}", (FAR,), ahead=False))
        house.clock.advance(LATENCY)
        assert isinstance(now(asked), Granted)
    assert house.shared.of("ahead") == []


@pytest.mark.parametrize("soft", [None, 500])
def test_of_a_key_with_a_soft_budget_nothing_is_ahead(soft: int | None) -> None:
    """It would be told as used."""
    house = House()
    quotas = Quotas(house.ahead, house.clock)
    key = VirtualKey(token=TOKEN, key_name="k", max_budget=10**6, soft_budget=soft)
    for _ in range(6):
        reserved = maybeDeferred(quotas.reserve, key, Demand(spend=100))
        house.pass_by(2 * LATENCY)
        assert isinstance(now(reserved), Reservation)
    assert bool(house.shared.of("ahead")) is (soft is None)


def test_who_costs_more_has_more_made_ahead_and_who_costs_less_takes_it() -> None:
    house = House()
    for cost in (10, 3000, 20, 900, 10):
        house.asked(FAR, tokens(10**7, cost))
    house.pass_by(3 * LATENCY)
    for cost in (3000, 10):
        granted = now(house.ask(FAR, tokens(10**7, cost)))
        assert isinstance(granted, Granted)
        assert granted.taken == (1, 4096)


def test_what_is_too_much_for_one_is_left_for_others() -> None:
    house, limit = House(), 10**6
    house.warm(FAR, tokens(limit, 3000))
    ready = house.ready
    small = house.asked(FAR, tokens(limit, 10))
    assert isinstance(small, Granted)
    assert (small.request_id, small.taken, house.ready) == ("", (1, 10), ready)
    assert house.ask(FAR, tokens(limit, 3000)).called


def test_when_all_cost_less_what_is_ahead_is_soon_what_they_cost() -> None:
    house, limit = House(), 10**6
    house.warm(FAR, tokens(limit, 3000))
    for _ in range(100):
        asked = house.asked(FAR, tokens(limit, 10))
        house.pass_by(10 * LATENCY)
    assert isinstance(asked, Granted)
    assert (bool(asked.request_id), asked.taken) == (True, (1, 16))


def test_who_costs_more_of_one_and_who_costs_more_of_another_limit_find_the_same() -> None:
    house = House()
    one = tokens(10**7, 3000), tokens(10**7, 10, "m")
    other = tokens(10**7, 10), tokens(10**7, 3000, "m")
    for rules in (one, other, other):
        house.asked(*rules)
        house.pass_by(3 * LATENCY)
    assert house.ask(*one).called
    assert house.ask(*other).called


def test_when_a_limit_is_less_than_it_was_costs_are_learnt_anew() -> None:
    house = House()
    house.warm(tokens(10**6, 1000))
    house.warm(tokens(10**5, 10))
    granted = now(house.ask(tokens(10**5, 10)))
    assert isinstance(granted, Granted)
    assert granted.taken == (16,)


def test_who_costs_more_finds_as_many() -> None:
    house = House()
    house.ask_often(900, tokens(10**6, 1))
    house.warm(tokens(10**6, 2))
    assert house.ready > MOST // 2


def test_there_are_more_when_many_come_at_once() -> None:
    """Though it is long until the next come."""
    house = House()
    for _ in range(6):
        burst = [house.ask(FAR) for _ in range(16)]
        found = sum(asked.called for asked in burst)
        house.pass_by(20 * LATENCY)
    assert found == 16


@pytest.mark.parametrize("elapsed", [AHEAD, -3600])
def test_nobody_takes_what_is_too_old(elapsed: float) -> None:
    """Nor what was reserved at a time that is to come: then the clock was set back, and nobody knows how old it is."""
    house = House()
    house.warm(FAR)
    old = house.ready
    house.clock.rightNow += elapsed  # and nothing that is due has been done yet
    asked = house.ask(FAR)
    assert not asked.called
    house.clock.pump([LATENCY] * 5)
    granted = now(asked)
    assert isinstance(granted, Granted)
    assert not granted.request_id
    assert len(house.shared.heard) == old


def test_what_is_young_enough_is_taken() -> None:
    house = House()
    house.warm(FAR)
    house.clock.rightNow += AHEAD - 10 * LATENCY
    assert house.ask(FAR).called


def test_fewer_are_ahead_when_there_were_too_many() -> None:
    house = House()
    house.ask_often(300, FAR)
    many = house.ready
    house.clock.rightNow += AHEAD + LATENCY
    house.asked(FAR)
    house.pass_by(5 * LATENCY)
    assert 0 < house.ready < many / 2


@pytest.mark.parametrize("count", [5, 20, 50])
def test_who_asks_often_at_once_and_then_waits_finds_as_many(count: int) -> None:
    """Though less is taken than half of what is ahead, and what was made for the last is too old for the next."""
    house = House()
    waited = []
    for _ in range(40):
        waited += [not house.ask(FAR).called for _ in range(count)]
        house.pass_by(0.3)
    assert sum(waited[len(waited) // 2 :]) < len(waited) / 20


def test_for_who_asks_no_more_nothing_is_made_anew() -> None:
    house = House()
    for _ in range(10):
        house.asked(FAR)
        house.pass_by(0.3)
    house.pass_by(4 * AHEAD)
    made = len(house.shared.of("ahead"))
    house.pass_by(4 * AHEAD)
    assert len(house.shared.of("ahead")) == made
    assert house.ready == 0


class Asker:
    """Requests of one key, as the relay makes them."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.quotas = Quotas(house.ahead, house.clock)
        limits = {"rpm_limit": 10**6, "tpm_limit": 10**7, "max_parallel_requests": 10**5}
        self._key = VirtualKey(token=TOKEN, key_name="sk-...", **limits)

    def reserve(self, expected: int) -> Reservation:
        demand = Demand(prompt_tokens=expected, is_bounded=True)
        asked = maybeDeferred(self.quotas.reserve, self._key, demand)
        self.house.pass_by(3 * LATENCY)
        reservation = now(asked)
        assert reservation is not None
        return reservation

    def reserve_ahead(self, expected: int) -> Reservation:
        """Return one that was made before it was asked for."""
        for _ in range(3):
            reservation = self.reserve(expected)
            if reservation.request_id != reservation.ask.request_id:
                return reservation
            self.quotas.settle(reservation, forwarded=False)
        raise AssertionError


@pytest.mark.parametrize(
    ("forwarded", "used", "counts"),
    [(True, None, 100), (True, 7, 7), (True, 120, 120), (True, 5000, 5000), (True, 0, 0), (False, None, None)],
)
def test_a_request_counts_with_what_it_used_or_was_expected_to(
    forwarded: bool, used: int | None, counts: int | None
) -> None:
    """Not with what was reserved, which is more."""
    asker = Asker(House())
    reservation = asker.reserve_ahead(100)
    assert reservation.taken == (1, 128, 1)
    asker.quotas.settle(reservation, forwarded=forwarded, tokens=used)
    asker.house.pass_by(LAPSED)
    expected = {("requests", ""): 1, ("tokens", ""): counts} if forwarded else {}
    assert asker.house.counted == {name: amount for name, amount in expected.items() if amount}
    ended = []
    Deferred.fromCoroutine(asker.quotas.close()).addCallback(ended.append)
    assert ended == [None]
    asker.house.assert_nothing_is_left()


def test_the_place_of_what_was_ahead_is_kept_for_as_long_as_it_runs() -> None:
    """A lease lasts 45 s."""
    asker = Asker(House())
    reservation = asker.reserve_ahead(100)
    asker.house.clock.pump([0.25] * 4 * 200)
    assert asker.house.shared.of("renew")[-1] == [reservation.request_id]
    assert asker.house.counted == {("max_parallel_requests", ""): 1}
    asker.quotas.settle(reservation, forwarded=True)
    asker.house.pass_by(5 * LATENCY)
    assert asker.house.counted == {}
    assert asker.quotas._leases == {}


def test_one_large_request_does_not_make_small_ones_hold_as_much() -> None:
    house = House()
    limit = 10**6
    for _ in range(8):
        house.asked(tokens(limit, 15_000))
        house.pass_by(2 * LATENCY)
    taken = []
    for _ in range(30):
        granted = house.asked(tokens(limit, 10))
        assert isinstance(granted, Granted)
        taken += granted.taken
        house.pass_by(2 * LATENCY)
    assert max(taken) <= 16
    assert len(house.shared.of("ahead")) > 2


def test_small_ones_of_different_sizes_share_what_is_ahead() -> None:
    house = House()
    house.warm(tokens(2**20, 900))
    asked = len(house.shared.of("reserve"))
    for cost in (10, 800, 3, 600):
        house.asked(tokens(2**20, cost))
        house.pass_by(2 * LATENCY)
    assert len(house.shared.of("reserve")) == asked
