"""Each directive of the ``X-Vllmsim`` header, in memory."""

import gzip
import hashlib

import httptools
import pytest
from _simulated import Memory, post, request
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.simulator.faults import DIRECTIVES, pattern

COMPLETION = {"prompt": "a b", "max_tokens": 3}


def get(directive: str, path: str = "/v1/models", **headers: str) -> bytes:
    return request("GET", path, x_vllmsim=directive, **headers)


def test_echo_shows_the_request_as_it_was_received() -> None:
    memory = Memory()
    body = b"\x00\xff" * 1000
    data = request("PUT", "/a%20b/?x=1&x=2", body, **{"X_Vllmsim": "echo", "Cookie": "a", "cookie": "b"})
    memory.send(request("GET", "/health"))
    answer = memory.ask(data).json()
    assert (answer["method"], answer["target"], answer["http_version"]) == ("PUT", "/a%20b/?x=1&x=2", "1.1")
    assert [pair for pair in answer["headers"] if pair[0].lower() == "cookie"] == [
        ["Cookie", "a"],
        ["cookie", "b"],
    ]
    assert answer["body_sha256"] == hashlib.sha256(body).hexdigest()
    assert answer["body_length"] == 2000
    assert (answer["connection"], answer["request"]) == (1, 2)


def test_echo_keeps_nothing_of_a_body() -> None:
    memory = Memory()
    memory.send(post("/v1/completions", b"x" * 100000, x_vllmsim="echo")[:-1])
    kept = memory.server._queue[0].request
    assert kept.length > 90000
    assert kept.body == b""


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after", [0, 1, 100])
def test_die_ends_the_connection_after_that_many_bytes(after: int, stream: bool) -> None:
    memory = Memory()
    body = COMPLETION | {"stream": stream}
    (answer,) = memory.send(post("/v1/completions", body, x_vllmsim=f"die; after={after}"))
    assert answer.status == 200
    assert len(answer.body) == after
    assert not answer.complete
    assert memory.client.lost is not None
    assert (memory.stats.aborts, memory.stats.running) == (0, 0)


def test_reset_sends_what_it_promised_first() -> None:
    memory = Memory()
    memory.send(post("/v1/completions", COMPLETION, x_vllmsim="reset; after=7"))
    (answer,) = memory.answers()
    assert len(answer.body) == 7
    assert memory.client.lost is not None
    assert memory.stats.aborts == 0


@pytest.mark.parametrize("directive", ["reset-before-head", "close-before-head"])
def test_an_end_before_the_head(directive: str) -> None:
    memory = Memory()
    assert memory.send(get(directive)) == []
    assert memory.client.data == b""
    assert memory.client.lost is not None


@pytest.mark.parametrize(("directive", "body"), [("stall; after=9", 9), ("stall", 0), ("stall-head", None)])
def test_a_stall_lasts_until_the_client_leaves(directive: str, body: int | None) -> None:
    memory = Memory()
    data = post("/v1/completions", COMPLETION | {"stream": True}, x_vllmsim=directive)
    memory.send(data)
    memory.wait(10000)
    assert [len(answer.body) for answer in memory.answers()] == ([] if body is None else [body])
    assert memory.client.lost is None
    memory.leave()
    assert memory.stats.aborts == 1


def test_short_promises_more_than_it_sends() -> None:
    memory = Memory()
    (answer,) = memory.send(get("short; length=50; sent=20"))
    assert answer.header("content-length") == "50"
    assert answer.body == pattern(0, 20)
    assert not answer.complete
    assert memory.client.lost is not None


def test_a_broken_chunk_comes_after_a_good_one() -> None:
    memory = Memory()
    assert memory.client.data == b""
    with pytest.raises(httptools.HttpParserError):
        memory.send(get("broken-chunk"))
    assert b'{"a good chunk":1,\r\nxyz\r\n' in memory.client.data


def test_garbage_is_not_http() -> None:
    memory = Memory()
    with pytest.raises(httptools.HttpParserError):
        memory.send(get("garbage"))
    assert memory.client.lost is not None


@pytest.mark.parametrize(
    ("framing", "header"), [("0", "content-length"), ("1", "transfer-encoding"), ("close", "connection")]
)
def test_bytes_come_in_each_framing(framing: str, header: str) -> None:
    memory = Memory()
    (answer,) = memory.send(get(f"bytes; length=100000; chunk=777; chunked={framing}; status=203"))
    assert answer.status == 203
    assert answer.header(header) is not None
    assert b"".join(pattern(i, 1000) for i in range(0, 100000, 1000)) == answer.body
    assert (memory.client.lost is not None) == (framing == "close")


def test_bytes_wait_before_each_piece() -> None:
    memory = Memory()
    memory.send(get("bytes; length=20; chunk=10; delay=3"))
    assert memory.answers()[0].body == b""
    memory.wait(3)
    assert len(memory.answers()[0].body) == 10
    memory.wait(3)
    assert memory.answers()[0].complete


def test_bytes_for_head_are_a_head() -> None:
    memory = Memory()
    memory.send(request("HEAD", "/x", x_vllmsim="bytes; length=100"))
    head, _, rest = memory.client.data.partition(b"\r\n\r\n")
    assert b"content-length: 100" in head
    assert rest == b""


@given(st.integers(0, 10**12), st.integers(0, 300))
def test_the_pattern_depends_on_the_place_only(offset: int, length: int) -> None:
    assert pattern(offset, length) == bytes(i % 251 for i in range(offset, offset + length))


def test_status_sets_every_part_of_the_head() -> None:
    directive = "status; code=503; reason=Gone Fishing; location=/x?a=1; set-cookie=a=1; set-cookie=b=2; header=x-y: z"
    memory = Memory()
    (answer,) = memory.send(get(directive))
    assert memory.client.data.startswith(b"HTTP/1.1 503 Gone Fishing\r\n")
    assert [value for name, value in answer.headers if name == "set-cookie"] == ["a=1", "b=2"]
    assert (answer.header("location"), answer.header("x-y")) == ("/x?a=1", "z")
    assert answer.json()["error"]["code"] == 503


@pytest.mark.parametrize("code", [204, 304])
def test_a_status_without_a_body_has_no_framing(code: int) -> None:
    memory = Memory()
    answer = memory.ask(get(f"status; code={code}"))
    assert (answer.status, answer.complete, answer.body) == (code, True, b"")
    assert answer.header("content-length") is None
    assert memory.ask(request("GET", "/health")).status == 200


def test_headers_of_any_size() -> None:
    answer = Memory().ask(get("headers; size=65536"))
    assert answer.header("metadata") == "m" * 65536


def test_http10_ends_with_the_connection() -> None:
    memory = Memory()
    (answer,) = memory.send(get("http10"))
    assert memory.client.data.startswith(b"HTTP/1.0 200 OK\r\n")
    assert answer.header("content-length") is None
    assert answer.json()["object"] == "list"
    assert memory.client.lost is not None


@pytest.mark.parametrize("code", [100, 102, 103])
def test_an_interim_answer_comes_first(code: int) -> None:
    memory = Memory()
    memory.send(get(f"continue; code={code}"))
    assert [answer.status for answer in memory.answers()] == [code, 200]


def test_gzip_says_so() -> None:
    answer = Memory().ask(get("gzip"))
    assert answer.header("content-encoding") == "gzip"
    assert b'"object":"list"' in gzip.decompress(answer.body)


def test_the_pace_of_one_stream_is_set_by_its_request() -> None:
    memory = Memory(ttft=100.0)
    body = {"prompt": "a", "stream": True}
    memory.send(post("/v1/completions", body, x_vllmsim="ttft=2; tpot=1; tokens=2; comments=0.5"))
    memory.wait(0.5)
    assert memory.answers()[0].body == b": keep-alive\n\n"
    for _ in range(5):
        memory.wait(0.5)
    assert memory.answers()[0].complete
    assert memory.stats.events == 3


def test_the_pace_goes_with_a_fault() -> None:
    memory = Memory()
    data = post("/v1/completions", COMPLETION | {"stream": True}, x_vllmsim="die; after=300; tpot=5")
    memory.send(data)
    assert memory.client.lost is None
    memory.wait(5)
    assert memory.client.lost is not None


def test_early_answers_at_the_head() -> None:
    memory = Memory()
    data = post("/v1/completions", COMPLETION, x_vllmsim="status; code=413; early=1")
    (answer,) = memory.send(data.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
    assert answer.status == 413


@pytest.mark.parametrize(
    "header",
    [
        "nope",
        "die; after=x",
        "die; after=-1",
        "bytes; length=1; chunk=0",
        "continue; code=101",
        "status; code=99",
        "ttft=soon",
    ],
)
def test_a_directive_that_makes_no_sense_is_refused(header: str) -> None:
    memory = Memory()
    answer = memory.ask(post("/v1/completions", COMPLETION, x_vllmsim=header))
    assert (answer.status, answer.json()["error"]["param"]) == (400, "X-Vllmsim")
    assert memory.stats.running == 0


def test_a_directive_works_on_any_path_and_method() -> None:
    memory = Memory()
    assert memory.ask(request("PATCH", "/no/such/path", x_vllmsim="echo")).json()["method"] == "PATCH"
    assert memory.ask(request("GET", "/no/such/path", x_vllmsim="gzip")).status == 404


def test_every_directive_is_documented() -> None:
    assert all(directive.__doc__ for directive in DIRECTIVES.values())
