"""Many waits of one length, against the plain way to have them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.logger import LogEvent

from vllmproxy.deadlines import Deadlines

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 5)),
        st.tuples(st.just("clear"), st.integers(0, 5)),
        st.tuples(st.just("advance"), st.sampled_from([0.0, 0.1, 1.0, 2.5, 9.99, 10.0, 30.0])),
    ),
    max_size=40,
)


@given(steps=STEPS, seconds=st.sampled_from([0.5, 4.0, 10.0]))
def test_every_wait_ends_within_the_slack_and_no_other_does(steps: list[tuple[str, float]], seconds: float) -> None:
    clock, expired = Clock(), []
    slack = min(seconds / 4, 1.0)
    deadlines: Deadlines[float] = Deadlines(clock, seconds, lambda item: expired.append((item, clock.seconds())))
    due: dict[float, float] = {}
    for what, value in steps:
        if what == "set":
            deadlines.set(value)
            due[value] = clock.seconds() + seconds
        elif what == "clear":
            deadlines.clear(value)
            due.pop(value, None)
        else:
            end = clock.seconds() + value
            while clock.seconds() < end:  # small steps, as a reactor would wake for other things
                clock.advance(min(0.05, end - clock.seconds()))
            for item, when in expired:
                assert due[item] - 1e-6 <= when <= due[item] + slack + 0.051
                del due[item]
            expired.clear()
            assert all(when + slack + 0.051 > clock.seconds() for when in due.values())
    assert len(clock.getDelayedCalls()) <= 1
    deadlines.close()
    assert not clock.getDelayedCalls()


def test_zero_switches_it_off() -> None:
    clock, expired = Clock(), []
    deadlines: Deadlines[str] = Deadlines(clock, 0, expired.append)
    deadlines.set("a")
    assert not clock.getDelayedCalls()
    deadlines.clear("a")
    deadlines.close()


@pytest.mark.parametrize("again", ["set", "clear"])
def test_what_one_expiry_does_to_another_wait_counts(again: str) -> None:
    """Both were due; the first one's end began the second one's wait anew, or ended it."""
    clock, expired = Clock(), []

    def expire(item: str) -> None:
        expired.append((item, clock.seconds()))
        if item == "first":
            getattr(deadlines, again)("second")

    deadlines: Deadlines[str] = Deadlines(clock, 10, expire)
    deadlines.set("first")
    deadlines.set("second")
    clock.advance(11)
    assert expired == [("first", 11)]
    clock.advance(11)
    assert expired == [("first", 11), *([("second", 22)] if again == "set" else [])]


def test_an_item_may_wait_again_from_its_own_end() -> None:
    clock, expired = Clock(), []

    def expire(item: str) -> None:
        expired.append(clock.seconds())
        deadlines.set(item)

    deadlines: Deadlines[str] = Deadlines(clock, 10, expire)
    deadlines.set("a")
    for _ in range(35):
        clock.advance(1)
    assert expired == [11, 22, 33]


def test_an_expiry_that_fails_does_not_stop_the_others(logged_errors: list[LogEvent]) -> None:
    clock, expired = Clock(), []

    def expire(item: str) -> None:
        expired.append(item)
        if item == "bad":
            raise ValueError("bad")

    deadlines: Deadlines[str] = Deadlines(clock, 10, expire)
    for item in ("bad", "good"):
        deadlines.set(item)
    clock.advance(11)
    assert expired == ["bad", "good"]
    assert len(logged_errors) == 1
    logged_errors.clear()


def test_nothing_waits_after_the_end() -> None:
    clock, expired = Clock(), []
    deadlines: Deadlines[str] = Deadlines(clock, 10, expired.append)
    deadlines.close()
    deadlines.set("a")
    assert not clock.getDelayedCalls()


def test_what_is_forgotten_leaves_nothing_on_the_clock_and_the_next_waits_as_before() -> None:
    clock, expired = Clock(), []
    deadlines: Deadlines[str] = Deadlines(clock, 10, expired.append)
    deadlines.set("a")
    deadlines.forget()
    assert not clock.getDelayedCalls()
    deadlines.set("b")
    clock.advance(11)
    assert expired == ["b"]


@pytest.mark.parametrize(("first", "then"), [(10.0, 2.0), (2.0, 10.0), (10.0, 10.0)])
def test_waits_that_are_changed_last_as_long_as_they_would_have(first: float, then: float) -> None:
    clock, expired = Clock(), []
    deadlines: Deadlines[str] = Deadlines(clock, first, lambda item: expired.append((item, clock.seconds())))
    deadlines.set("early")
    clock.advance(1)
    deadlines.set("late")
    deadlines.change(then)
    deadlines.set("new")
    for _ in range(300):
        clock.advance(0.05)
    assert [item for item, _ in expired] == ["early", "late", "new"]
    slack = min(then / 4, 1.0) + 0.051
    for (_, when), began in zip(expired, (0, 1, 1), strict=True):
        assert began + then - 1e-6 <= when <= began + then + slack
    assert not clock.getDelayedCalls()


def test_a_wait_that_is_over_by_the_new_length_ends_soon() -> None:
    clock, expired = Clock(), []
    deadlines: Deadlines[str] = Deadlines(clock, 600, expired.append)
    deadlines.set("item")
    clock.advance(100)
    deadlines.change(4)
    clock.advance(1.1)
    assert expired == ["item"]
    deadlines.set("item")
    deadlines.change(0)
    clock.advance(1000)
    assert expired == ["item"]


def test_the_newest_is_given_back_with_whether_it_was_due() -> None:
    clock = Clock()
    deadlines: Deadlines[str] = Deadlines(clock, 10, lambda item: None)
    assert deadlines.pop_newest() is None
    deadlines.set("old")
    clock.advance(10)
    deadlines.set("new")
    assert deadlines.pop_newest() == ("new", False)
    assert deadlines.pop_newest() == ("old", True)
    assert deadlines.pop_newest() is None
    deadlines.close()
