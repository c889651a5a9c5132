"""Connections of clients: kept, closed, pipelined, HTTP/1.0, and uploads that are refused at their head."""

import hashlib
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _asking import until
from _service import Twistd, start_proxy
from _wire import Wire, new_key, request, requests_seen, values, wire

GIGABYTE = 1 << 30
#: A refusal is a matter of milliseconds; an answer after the upload would take for ever.
PROMPT = 5.0


def test_a_connection_is_kept(proxy: Twistd) -> None:
    with wire(proxy) as connection:
        for number in range(50):
            connection.send(request(f"/vllm/v1/x?{number}", "X-Vllmsim: echo"))
            answer = connection.answer()
            assert answer.json()["target"] == f"/v1/x?{number}"
            assert answer.version == b"HTTP/1.1"
            assert answer.get("connection") is None


@pytest.mark.parametrize(("target", "key", "status"), [("/vllm/v1/models", None, 401), ("/vllm/sleep", "", 403)])
def test_a_connection_is_kept_after_a_refusal(proxy: Twistd, target: str, key: str | None, status: int) -> None:
    with wire(proxy) as connection:
        connection.send(request(target, key=new_key(proxy) if key == "" else key))
        assert connection.answer().status == status
        connection.send(request("/vllm/version"))
        assert connection.answer().status == 200


@pytest.mark.parametrize("option", ["close", "Close", "x-other, close"])
@pytest.mark.parametrize("target", ["/vllm/version", "/vllm/v1/models", "/vllm/nothing"])
def test_connection_close_is_honoured(proxy: Twistd, target: str, option: str) -> None:
    with wire(proxy) as connection:
        connection.send(request(target, f"Connection: {option}"))
        answer = connection.answer()
        assert answer.get("connection") == b"close"
        assert connection.ended()


def test_vllms_connection_close_is_its_own_affair(proxy: Twistd) -> None:
    with wire(proxy) as connection:
        for _ in range(3):
            connection.send(request("/vllm/v1/x", "X-Vllmsim: http10"))
            answer = connection.answer()
            assert (answer.status, answer.get("connection")) == (404, None)


# HTTP/1.0


def test_an_http10_client_gets_a_close(proxy: Twistd) -> None:
    with wire(proxy) as connection:
        connection.send(request("/vllm/version", version="1.0"))
        answer = connection.answer()
        assert answer.json() == {"version": "0.32.0"}
        assert answer.get("connection") in (b"close", None)
        assert connection.ended()


def test_an_http10_client_needs_no_host(proxy: Twistd) -> None:
    with wire(proxy) as connection:
        connection.send(request("/vllm/v1/x", "X-Vllmsim: echo", version="1.0", host=""))
        echoed = connection.answer().json()
        assert echoed["http_version"] == "1.1"
        assert values(echoed, "via")[0].startswith("1.0 ")


def test_an_http10_client_may_ask_for_more(proxy: Twistd) -> None:
    with wire(proxy) as connection:
        for _ in range(3):
            connection.send(request("/vllm/version", "Connection: Keep-Alive", version="1.0"))
            answer = connection.answer()
            assert answer.json() == {"version": "0.32.0"}
            assert (answer.get("connection") or b"").lower() == b"keep-alive"


@pytest.mark.parametrize("lines", [(), ("Connection: keep-alive",)])
@pytest.mark.parametrize("framing", ["1", "close"])
def test_an_http10_client_gets_no_chunks(proxy: Twistd, framing: str, lines: tuple[str, ...]) -> None:
    with wire(proxy) as connection:
        line = f"X-Vllmsim: bytes; length=100000; chunked={framing}; chunk=10000"
        connection.send(request("/vllm/v1/x", line, *lines, version="1.0"))
        answer = connection.answer()
        assert (answer.get("transfer-encoding"), answer.get("content-length")) == (None, None)
        assert len(answer.body) == 100_000  # up to the close
        assert answer.get("connection") in (b"close", None)


def test_an_http10_upload(proxy: Twistd) -> None:
    with wire(proxy) as connection:
        connection.send(request("/vllm/v1/x", "X-Vllmsim: echo", method="POST", body=b"old", version="1.0"))
        assert connection.answer().json()["body_sha256"] == hashlib.sha256(b"old").hexdigest()


# pipelining


def test_pipelined_requests_are_answered_in_order(proxy: Twistd) -> None:
    count = 60
    with wire(proxy) as connection:
        connection.send(b"".join(request(f"/vllm/v1/x?{n}", "X-Vllmsim: echo") for n in range(count)))
        assert [connection.answer().json()["target"] for _ in range(count)] == [f"/v1/x?{n}" for n in range(count)]


def test_a_slow_one_holds_up_those_behind_it(proxy: Twistd) -> None:
    body = b'{"model":"qwen2.5-7b-instruct","prompt":"a","max_tokens":1}'
    slow = ("Content-Type: application/json", "X-Vllmsim: ttft=0.5")
    with wire(proxy) as connection:
        connection.send(
            request("/vllm/v1/completions", *slow, method="POST", body=body)
            + request("/vllm/v1/models", key=None)
            + request("/vllm/v1/x", "X-Vllmsim: bytes; length=300000; chunked=1", method="HEAD")
            + request("/vllm/v1/x", "X-Vllmsim: bytes; length=300000; chunked=1")
            + request("/vllm/a", key="sk-x")
            + request("/key/info")
            + request("/vllm/v1/x", "X-Vllmsim: echo", method="PUT", body=b"with a body")
            + request("/vllm/version", "Connection: close")
            + request("/vllm/v1/never-answered")
        )
        assert connection.answer().json()["object"] == "text_completion"
        assert connection.answer().status == 401
        assert connection.answer("HEAD").status == 200
        assert len(connection.answer().body) == 300_000
        assert connection.answer().status == 401
        assert connection.answer().headers
        assert connection.answer().json()["body_length"] == 11
        assert connection.answer().json() == {"version": "0.32.0"}
        assert connection.ended()


def test_a_broken_request_behind_good_ones_is_answered_in_its_turn(proxy: Twistd) -> None:
    with wire(proxy) as connection:
        connection.send(request("/vllm/v1/x", "X-Vllmsim: bytes; length=200000") + b"GET nonsense HTTP/1.1\r\n\r\n")
        assert len(connection.answer().body) == 200_000
        assert connection.answer().status == 400
        assert connection.ended()


# one client and the next


@pytest.fixture
def on_a_socket(sim: Twistd, tmp_path: Path) -> Iterator[tuple[Twistd, Callable[[], Wire]]]:
    """A proxy that also listens on a UNIX socket, whose buffer is small and does not grow, and how to connect there."""
    with tempfile.TemporaryDirectory(prefix="proxy-") as short:  # sun_path has 108 bytes
        path = f"{short}/s"
        service = start_proxy(tmp_path, sim.url, "--listen", f"unix:{path}")
        until(lambda: Path(path).exists())

        def connect() -> Wire:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(30)
            sock.connect(path)
            return Wire(sock)

        yield service, connect
        service.stop()


def test_a_client_on_a_unix_socket(on_a_socket: tuple[Twistd, Callable[[], Wire]]) -> None:
    with on_a_socket[1]() as connection:
        connection.send(request("/vllm/v1/x", "X-Vllmsim: echo"))
        echoed = connection.answer().json()
        assert echoed["target"] == "/v1/x"
        assert values(echoed, "x-forwarded-proto") == ["http"]


def test_a_reader_that_stalls_at_the_end_of_its_answer_holds_up_nobody_else(
    on_a_socket: tuple[Twistd, Callable[[], Wire]],
) -> None:
    """Whatever the length, so that for some of them it is the answer's last piece that does not fit the buffers."""
    service, connect = on_a_socket
    for length in range(50_000, 700_000, 15_000):
        with connect() as stalled, wire(service) as other:
            stalled.send(request("/vllm/v1/x", f"X-Vllmsim: bytes; length={length}"))
            assert stalled.head().status == 200
            # Long enough for the whole answer to have come from upstream as far as it is read, and a connection
            # that it leaves behind is the one that is used next.
            time.sleep(0.02)
            other.sock.settimeout(PROMPT)
            other.send(request("/vllm/version"))
            assert other.answer().status == 200, length


# uploads that nobody may make


def refused_upload(proxy: Twistd, head: bytes, body: bytes) -> Wire:
    """Send a head and a little of its body; return the connection, at the status line of a prompt answer."""
    connection = wire(proxy)
    connection.sock.settimeout(PROMPT)
    connection.send(head + body)
    return connection


KEYS: dict[str, Callable[[Twistd], tuple[str | None, int, str]]] = {
    "none": lambda proxy: (None, 401, "/vllm/v1/audio/transcriptions"),
    "wrong": lambda proxy: ("sk-nobody-has-this-one-0123", 401, "/vllm/v1/audio/transcriptions"),
    "not enough": lambda proxy: (new_key(proxy), 403, "/vllm/v1/load_lora_adapter"),
    "unsafe": lambda proxy: (new_key(proxy), 400, "/vllm/v1//audio/transcriptions"),
}


@pytest.mark.parametrize("framing", [f"Content-Length: {GIGABYTE}", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("case", KEYS)
def test_a_gigabyte_that_is_not_allowed_is_refused_at_its_head(
    proxy: Twistd, sim: Twistd, case: str, framing: str
) -> None:
    key, status, path = KEYS[case](proxy)
    before = requests_seen(sim)
    chunked = framing.endswith("chunked")
    head = request(path, framing, method="POST", key=key)
    with refused_upload(proxy, head, b"5\r\nhello\r\n" if chunked else b"hello") as connection:
        answer = connection.answer()
        assert (answer.status, answer.interim) == (status, ())
        assert answer.get("connection") == b"close"
        assert answer.json()["error"]["message"]
    assert requests_seen(sim) == before


@pytest.mark.parametrize("case", KEYS)
def test_no_100_continue_goes_before_the_refusal(proxy: Twistd, sim: Twistd, case: str) -> None:
    key, status, path = KEYS[case](proxy)
    before = requests_seen(sim)
    lines = ("Expect: 100-continue", f"Content-Length: {GIGABYTE}")
    with refused_upload(proxy, request(path, *lines, method="POST", key=key), b"") as connection:
        assert connection.answer().status == status
        assert connection.rest() == b""
    assert requests_seen(sim) == before


def test_a_refused_client_that_goes_on_sending_still_reads_why(proxy: Twistd) -> None:
    head = request("/vllm/v1/x", f"Content-Length: {GIGABYTE}", method="POST", key=None)
    with refused_upload(proxy, head, b"x" * 1_000_000) as connection:
        answer = connection.answer()
        assert answer.json()["error"]["type"] == "auth_error"


def test_a_refused_client_that_never_stops_is_cut_off(proxy: Twistd) -> None:
    head = request("/vllm/v1/x", f"Content-Length: {GIGABYTE}", method="POST", key=None)
    before = proxy.rss()
    with wire(proxy) as connection:
        connection.send(head)
        sent, deadline = 0, time.monotonic() + 20
        try:
            while sent < GIGABYTE and time.monotonic() < deadline:
                connection.send(b"x" * 65_536)
                sent += 65_536
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert sent < 100 << 20
    assert proxy.rss() - before < 20 << 20


@pytest.mark.parametrize("value", ["100-continue", "100-Continue"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_100_continue_comes_once_the_key_is_good(proxy: Twistd, framing: str, value: str) -> None:
    chunked = framing == "chunked"
    line = "Transfer-Encoding: chunked" if chunked else "Content-Length: 5"
    head = request("/vllm/v1/x", f"Expect: {value}", line, "X-Vllmsim: echo", method="POST", key=new_key(proxy))
    with wire(proxy) as connection:
        connection.send(head)
        assert connection.head().status == 100
        connection.send(b"5\r\nhello\r\n0\r\n\r\n" if chunked else b"hello")
        answer = connection.answer()
        assert (answer.status, answer.interim) == (200, ())
        assert answer.json()["body_length"] == 5
        connection.send(request("/vllm/version"))
        assert connection.answer().status == 200


def test_an_impatient_client_need_not_wait_for_100(proxy: Twistd) -> None:
    with wire(proxy) as connection:
        connection.send(request("/vllm/v1/x", "Expect: 100-continue", "X-Vllmsim: echo", method="POST", body=b"hello"))
        answer = connection.answer()
        assert (answer.status, answer.json()["body_length"]) == (200, 5)


def test_another_expectation_is_refused(proxy: Twistd, sim: Twistd) -> None:
    before = requests_seen(sim)
    with wire(proxy) as connection:
        connection.send(request("/vllm/v1/x", "Expect: the-unexpected", method="POST", body=b"hello"))
        assert connection.answer().status == 417
    assert requests_seen(sim) == before
