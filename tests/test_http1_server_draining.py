"""The server channel in memory while the server stops: who is closed when, and who is told."""

import pytest
from _memory import Wire

GET = b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"
WEBSOCKET = b"GET /a HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"


def drained(wire: Wire) -> list[None]:
    """Drain, and return a list that has an entry as soon as everything is gone."""
    gone: list[None] = []
    wire.factory.drain().addCallback(gone.append)
    wire.clock.advance(0)
    return gone


def test_an_idle_connection_is_closed_at_once() -> None:
    wire = Wire(answer=True)
    wire.feed(GET)
    gone = drained(wire)
    assert wire.transport.ending == "lose"
    assert gone == [None]
    assert b"connection: close" not in wire.transport.sent


def test_the_answer_to_a_request_under_way_says_that_it_is_the_last() -> None:
    wire = Wire()
    wire.feed(GET)
    gone = drained(wire)
    assert not wire.transport.ending
    wire.streams[0].respond(200, b"OK", b"", b"ok")
    wire.clock.advance(0)
    assert b"\r\nconnection: close\r\n" in wire.transport.sent
    assert wire.transport.sent.endswith(b"ok")
    assert wire.transport.ending == "lose"
    assert gone == [None]


def test_an_answer_that_has_begun_goes_on_to_its_end() -> None:
    wire = Wire()
    wire.feed(GET)
    wire.streams[0].start_response(200, b"OK", b"", length=None)
    wire.streams[0].write(b"one")
    gone = drained(wire)
    wire.streams[0].write(b"two")
    assert not wire.transport.ending
    assert not gone
    wire.streams[0].write(b"three", last=True)
    wire.clock.advance(0)
    assert wire.transport.sent.endswith(b"3\r\none\r\n3\r\ntwo\r\n5\r\nthree\r\n0\r\n\r\n")
    assert wire.transport.ending == "lose"
    assert gone == [None]


def test_a_request_whose_head_has_begun_is_answered() -> None:
    wire = Wire(answer=True)
    wire.feed(GET + GET[:10])
    gone = drained(wire)
    assert not wire.transport.ending
    wire.feed(GET[10:])
    assert wire.transport.sent.count(b"HTTP/1.1 200") == 2
    assert wire.transport.sent.count(b"connection: close") == 1
    assert gone == [None]


@pytest.mark.parametrize("begun", [False, True])
def test_what_was_pipelined_is_answered_and_only_the_last_answer_says_close(begun: bool) -> None:
    wire = Wire()
    wire.feed(GET * 3)
    if begun:
        wire.streams[0].start_response(200, b"OK", b"", length=2)
        wire.streams[0].flush()
    gone = drained(wire)
    if begun:
        wire.streams[0].write(b"ok", last=True)
    else:
        wire.streams[0].respond(200, b"OK", b"", b"ok")
    for stream in range(1, 3):
        assert b"connection: close" not in wire.transport.sent
        wire.streams[stream].respond(200, b"OK", b"", b"ok")
    wire.clock.advance(0)
    assert wire.transport.sent.count(b"HTTP/1.1 200") == 3
    assert b"connection: close" in wire.transport.sent.rpartition(b"HTTP/1.1")[2]
    assert gone == [None]


def test_a_connection_that_was_just_accepted_has_a_moment_for_its_request() -> None:
    wire = Wire(answer=True, unused_timeout=2.0)
    gone = drained(wire)
    wire.clock.advance(1.9)
    assert not wire.transport.ending
    wire.feed(GET)
    assert b"connection: close" in wire.transport.sent
    assert gone == [None]


def test_a_connection_that_stays_unused_is_closed() -> None:
    wire = Wire(unused_timeout=2.0)
    gone = drained(wire)
    wire.feed(b"\r\n")
    wire.clock.advance(3)
    wire.clock.advance(0)
    assert wire.transport.ending == "lose"
    assert not wire.transport.sent
    assert gone == [None]


def test_a_slow_first_request_is_given_the_time_of_any() -> None:
    wire = Wire(answer=True, unused_timeout=2.0, head_timeout=10.0)
    wire.feed(GET[:5])
    gone = drained(wire)
    wire.clock.advance(5)
    assert not gone
    wire.feed(GET[5:])
    assert wire.transport.sent.startswith(b"HTTP/1.1 200 ")
    assert gone == [None]


def test_blank_lines_on_a_used_connection_are_no_request() -> None:
    wire = Wire(answer=True)
    wire.feed(GET)
    wire.factory.draining = True  # as if they had been on their way
    wire.feed(b"\r\n")
    assert wire.transport.ending == "lose"


def test_a_tunnel_is_left_to_its_ends() -> None:
    wire = Wire()
    wire.feed(WEBSOCKET)
    wire.streams[0].start_tunnel(b"Switching Protocols", b"")
    gone = drained(wire)
    wire.clock.advance(1000)
    assert not wire.transport.ending
    wire.feed(b"ping")
    assert wire.receiver(0).body == b"ping"
    wire.transport.close_from_peer()
    wire.streams[0].close()
    wire.clock.advance(0)
    assert gone == [None]


def test_closing_cuts_off_what_drains_and_ends_the_wait() -> None:
    wire = Wire()
    wire.feed(GET)
    wire.streams[0].start_response(200, b"OK", b"", length=10)
    wire.streams[0].write(b"12345")
    gone = drained(wire)
    wire.factory.close().addCallback(gone.append)
    wire.clock.advance(0)
    assert wire.transport.ending == "abort"
    assert gone == [None, None]
