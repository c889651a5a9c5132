"""The server channel in memory: what it makes of bytes, however they are cut."""

from itertools import combinations

import pytest
from _memory import Wire
from attrs import frozen
from twisted.internet.error import ConnectionDone

from vllmproxy.http1.message import Limits
from vllmproxy.http1.server import HOLD


@frozen
class Good:
    """Bytes, and the requests that they are: method, target, body."""

    wire: bytes
    requests: list[tuple[bytes, bytes, bytes]]


GET = b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"
GOOD = {
    "get": Good(GET, [(b"GET", b"/a", b"")]),
    "empty value": Good(b"GET /a HTTP/1.1\r\nX:\r\nHost:  h \t\r\nY: \r\n\r\n", [(b"GET", b"/a", b"")]),
    "leading newlines": Good(b"\r\n\r\n" + GET, [(b"GET", b"/a", b"")]),
    "length": Good(b"POST /b?c HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello", [(b"POST", b"/b?c", b"hello")]),
    "no body": Good(b"POST /b HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n", [(b"POST", b"/b", b"")]),
    "chunked": Good(
        b"PUT /b HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"5;a=b\r\nhello\r\n01\r\n!\r\n0\r\nT: x\r\n\r\n",
        [(b"PUT", b"/b", b"hello!")],
    ),
    "no chunk": Good(
        b"PUT /b HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [(b"PUT", b"/b", b"")]
    ),
    "absolute": Good(b"GET http://h/x HTTP/1.1\r\nHost: h\r\n\r\n", [(b"GET", b"/x", b"")]),
    "old": Good(b"POST / HTTP/1.0\r\nContent-Length: 1\r\n\r\nx", [(b"POST", b"/", b"x")]),
    "h2c": Good(
        b"POST /b HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
        b"Content-Length: 5\r\n\r\nhello" + GET,
        [(b"POST", b"/b", b"hello"), (b"GET", b"/a", b"")],
    ),
    "h2c chunked": Good(
        b"POST /b HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"5\r\nhello\r\n0\r\n\r\n" + GET,
        [(b"POST", b"/b", b"hello"), (b"GET", b"/a", b"")],
    ),
    "h2c without a body": Good(
        b"GET /b HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n" + GET,
        [(b"GET", b"/b", b""), (b"GET", b"/a", b"")],
    ),
    "pipeline": Good(
        b"POST /b HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello\r\n"
        + GET
        + b"PUT /c HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        [(b"POST", b"/b", b"hello"), (b"GET", b"/a", b""), (b"PUT", b"/c", b"abc")],
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_how_a_request_is_cut_makes_no_difference(name: str) -> None:
    good = GOOD[name]
    expected = [(*request, True) for request in good.requests]
    for cut in range(len(good.wire)):
        wire = Wire(answer=True)
        wire.feed_split(good.wire, cut)
        assert wire.seen == expected, good.wire[:cut]
        assert not wire.refused
        assert wire.transport.sent.count(b"\r\n\r\nok") == len(expected)


@pytest.mark.parametrize("name", GOOD)
def test_a_request_may_come_byte_by_byte(name: str) -> None:
    good = GOOD[name]
    wire = Wire(answer=True)
    wire.feed_split(good.wire, *range(1, len(good.wire)))
    assert wire.seen == [(*request, True) for request in good.requests]


def test_small_requests_in_a_row_never_count_as_one_large_head() -> None:
    """Only what belongs to one head counts towards its limit, however reads and requests overlap."""
    request = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 60\r\n\r\n" + b"x" * 60
    wire_bytes = request * 3
    for first, second in combinations(range(0, len(wire_bytes), 9), 2):
        wire = Wire(answer=True, limits=Limits(head=100))
        wire.feed_split(wire_bytes, first, second)
        assert not wire.refused, (first, second)
        assert len(wire.streams) == 3


def test_headers_are_kept_as_sent() -> None:
    wire = Wire()
    wire.feed(b"GET / HTTP/1.1\r\nhOST: h\r\nX:  a b \t\r\nx: \xff\r\nEmpty:\r\n\r\n")
    head = wire.streams[0].head
    assert head.headers == [(b"hOST", b"h"), (b"X", b"a b"), (b"x", b"\xff"), (b"Empty", b"")]
    assert head.fields[b"x"] == [b"a b", b"\xff"]


def test_requests_are_answered_one_at_a_time_and_in_order() -> None:
    wire = Wire()
    wire.feed(GET * 3)
    for count in (1, 2, 3):
        assert len(wire.streams) == count
        wire.streams[-1].respond(200, b"OK", b"", b"%d" % count)
    assert [part[-1:] for part in wire.transport.sent.split(b"HTTP/1.1 200")[1:]] == [b"1", b"2", b"3"]


BAD = {
    "bare lf": (b"GET / HTTP/1.1\nHost: h\n\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "garbage": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "fold": (b"GET / HTTP/1.1\r\nHost: h\r\nX: a\r\n b\r\n\r\n", 400),
    "space before colon": (b"GET / HTTP/1.1\r\nHost : h\r\n\r\n", 400),
    "nul": (b"GET / HTTP/1.1\r\nHost: h\r\nX: \x00\r\n\r\n", 400),
    "bare cr": (b"GET / HTTP/1.1\r\nHost: h\r\nX: a\rb\r\n\r\n", 400),
    "both": (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "two lengths": (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n", 400),
    "signed": (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: +3\r\n\r\nabc", 400),
    "gzip": (b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
    "connect": (b"CONNECT h:1 HTTP/1.1\r\nHost: h:1\r\n\r\n", 405),
    "http2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 0),
    "rtsp": (b"GET / RTSP/1.0\r\nHost: h\r\n\r\n", 505),
    "rtsp as 1.1": (b"POST /  RTSP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n", 505),
    "expect": (b"POST / HTTP/1.1\r\nHost: h\r\nExpect: x\r\nContent-Length: 3\r\n\r\n", 417),
    "old chunked": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_http_is_refused_after_the_good_requests_before_it(name: str) -> None:
    bad, status = BAD[name]
    for before in (0, 2):
        data = GET * before + bad
        for cut in range(len(data)):
            wire = Wire(answer=True)
            wire.feed_split(data, cut)
            assert len(wire.streams) == before, cut
            assert wire.refused in ([status] if status else [400, 405, 505]), cut
            assert wire.transport.sent.count(b"HTTP/1.1 ") == before + 1
            wire.feed(GET)
            assert len(wire.streams) == before


def test_a_refusal_waits_for_the_answer_before_it() -> None:
    wire = Wire()
    wire.feed(GET + b"nonsense\r\n\r\n")
    assert not wire.transport.sent
    wire.streams[0].respond(200, b"OK", b"", b"ok")
    assert wire.transport.sent.startswith(b"HTTP/1.1 200")
    assert wire.refused == 400


@pytest.mark.parametrize("begun", [False, True])
def test_a_body_that_breaks_is_not_taken_for_a_whole_one(begun: bool) -> None:
    wire = Wire()
    wire.feed(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
    if begun:
        wire.streams[0].start_response(200, b"OK", b"", length=None)
        wire.streams[0].write(b"x")
    wire.feed(b"zz\r\n")
    receiver = wire.receiver(0)
    assert receiver.events == (["client_gone"] if begun else ["body_failed 400"])
    assert wire.transport.ending == ("abort" if begun else "")
    assert wire.refused == (0 if begun else 400)
    wire.clock.advance(100)
    assert len(receiver.events) == 1


def test_expect_is_answered_when_the_body_is_wanted() -> None:
    data = b"POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
    wire = Wire(eager=False)
    wire.feed(data)
    assert not wire.transport.sent
    wire.streams[0].read_body()
    wire.streams[0].read_body()
    assert wire.transport.sent == b"HTTP/1.1 100 Continue\r\n\r\n"
    wire.feed(b"hello")
    assert wire.seen == [(b"POST", b"/", b"hello", True)]
    impatient = Wire(eager=False)
    impatient.feed(data + b"hello")
    impatient.streams[0].read_body()
    assert not impatient.transport.sent
    refused = Wire(eager=False)
    refused.feed(data)
    refused.streams[0].respond(401, b"Unauthorized", b"", b"no")
    assert refused.transport.sent.startswith(b"HTTP/1.1 401")
    assert b"connection: close" in refused.transport.sent


def test_a_body_that_nobody_wants_yet_is_held_up_to_a_bound() -> None:
    wire = Wire(eager=False)
    wire.feed(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n")
    for _ in range(20):
        wire.feed(b"x" * 10_000)
    assert not wire.transport.reading
    assert wire.streams[0].held_bytes < HOLD + 10_000
    wire.streams[0].read_body()
    wire.clock.advance(0)
    assert len(wire.receiver(0).body) == 200_000


def test_a_paused_body_stays_in_the_socket() -> None:
    wire = Wire()
    wire.feed(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\nhello")
    wire.streams[0].pause_body()
    wire.feed(b"world")
    assert wire.receiver(0).body == b"hello"
    wire.streams[0].resume_body()
    wire.clock.advance(0)
    assert wire.seen == [(b"POST", b"/", b"helloworld", True)]


class Filler:
    """Counts pauses."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pauseProducing(self) -> None:
        self.calls.append("pause")

    def resumeProducing(self) -> None:
        self.calls.append("resume")


def test_a_client_that_does_not_read_pauses_what_fills_its_answer() -> None:
    wire, filler = Wire(), Filler()
    wire.feed(GET * 2)
    stream = wire.streams[0]
    stream.start_response(200, b"OK", b"", length=200_000)
    stream.set_producer(filler)
    wire.transport.stall()
    stream.write(b"x" * 100_000)
    assert filler.calls == ["pause"]
    late = Filler()
    stream.set_producer(late)
    assert late.calls == ["pause"]
    stream.write(b"x" * 100_000, last=True)
    assert len(wire.streams) == 1  # the next answer would only lie in our memory
    wire.transport.drain()
    assert filler.calls == ["pause"]
    assert late.calls == ["pause"]
    assert len(wire.streams) == 2


@pytest.mark.parametrize(
    ("version", "length", "body"),
    [
        (b"1.1", 5, b"content-length: 5\r\n\r\nhello"),
        (b"1.1", None, b"transfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"),
        (b"1.0", None, b"connection: close\r\n\r\nhello"),
    ],
)
def test_framing_of_answers(version: bytes, length: int | None, body: bytes) -> None:
    wire = Wire()
    wire.feed(b"GET / HTTP/%s\r\nHost: h\r\n%s\r\n" % (version, b"Connection: keep-alive\r\n"))
    stream = wire.streams[0]
    stream.start_response(200, b"Fine", b"X: y\r\n", length=length)
    assert not wire.transport.sent
    stream.write(b"he")
    stream.write(b"llo", last=True)
    head = b"HTTP/1.1 200 Fine\r\nX: y\r\n"
    assert wire.transport.sent.startswith(head)
    assert wire.transport.sent.endswith(body)
    assert wire.transport.ending == ("lose" if b"close" in body else "")
    assert stream.bytes_out == 5


def test_an_empty_piece_does_not_end_a_chunked_answer() -> None:
    wire = Wire()
    wire.feed(GET)
    wire.streams[0].start_response(200, b"OK", b"", length=None)
    wire.streams[0].write(b"")
    wire.streams[0].write(b"x", last=True)
    assert wire.transport.sent.partition(b"\r\n\r\n")[2] == b"1\r\nx\r\n0\r\n\r\n"


def test_a_204_tells_no_length() -> None:
    """RFC 9110 §8.6: no Content-Length in a 1xx or 204."""
    wire = Wire()
    wire.feed(GET)
    wire.streams[0].respond(204, b"No Content", b"", b"")
    assert b"content-length" not in wire.transport.sent


def test_informational_answers_pass_to_clients_that_know_them() -> None:
    for version, passes in ((b"1.1", True), (b"1.0", False)):
        wire = Wire()
        wire.feed(b"GET / HTTP/%s\r\nHost: h\r\n\r\n" % version)
        wire.streams[0].inform(103, b"Early Hints", b"Link: x\r\n")
        assert wire.transport.sent == (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" if passes else b"")


@pytest.mark.parametrize("how", ["rst", "abort"])
@pytest.mark.parametrize("begun", [False, True])
def test_the_end_of_the_client_is_told_once(how: str, begun: bool) -> None:
    wire = Wire()
    wire.feed(GET * 2)
    stream = wire.streams[0]
    if begun:
        stream.start_response(200, b"OK", b"", length=None)
        stream.write(b"x")
    if how == "rst":
        wire.transport.reset_from_peer()
    else:
        stream.abort()
    wire.clock.advance(0)
    wire.clock.advance(1000)
    assert wire.receiver(0).events[-1:] == ["client_gone"]
    assert wire.receiver(0).events.count("client_gone") == 1
    assert stream.over
    assert len(wire.streams) == 1
    assert not wire.factory.channels
    assert not wire.clock.getDelayedCalls()


def test_a_fin_behind_a_whole_request_means_that_the_client_left() -> None:
    wire = Wire()
    wire.feed(GET)
    wire.transport.close_from_peer()
    wire.clock.advance(0)
    assert wire.receiver(0).events == ["body_complete", "client_gone"]
    assert wire.transport.ending == "abort"


def test_a_fin_between_requests_closes_quietly() -> None:
    wire = Wire(answer=True)
    wire.feed(GET)
    wire.transport.close_from_peer()
    wire.clock.advance(0)
    assert wire.transport.ending == "lose"
    assert wire.receiver(0).events == ["body_complete"]


WEBSOCKET = b"GET /ws HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


def test_early_tunnel_bytes_wait_for_the_tunnel() -> None:
    for cut in range(len(WEBSOCKET) + 5):
        wire = Wire(eager=False)
        wire.feed_split(WEBSOCKET + b"early", cut)
        stream, receiver = wire.streams[0], wire.receiver(0)
        assert stream.head.websocket
        assert not receiver.body
        stream.start_tunnel(b"Switching Protocols", b"X: y\r\n")
        assert wire.transport.sent == b"HTTP/1.1 101 Switching Protocols\r\nX: y\r\n\r\n"
        wire.clock.advance(0)
        wire.feed(b"late")
        assert receiver.body == b"earlylate", cut
        stream.write_raw(b"\x00GET")
        assert wire.transport.sent.endswith(b"\r\n\r\n\x00GET")


def test_a_tunnel_half_closes_in_both_orders() -> None:
    for client_first in (True, False):
        wire = Wire(eager=False)
        wire.feed(WEBSOCKET)
        stream = wire.streams[0]
        stream.start_tunnel(b"", b"")
        if client_first:
            wire.transport.close_from_peer()
            assert wire.receiver(0).events == ["tunnel_half_closed"]
            stream.write_raw(b"bye")
            assert wire.transport.sent.endswith(b"bye")
            stream.half_close()
        else:
            stream.half_close()
            assert wire.transport.write_closed
            wire.feed(b"bye")
            assert wire.receiver(0).body == b"bye"
            wire.transport.close_from_peer()
            stream.close()
        assert wire.transport.ending == "lose"
        wire.clock.advance(0)
        assert wire.transport.lost
        wire.receiver(0).reasons[0].trap(ConnectionDone)
        assert not wire.factory.channels


def test_a_handshake_that_is_not_taken_is_plain_http_again() -> None:
    wire = Wire(eager=False)
    wire.feed(WEBSOCKET + GET)
    wire.streams[0].respond(403, b"Forbidden", b"", b"")
    wire.clock.advance(0)
    assert [request[:2] for request in wire.seen] == [(b"GET", b"/ws"), (b"GET", b"/a")]
    wire.streams[1].respond(200, b"OK", b"", b"ok")
    wire.feed(GET)
    assert len(wire.streams) == 3
