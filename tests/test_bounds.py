"""Deadlines and caps of a real process: who holds on to a place loses it, and who asks how it is gets an answer."""

import json
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from _asking import CHAT, ask, until
from _raw import Ended, Upstream, Wire, connect, request
from _service import MASTER_KEY, Start, Twistd, start_proxy

BODY = json.dumps({**CHAT, "stream": True}).encode()
STALL = request(b"POST", b"/vllm/v1/chat/completions", b"X-Vllmsim: stall; after=300", body=BODY)
MODELS = request(b"GET", b"/vllm/v1/models")


def stalled(proxy: Twistd) -> Wire:
    """Begin a stream that never goes on."""
    client = connect(proxy)
    client.send(STALL)
    assert client.head().status == 200
    return client


def read_to_the_end(client: Wire) -> None:
    """Read until the client is told that it is over."""
    while client.some():
        pass


def metric(proxy: Twistd, name: str) -> float:
    lines = ask(proxy, "GET", "/metrics", key=MASTER_KEY).body.decode().splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " "))


def test_places_and_the_line_before_them(start: Start) -> None:
    proxy = start("--max-requests", "2", "--max-waiting", "1", "--waiting-timeout", "5")
    with stalled(proxy) as first, stalled(proxy), connect(proxy) as waits:
        waits.send(MODELS)
        until(lambda: metric(proxy, "vllmproxy_waiting_requests") == 1)
        reply = ask(proxy, "GET", "/vllm/v1/models", key=MASTER_KEY)
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert reply.error["type"] == "overloaded_error"
        assert ask(proxy, "GET", "/health/liveliness").status == 200
        answer = waits.message()
        assert answer.status == 503
        assert b"waited long enough" in answer.body
        waits.send(MODELS)
        until(lambda: metric(proxy, "vllmproxy_waiting_requests") == 1)
        first.reset()
        assert waits.message().status == 200
        assert metric(proxy, 'vllmproxy_turned_away_total{setting="max-waiting"}') == 1
        assert metric(proxy, 'vllmproxy_turned_away_total{setting="waiting-timeout"}') == 1


def test_a_full_proxy_still_says_how_it_is(start: Start) -> None:
    proxy = start("--max-connections", "3")
    with stalled(proxy), stalled(proxy), stalled(proxy):
        for _ in range(5):
            assert ask(proxy, "GET", "/health/liveliness").status == 200
            assert ask(proxy, "GET", "/health/readiness").status == 200
            assert ask(proxy, "GET", "/key/list", key=MASTER_KEY).status == 200
            assert ask(proxy, "GET", "/vllm/v1/models", key=MASTER_KEY).status == 503
        assert metric(proxy, "vllmproxy_relayed_requests") == 3


def test_connections_that_say_nothing_shut_nobody_out(start: Start) -> None:
    proxy = start("--max-connections", "3")
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(proxy)) for _ in range(20)]
        for _ in range(5):
            assert ask(proxy, "GET", "/vllm/v1/models", key=MASTER_KEY).status == 200
        with pytest.raises(Ended):
            silent[0].some()
        assert metric(proxy, "vllmproxy_evicted_connections_total") >= 17


@pytest.mark.parametrize("path", [b"/vllm/v1/completions", b"/key/generate"])
def test_bodies_that_come_in_drops_shut_nobody_out(start: Start, path: bytes) -> None:
    proxy = start("--max-connections", "3")
    with ExitStack() as stack:
        for _ in range(80):  # more than there is in reserve, too
            client = stack.enter_context(connect(proxy))
            client.send(request(b"POST", path, b"Content-Length: 100", b"Expect: 100-continue"))
            assert client.head().status == 100
            client.send(b"x")
        for _ in range(5):
            assert ask(proxy, "GET", "/vllm/v1/models", key=MASTER_KEY).status == 200


def test_an_address_may_have_only_so_many_connections(start: Start) -> None:
    proxy = start("--max-connections-per-client", "2")
    # It may be reset before this end has seen that it was there.
    with stalled(proxy), stalled(proxy), pytest.raises((Ended, ConnectionResetError)), connect(proxy) as third:
        third.some()
    until(lambda: _is_answered(proxy))


def _is_answered(proxy: Twistd) -> bool:
    with suppress(OSError):
        return ask(proxy, "GET", "/vllm/v1/models", key=MASTER_KEY).status == 200
    return False


def test_more_connections_than_files_is_said_at_the_start(start: Start) -> None:
    proxy = start("--max-connections", "500000000")
    assert "--max-connections: 500000000 do not fit" in proxy.log
    assert ask(proxy, "GET", "/health/liveliness").status == 200


@pytest.mark.parametrize("option", ["--between-bytes-timeout", "--total-timeout"])
def test_a_stream_that_stops_is_cut_on_both_sides(option: str, upstream: Upstream, tmp_path: Path) -> None:
    gone = threading.Event()

    def script(wire: Wire) -> None:
        wire.message()
        wire.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
        with suppress(OSError):
            wire.gone_at()
        gone.set()

    proxy = start_proxy(tmp_path, upstream.url, option, "1")
    try:
        with upstream.playing(script), connect(proxy) as client:
            client.send(MODELS)
            assert client.head().status == 200
            with pytest.raises(Ended):
                read_to_the_end(client)
            until(gone.is_set)
    finally:
        proxy.stop()
    (record,) = proxy.access_records
    assert record["error"] == ("stalled" if option.startswith("--between") else "total_timeout")


def test_a_body_that_dribbles_is_a_408(start: Start) -> None:
    proxy = start("--body-timeout", "2", "--min-body-rate", "1000")
    with connect(proxy) as client:
        client.send(request(b"POST", b"/vllm/v1/chat/completions", b"Content-Length: 100000"))
        stop = threading.Event()

        def dribble() -> None:
            with suppress(OSError):
                while not stop.wait(0.1):
                    client.send(b"x")

        thread = threading.Thread(target=dribble)
        thread.start()
        try:
            assert client.message().status == 408
        finally:
            stop.set()
            thread.join()


def test_a_silent_websocket_is_cut(start: Start) -> None:
    proxy = start("--tunnel-idle-timeout", "1")
    with connect(proxy) as client:
        client.send(
            request(
                b"GET",
                b"/vllm/v1/realtime",
                b"Connection: Upgrade",
                b"Upgrade: websocket",
                b"Sec-WebSocket-Version: 13",
                b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            )
        )
        assert client.head().status == 101
        began = time.monotonic()
        with pytest.raises(Ended):
            read_to_the_end(client)
        assert time.monotonic() - began >= 0.5


def test_a_route_with_a_time_of_its_own(start: Start) -> None:
    proxy = start("--first-byte-timeout-for", "/v1/models=1")
    asked = [b"X-Vllmsim: stall-head"]
    with connect(proxy) as client, connect(proxy) as other:
        other.send(request(b"GET", b"/vllm/version", *asked))
        client.send(request(b"GET", b"/vllm/v1/models", *asked))
        assert client.message().status == 504
        other.sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            other.sock.recv(1)
