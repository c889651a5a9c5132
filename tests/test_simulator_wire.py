"""The simulated vLLM's own HTTP/1.1: order, keep-alive, pacing, leaving."""

import pytest
from _simulated import Memory, post, request
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport

from vllmproxy.simulator.config import SimulatorConfig
from vllmproxy.simulator.server import SimulatorFactory

STREAM = {"prompt": "a b", "stream": True, "max_tokens": 3}


def test_pipelined_requests_are_answered_in_order_one_at_a_time() -> None:
    memory = Memory(ttft=1.0)
    slow = post("/v1/completions", {"prompt": "x", "max_tokens": 1}, x_request_id="slow")
    assert memory.send(slow + request("GET", "/version")) == []
    memory.wait(1.0)
    first, second = memory.answers()
    assert first.json()["id"] == "cmpl-slow"
    assert second.json() == {"version": "0.32.0"}


def test_a_request_may_come_one_byte_at_a_time() -> None:
    memory = Memory()
    for byte in post("/v1/completions", {"prompt": "x", "max_tokens": 1}):
        memory.send(bytes((byte,)))
    assert memory.answers()[0].status == 200


def test_an_idle_connection_is_closed_after_the_keep_alive_time_and_not_before() -> None:
    memory = Memory()
    memory.wait(60)
    assert memory.client.lost is None, "a connection that never asked is left alone, as by uvicorn"
    memory.send(request("GET", "/health"))
    memory.wait(4.9)
    memory.send(request("GET", "/health"))
    memory.wait(4.9)
    assert memory.client.lost is None
    memory.wait(0.2)
    assert memory.client.lost is not None


def test_the_first_byte_of_a_request_stops_the_idle_timer() -> None:
    memory = Memory()
    data = request("GET", "/health")
    memory.send(data)
    memory.send(data[:1])
    memory.wait(60)
    memory.send(data[1:])
    assert [answer.status for answer in memory.answers()] == [200, 200]


@pytest.mark.parametrize(
    "data",
    [
        b"GET /health HTTP/1.0\r\nhost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    ],
)
def test_a_connection_that_is_to_close_says_so_and_closes(data: bytes) -> None:
    memory = Memory()
    (answer,) = memory.send(data)
    assert answer.header("connection") == "close"
    assert memory.client.lost is not None


def test_what_is_not_http_is_a_400() -> None:
    memory = Memory()
    (answer,) = memory.send(b"GARBAGE\r\n\r\n")
    assert (answer.status, answer.body) == (400, b"Invalid HTTP request received.")
    assert memory.client.lost is not None


def test_an_unknown_path_is_answered_before_its_body_and_the_connection_goes_on() -> None:
    memory = Memory()
    data = post("/nowhere", {"a": 1})
    (answer,) = memory.send(data[:-3])
    assert answer.status == 404
    memory.send(data[-3:] + request("GET", "/health"))
    assert [answer.status for answer in memory.answers()] == [404, 200]


def test_expect_is_answered_when_the_body_is_wanted() -> None:
    memory = Memory()
    data = post("/v1/completions", {"prompt": "x", "max_tokens": 1}, expect="100-continue")
    head, _, body = data.partition(b"\r\n\r\n")
    memory.send(head + b"\r\n\r\n")
    assert memory.client.data == b"HTTP/1.1 100 Continue\r\n\r\n"
    memory.send(body)
    assert memory.answers()[-1].status == 200
    refused = Memory()
    refused.send(head.replace(b"/v1/completions", b"/nowhere") + b"\r\n\r\n")
    assert refused.client.data.startswith(b"HTTP/1.1 404")


def test_h2c_is_not_heard() -> None:
    memory = Memory()
    upgrade = {
        "connection": "Upgrade, HTTP2-Settings",
        "upgrade": "h2c",
        "http2_settings": "AAMAAABkAAQAAP__",
    }
    assert memory.ask(request("GET", "/health", **upgrade)).status == 200
    assert memory.ask(request("GET", "/health")).status == 200


def test_events_come_at_their_times() -> None:
    memory = Memory(ttft=2.0, tpot=0.5)
    (answer,) = memory.send(post("/v1/completions", STREAM))
    assert (answer.status, answer.body) == (200, b"")
    assert memory.wait(1.9) == b""
    assert memory.wait(0.2).count(b"data: ") == 1
    assert memory.wait(0.5).count(b"data: ") == 1
    assert memory.wait(0.5).count(b"data: ") == 2, "the last token, and [DONE] with it"
    assert memory.answers()[0].complete
    assert memory.stats.events == 4


def test_an_answer_in_one_piece_takes_as_long_as_its_tokens() -> None:
    memory = Memory(ttft=2.0, tpot=0.5)
    assert memory.send(post("/v1/completions", {"prompt": "x", "max_tokens": 3})) == []
    assert memory.stats.running == 1
    assert memory.wait(2.9) == b""
    memory.wait(0.2)
    assert memory.answers()[0].complete
    assert memory.stats.running == 0


def test_comments_fill_the_silence() -> None:
    memory = Memory(ttft=2.5, comment_every=1.0)
    memory.send(post("/v1/completions", STREAM))
    memory.wait(1.0)
    memory.wait(1.0)
    assert memory.answers()[0].body == b": keep-alive\n\n" * 2
    memory.wait(1.0)
    assert memory.answers()[0].events()[-1] == "[DONE]"
    assert memory.stats.events == 4, "comments are not events"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_leaving_before_the_first_token_aborts_at_once(stream: bool, half: bool) -> None:
    memory = Memory(ttft=30.0)
    memory.send(post("/v1/completions", STREAM | {"stream": stream}))
    if half:
        memory.server.readConnectionLost()
        memory.pump.flush()
    else:
        memory.leave()
    assert (memory.stats.aborts, memory.stats.running) == (1, 0)
    assert memory.stats.finished == {"abort": 1}
    assert memory.clock.getDelayedCalls() == []
    assert memory.client.lost is not None
    assert memory.stats.connections_open == 0


def test_leaving_in_mid_stream_is_one_abort_and_leaving_after_it_none() -> None:
    memory = Memory(tpot=1.0)
    memory.send(post("/v1/completions", STREAM))
    memory.leave()
    assert memory.stats.aborts == 1
    memory.connect()
    memory.send(post("/v1/completions", STREAM))
    memory.wait(1.0)
    memory.wait(1.0)
    memory.leave()
    assert memory.stats.aborts == 1
    assert memory.clock.getDelayedCalls() == []


def test_leaving_in_the_middle_of_a_request_body_is_no_abort() -> None:
    memory = Memory()
    memory.send(post("/v1/completions", STREAM)[:-1])
    memory.leave()
    assert memory.stats.aborts == 0


def test_a_client_that_does_not_read_is_not_written_to() -> None:
    clock = Clock()
    factory = SimulatorFactory(clock, SimulatorConfig())
    server, transport = factory.buildProtocol(None), StringTransport()
    transport.unregisterProducer = lambda: None  # type: ignore[method-assign]
    server.makeConnection(transport)
    head = {"x_vllmsim": "bytes; length=1000000; chunk=1000; delay=1"}
    server.dataReceived(request("GET", "/x", **head))
    assert transport.streaming is True
    clock.advance(1)
    transport.producer.pauseProducing()
    size = len(transport.value())
    clock.advance(100)
    clock.advance(100)
    assert len(transport.value()) == size
    transport.producer.resumeProducing()
    assert len(transport.value()) == size + 1000
