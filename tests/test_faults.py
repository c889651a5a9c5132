"""Upstreams that fail: never a truncated answer that looks whole, never a traceback, an address or HTML."""

import json
import threading
from collections.abc import Callable

import pytest
from _ports import free_port
from _raw import (
    CHUNKED,
    LAST_CHUNK,
    OK,
    PATIENCE,
    Ended,
    Message,
    Upstream,
    Wire,
    chunk,
    connect,
    each_request,
    request,
)
from _service import Twistd, start_proxy

#: What the proxy of this file is started with (conftest.py).
PROXY_OPTIONS = ("--first-byte-timeout", "1")
GET = request(b"GET", b"/vllm/v1/models")
POST = request(b"POST", b"/vllm/v1/chat/completions", body=b'{"model":"m"}')
MESSAGES = request(b"POST", b"/vllm/v1/messages", body=b'{"model":"m"}')
EVENT = b"data: 1\n\n"
LENGTH = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n"
OPEN_ENDED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


def stay(wire: Wire) -> None:
    """The upstream keeps its connection open: what it sent is wrong enough."""
    wire.rest()


ENDS: dict[str, Callable[[Wire], None]] = {"fin": Wire.close, "reset": Wire.reset, "stay": stay}


def playing(answer: bytes, end: str = "fin") -> Callable[[Wire], None]:
    """Return a script: one request, this answer, this end."""

    def script(wire: Wire) -> None:
        wire.message()
        wire.send(answer)
        ENDS[end](wire)

    return script


BROKEN_BODIES = {
    "length, fin": (LENGTH + b"half", "fin"),
    "length, reset": (LENGTH + b"half", "reset"),
    "length, nothing of it": (LENGTH, "fin"),
    "length, one byte short": (LENGTH + b"x" * 99, "fin"),
    "chunked, fin between chunks": (CHUNKED + chunk(EVENT), "fin"),
    "chunked, reset between chunks": (CHUNKED + chunk(EVENT), "reset"),
    "chunked, fin in a chunk": (CHUNKED + b"20\r\n" + EVENT, "fin"),
    "chunked, fin in a size": (CHUNKED + chunk(EVENT) + b"1", "fin"),
    "chunked, fin in the last chunk": (CHUNKED + chunk(EVENT) + b"0\r\n", "fin"),
    "chunked, fin before the first": (CHUNKED, "fin"),
    "chunked, size is no number": (CHUNKED + chunk(EVENT) + b"xyz\r\nnot a chunk\r\n", "stay"),
    "chunked, size is negative": (CHUNKED + chunk(EVENT) + b"-5\r\nhello\r\n", "stay"),
    "chunked, size too large for any number": (CHUNKED + chunk(EVENT) + b"f" * 300 + b"\r\n", "stay"),
    "chunked, data longer than its size": (CHUNKED + chunk(EVENT) + b"2\r\nhello\r\n" + LAST_CHUNK, "stay"),
    "chunked, garbage": (CHUNKED + chunk(EVENT) + b"\x16\x03\x01\x00\x00garbage\r\n\r\n", "stay"),
    "chunked, another answer": (CHUNKED + chunk(EVENT) + OK, "stay"),
    "close-delimited, reset": (OPEN_ENDED + EVENT, "reset"),
    "http/1.0, reset": (b"HTTP/1.0 200 OK\r\n\r\n" + EVENT, "reset"),
}


def whole(client: Wire) -> bytes:
    """Read an answer as a caller does; raises ``Ended`` where it was cut off."""
    return client.message().body


def break_off(upstream: Upstream, proxy: Twistd, case: str, asked: bytes) -> tuple[bytes, str]:
    """Let the answer break after the client has the head and whatever good there was; return what it saw."""
    answer, end = BROKEN_BODIES[case]
    head, _, body = answer.partition(b"\r\n\r\n")
    good = b"\r\n\r\n" + (chunk(EVENT) if body.startswith(chunk(EVENT)) else b"")
    has_it = threading.Event()

    def script(wire: Wire) -> None:
        wire.message()
        wire.send(head + good)
        assert has_it.wait(PATIENCE)
        wire.send(answer[len(head + good) :])
        ENDS[end](wire)

    with upstream.playing(script), connect(proxy) as client:
        client.send(asked)
        began = client.head()
        assert began.status == 200
        had = EVENT if EVENT in good else b""
        had = (client.chunk() if began.get(b"transfer-encoding") and had else client.exactly(len(had))) if had else b""
        has_it.set()
        rest, how = client.rest()
        return began.head + b"\r\n\r\n" + rest, how


@pytest.mark.parametrize("case", BROKEN_BODIES)
def test_a_caller_can_tell_that_the_answer_broke_off(upstream: Upstream, scripted_proxy: Twistd, case: str) -> None:
    """The connection ends, before the promised length or without the last chunk."""
    seen, _ = break_off(upstream, scripted_proxy, case, POST)
    head, _, rest = seen.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head or (b"content-length: 100" in head and len(rest) < 100)
    assert not rest.endswith(LAST_CHUNK)
    assert b"HTTP/1.1" not in rest


@pytest.mark.parametrize("case", [case for case in BROKEN_BODIES if not case.startswith("length")])
def test_an_http_1_0_caller_sees_a_reset(upstream: Upstream, scripted_proxy: Twistd, case: str) -> None:
    """Where the end of the connection is the end of the answer, a FIN would make it look whole."""
    asked = request(b"POST", b"/vllm/v1/chat/completions", version=b"1.0", body=b"{}")
    _, how = break_off(upstream, scripted_proxy, case, asked)
    assert how == "reset"


def check_cut_or_502(client: Wire) -> None:
    """Either the proxy could still say that the answer is bad, or the answer is visibly not whole."""
    seen, _ = client.rest_or_message()
    head, _, rest = seen.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 502 "):
        check_error(Message(head, rest), 502)
    elif Message(head).get(b"content-length"):
        assert len(rest) < int(Message(head).get(b"content-length"))
    else:
        assert Message(head).get(b"transfer-encoding") == b"chunked"
        assert not rest.endswith(LAST_CHUNK)


@pytest.mark.parametrize("case", BROKEN_BODIES)
def test_an_answer_that_is_broken_from_the_start(upstream: Upstream, scripted_proxy: Twistd, case: str) -> None:
    """All of it in one segment: a 502 is as honest as an answer that breaks off."""
    with upstream.playing(playing(*BROKEN_BODIES[case])), connect(scripted_proxy) as client:
        client.send(POST)
        check_cut_or_502(client)


@pytest.mark.parametrize("fault", ["die; after=200", "reset; after=200", "broken-chunk", "short", "die", "reset"])
@pytest.mark.parametrize("stream", [b"true", b"false"])
def test_the_simulators_deaths(proxy: Twistd, fault: str, stream: bytes) -> None:
    body = b'{"model":"qwen2.5-7b-instruct","messages":[{"role":"user","content":"hi"}],"stream":%s}' % stream
    with connect(proxy) as client:
        client.send(request(b"POST", b"/vllm/v1/chat/completions", b"X-Vllmsim: " + fault.encode(), body=body))
        check_cut_or_502(client)


@pytest.mark.parametrize("fault", ["close-before-head", "reset-before-head", "garbage"])
def test_the_simulators_silence(proxy: Twistd, fault: str) -> None:
    with connect(proxy) as client:
        for _ in range(3):
            client.send(request(b"POST", b"/vllm/v1/completions", b"X-Vllmsim: " + fault.encode(), body=b"{}"))
            check_error(client.message(), 502)


def test_a_close_delimited_answer_that_ends_well_is_whole(upstream: Upstream, scripted_proxy: Twistd) -> None:
    with upstream.playing(playing(OPEN_ENDED + EVENT)), connect(scripted_proxy) as client:
        client.send(POST)
        assert whole(client) == EVENT


BAD_HEADS = {
    "fin": (b"", "fin"),
    "reset": (b"", "reset"),
    "fin in the head": (b"HTTP/1.1 200 OK\r\ncontent-le", "fin"),
    "reset in the head": (b"HTTP/1.1 200 OK\r\ncontent-le", "reset"),
    "TLS": (b"\x16\x03\x01\x00\x05hello\r\n\r\n", "stay"),
    "HTML without a head": (b"<html><h1>Bad Gateway 127.0.0.1</h1></html>\r\n\r\n", "stay"),
    "HTTP/2": (b"\x00\x00\x12\x04\x00\x00\x00\x00\x00", "stay"),
    "HTTP/2.0 in words": (b"HTTP/2.0 200 OK\r\ncontent-length: 0\r\n\r\n", "stay"),
    "length and chunked": (CHUNKED[:-2] + b"content-length: 5\r\n\r\n" + chunk(b"hello") + LAST_CHUNK, "stay"),
    "two lengths": (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 5\r\n\r\nhello", "stay"),
    "a list of lengths": (b"HTTP/1.1 200 OK\r\ncontent-length: 2, 5\r\n\r\nhello", "stay"),
    "a negative length": (b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\nhello", "stay"),
    "a length of 5000 digits": (b"HTTP/1.1 200 OK\r\ncontent-length: " + b"9" * 5000 + b"\r\n\r\nhello", "stay"),
    "101 unasked": (b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nraw", "stay"),
    "a status of 100 digits": (b"HTTP/1.1 " + b"2" * 100 + b" OK\r\ncontent-length: 2\r\n\r\nok", "stay"),
    "a status of two digits": (b"HTTP/1.1 20 OK\r\ncontent-length: 2\r\n\r\nok", "stay"),
    "status 099": (b"HTTP/1.1 099 OK\r\ncontent-length: 2\r\n\r\nok", "stay"),
    "a status that is no number": (b"HTTP/1.1 abc OK\r\ncontent-length: 2\r\n\r\nok", "stay"),
    "an unknown transfer coding": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: rot13\r\n\r\nuryyb", "stay"),
    "chunked twice": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n", "stay"),
    "a header without a colon": (b"HTTP/1.1 200 OK\r\nnonsense\r\ncontent-length: 2\r\n\r\nok", "stay"),
    "a NUL in a header": (b"HTTP/1.1 200 OK\r\nx: a\x00b\r\ncontent-length: 2\r\n\r\nok", "stay"),
    "a folded header": (b"HTTP/1.1 200 OK\r\nx: a\r\n b\r\ncontent-length: 2\r\n\r\nok", "stay"),
    "a head without end": (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 3_000_000, "stay"),
    "ten thousand headers": (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 10_000 + b"content-length: 2\r\n\r\nok", "stay"),
}


def check_error(answer: Message, status: int, *, anthropic: bool = False) -> None:
    """An error of the proxy's own, in the shape that the route's SDK reads, which gives nothing away."""
    assert answer.status == status
    assert answer.get(b"content-type").startswith(b"application/json")
    content = json.loads(answer.body)
    error = content["error"]
    if anthropic:
        assert content["type"] == "error"
        assert set(error) == {"type", "message"}
    else:
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == str(status)
    assert error["message"]
    assert error["type"]
    shown = (answer.head + answer.body).lower()
    for secret in (b"traceback", b"127.0.0.1", b"localhost", b"<html", b"twisted", b".py", b"httptools", b"errno"):
        assert secret not in shown


@pytest.mark.parametrize("case", BAD_HEADS)
@pytest.mark.parametrize("asked", [POST, MESSAGES], ids=["openai", "anthropic"])
def test_no_usable_head_is_a_502(upstream: Upstream, scripted_proxy: Twistd, case: str, asked: bytes) -> None:
    answer, end = BAD_HEADS[case]

    def script(wire: Wire) -> None:
        try:
            playing(answer, end)(wire)
        except (OSError, Ended):  # it was cut off in the middle of its nonsense, as it should be
            return

    with connect(scripted_proxy) as client:
        with upstream.playing(script):
            client.send(asked)
            check_error(client.message(), 502, anthropic=asked is MESSAGES)
        with upstream.playing(each_request()):  # the caller's connection is as good as before
            client.send(GET)
            assert client.message().body == b"ok"


def test_an_upstream_that_refused_to_talk_http_is_hung_up_on(upstream: Upstream, scripted_proxy: Twistd) -> None:
    def script(wire: Wire) -> None:
        wire.message()
        wire.send(b"\x16\x03\x01\x00\x05hello\r\n\r\n")
        wire.gone_at(5)

    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(POST)
        assert client.message().status == 502


@pytest.mark.parametrize("asked", [POST, MESSAGES], ids=["openai", "anthropic"])
def test_no_first_byte_in_time_is_a_504(upstream: Upstream, scripted_proxy: Twistd, asked: bytes) -> None:
    """And the upstream's connection is closed, so that vLLM stops."""

    def script(wire: Wire) -> None:
        if b"late" not in wire.message().target:
            wire.gone_at()

    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(asked)
        check_error(client.message(), 504, anthropic=asked is MESSAGES)


def test_a_head_that_never_ends_is_a_504(upstream: Upstream, scripted_proxy: Twistd) -> None:
    def script(wire: Wire) -> None:
        wire.message()
        wire.send(b"HTTP/1.1 200 OK\r\ncontent-")
        wire.gone_at()

    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(POST)
        check_error(client.message(), 504)


def test_a_body_that_pauses_is_not_late(upstream: Upstream, scripted_proxy: Twistd) -> None:
    """The timeout is for the first byte: tokens may take longer than that between one another."""

    def script(wire: Wire) -> None:
        wire.message()
        wire.send(CHUNKED + chunk(EVENT))
        assert not wire.readable(2.5), "the proxy gave up on a stream that had begun"
        wire.send(chunk(EVENT) + LAST_CHUNK)

    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(POST)
        assert whole(client) == EVENT * 2


def test_nobody_listening_is_a_503(tmp_path_factory: pytest.TempPathFactory) -> None:
    port = free_port()
    proxy = start_proxy(tmp_path_factory.mktemp("nobody"), f"http://127.0.0.1:{port}")
    try:
        with connect(proxy) as client:
            for asked in (POST, MESSAGES, GET):
                client.send(asked)
                answer = client.message()
                check_error(answer, 503, anthropic=asked is MESSAGES)
                assert str(port).encode() not in answer.head + answer.body
        assert "Traceback" not in proxy.log
    finally:
        proxy.stop()


POISON = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nPOISON"
COMPLETE = {
    "length": (b"GET", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", b"ok"),
    "chunked": (b"GET", CHUNKED + chunk(b"ok") + LAST_CHUNK, b"ok"),
    "empty": (b"GET", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b""),
    "HEAD": (b"HEAD", b"HTTP/1.1 200 OK\r\ncontent-length: 44\r\n\r\n", b""),
    "204": (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    "304": (b"GET", b"HTTP/1.1 304 Not Modified\r\ncontent-length: 44\r\n\r\n", b""),
}


@pytest.mark.parametrize(
    "extra", [POISON, b"junk", b"\r\n\r\n", b"x" * 100_000], ids=["answer", "junk", "empty", "much"]
)
@pytest.mark.parametrize("when", ["at once", "later"])
@pytest.mark.parametrize("case", COMPLETE)
def test_bytes_after_a_whole_answer_reach_nobody(
    upstream: Upstream, scripted_proxy: Twistd, case: str, when: str, extra: bytes
) -> None:
    """Where they come with the answer nothing may pause in between; later, the proxy must have had time to see them."""
    method, answer, body = COMPLETE[case]
    over = threading.Event()

    def script(wire: Wire) -> None:
        try:
            while wire.message().target != b"/v1/first":
                wire.send(OK)
            wire.send(answer + (extra if when == "at once" else b""))
            if when == "later":
                wire.send(extra)
                if extra.strip():
                    wire.gone_at()  # a line end before the next answer is allowed (RFC 9112 §2.2), and skipped
            over.set()
            each_request()(wire)
        except (OSError, Ended):
            over.set()

    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(request(method, b"/vllm/v1/first"))
        got = client.message(bodiless=body == b"" and case != "empty")
        assert (got.status, got.body) == (int(answer[9:12]), body)
        assert when == "at once" or over.wait(PATIENCE)
        for _ in range(2):
            client.send(GET)
            assert client.message().body == b"ok"
