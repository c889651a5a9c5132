"""Many requests in one read: others have their turn meanwhile, and little is kept of them."""

import sys

from _memory import Wire
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.http1.pipeline import QUEUE

GET = b"GET /%d HTTP/1.1\r\nHost: h\r\n\r\n"


def requests(count: int) -> bytes:
    return b"".join(GET % number for number in range(count))


def due_now(wire: Wire) -> int:
    return sum(call.getTime() <= wire.clock.seconds() for call in wire.clock.getDelayedCalls())


def test_a_read_full_of_requests_is_not_answered_in_one_turn() -> None:
    wire = Wire(answer=True)
    wire.transport.receive(requests(2000))
    assert 0 < len(wire.streams) < 20
    assert due_now(wire) == 1
    wire.clock.advance(0)  # runs what becomes due meanwhile, too, which a reactor leaves for its next turn
    assert [stream.head.target for stream in wire.streams] == [b"/%d" % number for number in range(2000)]
    assert wire.transport.sent.count(b"HTTP/1.1 200 OK") == 2000
    assert not wire.refused


def test_what_waits_behind_a_slow_answer_stays_bytes() -> None:
    wire = Wire()
    wire.transport.receive(requests(2000))
    assert len(wire.streams) == 1
    assert len(wire.channel._requests._queue) < QUEUE + 8192 // len(GET)
    assert not wire.transport.reading
    assert sys.getsizeof(wire.channel._requests._unparsed) < 65_536
    wire.transport.receive(GET % 2000)  # and the kernel keeps what comes now
    for number in range(2001):
        wire.streams[number].respond(200, b"OK", b"", b"")
        wire.clock.advance(0)
    assert len(wire.streams) == 2001
    assert wire.transport.reading


def test_one_that_is_broken_ends_them_in_its_turn() -> None:
    wire = Wire(answer=True)
    wire.transport.receive(requests(300) + b"GET /bad path HTTP/1.1\r\nHost: h\r\n\r\n" + requests(300))
    for _ in range(200):
        wire.clock.advance(0)
    assert len(wire.streams) == 300
    assert wire.refused == 400


def test_a_client_that_leaves_meanwhile() -> None:
    wire = Wire(answer=True)
    wire.transport.receive(requests(500))
    assert due_now(wire) == 1
    wire.transport.reset_from_peer()
    assert due_now(wire) == 0


def test_a_websocket_behind_them_has_its_own_bytes() -> None:
    wire = Wire()
    handshake = b"GET /ws HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    raw = bytes(range(256)) * 64
    wire.transport.receive(requests(400) + handshake + raw)
    for number in range(400):
        wire.streams[number].respond(200, b"OK", b"", b"")
        wire.clock.advance(0)
    wire.streams[400].start_tunnel(b"Switching Protocols", b"")
    assert wire.receiver(400).body == raw


def test_the_last_ones_body_may_be_what_was_left_unparsed() -> None:
    wire = Wire(answer=True)
    body = b"x" * 30_000
    wire.transport.receive(requests(QUEUE * 5) + b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
    wire.transport.receive(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
    wire.clock.advance(0)
    assert len(wire.streams) == QUEUE * 5 + 1
    assert wire.seen[-1][2:] == (body, True)


@given(st.lists(st.sampled_from([b"", b"x" * 5, b"y" * 20_000]), min_size=1, max_size=40), st.data())
def test_bodies_among_them_arrive_whole(bodies: list[bytes], data: st.DataObject) -> None:
    sent = b"".join(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (len(b), b) for b in bodies)
    cut = data.draw(st.integers(0, len(sent)))
    wire = Wire(answer=True)
    for piece in (sent[:cut], sent[cut:]):
        if piece:
            wire.transport.receive(piece)
        for _ in range(20):
            wire.clock.advance(0)
    assert [body for _, _, body, whole in wire.seen if whole] == bodies
