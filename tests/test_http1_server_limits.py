"""Sizes and times of the server channel, in memory with a clock."""

import pytest
from _memory import Wire, render

from vllmproxy.http1.message import Limits, RequestHead
from vllmproxy.http1.pipeline import Pipeline
from vllmproxy.http1.server import LINGER_BYTES
from vllmproxy.http1.stream import Stream
from vllmproxy.http1.templates import KnownHeads

GET = b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"
CHUNKED = b"POST /b HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
SMALL = Limits(head=2000, lines=20, target=500)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /%s HTTP/1.1\r\nHost: h\r\n\r\n" % (b"a" * 500), 414),
        (b"GET / HTTP/1.1\r\nHost: h\r\n%s\r\n" % (b"X: y\r\n" * 20), 431),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX: %s\r\n\r\n" % (b"y" * 2000), 431),
        (b"GET / HTTP/1.1\r\nHost: h\r\n%s: y\r\n\r\n" % (b"x" * 2000), 431),
    ],
)
def test_a_head_over_a_limit(head: bytes, status: int) -> None:
    for cut in (0, 30, len(head) // 2, len(head) - 1):
        wire = Wire(limits=SMALL)
        wire.feed_split(head, cut)
        assert wire.refused in ([status] if cut != 30 else [status, 431])
        assert not wire.streams


def test_a_head_over_a_limit_is_told_the_limit() -> None:
    for line, said in ((b"GET /%s" % (b"a" * 500), "500 bytes"), (b"GET /", "20 lines or 2000 bytes")):
        requests = Pipeline(no_stream, SMALL, KnownHeads(), ("192.0.2.1", False))
        requests.feed(line + b" HTTP/1.1\r\nHost: h\r\n%b\r\n" % (b"X: y\r\n" * 20))
        assert requests.error is not None
        assert requests.error.message.endswith(f"has more than {said}.")


def test_limits_that_change_hold_on_new_connections_for_heads_that_were_known() -> None:
    wire, asked = Wire(answer=True), b"POST / HTTP/1.1\r\nHost: h\r\nA: b\r\nContent-Length: 2\r\n\r\nok"
    for _ in range(3):
        wire.feed(asked)
    wire.factory.change_limits(Limits(lines=2))
    wire.feed(asked)
    assert [stream.status for stream in wire.streams] == [200] * 4
    wire.connect()
    wire.feed(asked)
    assert wire.refused == 431


def no_stream(head: RequestHead) -> Stream:
    raise AssertionError(head)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /%s HTTP/1.1\r\nHost: h\r\n\r\n" % (b"a" * 499),
        b"GET / HTTP/1.1\r\nHost: h\r\n%s\r\n" % (b"X: y\r\n" * 19),
        b"GET / HTTP/1.1\r\nHost: h\r\nX: %s\r\n\r\n" % (b"y" * 1900),
    ],
)
def test_a_head_within_the_limits(head: bytes) -> None:
    for cut in range(0, len(head), 7):
        wire = Wire(limits=SMALL)
        wire.feed_split(head, cut)
        assert len(wire.streams) == 1


@pytest.mark.parametrize(
    "endless", [b"GET /", b"GET / HTTP/1.1\r\nX", b"GET / HTTP/1.1\r\nX: ", b"GET / HTTP/1.1\r\nX: y\r\n"]
)
def test_a_line_without_end_is_cut_off(endless: bytes) -> None:
    wire = Wire(limits=SMALL)
    wire.feed(endless)
    for _ in range(100):
        wire.feed(b"a" * 100)
    assert wire.refused in (414, 431)
    fresh = Wire(limits=SMALL)
    for byte in endless + b"a" * 5000:
        fresh.feed(bytes([byte]))
    assert fresh.refused in (414, 431)


@pytest.mark.parametrize("before", [b"", b"T: 1\r\n" * 100])
def test_a_trailer_without_end_is_cut_off(before: bytes) -> None:
    """The parser keeps an unfinished trailer line in memory: it is head bytes like any other, and as limited."""
    wire = Wire(limits=SMALL)
    wire.feed(CHUNKED + b"0\r\n" + before + b"T: ")
    for _ in range(100):
        wire.feed(b"a" * 100)
    assert wire.refused in (400, 431) or wire.transport.ending == "abort"


def test_nothing_asked_in_time() -> None:
    wire = Wire()
    wire.clock.advance(9)
    assert not wire.transport.ending
    wire.clock.advance(2)
    assert wire.transport.ending == "lose"
    assert not wire.transport.sent


def test_a_head_that_dribbles_gets_408() -> None:
    wire = Wire()
    for byte in GET[:12]:
        wire.feed(bytes([byte]))
        wire.clock.advance(1)
    assert wire.refused == 408
    assert not wire.streams


def test_a_second_head_that_dribbles_gets_408() -> None:
    wire = Wire(answer=True)
    wire.feed(GET)
    wire.clock.advance(60)
    wire.feed(GET[:5])
    wire.clock.advance(9)
    assert not wire.refused
    wire.clock.advance(2)
    assert wire.refused == 408


def test_a_head_begun_behind_an_answer_has_its_time_from_that_answers_end() -> None:
    wire = Wire()
    wire.feed(GET + GET[:5])
    wire.clock.advance(300)
    wire.streams[0].respond(200, b"OK", b"", b"ok")
    assert not wire.refused
    wire.clock.advance(9)
    assert not wire.refused
    wire.clock.advance(2)
    assert wire.refused == 408


def test_a_head_behind_a_running_answer_has_all_the_time() -> None:
    """A 408 in the middle of another request's answer would be read as part of it."""
    wire = Wire()
    wire.feed(GET + GET + GET[:5])
    wire.streams[0].respond(200, b"OK", b"", b"ok")
    second = wire.streams[1]
    second.start_response(200, b"OK", b"", length=2)
    second.write(b"o")
    wire.clock.advance(300)
    assert not wire.refused
    second.write(b"k", last=True)
    assert wire.transport.sent.endswith(b"content-length: 2\r\n\r\nok")
    wire.feed(GET[5:])
    assert len(wire.streams) == 3


def test_an_answer_may_take_any_time() -> None:
    wire = Wire()
    wire.feed(GET)
    wire.clock.advance(10_000)
    assert not wire.transport.ending


def test_an_idle_connection_is_closed_and_then_reset_if_it_does_not_drain() -> None:
    wire = Wire(answer=True)
    wire.feed(GET)
    wire.clock.advance(74)
    assert not wire.transport.ending
    wire.feed(GET)
    wire.clock.advance(74)
    assert not wire.transport.ending
    wire.transport.stall()
    wire.feed(GET)
    wire.clock.advance(77)
    assert wire.transport.ending == "lose"
    wire.clock.advance(77)
    assert wire.transport.ending == "abort"
    wire.clock.advance(0)
    assert not wire.factory.channels


def test_a_refused_upload_is_read_for_a_while_so_that_the_answer_survives() -> None:
    wire = Wire(eager=False)
    wire.feed(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10000000000\r\n\r\n")
    wire.streams[0].respond(401, b"Unauthorized", b"", b"no")
    assert b"connection: close" in wire.transport.sent
    assert wire.transport.write_closed
    for _ in range(LINGER_BYTES // 65_536):
        wire.feed(b"x" * 65_536)
    assert not wire.transport.ending
    wire.feed(b"x")
    assert wire.transport.ending == "abort"


@pytest.mark.parametrize("client_closes", [False, True])
def test_lingering_ends_with_time_or_with_the_client(client_closes: bool) -> None:
    wire = Wire(eager=False)
    wire.feed(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n")
    wire.streams[0].respond(401, b"Unauthorized", b"", b"no")
    if client_closes:
        wire.transport.close_from_peer()
        assert wire.transport.ending == "lose"
    else:
        wire.clock.advance(1.9)
        assert not wire.transport.ending
        wire.clock.advance(1)
        assert wire.transport.ending == "abort"
    wire.clock.advance(0)
    assert wire.transport.lost
    assert not wire.factory.channels
    assert len(wire.streams) == 1
    assert not wire.receiver(0).events


def test_lingering_lasts_though_the_connection_had_been_idle_for_long() -> None:
    """It would be closed with bytes unread, which is a reset, and that may take the answer with it."""
    wire = Wire(answer=True)
    wire.feed(GET)
    wire.clock.advance(74)  # of the 75 s for which it may be idle
    wire.feed(b"GET / HTTP/1.1\r\n\r\n")
    assert wire.refused == 400
    wire.clock.pump([0.1] * 19)
    assert not wire.transport.ending
    wire.clock.pump([0.1] * 10)
    assert wire.transport.ending == "abort"


def test_a_body_that_stops_coming_does_not_hold_a_connection_for_ever() -> None:
    """ "Every arrow has a deadline": a client that never sends the rest of its body is let go some day."""
    wire = Wire()
    wire.feed(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\nhello")
    for _ in range(24 * 60):
        wire.clock.advance(60)
    assert wire.refused == 408 or wire.transport.lost


def test_closing_the_factory_leaves_nothing() -> None:
    wire = Wire()
    wire.feed(GET)
    wire.factory.close()
    wire.clock.advance(0)
    assert wire.receiver(0).events[-1] == "client_gone"
    assert not wire.clock.getDelayedCalls()


@pytest.mark.parametrize("behind", [b"", GET[:5]])
def test_a_request_behind_one_that_was_answered_at_once_has_all_the_time(behind: bytes) -> None:
    """The first answer is written while the queue is being worked through: nothing is idle, no head is awaited."""
    wire = Wire(eager=False)
    handle = wire.factory.handle

    def answer_the_first(stream: Stream) -> None:
        handle(stream)
        if len(wire.streams) == 1:
            stream.respond(401, b"Unauthorized", b"", b"no")

    wire.factory.handle = answer_the_first
    wire.feed(GET + GET + behind)
    second = wire.streams[1]
    second.start_response(200, b"OK", b"", length=2)
    second.write(b"o")
    wire.clock.pump([1] * 300)
    assert not wire.refused
    assert not wire.transport.ending
    second.write(b"k", last=True)
    assert wire.transport.sent.endswith(b"content-length: 2\r\n\r\nok")


def test_an_upload_that_moves_has_all_the_time_and_so_has_one_that_we_do_not_read() -> None:
    wire = Wire()
    wire.feed(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(500):
        wire.feed(b"x")
        wire.clock.advance(1)
    wire.streams[0].pause_body()
    wire.clock.pump([1] * 500)
    wire.streams[0].resume_body()
    wire.feed(b"x" * 500)
    assert wire.seen[0][3]
    wire.clock.pump([1] * 500)
    assert not wire.refused
    assert not wire.transport.ending


def test_a_body_that_stops_coming_does_not_cut_the_answer_that_came_before_it() -> None:
    wire = Wire()
    wire.feed(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\nhello")
    stream = wire.streams[0]
    stream.start_response(200, b"OK", b"", length=4)
    for piece in (b"o", b"n", b"e"):
        stream.write(piece)
        wire.clock.pump([1] * 200)
        assert not wire.transport.ending
    wire.feed(b"w")
    wire.clock.pump([1] * 200)
    stream.write(b"!", last=True)
    assert not wire.receiver(0).events
    assert wire.receiver(0).body == b"hellow"
    assert b"connection: close\r\n" in wire.transport.sent
    assert wire.transport.sent.endswith(b"\r\n\r\none!")
    assert wire.transport.write_closed
    wire.feed(b"orld")
    assert not wire.transport.ending
    wire.clock.advance(3)
    assert wire.transport.ending == "abort"


@pytest.mark.parametrize("piece", [b"", GET[:5]])
def test_a_connection_that_closes_is_no_longer_idle_or_awaited(piece: bytes) -> None:
    wire = Wire(idle_timeout=5, head_timeout=5, write_timeout=50)
    wire.transport.stall()
    wire.transport.write(b"x")
    wire.feed(piece) if piece else None
    wire.transport.close_from_peer()
    assert wire.transport.ending == "lose"
    wire.clock.pump([1] * 40)
    assert wire.transport.ending == "lose"
    wire.clock.pump([1] * 20)
    assert wire.transport.ending == "abort"


UPLOAD = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n"


def trickle(wire: Wire, each: int, seconds: int) -> None:
    """Send ``each`` bytes of a body a second, as long as anybody takes them."""
    for _ in range(seconds):
        if not wire.refused:
            wire.feed(b"x" * each)
            wire.clock.advance(1)


def test_a_body_that_dribbles_gets_408() -> None:
    wire = Wire(body_timeout=60, min_body_rate=10)
    wire.feed(UPLOAD)
    trickle(wire, 11, 300)
    assert not wire.refused
    trickle(wire, 9, 130)
    assert wire.refused == 408
    assert wire.receiver(0).events == ["body_failed 408"]


def test_a_body_that_is_not_taken_need_not_come() -> None:
    wire = Wire(body_timeout=60, min_body_rate=10)
    wire.feed(UPLOAD)
    for _ in range(20):
        trickle(wire, 1, 40)
        wire.streams[0].pause_body()
        wire.clock.pump([1] * 100)
        wire.streams[0].resume_body()
    assert not wire.refused
    trickle(wire, 1, 62)
    assert wire.refused == 408


def test_each_body_on_a_connection_has_a_rate_of_its_own() -> None:
    wire = Wire(body_timeout=60, min_body_rate=10, answer=True)
    request = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5000\r\n\r\n"
    wire.feed(request + b"x" * 4999)
    wire.clock.pump([1] * 30)
    wire.feed(b"x" + request)
    trickle(wire, 11, 58)
    assert not wire.refused
    trickle(wire, 11, 300)
    assert not wire.refused


def test_a_client_that_waits_to_be_told_to_go_on_is_not_late() -> None:
    wire = Wire(eager=False, body_timeout=10, min_body_rate=10)
    wire.feed(UPLOAD.replace(b"Host", b"Expect: 100-continue\r\nHost"))
    wire.clock.pump([1] * 100)
    assert not wire.refused
    wire.streams[0].read_body()
    assert wire.transport.take() == b"HTTP/1.1 100 Continue\r\n\r\n"
    wire.clock.pump([1] * 12)
    assert wire.refused == 408


def test_a_body_that_is_announced_as_too_large() -> None:
    wire = Wire(limits=Limits(body=1000))
    wire.feed(b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n" + b"a" * 1000)
    assert len(wire.streams) == 1
    other = Wire(limits=Limits(body=1000))
    refused: list[RequestHead | None] = []
    other.factory.render = lambda error, head, peer: refused.append(head) or render(error, head, peer)
    other.feed(b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 1001\r\n\r\n")
    assert other.refused == 413
    assert not other.streams
    assert [head is not None and head.target for head in refused] == [b"/a"]  # so that it can be named


def test_a_body_that_grows_too_large() -> None:
    """Whatever its chunks are, and each request on a connection anew."""
    for size in (1, 7, 500, 1000):
        wire = Wire(limits=Limits(body=1000), answer=True)
        for _ in range(2):
            wire.feed(CHUNKED)
            for start in range(0, 1000, size):
                piece = b"a" * min(size, 1000 - start)
                wire.feed(b"%x\r\n%s\r\n" % (len(piece), piece))
            wire.feed(b"0\r\n\r\n")
        assert [stream.complete for stream in wire.streams] == [True, True]
        broken = Wire(limits=Limits(body=1000))
        broken.feed(CHUNKED)
        for _ in range(0, 1001, size):
            broken.feed(b"%x\r\n%s\r\n" % (size, b"a" * size))
        assert not broken.streams[0].complete
        assert broken.refused == 413


def test_bodies_of_any_size() -> None:
    wire = Wire(limits=Limits(body=0))
    wire.feed(b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999999\r\n\r\n")
    assert len(wire.streams) == 1
