"""Whose turn it is to accept."""

import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.workers.loads import MANY, PATIENCE, SLACK, Loads, Turns


class Crowd:
    """Workers that only count."""

    def __init__(self, count: int) -> None:
        self.loads = Loads.make(count)
        self.has = [0] * count
        seen = [Loads(os.dup(self.loads.descriptor)) for _ in range(count)]  # each has a view of its own
        self.turns = [Turns(seen[index], index + 1, lambda index=index: self.has[index]) for index in range(count)]

    def take(self, index: int) -> int:
        taken = self.turns[index].take()
        self.has[index] += taken
        return taken

    def close(self) -> None:
        os.close(self.loads.descriptor)


@pytest.fixture
def two() -> Crowd:
    return Crowd(2)


def test_while_nobody_else_accepts_all_are_taken(two: Crowd) -> None:
    assert [two.take(0) for _ in range(100)] == [1] * 100


def test_one_with_more_than_another_lets_that_go_first(two: Crowd) -> None:
    two.take(1)
    assert [two.take(0) for _ in range(1 + SLACK)] == [1] * (1 + SLACK)
    assert two.take(0) == 0
    assert two.take(1) == 1
    assert two.take(0) == 1  # the other moves
    assert two.take(0) == 0


def test_one_that_does_not_move_is_not_waited_for_for_ever(two: Crowd) -> None:
    two.take(1)
    two.has[0] = 100
    assert [two.take(0) for _ in range(2 * PATIENCE)] == [0, 1] * PATIENCE
    assert [two.take(0) for _ in range(4)] == [0, MANY, 0, MANY]
    two.take(1)
    assert [two.take(0) for _ in range(4)] == [0, 1, 0, 1]


def test_one_that_is_gone_is_not_waited_for(two: Crowd) -> None:
    two.take(1)
    two.has[0] = 100
    two.loads.leave(2)
    assert two.take(0) == 1


def test_one_whose_connections_have_ended_takes_again(two: Crowd) -> None:
    two.has = [100, 100]
    assert (two.take(0), two.take(1)) == (1, 1)
    two.has[0] = 0
    assert (two.take(0), two.take(1)) == (1, 0)


@given(st.integers(2, 5), st.integers(0, 2**32))
def test_whoever_is_woken_more_often_nobody_has_much_more(count: int, seed: int) -> None:
    crowd, dice = Crowd(count), random.Random(seed)
    weights = [dice.random() + 0.05 for _ in range(count)]
    try:
        for index in range(count):
            crowd.take(index)
        for _ in range(500):
            # Whoever waits asks again at its next turn; meanwhile each of the others has one.
            index = dice.choices(range(count), weights)[0]
            if crowd.take(index) == 0:
                for other in range(count):
                    if other != index:
                        crowd.take(other)
        assert max(crowd.has) - min(crowd.has) <= SLACK + count
    finally:
        crowd.close()
