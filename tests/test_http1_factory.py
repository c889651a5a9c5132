"""How many connections are taken, and whose place a new one gets, in memory."""

from typing import Any

import pytest
from _memory import Hangups, RefusingReceiver, render
from hypothesis import example, given
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.interfaces import IAddress
from twisted.internet.task import Clock

from vllmproxy.http1.factory import RESERVE, ServerFactory
from vllmproxy.http1.stream import Stream
from vllmproxy.relay.headers import TrustedProxies
from vllmproxy.settings_kinds import NETWORK
from vllmproxy.testing import MemoryTransport

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n"


class Door:
    """A server and those who connect to it. Requests are answered when the test says so."""

    def __init__(self, most: int = 0, per_client: int = 0, trusted: str = "") -> None:
        self.clock = Clock()
        self.streams: dict[MemoryTransport, Stream] = {}
        self.open: list[MemoryTransport] = []
        hangups: Any = Hangups()
        self.factory = ServerFactory(
            self.clock,
            self._handle,
            render,
            hangups,
            max_connections=most,
            per_client=per_client,
            client_of=TrustedProxies((NETWORK.convert(trusted),) if trusted else ()).client_of_peer,
        )

    def _handle(self, stream: Stream) -> None:
        transport: Any = stream.channel.transport
        self.streams[transport] = stream
        stream.receiver = RefusingReceiver(stream)

    def connect(self, peer: IAddress | str = "192.0.2.1") -> MemoryTransport:
        address = IPv4Address("TCP", peer, 50_000) if isinstance(peer, str) else peer
        transport = MemoryTransport(self.clock)
        transport.connect(self.factory.buildProtocol(address))
        self.clock.advance(0)
        self.open.append(transport)
        return transport

    def ask(self, transport: MemoryTransport) -> None:
        transport.receive(GET)

    def answer(self, transport: MemoryTransport) -> None:
        self.streams.pop(transport).respond(200, b"OK", b"", b"ok")

    @property
    def alive(self) -> list[int]:
        """Which of those that connected are still there."""
        return [number for number, transport in enumerate(self.open) if not transport.lost]


def test_a_new_connection_gets_the_place_of_the_one_that_was_idle_longest() -> None:
    door = Door(most=4)
    silent, first, second, busy = (door.connect() for _ in range(4))
    for transport in (second, first):
        door.clock.advance(1)
        door.ask(transport)
        door.answer(transport)
    door.ask(busy)
    door.connect()
    assert door.alive == [0, 1, 3, 4]
    door.connect()
    assert door.alive == [0, 3, 4, 5]
    assert not silent.lost
    door.connect()
    assert door.alive == [3, 4, 5, 6]
    assert door.factory.evicted == 3
    assert not door.factory.refused


def test_busy_connections_keep_their_places_and_the_reserve_is_for_those_who_ask_how_it_is() -> None:
    door = Door(most=4)
    for _ in range(4):
        door.ask(door.connect())
    for _ in range(RESERVE):
        door.ask(door.connect())
    assert len(door.alive) == 4 + RESERVE
    door.connect()
    assert len(door.alive) == 4 + RESERVE
    assert door.open[-1].lost
    assert not door.open[-1].sent
    assert door.factory.refused == {"no_place": 1}
    door.answer(door.open[0])
    door.connect()
    assert 0 not in door.alive
    assert not door.open[-1].lost


def test_who_sends_a_body_in_drops_shuts_nobody_out() -> None:
    door = Door(most=3)
    for _ in range(3):
        door.clock.advance(1)
        door.connect().receive(POST + b"x")
    door.clock.advance(1)
    door.open[0].receive(b"x")
    door.open[1].receive(b"x" * 9)  # all of it: it is answered now
    door.connect()
    assert door.alive == [0, 1, 3]
    door.ask(door.open[3])
    door.connect()
    assert door.alive == [1, 3, 4]
    assert door.factory.evicted == 2
    assert not door.factory.refused


def stuck(door: Door) -> MemoryTransport:
    """Return one that has asked thrice and does not read the first answer, so that the second is not begun."""
    transport = door.connect()
    transport.stall()
    transport.receive(GET * 3)
    door.streams.pop(transport).respond(200, b"OK", b"", b"x" * 100_000)
    assert transport not in door.streams
    return transport


def test_who_asks_and_does_not_read_the_answers_shuts_nobody_out() -> None:
    """Nothing is under way for such a client, nor does it wait for anything that has a deadline of its own."""
    door = Door(most=2)
    for _ in range(2 + RESERVE):
        door.clock.advance(1)
        stuck(door)
    assert door.alive == [RESERVE, RESERVE + 1]
    assert not door.factory.refused


def test_who_reads_slowly_what_is_under_way_keeps_its_place() -> None:
    door = Door(most=1)
    slow = door.connect()
    slow.stall()
    door.ask(slow)
    stream = door.streams[slow]
    stream.start_response(200, b"OK", b"", length=None)
    stream.write(b"x" * 100_000)
    door.clock.advance(1)
    others = [stuck(door) for _ in range(RESERVE)]
    door.connect()
    assert not slow.lost
    assert others[0].lost


def test_who_has_been_awaited_longest_goes_first() -> None:
    door = Door(most=3)
    silent = door.connect()
    door.clock.advance(1)
    reads_nothing = stuck(door)
    door.clock.advance(1)
    sends_nothing = door.connect()
    sends_nothing.receive(POST + b"x")
    for transport in (silent, reads_nothing, sends_nothing):
        assert not transport.lost
        door.ask(door.connect())
        assert transport.lost


def test_an_address_may_have_only_so_many_and_does_not_drive_others_out() -> None:
    door = Door(most=4, per_client=2)
    for peer in ("192.0.2.1", "192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.1"):
        door.connect(peer)
    assert door.alive == [0, 1, 2, 3]
    assert door.factory.refused == {"client_full": 1}
    assert door.factory.evicted == 0
    door.open[0].reset_from_peer()
    door.connect("192.0.2.1")
    assert door.alive == [1, 2, 3, 5]


@pytest.mark.parametrize("peer", ["10.1.2.3", UNIXAddress("/run/x"), None])
def test_trusted_proxies_and_unix_sockets_are_many_clients(peer: IAddress | str | None) -> None:
    door = Door(per_client=1, trusted="10.0.0.0/8")
    for _ in range(3):
        door.connect(peer)  # type: ignore[arg-type]
    assert door.alive == [0, 1, 2]


def test_without_a_limit_any_number_is_taken() -> None:
    door = Door()
    for _ in range(300):
        door.connect()
    assert len(door.alive) == 300


STEPS = st.lists(st.tuples(st.sampled_from(["connect", "ask", "answer", "leave", "wait"]), st.integers(0, 9)))


@example([("connect", 0), ("ask", 0), ("connect", 0), ("answer", 0)], 1, 0)  # both are left, in the reserve
@given(STEPS, st.integers(0, 3), st.integers(0, 2))
def test_nothing_is_leaked_and_nobody_who_asks_is_cut_off_whatever_the_order(
    steps: list[tuple[str, int]], most: int, per_client: int
) -> None:
    door = Door(most=most, per_client=per_client)
    for what, number in steps:
        there = [transport for transport in door.open if not transport.lost]
        if what == "connect":
            door.connect(f"192.0.2.{number % 3}")
            if len(there) >= most > 0 and len(there) > len(door.streams):  # one of them was not busy
                assert len(door.alive) <= len(there)
        elif what == "wait":
            door.clock.advance(number)
        elif number < len(there):
            chosen = there[number]
            if what == "leave":
                chosen.reset_from_peer()
                door.streams.pop(chosen, None)
            elif what == "answer" and chosen in door.streams:
                door.answer(chosen)
            elif what == "ask" and chosen not in door.streams:
                door.ask(chosen)
        door.clock.advance(0)
        assert all(not transport.lost for transport in door.streams)
        assert door.factory.connections.taken == len(door.alive)
    door.factory.close()
    door.clock.advance(0)
    assert door.factory.connections.taken == 0
    assert not door.factory.channels
    assert not door.clock.getDelayedCalls()
