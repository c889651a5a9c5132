"""An upstream's answers in memory: however they are cut, and every way that they end."""

import pytest
from _memory import OK, Body, Upstream
from attrs import frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from vllmproxy.http1.answer import AnswerLost
from vllmproxy.http1.message import BadAnswer, Limits, ResponseHead


@frozen
class Case:
    """An upstream's bytes, and what they are: status, body, informational statuses, whether kept."""

    wire: bytes
    status: int
    body: bytes
    kept: bool = True
    method: bytes = b"GET"
    informed: tuple[int, ...] = ()


ANSWERS = {
    "length": Case(OK, 200, b"ok"),
    "no reason": Case(b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok", 200, b"ok"),
    "empty": Case(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, b""),
    "chunked": Case(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n1\r\n!\r\n0\r\nT: x\r\n\r\n",
        200,
        b"hello!",
    ),
    "204": Case(b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
    "304": Case(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n", 304, b""),
    "head": Case(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", 200, b"", kept=False, method=b"HEAD"),
    "head chunked": Case(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 200, b"", kept=False, method=b"HEAD"
    ),
    "head open": Case(b"HTTP/1.1 200 OK\r\n\r\n", 200, b"", method=b"HEAD"),
    "about RTSP": Case(
        b"HTTP/1.1 200 OK\r\nContent-Length: 24\r\n\r\n\r\n\r\nRTSP/1.0 200 OK\r\n...",
        200,
        b"\r\n\r\nRTSP/1.0 200 OK\r\n...",
    ),
    "informed": Case(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK,
        200,
        b"ok",
        informed=(100, 103),
    ),
    "says close": Case(
        b"HTTP/1.1 200 OK\r\nConnection: x, Close\r\nContent-Length: 2\r\n\r\nok", 200, b"ok", kept=False
    ),
    "old": Case(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", 200, b"ok", kept=False),
    "old kept alive": Case(
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok", 200, b"ok", kept=False
    ),
    "offers an upgrade": Case(
        b"HTTP/1.1 200 OK\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\nok", 200, b"ok"
    ),
    "wants an upgrade": Case(
        b"HTTP/1.1 426 Upgrade Required\r\nConnection: Upgrade\r\nUpgrade: x\r\nContent-Length: 2\r\n\r\nok", 426, b"ok"
    ),
    "extra bytes": Case(OK + b"X", 200, b"ok", kept=False),
    "an answer too many": Case(OK + OK, 200, b"ok", kept=False),
    "a body to HEAD": Case(OK, 200, b"", kept=False, method=b"HEAD"),
    "a body with 204": Case(b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nok", 204, b"", kept=False),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_how_an_answer_is_cut_makes_no_difference(name: str) -> None:
    case = ANSWERS[name]
    for cut in range(len(case.wire) + 1):
        upstream, informed = Upstream(), []
        inform = lambda head, informed=informed: informed.append(head.status)  # noqa: E731
        pending = upstream.ask(case.method, inform=inform)
        (wire,) = upstream.wires
        assert wire.take() == case.method + b" /v1/x?y HTTP/1.1\r\nhost: vllm\r\n\r\n"
        for piece in (case.wire[:cut], case.wire[cut:]):
            if piece:
                wire.receive(piece)
        assert pending.answer is not None
        assert pending.answer.head.status == case.status
        assert pending.whole == case.body, cut
        assert tuple(informed) == case.informed
        upstream.ask()
        upstream.settle()
        assert len(upstream.wires) == (1 if case.kept else 2), cut
        assert wire.ending == ("" if case.kept else "abort")
        assert bool(wire.sent) is case.kept
        if case.kept:  # the next answer is parsed as its own
            again = upstream.ask()
            upstream.wires[-1].receive(OK)
            assert again.whole == b"ok" or len(upstream.wires) == 2


@pytest.mark.parametrize("cut", [0, 1, 20, 45, 50])
def test_an_answer_that_ends_with_the_connection(cut: int) -> None:
    data = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nhello"
    for clean in (True, False):
        upstream = Upstream()
        pending = upstream.ask()
        wire = upstream.wires[0]
        for piece in (data[:cut], data[cut:]):
            if piece:
                wire.receive(piece)
        assert pending.receiver.body == b"hello"
        assert pending.whole is None
        wire.close_from_peer() if clean else wire.reset_from_peer()
        upstream.settle()
        assert pending.receiver.events == ["answer_finished" if clean else "answer_failed"]


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello!\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
@pytest.mark.parametrize("clean", [True, False])
def test_a_truncated_answer_is_not_taken_for_a_whole_one(data: bytes, clean: bool) -> None:
    head, _, body = data.partition(b"\r\n\r\n")
    for cut in range(len(body)):
        upstream = Upstream()
        pending = upstream.ask()
        wire = upstream.wires[0]
        wire.receive(head + b"\r\n\r\n")
        for piece in (body[:cut], body[cut:]):
            wire.receive(piece)
        wire.close_from_peer() if clean else wire.reset_from_peer()
        upstream.settle()
        assert pending.receiver.events == ["answer_failed"]
        assert pending.receiver.reasons[0].check(AnswerLost, BadAnswer)
        assert wire.lost


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 99 X\r\n\r\n",
        b"HTTP/1.1 600 X\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\nok",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        b"RTSP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"ICE/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 103 Early Hints\r\n\r\nRTSP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 600,
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 5000,
        b"HTTP/1.1 200 " + b"y" * 5000,
    ],
)
def test_an_answer_that_may_not_pass(data: bytes) -> None:
    for step in (1, 7, len(data)):
        upstream = Upstream(Limits(answer_head=4000))
        pending = upstream.ask()
        for at in range(0, len(data), step):
            upstream.wires[0].receive(data[at : at + step])
        assert pending.error is BadAnswer
        assert pending.answer is None
        assert upstream.wires[0].ending == "abort"
        upstream.ask()
        assert len(upstream.wires) == 2


def test_a_64_kib_header_passes() -> None:
    upstream = Upstream()
    pending = upstream.ask()
    upstream.wires[0].receive(b"HTTP/1.1 200 OK\r\nMetadata: %s\r\nContent-Length: 0\r\n\r\n" % (b"m" * 65_536))
    assert pending.answer is not None
    assert pending.answer.head.get(b"metadata") == b"m" * 65_536


def test_an_upstreams_trailer_without_end_is_cut_off() -> None:
    upstream = Upstream(Limits(answer_head=4000))
    pending = upstream.ask()
    upstream.wires[0].receive(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nT: ")
    for _ in range(100):
        upstream.wires[0].receive(b"t" * 100)
    assert pending.receiver.events == ["answer_failed"]


def test_a_tunnel() -> None:
    switching = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX: y\r\n\r\n"
    for cut in range(len(switching) + 5):
        upstream = Upstream()
        pending = upstream.ask(upgrade=True)
        wire = upstream.wires[0]
        wire.take()
        for piece in ((switching + b"early")[:cut], (switching + b"early")[cut:]):
            wire.receive(piece) if piece else None
        assert pending.answer is not None
        assert pending.answer.head.status == 101
        pending.answer.connection.write(b"\x00up")
        wire.receive(b"HTTP/1.1 200 OK\r\n")
        assert wire.take() == b"\x00up"
        assert pending.receiver.body == b"earlyHTTP/1.1 200 OK\r\n"
        wire.close_from_peer()
        assert pending.receiver.events == ["tunnel_half_closed"]
        pending.answer.connection.half_close()
        upstream.settle()
        assert pending.receiver.events == ["tunnel_half_closed", "answer_finished"]
        assert wire.lost


def test_a_tunnel_that_is_reset_failed() -> None:
    upstream = Upstream()
    pending = upstream.ask(upgrade=True)
    upstream.wires[0].receive(b"HTTP/1.1 101 S\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    upstream.wires[0].reset_from_peer()
    assert pending.receiver.events == ["answer_failed"]


def test_an_upgrade_that_is_not_taken_is_plain_http() -> None:
    upstream = Upstream()
    pending = upstream.ask(upgrade=True)
    upstream.wires[0].receive(OK)
    assert pending.whole == b"ok"
    upstream.ask()
    assert len(upstream.wires) == 1


# anything


@given(
    data=st.lists(
        st.one_of(
            st.sampled_from([case.wire for case in ANSWERS.values()]),
            st.sampled_from([b"\r\n", b"0\r\n\r\n", b"HTTP/1.1 101 S\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"]),
            st.binary(max_size=6),
        ),
        max_size=5,
    ),
    method=st.sampled_from([b"GET", b"HEAD", b"POST"]),
    step=st.integers(1, 60),
    end=st.sampled_from(["fin", "rst", "cancel", "agent"]),
    upgrade=st.booleans(),
)
@settings(max_examples=400)
def test_every_request_ends_once_whatever_comes(
    data: list[bytes], method: bytes, step: int, end: str, upgrade: bool
) -> None:
    upstream = Upstream()
    body = Body(3) if method == b"POST" else None
    informed: list[ResponseHead] = []
    pending = upstream.ask(method, body, upgrade=upgrade, inform=informed.append)
    wire = upstream.wires[0]
    stream = b"".join(data)
    for at in range(0, len(stream), step):
        wire.receive(stream[at : at + step])
    if end == "cancel":
        pending.asked.cancel()
    if end != "rst":
        wire.close_from_peer()
        if pending.answer is not None and pending.answer.head.status == 101:
            pending.answer.connection.half_close()
    else:
        wire.reset_from_peer()
    upstream.settle()
    upstream.agent.close()
    upstream.settle()
    assert wire.lost
    ends = pending.receiver.events.count("answer_finished") + pending.receiver.events.count("answer_failed")
    assert ends + (pending.failure is not None) == 1
    if body is not None:
        assert body.calls == ["start", "stop"]
    assert not upstream.clock.getDelayedCalls()
