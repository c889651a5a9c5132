"""A body that is all here, on its way to an upstream in memory."""

import mmap

import pytest
from _memory import OK, Upstream

from vllmproxy.http1.bodies import REPLAYABLE, WholeBody

LONG = bytes(range(256)) * 8192  # 2 MiB


def body_of(sent: bytes) -> bytes:
    """Return the body of the one request in ``sent``, chunked coding removed."""
    _, _, body = sent.partition(b"\r\n\r\n")
    if body != b"0\r\n\r\n" and not body.endswith(b"\r\n0\r\n\r\n"):
        return body
    whole = b""
    while body != b"0\r\n\r\n":
        size, _, rest = body.partition(b"\r\n")
        whole, body = whole + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return whole


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("data", [b"", b"x", b"x" * REPLAYABLE, LONG], ids=len)
def test_it_arrives(data: bytes, chunked: bool) -> None:
    upstream = Upstream()
    pending = upstream.ask(b"POST", WholeBody([data], chunked=chunked))
    (wire,) = upstream.wires
    assert body_of(wire.sent) == data
    wire.receive(OK)
    assert pending.whole == b"ok"
    assert upstream.ask().answer is None
    assert len(upstream.wires) == 1  # the connection is used again


@pytest.mark.parametrize("chunked", [False, True])
def test_one_in_pieces_arrives(chunked: bool) -> None:
    own = mmap.mmap(-1, len(LONG))
    own.write(LONG)
    upstream = Upstream()
    body = WholeBody([memoryview(LONG)[:-5], b"", b"new", own, memoryview(LONG)[:0]], chunked=chunked)
    upstream.ask(b"POST", body)
    assert body_of(upstream.wires[0].sent) == LONG[:-5] + b"new" + LONG
    upstream.ask(b"POST", short := WholeBody([memoryview(b"abc")[1:], b"d"], chunked=chunked))
    assert short.whole == b"bcd"


def test_a_short_one_leaves_with_the_head() -> None:
    upstream = Upstream()
    upstream.endpoint.hold = True
    upstream.ask(b"POST", WholeBody([b"{}"], chunked=False))
    upstream.endpoint.go()
    (wire,) = upstream.wires
    assert wire.sent.endswith(b"\r\n\r\n{}")


def test_a_long_one_waits_for_the_upstream() -> None:
    upstream = Upstream()
    pending = upstream.ask()
    (wire,) = upstream.wires
    wire.receive(OK)
    wire.take()
    wire.stall()
    pending = upstream.ask(b"POST", WholeBody([LONG], chunked=False))
    sent = b""
    while len(sent) < len(LONG):
        assert 0 < len(wire.queued) < 3 * REPLAYABLE
        wire.drain()
        sent += wire.take()
        wire.stall()
    assert body_of(sent + wire.queued) == LONG
    wire.receive(OK)
    assert pending.whole == b"ok"


def test_it_is_sent_again_from_its_beginning() -> None:
    upstream = Upstream()
    body = WholeBody([LONG], chunked=False)
    upstream.ask(b"POST", body)
    upstream.wires[0].stall()
    upstream.ask(b"POST", body)
    assert body_of(upstream.wires[1].sent) == LONG


def test_an_early_answer_ends_it() -> None:
    upstream = Upstream()
    pending = upstream.ask()
    (wire,) = upstream.wires
    wire.receive(OK)
    wire.stall()
    body = WholeBody([LONG], chunked=False)
    pending = upstream.ask(b"POST", body)
    wire.receive(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
    body.forget()
    assert pending.answer is not None
    assert pending.answer.code == 413
    assert wire.ending == "abort"
    wire.drain()
    assert len(wire.queued) < len(LONG)
