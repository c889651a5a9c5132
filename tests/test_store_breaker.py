"""When the store is asked, when not, and how it is found again: in virtual time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent

from vllmproxy.store.breaker import PAUSE, Breaker
from vllmproxy.store.interface import StoreUnavailable


class House:
    """A breaker whose probes are answered by the test."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.probes: list[Deferred[None]] = []
        self.breaker = Breaker(self.clock, self._probe)
        self.breaker.start()

    def _probe(self) -> Deferred[None]:
        self.probes.append(Deferred())
        return self.probes[-1]

    def answer(self) -> None:
        self.probes[-1].callback(None)

    def fail(self, why: str = "refused") -> None:
        self.probes[-1].errback(StoreUnavailable(why))


def test_calls_pass_until_one_fails() -> None:
    house = House()
    house.clock.advance(3600)
    assert (house.breaker.reason, house.probes) == (None, [])
    house.breaker.trip("late")
    assert house.breaker.reason == "late"


def test_it_probes_at_once_and_after_every_pause_and_closes_by_itself() -> None:
    house = House()
    house.breaker.trip("late")
    for number in range(1, 5):
        assert len(house.probes) == number
        house.fail(f"refused {number}")
        assert house.breaker.reason == f"refused {number}"
        house.clock.advance(PAUSE * 0.99)
        assert len(house.probes) == number
        house.clock.advance(PAUSE * 0.01)
    house.answer()
    assert house.breaker.reason is None
    assert house.clock.getDelayedCalls() == []
    house.clock.advance(3600)
    assert len(house.probes) == 5


def test_failures_while_it_is_open_change_nothing() -> None:
    house = House()
    house.breaker.trip("first")
    house.breaker.trip("second")
    assert (house.breaker.reason, len(house.probes)) == ("first", 1)
    house.fail("third")
    house.breaker.trip("fourth")
    assert (house.breaker.reason, len(house.probes)) == ("third", 1)


def test_it_opens_again() -> None:
    house = House()
    for _ in range(3):
        house.breaker.trip("late")
        house.answer()
        assert house.breaker.reason is None
    assert len(house.probes) == 3


def test_a_probe_may_end_at_once() -> None:
    clock, answers = Clock(), ["refused", "refused again", ""]

    async def probe() -> None:
        why = answers.pop(0)
        if why:
            raise StoreUnavailable(why)

    breaker = Breaker(clock, lambda: Deferred.fromCoroutine(probe()))
    breaker.start()
    breaker.trip("late")
    assert breaker.reason == "refused"
    clock.advance(PAUSE)
    assert breaker.reason == "refused again"
    clock.advance(PAUSE)
    assert breaker.reason is None


def test_a_fault_of_the_probe_is_logged_and_does_not_end_it(logged_errors: list[LogEvent]) -> None:
    house = House()
    house.breaker.trip("late")
    house.probes[-1].errback(ZeroDivisionError())
    assert len(logged_errors) == 1
    logged_errors.clear()
    house.clock.advance(PAUSE)
    house.answer()
    assert house.breaker.reason is None


@pytest.mark.parametrize("probing", [True, False])
def test_the_end_leaves_nothing_behind(probing: bool) -> None:
    house = House()
    house.breaker.trip("late")
    if not probing:
        house.fail()
    house.breaker.end()
    house.breaker.end()
    house.breaker.trip("too late")
    assert house.breaker.reason == "the store is closed"
    assert house.clock.getDelayedCalls() == []
    if probing:
        assert house.probes[0].called  # cancelled
    house.breaker.start()
    assert house.breaker.reason is None


@given(st.lists(st.sampled_from(["trip", "answer", "fail", "pass", "start"])))
def test_while_it_is_open_one_probe_is_under_way_or_due(events: list[str]) -> None:
    house = House()
    for event in events:
        under_way = bool(house.probes) and not house.probes[-1].called
        if event == "trip":
            house.breaker.trip("late")
        elif event == "pass":
            house.clock.advance(PAUSE)
        elif event == "start":
            house.breaker.start()
        elif under_way:
            house.answer() if event == "answer" else house.fail()
        under_way = bool(house.probes) and not house.probes[-1].called
        due = len(house.clock.getDelayedCalls())
        assert under_way + due == (house.breaker.reason is not None)
