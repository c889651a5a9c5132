"""What an exchange waits for, and how long, in memory with a clock."""

from collections.abc import Iterator

import pytest
from _memory import OK, House
from hypothesis import given
from hypothesis import strategies as st
from test_relay_exchange import GET, POST, STREAM, SWITCH, WEBSOCKET

from vllmproxy.keys.policy import parse_route
from vllmproxy.relay.waits import Silence, Timeouts

PIECE = b"5\r\nhello\r\n"


def seconds_until_cut(house: House, limit: int = 5000) -> int:
    """Return how many seconds pass until the client is reset."""
    for passed in range(limit):
        if house.client.ending == "abort" or house.client.lost:
            return passed
        house.clock.advance(1)
    raise AssertionError("never")


def answering(house: House, *pieces: bytes) -> None:
    """Bring a stream under way."""
    house.client.receive(GET)
    house.wires[0].receive(STREAM + b"".join(pieces))


def test_an_answer_that_stops_is_cut_on_both_sides() -> None:
    house = House(timeouts=Timeouts(between_bytes=100))
    answering(house, PIECE)
    for _ in range(20):
        house.clock.pump([1] * 90)
        house.wires[0].receive(PIECE)
    assert 100 <= seconds_until_cut(house) <= 130
    assert not house.client.sent.endswith(b"0\r\n\r\n")
    assert house.wires[0].ending == "abort"
    assert (house.record.ended, house.record.error, house.record.status) == ("upstream_failed", "stalled", 200)


@pytest.mark.parametrize("route", ["/v1/models", "/v1"])
def test_the_first_byte_of_a_body_has_the_time_of_the_first_byte(route: str) -> None:
    """vLLM sends the head of a stream before it begins with the prompt."""
    timeouts = Timeouts(first_byte=5, first_byte_for=((parse_route(route), 300.0),), between_bytes=10)
    house = House(timeouts=timeouts)
    house.client.receive(GET)
    house.clock.pump([1] * 290)
    house.wires[0].receive(STREAM)
    assert 300 <= seconds_until_cut(house) <= 302


def test_of_several_routes_the_longest_counts() -> None:
    routes = [("/v1", 20.0), ("/v1/models", 40.0), ("/v1/mod", 60.0)]
    house = House(timeouts=Timeouts(first_byte=5, first_byte_for=tuple((parse_route(r), s) for r, s in routes)))
    late: list[tuple[bytes, int]] = []
    for path in (b"/v1/models", b"/v1/models/m", b"/v1/score", b"/version"):
        house.client.receive(b"GET /vllm%s HTTP/1.1\r\nHost: h\r\n\r\n" % path)
        passed = 0
        while not house.client.sent.startswith(b"HTTP/1.1 504 "):
            house.clock.advance(1)
            passed += 1
        house.client.take()
        late.append((path, passed))
    expected = [(b"/v1/models", 40), (b"/v1/models/m", 40), (b"/v1/score", 20), (b"/version", 5)]
    assert [path for path, _ in late] == [path for path, _ in expected]
    assert all(least <= passed <= least + 2 for (_, passed), (_, least) in zip(late, expected, strict=True))


def test_a_client_that_does_not_read_is_no_fault_of_the_upstreams() -> None:
    house = House(timeouts=Timeouts(between_bytes=10))
    house.factory.write_deadlines.close()
    answering(house, PIECE)
    house.client.stall()
    house.wires[0].receive(b"11170\r\n%s\r\n" % (b"x" * 70_000))
    house.clock.pump([1] * 500)
    assert not house.client.ending
    house.client.drain()
    assert 10 <= seconds_until_cut(house) <= 25


@pytest.mark.parametrize("when", ["admitting", "uploading", "waiting", "answering"])
def test_the_whole_of_a_request_may_have_a_time(when: str) -> None:
    house = House(timeouts=Timeouts(total=50))
    house.gate.hold = when == "admitting"
    house.client.receive(POST if when == "uploading" else POST + b"hello")
    if when == "answering":
        house.wires[0].receive(STREAM)
        for _ in range(48):
            house.clock.advance(1)
            house.wires[0].receive(PIECE)
    else:
        house.clock.pump([1] * 48)
    assert not house.observer.records
    house.clock.pump([1] * 4)
    assert (house.record.ended, house.record.status) == ("refused", 200 if when == "answering" else 504)
    if when == "answering":
        assert house.client.ending == "abort"
        assert house.record.error == "total_timeout"
    else:
        assert house.client.sent.startswith(b"HTTP/1.1 504 ")
    house.turn()
    assert all(wire.lost for wire in house.wires)


def test_a_silent_tunnel_ends_and_a_busy_one_does_not() -> None:
    house = House(timeouts=Timeouts(tunnel_idle=60, total=100))
    house.client.receive(WEBSOCKET)
    house.wires[0].receive(SWITCH)
    sides: Iterator[bool] = iter([True, False] * 20)
    for to_upstream in sides:
        house.clock.pump([1] * 50)
        (house.client if to_upstream else house.wires[0]).receive(b"\x89\x00")
        assert not house.client.ending
    assert 60 <= seconds_until_cut(house) <= 80
    assert house.wires[0].ending == "abort"
    assert (house.record.ended, house.record.status) == ("upstream_failed", 101)
    assert house.record.error == "stalled"


def test_zero_switches_a_wait_off() -> None:
    house = House(timeouts=Timeouts(first_byte=0, between_bytes=0, tunnel_idle=0))
    answering(house, PIECE)
    house.clock.pump([60] * 600)
    house.wires[0].receive(b"0\r\n\r\n")
    assert house.record.ended == "done"
    house.client.receive(WEBSOCKET)
    house.wires[-1].receive(SWITCH)
    house.clock.pump([60] * 600)
    assert not house.client.ending


def test_nothing_waits_behind_an_answer() -> None:
    house = House(timeouts=Timeouts(first_byte=5, between_bytes=5, total=5))
    house.client.receive(GET)
    house.wires[0].receive(OK)
    house.clock.pump([1] * 20)
    assert not house.client.ending
    assert house.record.ended == "done"


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 4))
def test_a_silence_is_as_many_looks_at_the_same(steps: list[int], looks: int) -> None:
    silence, passed, same = Silence(looks), 0, 0
    for step in steps:
        passed += step
        same = 0 if step else same + 1
        assert silence.lasts(passed) is (same >= looks)


def test_times_that_change_hold_for_what_waits_already() -> None:
    route = parse_route("/v1/models")
    house = House(timeouts=Timeouts(first_byte=500, between_bytes=500))
    answering(house, PIECE)
    house.clock.pump([1] * 50)
    house.relay.waits.change(Timeouts(first_byte=500, first_byte_for=((route, 30.0),), between_bytes=100))
    assert 50 <= seconds_until_cut(house) <= 150
    other = House(timeouts=Timeouts(first_byte=500))
    other.relay.waits.change(Timeouts(first_byte=500, first_byte_for=((route, 30.0),)))
    other.client.receive(GET)
    other.clock.pump([1] * 20)
    other.relay.waits.change(Timeouts(first_byte=500, first_byte_for=((route, 60.0),)))
    other.clock.pump([1] * 35)
    assert b"504" not in other.client.sent
    other.clock.pump([1] * 10)
    assert other.client.sent.startswith(b"HTTP/1.1 504 ")
