"""How a stop goes, step by step, with a clock."""

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from vllmproxy.draining import Draining, State


class House:
    """Something to stop.

    :ivar over: when it was over, ``None`` before.
    """

    def __init__(self) -> None:
        self.clock = Clock()
        self.idle: Deferred[None] = Deferred()
        self.accepting = True
        self.over: float | None = None
        self.draining = Draining(self.clock, self._take_no_more)

    def _take_no_more(self) -> Deferred[None]:
        self.accepting = False
        return self.idle

    def begin(self, delay: float, timeout: float) -> None:
        self.draining.begin(delay, timeout).addCallback(self._end)

    def _end(self, _: None) -> None:
        self.over = self.clock.seconds()
        assert not self.clock.getDelayedCalls()


def test_requests_are_taken_for_the_delay_and_then_no_more() -> None:
    house = House()
    assert not house.draining.has_begun
    house.begin(5, 30)
    assert house.draining.has_begun
    house.clock.advance(4.9)
    assert house.accepting
    house.clock.advance(0.2)
    assert not house.accepting
    assert house.over is None


@pytest.mark.parametrize("delay", [0.0, 5.0])
def test_it_is_over_when_nothing_is_under_way(delay: float) -> None:
    house = House()
    house.begin(delay, 30)
    house.clock.advance(delay)
    house.clock.advance(7)
    house.idle.callback(None)
    assert house.over == delay + 7
    assert house.draining.state is State.OVER


def test_it_is_over_at_once_where_nothing_is_under_way() -> None:
    house = House()
    house.idle.callback(None)
    house.begin(0, 30)
    assert house.over == 0


@pytest.mark.parametrize(("delay", "timeout"), [(0.0, 30.0), (5.0, 30.0), (5.0, 0.0)])
def test_it_is_over_when_its_time_is(delay: float, timeout: float) -> None:
    house = House()
    house.begin(delay, timeout)
    house.clock.advance(delay)
    house.clock.advance(timeout)
    assert house.over == delay + timeout
    house.idle.callback(None)  # too late to matter


def test_the_log_says_that_something_is_cut_off(logged: list[str]) -> None:
    for finishes in (True, False):
        house = House()
        house.begin(0, 30)
        if finishes:
            house.idle.callback(None)
        house.clock.advance(30)
        assert any("is cut off" in line for line in logged) is not finishes


@pytest.mark.parametrize("after", [0.0, 3.0, 6.0])
def test_whoever_asks_again_does_not_wait(after: float) -> None:
    house = House()
    house.begin(5, 30)
    house.clock.advance(after)
    house.draining.hurry()
    assert house.over == after
    house.draining.hurry()


def test_whoever_asks_twice_before_it_began_does_not_wait_either() -> None:
    house = House()
    house.draining.hurry()
    house.begin(5, 30)
    assert house.over == 0
