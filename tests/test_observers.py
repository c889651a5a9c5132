"""The observer that is several."""

from collections.abc import Callable
from typing import Any

import pytest
from twisted.logger import Logger

from vllmproxy.observers import fanout
from vllmproxy.observers.fanout import FanOut
from vllmproxy.observers.record import Observer, RequestRecord
from vllmproxy.testing import MemoryObserver


def record(request_id: str) -> RequestRecord:
    return RequestRecord(time=0.0, request_id=request_id, method="GET", route="/")


class Broken:
    """Raises whatever it is told."""

    def started(self) -> None:
        raise RuntimeError("started is broken")

    def finished(self, record: RequestRecord) -> None:
        raise RuntimeError("finished is broken")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the module tells Twisted's log; it is kept from the global publisher."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(fanout, "_log", Logger(observer=found.append))
    return found


def test_everyone_is_told_in_spite_of_one_that_raises(events: list[dict[str, Any]]) -> None:
    first, last = MemoryObserver(), MemoryObserver()
    observers: list[Observer] = [first, Broken(), last]
    everyone = FanOut(observers, seconds=lambda: 0.0)
    everyone.started()
    everyone.started()
    everyone.finished(record("a"))
    for memory in (first, last):
        assert memory.in_flight == 1
        assert [kept.request_id for kept in memory.records] == ["a"]


def test_records_wait_until_they_may_be_offered_and_each_observer_has_them_in_a_row() -> None:
    soon: list[Callable[[], None]] = []
    told: list[tuple[str, str]] = []

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def started(self) -> None:
            told.append((self.name, ""))

        def finished(self, record: RequestRecord) -> None:
            told.append((self.name, record.request_id))

    everyone = FanOut([Named("x"), Named("y")], soon=soon.append)
    everyone.started()
    assert told == [("x", ""), ("y", "")]
    told.clear()
    everyone.finished(record("a"))
    everyone.finished(record("b"))
    assert (told, len(soon)) == ([], 1)
    soon.pop()()
    assert told == [("x", "a"), ("x", "b"), ("y", "a"), ("y", "b")]
    everyone.finished(record("c"))
    assert len(soon) == 1
    everyone.flush()  # the process ends
    assert told[4:] == [("x", "c"), ("y", "c")]
    soon.pop()()
    assert len(told) == 6


def test_one_that_raises_is_logged_once_a_second_with_its_traceback(events: list[dict[str, Any]]) -> None:
    now = 100.0
    everyone = FanOut([Broken()], seconds=lambda: now)
    for _ in range(10):
        everyone.finished(record("a"))
    assert len(events) == 1
    assert "finished is broken" in events[0]["log_failure"].getTraceback()
    assert events[0]["observer"] == "Broken"
    now = 100.9
    everyone.started()
    assert len(events) == 1
    now = 101.0
    everyone.started()
    assert "started is broken" in events[1]["log_failure"].getTraceback()


def test_each_has_its_own_complaint(events: list[dict[str, Any]]) -> None:
    FanOut([Broken(), Broken()], seconds=lambda: 5.0).started()
    assert len(events) == 2
