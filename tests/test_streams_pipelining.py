"""Several requests on one connection: in order, one at a time, however they are cut; heads too slow or too big."""

import json
import threading
import time

import pytest
from _raw import AUTH, OK, PATIENCE, Ended, Upstream, Wire, chunk, connect, each_request, request
from _service import Twistd

#: What the proxy of this file is started with (conftest.py).
PROXY_OPTIONS = ("--head-timeout", "1")
GET = request(b"GET", b"/vllm/v1/models")


class OneAtATime:
    """An upstream that echoes target and body, notes the order, and fails the test when two requests overlap."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seen: list[bytes] = []
        self._busy = threading.Lock()
        self._seconds = seconds

    def __call__(self, wire: Wire) -> None:
        while True:
            try:
                message = wire.message()
            except Ended:
                return
            assert self._busy.acquire(blocking=False), "two requests of one connection at once"
            self.seen.append(message.target)
            time.sleep(self._seconds)
            body = message.target + b" " + message.body
            self._busy.release()
            wire.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))


def several() -> tuple[bytes, list[bytes]]:
    """Return GETs and POSTs of both framings in one run of bytes, and the bodies of their answers."""
    path = b"/vllm/v1/completions?n=%d"
    chunked = request(b"POST", path % 3, b"Transfer-Encoding: chunked") + chunk(b"ab") + chunk(b"c" * 20) + b"0\r\n\r\n"
    requests = [
        request(b"GET", path % 0),
        request(b"POST", path % 1, body=b"one" * 30),
        request(b"GET", path % 2),
        chunked,
        request(b"POST", path % 4, body=b""),
        request(b"POST", path % 5, body=b"five"),
        request(b"GET", path % 6),
    ]
    bodies = [b"", b"one" * 30, b"", b"ab" + b"c" * 20, b"", b"five", b""]
    return b"".join(requests), [b"/v1/completions?n=%d %s" % pair for pair in enumerate(bodies)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 333, 1024, 100_000])
def test_pipelined_requests_are_answered_in_order(upstream: Upstream, scripted_proxy: Twistd, size: int) -> None:
    data, bodies = several()
    script = OneAtATime()
    with upstream.playing(script), connect(scripted_proxy) as client:
        for i in range(0, len(data), size):
            client.send(data[i : i + size])
        assert [client.message().body for _ in bodies] == bodies
    assert script.seen == [body.split(b" ")[0] for body in bodies]


def test_pipelined_requests_reach_the_upstream_one_at_a_time(upstream: Upstream, scripted_proxy: Twistd) -> None:
    data, bodies = several()
    with upstream.playing(OneAtATime(0.02)), connect(scripted_proxy) as client:
        client.send(data * 3)
        assert [client.message().body for _ in range(3 * len(bodies))] == bodies * 3


def test_thousands_of_pipelined_requests(upstream: Upstream, scripted_proxy: Twistd) -> None:
    number = 2000
    with upstream.playing(each_request()), connect(scripted_proxy) as client:
        before = scripted_proxy.rss()
        sending = threading.Thread(target=client.send, args=(GET * number,), daemon=True)
        sending.start()
        for _ in range(number):
            assert client.message().body == b"ok"
        sending.join(PATIENCE)
        assert scripted_proxy.rss() - before < 20 * 1024 * 1024


@pytest.mark.parametrize(
    "bad",
    [
        b"GET /vllm/v1/models HTTP/1.1\r\nHost: x\r\nno colon here\r\n\r\n",
        b"GET /vllm/v1/models HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x00\x05hello",
        b"POST /vllm/v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /vllm/v1/completions HTTP/1.1\r\nHost: x\r\n" + AUTH + b"\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    ],
    ids=["header", "no host", "TLS", "length and chunked", "chunk"],
)
@pytest.mark.parametrize("together", [True, False])
def test_a_malformed_request_behind_a_good_one(
    upstream: Upstream, scripted_proxy: Twistd, bad: bytes, together: bool
) -> None:
    """The first is answered; then comes a 400, and the end. What follows is not read as a request."""
    with upstream.playing(OneAtATime()), connect(scripted_proxy) as client:
        if together:
            client.send(GET + bad + GET)
            assert client.message().body == b"/v1/models "
        else:
            client.send(GET)
            assert client.message().body == b"/v1/models "
            client.send(bad + GET)
        answer = client.message()
        assert answer.status == 400
        assert answer.get(b"connection") == b"close"
        assert json.loads(answer.body)["error"]["code"] == "400"
        assert client.rest()[0] == b""


def test_connection_close_ends_the_pipeline(upstream: Upstream, scripted_proxy: Twistd) -> None:
    script = OneAtATime()
    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(request(b"GET", b"/vllm/v1/models?last", b"Connection: close") + GET)
        assert client.message().body == b"/v1/models?last "
        assert client.rest()[0] == b""
    assert script.seen == [b"/v1/models?last"]


def test_our_own_answers_keep_their_place(upstream: Upstream, scripted_proxy: Twistd) -> None:
    """Refused, passed on, answered by Klein: each in its turn."""
    unknown = request(b"GET", b"/vllm/v1/models", key=b"x-api-key: sk-wrong")
    alive = request(b"GET", b"/health/liveliness")
    with upstream.playing(OneAtATime(0.02)), connect(scripted_proxy) as client:
        client.send(GET + unknown + alive + GET + alive + unknown + GET)
        assert [client.message().status for _ in range(7)] == [200, 401, 200, 200, 200, 401, 200]


def dribble(client: Wire, data: bytes, seconds: float) -> tuple[bytes, float]:
    """Send a byte every ``seconds`` until the proxy answers or closes; return what it said and how long that took."""
    began = time.monotonic()
    try:
        for i in range(len(data)):
            client.send(data[i : i + 1])
            if client.readable(seconds):
                break
            assert time.monotonic() - began < 15, "the proxy waits for ever"
        return client.rest()[0], time.monotonic() - began
    except ConnectionError:
        return b"", time.monotonic() - began


@pytest.mark.parametrize("first", [b"", GET], ids=["new connection", "kept-alive connection"])
@pytest.mark.parametrize("head", [GET[:-4] + b"\r\nX-Slow: " + b"y" * 1000, b"G" * 1000], ids=["headers", "first line"])
def test_a_head_that_dribbles_is_cut_off(upstream: Upstream, scripted_proxy: Twistd, first: bytes, head: bytes) -> None:
    with upstream.playing(each_request()), connect(scripted_proxy) as client:
        if first:
            client.send(first)
            assert client.message().body == b"ok"
        said, took = dribble(client, head, 0.1)
        assert said == b"" or said.startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 400 "))
        if head.startswith(GET[:-4]):
            assert 0.9 < took < 10


@pytest.mark.parametrize("sent", [b"", GET[:30]], ids=["nothing", "half a head"])
def test_a_silent_connection_is_closed(scripted_proxy: Twistd, sent: bytes) -> None:
    with connect(scripted_proxy) as client:
        client.send(sent)
        said, _ = client.rest()
        assert said == b"" or said.startswith(b"HTTP/1.1 408 ")


def test_a_body_may_take_longer_than_a_head(upstream: Upstream, scripted_proxy: Twistd) -> None:
    with upstream.playing(each_request()), connect(scripted_proxy) as client:
        client.send(request(b"POST", b"/vllm/v1/completions", b"Content-Length: 4"))
        assert not client.readable(2.5)
        client.send(b"body")
        assert client.message().body == b"ok"


TOO_BIG = {
    "one header of 100 KiB": (request(b"GET", b"/vllm/v1/models", b"X: " + b"y" * 102_400), 431),
    "a head of 100 KiB": (request(b"GET", b"/vllm/v1/models", *[b"X: " + b"y" * 1021] * 100), 431),
    "a header line without end": (GET[:-2] + b"X: " + b"y" * 1_000_000, 431),
    "a header name without end": (GET[:-2] + b"y" * 1_000_000, 431),
    "two hundred headers": (request(b"GET", b"/vllm/v1/models", *[b"X: y"] * 200), 431),
    "a target of 20 KiB": (request(b"GET", b"/vllm/v1/models?" + b"q" * 20_480), 414),
    "a target without end": (b"GET /vllm/v1/models?" + b"q" * 1_000_000, 414),
}


@pytest.mark.parametrize("case", TOO_BIG)
def test_what_is_too_big_is_refused(upstream: Upstream, scripted_proxy: Twistd, case: str) -> None:
    data, status = TOO_BIG[case]
    with upstream.playing(each_request()), connect(scripted_proxy) as client:
        client.send(data)
        answer = client.message()
        assert answer.status == status
        assert json.loads(answer.body)["error"]["code"] == str(status)
        assert client.rest()[0] == b""
        assert upstream.connections == 0


@pytest.mark.parametrize(
    "data",
    [
        request(b"GET", b"/vllm/v1/models", b"X: " + b"y" * 60_000),
        request(b"GET", b"/vllm/v1/models", *[b"X: y"] * 120),
        request(b"GET", b"/vllm/v1/models?" + b"q" * 16_000),
    ],
    ids=["60 KB", "120 headers", "16 KB of target"],
)
def test_what_is_just_small_enough_passes(upstream: Upstream, scripted_proxy: Twistd, data: bytes) -> None:
    with upstream.playing(each_request(OK)), connect(scripted_proxy) as client:
        for _ in range(2):
            client.send(data)
            assert client.message().body == b"ok"
