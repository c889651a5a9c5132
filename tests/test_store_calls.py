"""Deadlines, cancellation and closing, in virtual time."""

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from vllmproxy.store.calls import Calls
from vllmproxy.store.interface import StoreUnavailable


def failure_of(call: Deferred[str]) -> Failure:
    caught: list[Failure] = []
    call.addErrback(caught.append)
    assert len(caught) == 1
    return caught[0]


def test_a_result_in_time_passes_and_leaves_no_timer() -> None:
    clock, source = Clock(), Deferred[str]()
    results: list[str] = []
    Calls(clock).run(source, 2).addCallback(results.append)
    clock.advance(1.9)
    source.callback("here")
    assert results == ["here"]
    assert clock.getDelayedCalls() == []


def test_the_deadline_is_kept_and_told_of_first() -> None:
    clock, source, told = Clock(), Deferred[str](), list[str]()
    call = Calls(clock).run(source, 2, lambda: told.append("late"))
    clock.advance(1.999)
    assert (told, source.called) == ([], False)
    clock.advance(0.001)
    assert told == ["late"]
    failure = failure_of(call)
    assert failure.type is StoreUnavailable
    assert "2 s" in str(failure.value)
    source.callback("too late")  # from a thread that could not be stopped


def test_a_failure_in_time_passes() -> None:
    clock, source = Clock(), Deferred[str]()
    call = Calls(clock).run(source, 2)
    source.errback(KeyError())
    assert failure_of(call).type is KeyError
    assert clock.getDelayedCalls() == []


def test_who_cancels_gets_cancelled() -> None:
    clock, source, told = Clock(), Deferred[str](), list[str]()
    call = Calls(clock).run(source, 2, lambda: told.append("late"))
    call.cancel()
    assert failure_of(call).type is CancelledError
    assert (told, clock.getDelayedCalls()) == ([], [])


def test_end_fails_all_that_is_pending_and_no_more() -> None:
    clock = Clock()
    calls = Calls(clock)
    done, first, second = Deferred[str](), Deferred[str](), Deferred[str]()
    pending = [calls.run(source, 2) for source in (done, first, second)]
    done.callback("done")
    calls.end()
    calls.end()
    assert pending[0].result == "done"
    assert [failure_of(call).type for call in pending[1:]] == [StoreUnavailable] * 2
    assert clock.getDelayedCalls() == []
    later = calls.run(Deferred[str](), 2)
    assert not later.called
    later.cancel()
    with pytest.raises(CancelledError):
        failure_of(later).raiseException()


def test_a_process_that_was_too_busy_to_look_waits_once_more() -> None:
    clock, source, told = Clock(), Deferred[str](), list[str]()
    results: list[str] = []
    call = Calls(clock).run(source, 2, lambda: told.append("late"))
    clock.advance(2.5)
    assert (told, source.called) == ([], False)
    clock.advance(1.999)
    assert told == []
    clock.advance(0.001)
    assert told == ["late"]
    assert failure_of(call).type is StoreUnavailable

    answered = Calls(clock).run(Deferred[str](), 2)
    clock.advance(2.5)
    answered.callback("it had been there")
    answered.addCallback(results.append)
    assert results == ["it had been there"]
    assert clock.getDelayedCalls() == []
