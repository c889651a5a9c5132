"""How settlements are told, together and again, in virtual time."""

import pytest
from _limits import TOKEN, parallel
from _shared import LATENCY, Shared
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent

from vllmproxy.limits import behind
from vllmproxy.limits.behind import _MOST_KEPT, _TOGETHER, HELD, MATTERS, PAUSE, RETRY, Behind
from vllmproxy.limits.values import Ask

OTHER = "cd" * 32


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behind, "_AT_A_TIME", 1)


class House:
    def __init__(self) -> None:
        self.clock = Clock()
        self.clock.advance(1_500_000_000)
        self.shared = Shared(self.clock)
        self.behind = Behind(self.shared, self.clock)

    def settle(self, *ids: str, prompt: bool = False, key: str = TOKEN) -> None:
        for request_id in ids:
            self.behind.settle(key, request_id, (None,), prompt=prompt)

    @property
    def told(self) -> list[list[str]]:
        return self.shared.of("settle")

    def pass_by(self, seconds: float) -> None:
        """Let time pass in steps that are shorter than anything that is waited for."""
        for _ in range(round(seconds / LATENCY)):
            self.clock.advance(LATENCY)

    def assert_nothing_is_left(self) -> None:
        behind = self.behind
        assert (behind._due, behind._keys, behind._telling, behind._kept) == ([], set(), set(), [])
        assert self.clock.getDelayedCalls() == []


def test_one_that_is_prompt_is_told_at_once() -> None:
    house = House()
    house.settle("a", prompt=True)
    assert house.told == [["a"]]
    house.pass_by(2 * PAUSE)
    assert house.told == [["a"]]
    house.assert_nothing_is_left()


def test_others_wait_for_each_other_and_no_longer_than_said() -> None:
    house = House()
    house.settle("a")
    house.clock.advance(PAUSE * 0.9)
    house.settle("b")
    house.settle("c", key=OTHER)
    assert house.told == []
    house.clock.advance(PAUSE * 0.2)
    assert house.told == [["a", "b", "c"]]
    house.settle("d")
    house.clock.advance(PAUSE)
    assert house.told[1:] == [["d"]]
    house.pass_by(2 * PAUSE)
    house.assert_nothing_is_left()


def test_a_prompt_one_takes_along_what_waits() -> None:
    house = House()
    house.settle("a")
    house.settle("b", prompt=True)
    assert house.told == [["a", "b"]]
    house.pass_by(2 * PAUSE)
    assert house.told == [["a", "b"]]
    house.assert_nothing_is_left()


@pytest.mark.parametrize("ends", ["answer", "fail"])
def test_prompt_ones_wait_for_the_call_under_way_and_go_together(ends: str) -> None:
    house = House()
    house.shared.mode = "held"
    house.settle("a", "b", prompt=True)
    house.settle("c")
    house.settle("other", prompt=True, key=OTHER)
    house.settle("d", prompt=True)
    assert house.told == [["a"]]
    getattr(house.shared.under_way[0], ends)()
    assert house.told[1:] == [["b", "c", "other", "d"]]


def test_some_calls_are_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behind, "_AT_A_TIME", 3)
    house = House()
    house.shared.mode = "held"
    house.settle("a", "b", "c", "d", "e", prompt=True)
    assert house.told == [["a"], ["b"], ["c"]]
    house.shared.under_way[1].answer()
    assert house.told[3:] == [["d", "e"]]


def test_one_that_waits_goes_within_its_time_though_a_call_is_under_way() -> None:
    house = House()
    house.shared.mode = "held"
    house.settle("a", prompt=True)
    house.settle("b")
    house.clock.advance(PAUSE)
    assert house.told == [["a"], ["b"]]


def test_what_is_due_is_told_when_somebody_is_about_to_ask() -> None:
    house = House()
    house.shared.mode = "held"
    house.settle("a", "b", prompt=True)
    house.settle("c")
    house.behind.tell(OTHER)
    assert house.told == [["a"]]
    house.behind.tell(TOKEN)
    assert house.told == [["a"], ["b", "c"]]
    house.behind.tell(TOKEN)
    house.settle("d", key=OTHER)
    house.behind.tell(TOKEN)
    assert house.told == [["a"], ["b", "c"]]
    house.shared.mode = "up"
    for call in list(house.shared.under_way):
        call.answer()
    house.pass_by(2 * PAUSE)
    assert house.told == [["a"], ["b", "c"], ["d"]]  # and the prompt one not again
    house.assert_nothing_is_left()


def test_what_comes_after_others_were_told_waits_for_as_long_as_those_did() -> None:
    house = House()
    house.settle("a")
    house.clock.advance(PAUSE * 0.9)
    house.behind.tell(TOKEN)
    house.settle("b")
    house.clock.advance(PAUSE * 0.9)
    assert house.told == [["a"]]
    house.clock.advance(PAUSE * 0.2)
    assert house.told == [["a"], ["b"]]
    house.pass_by(2 * PAUSE)
    house.assert_nothing_is_left()


def test_no_more_go_together_than_a_store_has_patience_for() -> None:
    house = House()
    ids = [f"r{number}" for number in range(2 * _TOGETHER + 1)]
    house.settle(*ids)
    house.clock.advance(PAUSE)
    assert [len(each) for each in house.told] == [_TOGETHER, _TOGETHER, 1]
    assert [each for together in house.told for each in together] == ids
    house.pass_by(2 * PAUSE)
    house.assert_nothing_is_left()


@pytest.mark.parametrize("mode", ["away", "mute"])
def test_what_the_store_did_not_hear_is_told_again_until_it_does(mode: str) -> None:
    house = House()
    house.shared.mode = mode
    house.settle("a", "b")
    house.settle("c", prompt=True, key=OTHER)
    house.pass_by(5)
    assert 5 <= house.told.count(["a", "b", "c"]) <= 6
    house.shared.mode = "up"
    house.pass_by(2 * RETRY)
    assert sorted(house.shared.heard) == ["a", "b", "c"]
    times = len(house.told)
    house.pass_by(2 * RETRY)
    assert len(house.told) == times
    house.assert_nothing_is_left()


def test_what_no_longer_matters_is_forgotten() -> None:
    house = House()
    house.shared.mode = "away"
    house.settle("old", prompt=True)
    house.pass_by(MATTERS / 2)
    house.settle("new", prompt=True)
    house.pass_by(MATTERS / 2 + 2 * RETRY)
    times = house.told.count(["old"])
    assert MATTERS / RETRY <= times <= MATTERS / RETRY + 1
    house.shared.mode = "up"
    house.pass_by(2 * RETRY)
    assert house.shared.heard == ["new"]
    house.pass_by(2 * RETRY)
    house.assert_nothing_is_left()


@pytest.mark.parametrize(("hours", "matters"), [(23, True), (25, False)])
def test_that_all_is_given_back_matters_for_a_day(hours: int, matters: bool) -> None:
    """A budget holds it for so long."""
    assert HELD == 24 * 3600
    house = House()
    house.shared.mode = "away"
    house.settle("used")
    for cost in (0, 1):
        house.behind.settle(TOKEN, f"cost-{cost}", (cost, cost), prompt=False)
    for _ in range(hours * 60):
        house.clock.advance(60)
    assert len(house.told) <= hours * 60 + 2  # and no more often than each minute
    house.shared.mode = "up"
    house.clock.advance(60)
    house.clock.advance(60)
    assert house.shared.heard == (["cost-0"] if matters else [])
    house.clock.advance(60)
    house.assert_nothing_is_left()


def test_no_more_are_kept_than_there_is_memory_for_and_the_log_says_so(logged: list[str]) -> None:
    house = House()
    house.shared.mode = "away"
    for number in range(_MOST_KEPT):
        house.settle(f"r{number}", prompt=True)
    assert logged == []
    house.settle("one", "too", "many")
    house.pass_by(2 * PAUSE)
    assert len(house.behind._kept) == _MOST_KEPT
    assert len(logged) == 1
    assert "what 3 requests gave back is not kept" in logged[0]


def test_what_is_told_again_goes_together() -> None:
    house, count = House(), 3 * _TOGETHER // 2
    house.shared.mode = "away"
    for number in range(count):
        house.settle(f"r{number}", prompt=True)
    assert len(house.told) == count
    house.clock.advance(RETRY)
    assert [len(each) for each in house.told[count:]] == [_TOGETHER, count - _TOGETHER]
    house.shared.mode = "up"
    house.pass_by(3 * RETRY)
    assert house.shared.heard == [f"r{number}" for number in range(count)]
    house.assert_nothing_is_left()


def test_what_goes_together_again_matters_for_as_long() -> None:
    house = House()
    house.shared.mode = "away"
    house.settle("old", prompt=True)
    house.clock.advance(0.9 * RETRY)
    house.settle("younger", prompt=True)
    house.clock.advance(0.9 * RETRY)
    house.settle("youngest", prompt=True)
    house.clock.advance(RETRY)
    assert house.told[-2:] == [["old", "younger"], ["youngest"]]


def test_a_fault_is_told_and_not_repeated(logged_errors: list[LogEvent]) -> None:
    house = House()
    house.shared.mode = "held"
    house.settle("a", "b", prompt=True)
    house.shared.under_way[0].fail(ZeroDivisionError())
    assert [event["log_failure"].type for event in logged_errors] == [ZeroDivisionError]
    logged_errors.clear()
    house.shared.mode = "up"
    house.shared.under_way[0].answer()
    house.pass_by(2 * RETRY)
    assert house.told == [["a"], ["b"]]
    house.assert_nothing_is_left()


def test_at_the_end_all_is_told_and_waited_for() -> None:
    house = House()
    house.shared.mode = "held"
    house.settle("a", "b", prompt=True)
    house.settle("c", key=OTHER)
    ended: list[None] = []
    Deferred.fromCoroutine(house.behind.finish()).addCallback(ended.append)
    assert house.told == [["a"], ["b", "c"]]
    house.settle("late", "later", prompt=True)  # given back meanwhile
    for left in (2, 1, 1):
        assert not ended
        assert len(house.shared.under_way) <= left
        house.shared.under_way[0].answer()
    assert ended == [None]
    assert house.shared.heard == ["a", "b", "c", "late", "later"]
    house.assert_nothing_is_left()


@pytest.mark.parametrize("mode", ["away", "mute"])
def test_the_end_does_not_wait_for_a_store_that_is_away(mode: str) -> None:
    house = House()
    house.shared.mode = mode
    house.settle("a", prompt=True)
    house.pass_by(0.3)
    house.settle("b")
    ended: list[None] = []
    Deferred.fromCoroutine(house.behind.finish()).addCallback(ended.append)
    house.pass_by(0.3)
    assert ended == [None]
    house.assert_nothing_is_left()


def test_at_the_end_what_the_store_did_not_hear_is_told_once_more() -> None:
    house = House()
    house.shared.mode = "away"
    house.settle("a", prompt=True)
    house.shared.mode = "up"
    ended: list[None] = []
    Deferred.fromCoroutine(house.behind.finish()).addCallback(ended.append)
    assert not ended
    house.clock.advance(LATENCY)
    assert ended == [None]
    assert house.shared.heard == ["a"]
    house.assert_nothing_is_left()


def test_only_the_first_time_counts() -> None:
    """It was heard, and its answer was not."""
    house = House()
    house.shared.reserve(Ask(TOKEN, "a", (parallel(1),)))
    house.clock.advance(LATENCY)
    house.shared.mode = "mute"
    house.settle("a", prompt=True)
    assert house.shared.counted(TOKEN) == {}
    house.clock.advance(0.2)
    house.shared.mode = "up"
    house.shared.reserve(Ask(TOKEN, "b", (parallel(1),)))
    house.pass_by(2 * RETRY)
    assert house.told == [["a"], ["a"]]
    assert house.shared.counted(TOKEN) == {("max_parallel_requests", ""): 1}


_STEPS = st.one_of(
    st.tuples(st.just("settle"), st.sampled_from([TOKEN, OTHER]), st.booleans()),
    st.tuples(st.just("tell"), st.sampled_from([TOKEN, OTHER])),
    st.tuples(st.just("pass"), st.sampled_from([0.0, 0.001, 0.009, 0.02, 0.3, 1.1])),
    st.tuples(st.just("mode"), st.sampled_from(["up", "held", "away", "mute"])),
    st.tuples(st.sampled_from(["run", "answer", "fail"]), st.integers(0, 5)),
)


@given(st.lists(_STEPS, max_size=40))
def test_each_is_told_in_time_and_until_it_is_heard_and_then_never_again(steps: list[tuple[object, ...]]) -> None:
    house = House()
    due: dict[str, tuple[float, bool]] = {}
    for number, (what, *rest) in enumerate(steps):
        if what == "settle":
            key, prompt = rest
            house.settle(f"r{number}", prompt=bool(prompt), key=str(key))
            due[f"r{number}"] = house.clock.seconds() + PAUSE, bool(prompt)
        elif what == "tell":
            house.behind.tell(str(rest[0]))
        elif what == "pass":
            house.clock.pump([LATENCY] * round(float(str(rest[0])) / LATENCY))
        elif what == "mode":
            house.shared.mode = str(rest[0])
        elif house.shared.under_way:
            call = house.shared.under_way[int(str(rest[0])) % len(house.shared.under_way)]
            getattr(call, str(what))()
        told = {each for ids in house.told for each in ids}
        busy = any(call.what == "settle" for call in house.shared.under_way)
        for request_id, (latest, prompt) in due.items():
            waits = not prompt and house.clock.seconds() <= latest + 1e-6
            assert request_id in told or waits or (prompt and busy)
        assert len(house.shared.heard) == len(set(house.shared.heard))
    house.shared.mode = "up"
    for call in list(house.shared.under_way):
        call.answer()
    house.pass_by(3 * RETRY)
    assert sorted(house.shared.heard) == sorted(due)
    house.assert_nothing_is_left()
