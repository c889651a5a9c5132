"""Leases, and time that never goes back."""

from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.limits.leases import Leases
from vllmproxy.limits.steady import Steady


def test_a_lease_ends_by_itself_unless_renewed() -> None:
    leases: Leases[str] = Leases(100)
    leases.take(0, "a", "A")
    leases.take(50, "b", "B")
    assert leases.renew(99, "a")
    assert leases.count(149) == 2
    assert leases.count(150) == 1
    assert (leases.get(150, "a"), leases.get(150, "b")) == ("A", None)
    assert not leases.renew(150, "b")
    assert leases.count(198) == 1
    assert leases.get(199, "a") is None
    assert leases.count(199) == 0


def test_what_has_ended_is_not_renewed() -> None:
    leases: Leases[str] = Leases(100)
    leases.take(0, "a", "A")
    leases.end("a")
    leases.end("a")
    assert not leases.renew(1, "a")
    leases.take(0, "a", "A")
    assert not leases.renew(100, "a")
    assert leases.count(100) == 0


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from(["take", "renew", "end", "count"]), st.sampled_from("abcd")),
        max_size=60,
    )
)
def test_against_a_plain_list(steps: list[tuple[int, str, str]]) -> None:
    leases: Leases[str] = Leases(100)
    ends: dict[str, int] = {}
    now = 0
    for pause, step, name in steps:
        now += pause
        alive = ends.get(name, 0) > now
        if step == "take":
            leases.take(now, name, name)
            ends[name] = now + 100
        elif step == "renew":
            assert leases.renew(now, name) == alive
            if alive:
                ends[name] = now + 100
        elif step == "end":
            leases.end(name)
            ends.pop(name, None)
        else:
            assert leases.count(now) == sum(end > now for end in ends.values())
        assert (leases.get(now, name) is not None) == (ends.get(name, 0) > now)


@given(st.lists(st.integers(-1000, 1000)))
def test_steady_time_goes_on_as_the_clock_does_and_never_back(changes: list[int]) -> None:
    steady, now, told = Steady(), 10_000, 0
    told = steady.at(now)
    assert told == now
    for change in changes:
        now += change
        before, told = told, steady.at(now)
        assert told - before == max(change, 0)
