"""One worker, as its parent watches over it, with a clock for time and nothing for a process."""

import signal
from typing import Any

import pytest
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import LogEvent

from vllmproxy.workers.backoff import LONGEST, YOUNG, Backoff
from vllmproxy.workers.channel import Channel
from vllmproxy.workers.process import Ending
from vllmproxy.workers.seat import ABORTING, HURRYING, STARTING, Seat, State

LIMIT = 30.0
KILLED = Ending(None, "by SIGKILL")


class Process:
    """Notes what is done to it."""

    pid = 7

    def __init__(self) -> None:
        self.channel = Channel(lambda kind, body: None)
        self.channel.makeConnection(StringTransport())
        self.signals: list[signal.Signals] = []

    def kill(self, number: signal.Signals) -> None:
        self.signals.append(number)

    @property
    def said(self) -> bytes:
        transport: Any = self.channel.transport
        said: bytes = transport.value()
        return said


class House:
    """A seat and what becomes of it."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.processes: list[Process] = []
        self.states: list[State] = []
        self.fault: OSError | None = None
        self.seat = Seat(1, self.clock, self._launch, lambda seat: self.states.append(seat.state), LIMIT)

    def _launch(self, seat: Seat) -> Process:
        if self.fault is not None:
            raise self.fault
        self.processes.append(Process())
        return self.processes[-1]

    def live(self, seconds: float) -> None:
        """Let time pass for a worker that shows signs of life."""
        for _ in range(int(seconds)):
            self.clock.advance(1)
            self.seat.beat(["shown"])
            assert self.seat.look()


@pytest.fixture
def house(logged_errors: list[LogEvent]) -> House:
    made = House()
    made.seat.start()
    return made


@pytest.fixture(autouse=True)
def _deaths_are_logged(logged_errors: list[LogEvent]) -> Any:
    yield
    logged_errors.clear()


def test_started_ready_stopped_over(house: House) -> None:
    house.seat.accepts()
    deaf: list[Any] = []
    house.seat.stop().addCallback(deaf.append)
    (process,) = house.processes
    assert process.said.endswith(b'[1,"stop",null]')
    assert deaf == []
    process.channel.stringReceived(b'[1,"answer",null]')
    assert deaf == [None]
    assert house.states == [State.STARTING, State.READY, State.STOPPING]
    house.seat.ended(Ending(0, "with status 0"))
    assert house.states[-1] is State.OVER
    assert len(house.processes) == 1
    assert not house.clock.getDelayedCalls()


def test_one_that_dies_is_started_again_at_once_and_says_why(house: House, logged_errors: list[LogEvent]) -> None:
    house.seat.accepts()
    house.live(20)
    house.seat.ended(KILLED)
    (event,) = logged_errors
    assert (event["number"], event["how"], event["when"]) == (1, "by SIGKILL", "now")
    house.clock.advance(0)
    assert len(house.processes) == 2
    assert house.seat.restarts == 1
    assert house.seat.shown == []
    assert house.states == [State.STARTING, State.READY, State.WAITING, State.STARTING]


def test_one_that_was_asked_to_stop_by_others_is_started_again(house: House) -> None:
    house.seat.accepts()
    house.seat.accepts_no_more()
    assert house.seat.state is State.LEAVING
    house.seat.ended(Ending(0, "with status 0"))
    house.clock.advance(0)
    assert house.states[1:] == [State.READY, State.LEAVING, State.WAITING, State.STARTING]


def test_one_that_was_asked_to_stop_by_others_and_then_by_us_is_not(house: House) -> None:
    house.seat.accepts()
    house.seat.accepts_no_more()
    house.seat.stop()
    assert b'"stop"' in house.processes[0].said
    house.seat.accepts_no_more()
    house.seat.ended(Ending(0, "with status 0"))
    assert house.seat.state is State.OVER


def test_one_that_keeps_dying_is_started_less_and_less_often(house: House) -> None:
    waits = []
    for _ in range(8):
        house.seat.ended(KILLED)
        (call,) = house.clock.getDelayedCalls()
        waits.append(call.getTime() - house.clock.seconds())
        house.clock.advance(waits[-1])
    assert waits == [0, 1, 2, 4, 8, 16, 30, 30]
    house.live(YOUNG)
    house.seat.ended(KILLED)
    assert house.clock.getDelayedCalls()[0].getTime() == house.clock.seconds()


def test_one_that_cannot_even_be_started_is_tried_again(house: House, logged_errors: list[LogEvent]) -> None:
    house.fault = OSError(12, "Cannot allocate memory")
    house.seat.ended(KILLED)
    house.clock.advance(0)
    house.clock.advance(0)
    assert "Cannot allocate memory" in logged_errors[-1]["how"]
    assert house.seat.look()
    house.fault = None
    house.clock.advance(1)
    assert house.seat.state is State.STARTING
    assert len(house.processes) == 2


def test_the_longest_wait_is_kept_to() -> None:
    backoff = Backoff()
    assert max(backoff.died(0) for _ in range(5000)) == LONGEST


def test_one_that_is_stuck_is_ended_and_where_that_does_not_help_killed(house: House) -> None:
    house.seat.accepts()
    house.live(5)
    (process,) = house.processes
    house.clock.advance(LIMIT)
    assert house.seat.look()
    assert process.signals == []
    house.clock.advance(1)
    assert house.seat.look()
    assert process.signals == [signal.SIGABRT]
    house.clock.advance(ABORTING - 1)
    assert house.seat.look()
    assert process.signals == [signal.SIGABRT]
    house.clock.advance(1)
    assert house.seat.look()
    assert process.signals == [signal.SIGABRT, signal.SIGKILL]
    house.clock.advance(ABORTING)
    assert not house.seat.look()  # systemd has to
    house.seat.ended(KILLED)
    assert house.seat.look()
    house.clock.advance(0)
    house.live(LIMIT)
    assert house.processes[-1].signals == []


def test_one_that_is_to_end_at_once_is_killed_if_it_does_not(house: House) -> None:
    house.seat.stop()
    house.seat.hurry()
    (process,) = house.processes
    assert b'"hurry"' in process.said
    house.clock.advance(HURRYING - 0.1)
    assert process.signals == []
    house.clock.advance(0.1)
    assert process.signals == [signal.SIGKILL]


def test_who_ends_at_once_is_not_killed(house: House) -> None:
    house.seat.stop()
    house.seat.hurry()
    house.seat.ended(KILLED)
    house.seat.hurry()
    house.clock.advance(HURRYING)
    assert house.processes[0].signals == []


def test_a_start_may_take_longer(house: House) -> None:
    house.clock.advance(STARTING)
    assert house.seat.look()
    assert house.processes[0].signals == []
    house.clock.advance(1)
    assert house.seat.look()
    assert house.processes[0].signals == [signal.SIGABRT]


def test_a_parent_that_did_not_listen_forgives(house: House) -> None:
    house.live(1)
    house.clock.advance(1000)
    house.seat.forgive()
    assert house.seat.look()
    assert house.processes[0].signals == []


def test_a_stop_while_it_waits_to_be_started_again(house: House) -> None:
    house.seat.ended(KILLED)
    house.clock.advance(0)
    house.seat.ended(KILLED)
    assert house.seat.state is State.WAITING
    deaf: list[Any] = []
    house.seat.stop().addCallback(deaf.append)
    assert (deaf, house.seat.state) == ([None], State.OVER)
    assert not house.clock.getDelayedCalls()
    house.seat.start()
    assert len(house.processes) == 2


def test_one_that_dies_while_it_stops_is_not_started_again(house: House) -> None:
    deaf: list[Any] = []
    house.seat.stop().addCallback(deaf.append)
    house.processes[0].channel.connectionLost()
    house.seat.ended(KILLED)
    assert deaf == [None]
    assert house.seat.state is State.OVER
    assert not house.clock.getDelayedCalls()


def test_a_stop_before_it_is_told_that_it_could_not_be_started() -> None:
    house = House()
    house.fault = OSError(12, "Cannot allocate memory")
    house.seat.start()
    deaf: list[Any] = []
    house.seat.stop().addCallback(deaf.append)
    assert deaf == [None]
    house.clock.advance(0)
    assert house.seat.state is State.OVER
    assert not house.clock.getDelayedCalls()
