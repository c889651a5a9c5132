"""The server channel against arbitrary bytes, with h11 as the second opinion."""

import re

import h11
from _memory import Wire
from hypothesis import given, settings
from hypothesis import strategies as st
from test_http1_server import BAD, GOOD

CORPUS = [good.wire for good in GOOD.values()] + [bad for bad, _ in BAD.values()]
SPACES = re.compile(rb"\A([A-Z]+) +([^ \r\n]+) +")
TOKENS = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\r\n\r\n",
    b" ",
    b"\t",
    b":",
    b",",
    b"\x00",
    b"\x0b",
    b"\xff",
    b"0",
    b"Content-Length: 3\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Connection: close\r\n",
    b"Connection: upgrade\r\nUpgrade: h2c\r\n",
    b"Host: h\r\n",
    b"GET / HTTP/1.1\r\nHost: h\r\n\r\n",
    b"HTTP/1.0",
    b";x=y",
    b"chunked",
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A few good or bad requests in a row, with a few pieces put in, taken out or doubled."""
    data = b"".join(draw(st.lists(st.sampled_from(CORPUS), min_size=1, max_size=3)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        take = draw(st.integers(0, 8))
        put = draw(st.one_of(st.just(b""), st.sampled_from(TOKENS), st.binary(max_size=3)))
        if draw(st.booleans()):
            put += data[at : at + take] * 2
        data = data[:at] + put + data[at + take :]
    return data


def first_by_h11(data: bytes) -> tuple[tuple[bytes, bytes, bytes] | None, bytes]:
    """Return the first request that h11 takes for whole (method, target, body) and what follows it, if anything may."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1_000_000)
    connection.receive_data(data)
    head, body = None, b""
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                last = connection.their_state is h11.MUST_CLOSE
                return (head.method, head.target, body), b"" if last else connection.trailing_data[0]
            else:
                return None, b""
    except h11.RemoteProtocolError:
        return None, b""


def accepted_by_h11(data: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """Return the requests that h11 takes for whole before the first error. Unlike h11, llhttp passes over empty lines
    before a request (RFC 9112 §2.2) and takes several spaces around the target for one (§3), and we take an Upgrade
    that we do not know for none (RFC 9110 §7.8)."""
    requests = []
    while data := data.lstrip(b"\r\n"):
        request, data = first_by_h11(SPACES.sub(rb"\1 \2 ", data))
        if request is None:
            break
        requests.append(request)
    return requests


def origin_form(target: bytes) -> bytes:
    if target.startswith(b"/"):
        return target
    rest = re.sub(rb"\A(?i:https?)://[^/?#]*", b"", target)
    return rest if rest.startswith(b"/") else b"/" + rest


@given(data=mutated(), cuts=st.lists(st.integers(0, 400), max_size=3))
@settings(max_examples=600, deadline=None)
def test_no_request_that_h11_would_not_see(data: bytes, cuts: list[int]) -> None:
    wire = Wire(answer=True)
    wire.feed_split(data, *sorted(min(cut, len(data)) for cut in cuts))
    whole = [request[:3] for request in wire.seen if request[3]]
    theirs = [(method, origin_form(target), body) for method, target, body in accepted_by_h11(data)]
    assert whole == theirs[: len(whole)]


@given(data=mutated(), cuts=st.lists(st.integers(0, 400), max_size=4), fin=st.booleans())
@settings(max_examples=300, deadline=None)
def test_nothing_depends_on_how_bytes_are_cut_and_nothing_is_left_behind(
    data: bytes, cuts: list[int], fin: bool
) -> None:
    whole, cut = Wire(answer=True), Wire(answer=True)
    whole.feed(data)
    cut.feed_split(data, *sorted(min(at, len(data)) for at in cuts))
    assert [s for s in cut.seen if s[3]] == [s for s in whole.seen if s[3]]
    assert bool(cut.refused) == bool(whole.refused)
    for wire in (whole, cut):
        (wire.transport.close_from_peer if fin else wire.transport.reset_from_peer)()
        wire.clock.advance(0)
        for _ in range(4):
            wire.clock.advance(100)
        assert wire.transport.lost
        assert not wire.factory.channels
        for index, stream in enumerate(wire.streams):
            assert stream.over
            assert wire.receiver(index).events.count("client_gone") <= 1
        assert not wire.clock.getDelayedCalls()


@given(st.binary(max_size=200))
def test_noise(data: bytes) -> None:
    wire = Wire(answer=True)
    wire.feed(data)
    wire.transport.reset_from_peer()
    for _ in range(4):
        wire.clock.advance(100)
    assert not wire.clock.getDelayedCalls()
