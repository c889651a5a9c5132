"""Looking keys up in Redis, with the time and the answers in the test's hands; test_store_redis.py has a real one."""

from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from txredisapi import ConnectionError as RedisConnectionError

from vllmproxy.keys.key import VirtualKey
from vllmproxy.store.calls import LAG
from vllmproxy.store.interface import StoreUnavailable
from vllmproxy.store.link import Wire
from vllmproxy.store.lookups import Lookups
from vllmproxy.store.rows import dump_row
from vllmproxy.testing import MemoryTransport

ONE = VirtualKey(token="one", key_name="sk-...one")
TWO = VirtualKey(token="two", key_name="sk-...two", rpm_limit=3)
TIMEOUT = 0.2


class Link:
    """One connection, which the test answers."""

    def __init__(self, clock: Clock) -> None:
        self.wire = Wire()
        self.transport = MemoryTransport(clock)
        self.transport.connect(self.wire)
        self.ready: Wire | None = self.wire
        self.waiting: Deferred[Wire] = Deferred()
        self.told: list[tuple[Wire | None, float]] = []

    def get(self) -> Deferred[Wire]:
        return self.waiting if self.ready is None else succeed(self.ready)

    def late(self, wire: Wire | None, started: float) -> None:
        self.told.append((wire, started))


class House:
    def __init__(self) -> None:
        self.clock = Clock()
        self.link = Link(self.clock)
        link: Any = self.link
        self.lookups = Lookups(link, self.clock, TIMEOUT, "the Redis")

    def get(self, token: str) -> list[VirtualKey | Failure | None]:
        """Look a key up; what comes of it will be in the list."""
        answers: list[VirtualKey | Failure | None] = []
        self.lookups.get(token).addBoth(answers.append)
        return answers

    def reply(self, *rows: str | None) -> None:
        parts = [b"$-1\r\n" if row is None else b"$%d\r\n%b\r\n" % (len(row), row.encode()) for row in rows]
        self.link.transport.receive(b"".join(parts))


@pytest.fixture
def house() -> House:
    return House()


def why(answers: list[VirtualKey | Failure | None]) -> str:
    (failure,) = answers
    assert isinstance(failure, Failure)
    assert isinstance(failure.value, StoreUnavailable)
    return str(failure.value)


def test_answers_come_in_order(house: House) -> None:
    one, nobody, two = house.get("one"), house.get("nobody"), house.get("two")
    asked = b"*3\r\n$4\r\nHGET\r\n$19\r\nvllmproxy:{one}:key\r\n$3\r\nrow\r\n"
    assert house.link.transport.take().startswith(asked)
    house.reply(dump_row(ONE), None, dump_row(TWO))
    assert (one, nobody, two) == ([ONE], [None], [TWO])
    house.clock.advance(1)
    assert house.link.told == []
    assert not house.clock.getDelayedCalls()


def test_who_gives_up_leaves_its_place(house: House) -> None:
    leaving = house.lookups.get("one")
    two = house.get("two")
    left: list[Failure] = []
    leaving.addErrback(left.append)
    leaving.cancel()
    assert left[0].check(CancelledError)
    house.reply(dump_row(ONE), dump_row(TWO))
    assert two == [TWO]


def test_one_without_an_answer_is_late(house: House) -> None:
    one = house.get("one")
    house.clock.advance(TIMEOUT)
    assert one == []
    house.clock.advance(0.01)
    assert why(one) == "the store did not answer within 0.2 s"
    assert house.link.told == [(house.link.wire, 0.0)]
    two = house.get("two")
    house.reply(dump_row(ONE), dump_row(TWO))
    assert two == [TWO]


def test_a_busy_process_gives_it_once_more(house: House) -> None:
    one, two = house.get("one"), house.get("two")
    house.clock.advance(TIMEOUT + 2 * LAG)
    assert house.link.told == []
    house.reply(dump_row(ONE))
    assert (one, two) == ([ONE], [])
    house.clock.advance(TIMEOUT + 2 * LAG)
    assert "did not answer" in why(two)


def test_it_waits_for_a_connection(house: House) -> None:
    house.link.ready = None
    one, two = house.get("one"), house.get("two")
    assert house.link.transport.take() == b""
    house.clock.advance(TIMEOUT + 0.01)
    assert "did not answer" in why(one)
    assert house.link.told == [(None, 0.0)] * 2
    house.link.waiting.callback(house.link.wire)
    assert house.link.transport.take() == b""  # nobody waits for it any more
    assert len(two) == 1


def test_there_is_no_connection(house: House) -> None:
    house.link.ready = None
    one = house.get("one")
    house.link.waiting.errback(StoreUnavailable("refused"))
    assert why(one) == "refused"
    house.clock.advance(1)
    assert house.link.told == []


def test_a_lost_connection(house: House) -> None:
    one = house.get("one")
    house.link.wire.connectionLost(Failure(RedisConnectionError("gone")))
    assert why(one).startswith("the Redis: ")
    assert why(house.get("two")) == "the Redis: Not connected"


@pytest.mark.parametrize("row", ["", "{}", "3", "[" * 100_000])
def test_something_else_than_a_row_is_a_failure(house: House, row: str) -> None:
    one, two = house.get("one"), house.get("two")
    house.reply(row, dump_row(TWO))
    (failure,) = one
    assert isinstance(failure, Failure)
    assert two == [TWO]


def test_closing_fails_all(house: House) -> None:
    one, two = house.get("one"), house.get("two")
    house.lookups.end()
    assert why(one) == why(two) == "the store was closed"
    house.reply(dump_row(ONE), dump_row(TWO))
    assert len(one) == len(two) == 1
