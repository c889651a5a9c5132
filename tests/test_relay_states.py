"""Every event in every state of an exchange, and any order in which things can happen to it, in memory."""

from itertools import product
from typing import Any

import pytest
from _memory import OK, House, caller_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_relay_exchange import GET, POST, STREAM, SWITCH, WEBSOCKET
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from vllmproxy.errors import AuthError
from vllmproxy.http1.answer import AnswerLost
from vllmproxy.http1.message import WireError
from vllmproxy.http1.places import Places
from vllmproxy.keys.gate import ANONYMOUS
from vllmproxy.relay.exchange import _TABLE, Event, Exchange, State
from vllmproxy.relay.line import Line
from vllmproxy.relay.waits import LOOKS, Timeouts

#: Somebody whose requests are read before they are forwarded, and counted in every way.
HOLDER = caller_of(aliases={"fast": "real"}, rpm_limit=1000, tpm_limit=10**9, max_parallel_requests=9)


class Somebody:
    """Takes a place, or stands in the line, and does nothing with it."""

    def feed(self, event: Event) -> None:
        assert event is Event.PLACED


SOMEBODY: Any = Somebody()


def full_line() -> Line:
    """Return a line before one place, which somebody has."""
    places: Places[Any] = Places(1, line=2)
    places.enter(SOMEBODY, "")
    return Line(places)


def exchange_in(house: House, state: State) -> Exchange:
    """Bring one exchange to ``state``."""
    house.gate.hold = state is State.ADMITTING
    if state is State.QUEUED:
        house.relay.line = full_line()
    if state is State.HOLDING:
        house.gate.caller = HOLDER
    house.client.receive(WEBSOCKET if state is State.TUNNELLING else POST)
    exchange = house.streams[0].receiver
    if state is State.ANSWERING:
        house.wires[0].receive(STREAM)
    elif state is State.TUNNELLING:
        house.wires[0].receive(SWITCH)
    elif state is State.OVER:
        house.client.reset_from_peer()
    assert isinstance(exchange, Exchange)
    assert exchange._state is state
    return exchange


ARGUMENTS: dict[Event, tuple[Any, ...]] = {
    Event.ADMITTED: (ANONYMOUS,),
    Event.RESERVED: (None,),
    Event.PIECE: (b"hello",),
    Event.REFUSED: (AuthError("no"),),
    Event.NO_ANSWER: (Failure(AnswerLost()),),
    Event.BODY_FAILED: (Failure(AnswerLost()),),
    Event.UPLOAD_FAILED: (WireError(400, "no"),),
}


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)), ids=str)
def test_every_event_in_every_state(state: State, event: Event) -> None:
    house = House()
    exchange = exchange_in(house, state)
    before = len(house.observer.records)
    known = (state, event) in _TABLE
    if known and event is Event.ANSWERED:
        house.wires[0].receive(STREAM)
    else:
        for _ in range(LOOKS if (state, event) == (State.TUNNELLING, Event.LATE) else 1):
            exchange.feed(event, *ARGUMENTS.get(event, ()))
    assert (exchange._state is not state) is (known and event is not Event.PIECE)
    if (state, event) == (State.ANSWERING, Event.CLIENT_GONE):
        assert house.wires[0].ending == "abort"
        house.turn()
    goes_on = (Event.ADMITTED, Event.PIECE, Event.HELD, Event.PLACED, Event.RESERVED, Event.ANSWERED)
    ends = known and event not in goes_on
    assert len(house.observer.records) == before + ends
    house.client.reset_from_peer()
    house.turn()
    assert len(house.observer.records) == 1
    assert house.observer.in_flight == 0
    if event not in (Event.NO_ANSWER, Event.BODY_ENDED, Event.BODY_FAILED):  # what a connection says of its own end
        assert all(wire.lost for wire in house.wires)


# any order at all


class Play:
    """Does what a list of words says, where it makes sense."""

    def __init__(self, house: House) -> None:
        self.house = house

    def __call__(self, word: str) -> None:
        getattr(self, "do_" + word)()

    def do_get(self) -> None:
        self.house.client.receive(GET)

    def do_post(self) -> None:
        self.house.client.receive(POST)

    def do_body(self) -> None:
        self.house.client.receive(b"hello")

    def do_websocket(self) -> None:
        self.house.client.receive(WEBSOCKET)

    def do_client_fin(self) -> None:
        self.house.client.close_from_peer()

    def do_client_rst(self) -> None:
        self.house.client.reset_from_peer()

    def do_client_stalls(self) -> None:
        self.house.client.stall()

    def do_client_reads(self) -> None:
        self.house.client.drain()

    def do_hold_gate(self) -> None:
        self.house.gate.hold = True

    def do_admit(self) -> None:
        self.house.gate.hold = False
        while self.house.gate.waiting:
            self.house.gate.waiting.pop().callback(self.house.gate.caller)

    def do_holder(self) -> None:
        self.house.gate.caller = HOLDER

    def do_revoke(self) -> None:
        for token in self.house.relay.running():
            self.house.relay.revoke(token, forwarded=True)

    def do_refuse(self) -> None:
        self.house.gate.hold = False
        while self.house.gate.waiting:
            self.house.gate.waiting.pop().errback(AuthError("no"))

    def do_occupy(self) -> None:
        self.do_vacate()
        self.house.relay.line.places.enter(SOMEBODY, "")

    def do_vacate(self) -> None:
        self.house.relay.line.leave(SOMEBODY)

    def do_hold_connect(self) -> None:
        self.house.endpoint.hold = True

    def do_connect(self) -> None:
        self.house.endpoint.hold = False
        self.house.endpoint.go()

    def _upstream(self, data: bytes) -> None:
        for wire in self.house.wires[-1:]:
            if not wire.lost:
                wire.receive(data)

    def do_answer(self) -> None:
        self._upstream(OK)

    def do_head(self) -> None:
        self._upstream(STREAM)

    def do_piece(self) -> None:
        self._upstream(b"5\r\nhello\r\n")

    def do_large_piece(self) -> None:
        self._upstream(b"11170\r\n%s\r\n" % (b"x" * 70_000))

    def do_last(self) -> None:
        self._upstream(b"0\r\n\r\n")

    def do_inform(self) -> None:
        self._upstream(b"HTTP/1.1 103 Early Hints\r\n\r\n")

    def do_switch(self) -> None:
        self._upstream(SWITCH)

    def do_garbage(self) -> None:
        self._upstream(b"\x00\r\n")

    def do_upstream_fin(self) -> None:
        for wire in self.house.wires[-1:]:
            wire.close_from_peer()

    def do_upstream_rst(self) -> None:
        for wire in self.house.wires[-1:]:
            wire.reset_from_peer()

    def do_upstream_stalls(self) -> None:
        for wire in self.house.wires[-1:]:
            wire.stall()

    def do_upstream_reads(self) -> None:
        for wire in self.house.wires[-1:]:
            wire.drain()

    def do_turn(self) -> None:
        self.house.turn()

    def do_wait(self) -> None:
        self.house.clock.advance(601)


WORDS = [name.removeprefix("do_") for name in dir(Play) if name.startswith("do_")]


@given(st.lists(st.sampled_from(WORDS), max_size=14), st.sampled_from(["get", "post", "websocket"]))
@settings(max_examples=600)
def test_one_record_whatever_happens_in_whatever_order(words: list[str], first: str) -> None:
    house = House(line=Line(Places(1, line=1)), timeouts=Timeouts(total=5000))
    play = Play(house)
    play("hold_gate") if "admit" in words or "refuse" in words else None
    for word in [first, *words]:
        play(word)
    for wire in house.wires:
        wire.drain()
    house.client.reset_from_peer()
    house.turn()
    play("refuse")
    play("connect")
    play("vacate")
    house.turn()
    assert (house.relay.line.places.taken, house.relay.line.places.waiting) == (0, 0)
    assert len(house.observer.records) == len(house.streams)
    assert house.observer.in_flight == 0
    assert all(stream.over for stream in house.streams)
    assert house.relay.running() == []
    assert house.relay.held == 0
    assert all(not book.journal.open for book in house.relay.books._books)
    house.clock.advance(4)  # idle connections to the upstream expire; the others are gone with their client
    house.turn()
    assert all(wire.lost for wire in house.wires)
    Deferred.fromCoroutine(house.relay.close())
    Deferred.fromCoroutine(house.relay.books.close())
    house.factory.close()
    assert not house.clock.getDelayedCalls()
