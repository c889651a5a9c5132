"""The channel between parent and worker, both ends in memory."""

from typing import Any

import pytest
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import LogEvent
from twisted.python.failure import Failure

from vllmproxy.workers.channel import Channel, ChannelLost


class Pair:
    """Two ends; :meth:`carry` brings what each has said to the other, in pieces of one byte."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []
        self.answer: Any = None
        self.lost: list[str] = []
        self.ours = Channel(lambda kind, body: None, lambda: self.lost.append("ours"))
        self.theirs = Channel(self._hear)
        for channel in (self.ours, self.theirs):
            channel.makeConnection(StringTransport())

    def _hear(self, kind: str, body: Any) -> Any:
        self.heard.append((kind, body))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def carry(self) -> None:
        for one, other in ((self.ours, self.theirs), (self.theirs, self.ours)):
            transport: Any = one.transport
            data, _ = transport.value(), transport.clear()
            for position in range(len(data)):
                other.dataReceived(data[position : position + 1])


@pytest.fixture
def pair() -> Pair:
    return Pair()


def results(deferred: Deferred[Any]) -> list[Any]:
    """What it fired with; of a failure, its exception."""
    found: list[Any] = []
    deferred.addBoth(lambda result: found.append(result.value if isinstance(result, Failure) else result))
    return found


def test_what_is_told_arrives_in_order(pair: Pair) -> None:
    pair.ours.tell("ready")
    pair.ours.tell("beat", ["näh\n", {"a": [1, 2.5, None]}, "x" * 100_000])
    pair.carry()
    assert pair.heard == [("ready", None), ("beat", ["näh\n", {"a": [1, 2.5, None]}, "x" * 100_000])]


def test_what_is_asked_is_answered_each_with_its_own(pair: Pair) -> None:
    pair.answer = first = Deferred()
    one = results(pair.ours.ask("stop", 1))
    pair.carry()
    pair.answer = {"second": True}
    other = results(pair.ours.ask("shown"))
    pair.carry()
    assert (one, other) == ([], [{"second": True}])
    first.callback("first")
    pair.carry()
    assert one == ["first"]


def test_an_answer_that_does_not_come_in_time_and_one_that_comes_then(pair: Pair) -> None:
    clock = Clock()
    pair.answer = late = Deferred()
    asked = results(pair.ours.ask("shown", within=(1.0, clock)))
    pair.carry()
    clock.advance(1)
    assert [type(each) for each in asked] == [TimeoutError]
    late.callback("late")
    pair.carry()
    assert len(asked) == 1
    pair.answer = "next"
    after = results(pair.ours.ask("shown", within=(1.0, clock)))
    pair.carry()
    assert after == ["next"]
    assert not clock.getDelayedCalls()


def test_the_other_end_is_gone(pair: Pair) -> None:
    asked = results(pair.ours.ask("stop"))
    pair.ours.connectionLost(Failure(ConnectionDone()))
    assert [type(each) for each in asked] == [ChannelLost]
    assert pair.lost == ["ours"]
    assert [type(each) for each in results(pair.ours.ask("stop"))] == [ChannelLost]
    pair.ours.tell("beat")
    assert [type(each) for each in results(Channel(print).ask("before it is connected"))] == [ChannelLost]


def test_a_handler_that_fails_is_logged_and_the_channel_goes_on(pair: Pair, logged_errors: list[LogEvent]) -> None:
    pair.answer = ValueError("no")
    pair.ours.tell("reload")
    pair.carry()
    assert [event["kind"] for event in logged_errors] == ["reload"]
    logged_errors.clear()
    pair.answer = "yes"
    asked = results(pair.ours.ask("reload"))
    pair.carry()
    assert asked == ["yes"]
