"""One access record for each finished request, and the proxy's own counters."""

import base64
import json
import os
import re
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _asking import CHAT, ask, bearer, make_key, until
from _ports import free_port
from _service import MASTER_KEY, Twistd, start_proxy

CHAT_PATH = "/vllm/v1/chat/completions"
MODELS = "/vllm/v1/models"
LONG = {**CHAT, "max_tokens": 5000, "stream": True}


class Watched:
    """A proxy whose records since the last look are handed out."""

    def __init__(self, service: Twistd) -> None:
        self.service = service
        made = make_key(service, key_alias="alice")
        self.key: str = made["key"]
        self.token: str = made["token"]
        self._seen = 0
        self.records(1)

    def records(self, count: int) -> list[dict[str, Any]]:
        """The next ``count`` records; there are no more."""
        until(lambda: len(self.service.access_records) >= self._seen + count)
        found = self.service.access_records[self._seen :]
        self._seen += len(found)
        assert len(found) == count, found
        return found

    def record(self) -> dict[str, Any]:
        (found,) = self.records(1)
        return found

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of a metric that have ``labels``; the asking itself leaves a record."""
        text = ask(self.service, "GET", "/metrics").body.decode()
        self.records(1)
        return sum(float(value) for found, value in samples(text, name) if labels.items() <= found.items())


def samples(text: str, name: str) -> Iterator[tuple[dict[str, str], str]]:
    for found in re.finditer(rf"^{re.escape(name)}(?:\{{(.*)\}})? (\S+)$", text, re.MULTILINE):
        yield dict(re.findall(r'(\w+)="([^"]*)"', found[1] or "")), found[2]


@pytest.fixture(scope="module")
def watched(sim: Twistd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    service = start_proxy(tmp_path_factory.mktemp("watched"), sim.url)
    yield Watched(service)
    service.stop()
    assert "Traceback" not in service.log


def raw(service: Twistd, method: str, path: str, key: str, *lines: str, body: bytes = b"") -> socket.socket:
    """Send a request by hand and return its socket."""
    head = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", *lines]
    sock = service.connect()
    sock.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + body)
    return sock


def test_a_request(watched: Watched) -> None:
    body = {**CHAT, "user": "u"}
    headers = {"x-litellm-end-user-id": "end-user-7", "X-Request-Id": "id-of-my-own"}
    reply = ask(watched.service, "POST", CHAT_PATH + "?q=1", body, key=watched.key, headers=headers)
    record = watched.record()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["time"])
    assert record["key_id"] == watched.token
    assert record["key_alias"] == "alice"
    assert record["end_user"] == "end-user-7"
    assert record["client"] == "127.0.0.1"
    assert record["request_id"] == "id-of-my-own" == reply.headers["x-request-id"]
    assert (record["method"], record["route"]) == ("POST", "/v1/chat/completions")
    assert record["model"] == CHAT["model"]
    assert record["status"] == 200
    assert record["bytes_in"] == len(json.dumps(body))
    assert record["bytes_out"] == len(reply.body)
    assert 0 < record["time_to_first_byte"] <= record["duration"] < 30
    usage = reply.json()["usage"]
    assert (record["prompt_tokens"], record["completion_tokens"]) == (usage["prompt_tokens"], 4)
    assert record["total_tokens"] == usage["total_tokens"]
    assert record["ended"] == "done"
    assert "error" not in record


def test_a_stream_with_usage(watched: Watched) -> None:
    body = {**CHAT, "max_tokens": 10, "stream": True, "stream_options": {"include_usage": True}}
    reply = ask(watched.service, "POST", CHAT_PATH, body, key=watched.key)
    record = watched.record()
    assert record["bytes_out"] == len(reply.body)
    assert record["completion_tokens"] == 10
    assert record["prompt_tokens"] >= 1
    assert record["total_tokens"] == record["prompt_tokens"] + 10
    assert record["duration"] - record["time_to_first_byte"] > 0.1  # nine times 20 ms: first byte, not last
    assert record["ended"] == "done"


def test_the_master_key_and_an_unknown_one(watched: Watched) -> None:
    ask(watched.service, "GET", MODELS, key=MASTER_KEY)
    assert watched.record()["key_id"] == "master"
    reply = ask(watched.service, "POST", CHAT_PATH, CHAT, key="sk-nobody-has-this-one")
    record = watched.record()
    assert (record["status"], record["ended"], record["error"]) == (401, "refused", "token_not_found_in_db")
    assert record["bytes_out"] == len(reply.body)
    assert record["request_id"] == reply.headers["x-request-id"]
    assert "key_id" not in record
    assert "time_to_first_byte" not in record


def test_a_route_that_the_key_does_not_open(watched: Watched) -> None:
    assert ask(watched.service, "POST", "/vllm/sleep", key=watched.key).status == 403
    record = watched.record()
    assert (record["status"], record["ended"], record["route"]) == (403, "refused", "/sleep")
    assert record["key_alias"] == "alice"


@pytest.mark.parametrize(
    ("rest", "status", "error"),
    [(b"\r\nHost: b", 400, "malformed_request"), (b"\r\nX: " + b"x" * 70_000, 431, "too_large")],
)
def test_what_is_no_http(watched: Watched, rest: bytes, status: int, error: str) -> None:
    with watched.service.connect() as sock:
        sock.sendall(b"GET " + MODELS.encode() + b" HTTP/1.1\r\nHost: a" + rest + b"\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 %d " % status)
    record = watched.record()
    assert (record["status"], record["ended"], record["error"]) == (status, "refused", error)


def test_an_error_of_vllm_is_an_answer(watched: Watched) -> None:
    reply = ask(watched.service, "POST", CHAT_PATH, {**CHAT, "model": "no-such-model"}, key=watched.key)
    record = watched.record()
    assert (record["status"], record["ended"]) == (404, "done")
    assert record["bytes_out"] == len(reply.body)


def test_head_and_an_upload(watched: Watched) -> None:
    ask(watched.service, "HEAD", MODELS, key=watched.key)
    record = watched.record()
    assert (record["method"], record["status"], record["bytes_out"]) == ("HEAD", 405, 0)
    headers = {"X-Vllmsim": "echo", "Content-Type": "application/octet-stream"}
    ask(watched.service, "POST", "/vllm/v1/embeddings", b"x" * 1_000_001, key=watched.key, headers=headers)
    assert watched.record()["bytes_in"] == 1_000_001


def test_a_chunked_upload_counts_the_bytes_of_its_body(watched: Watched) -> None:
    lines = ("Transfer-Encoding: chunked", "X-Vllmsim: echo", "Connection: close")
    with raw(
        watched.service, "POST", "/vllm/x", MASTER_KEY, *lines, body=b"5\r\nhello\r\n3\r\nyou\r\n0\r\n\r\n"
    ) as sock:
        while sock.recv(65536):
            pass
    assert watched.record()["bytes_in"] == 8


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_a_stream(watched: Watched, reset: bool) -> None:
    body = json.dumps(LONG).encode()
    lines = ("Content-Type: application/json", f"Content-Length: {len(body)}")
    sock = raw(watched.service, "POST", CHAT_PATH, watched.key, *lines, body=body)
    assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    record = watched.record()
    assert (record["status"], record["ended"]) == (200, "client_gone")
    assert record["key_alias"] == "alice"
    assert record["bytes_in"] == len(body)
    assert record["duration"] < 30


def test_a_client_that_leaves_before_the_answer_begins(watched: Watched, sim: Twistd) -> None:
    def asked() -> int:
        count: int = ask(sim, "GET", "/vllmsim/stats").json()["requests"].get("/v1/models", 0)
        return count

    before = asked()
    sock = raw(watched.service, "GET", MODELS, watched.key, "X-Vllmsim: stall-head")
    until(lambda: asked() > before)
    sock.close()
    record = watched.record()
    assert (record["status"], record["ended"]) == (0, "client_gone")
    assert "time_to_first_byte" not in record


@pytest.mark.parametrize(
    ("directive", "status", "answered"),
    [
        ("broken-chunk", None, None),  # 502 where it came together with the head, of which nothing was passed on yet
        ("die; after=100", 200, 100),
        ("short; length=100; sent=10", 200, 10),
        ("close-before-head", 502, None),
        ("reset-before-head", 502, None),
        ("garbage", 502, None),
    ],
)
def test_an_upstream_that_dies(watched: Watched, directive: str, status: int | None, answered: int | None) -> None:
    with raw(watched.service, "GET", MODELS, watched.key, f"X-Vllmsim: {directive}", "Connection: close") as sock:
        try:
            while sock.recv(65536):
                pass
        except ConnectionResetError:
            pass
    record = watched.record()
    assert record["ended"] == "upstream_failed"
    assert record["status"] in ((200, 502) if status is None else (status,))
    assert record["error"]
    assert answered is None or record["bytes_out"] <= answered


def test_no_upstream(tmp_path_factory: pytest.TempPathFactory) -> None:
    service = start_proxy(tmp_path_factory.mktemp("lonely"), f"http://127.0.0.1:{free_port()}")
    try:
        lonely = Watched(service)
        assert ask(service, "GET", MODELS, key=lonely.key).status == 503
        record = lonely.record()
        assert (record["status"], record["ended"]) == (503, "upstream_failed")
        assert record["error"] == "upstream_unreachable"
    finally:
        service.stop()


def test_a_websocket(watched: Watched) -> None:
    key = base64.b64encode(os.urandom(16)).decode()
    lines = ("Connection: Upgrade", "Upgrade: websocket", f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13")
    sock = raw(watched.service, "GET", "/vllm/v1/realtime", watched.key, *lines, "X-Vllmsim: raw")
    head = b""
    while b"\r\n\r\n" not in head:
        head += sock.recv(1)
    assert head.startswith(b"HTTP/1.1 101 ")
    sock.sendall(b"twelve bytes")
    assert sock.recv(12, socket.MSG_WAITALL) == b"twelve bytes"
    sock.close()
    record = watched.record()
    assert (record["status"], record["route"]) == (101, "/v1/realtime")
    assert record["ended"] in ("done", "client_gone")
    assert record["key_alias"] == "alice"
    assert (record["bytes_in"], record["bytes_out"]) == (12, 12)


def test_the_api_is_recorded_too(watched: Watched) -> None:
    reply = ask(watched.service, "GET", f"/key/info?key={watched.key}", key=MASTER_KEY)
    record = watched.record()
    assert (record["method"], record["route"], record["status"]) == ("GET", "/key/info", 200)
    assert record["bytes_out"] == len(reply.body)
    assert record["key_id"] == "master"
    assert ask(watched.service, "POST", "/key/generate", {}, key=watched.key).status == 403
    record = watched.record()
    assert (record["status"], record["ended"]) == (403, "refused")
    assert record["key_alias"] == "alice"
    assert ask(watched.service, "GET", "/no/such/thing").status == 404
    assert watched.record()["status"] == 404


# GET /metrics


def test_the_counters_move(watched: Watched) -> None:
    labels = {"route": "/v1/chat/completions", "method": "POST", "status": "200", "ended": "done"}
    names = ["vllmproxy_request_bytes_total", "vllmproxy_response_bytes_total"]
    before = {name: watched.metric(name) for name in names}
    count = watched.metric("vllmproxy_requests_total", **labels)
    waits = watched.metric("vllmproxy_time_to_first_byte_seconds_count", route="/v1/chat/completions")
    tokens = watched.metric("vllmproxy_tokens_total", kind="completion")
    replies = [ask(watched.service, "POST", CHAT_PATH, CHAT, key=watched.key) for _ in range(3)]
    sent = sum(record["bytes_in"] for record in watched.records(3))
    assert watched.metric("vllmproxy_requests_total", **labels) == count + 3
    assert watched.metric("vllmproxy_time_to_first_byte_seconds_count", route="/v1/chat/completions") == waits + 3
    assert watched.metric("vllmproxy_request_duration_seconds_count", route="/v1/chat/completions") >= waits + 3
    assert watched.metric("vllmproxy_tokens_total", kind="completion") == tokens + 12
    assert watched.metric(names[0]) == before[names[0]] + sent
    assert watched.metric(names[1]) >= before[names[1]] + sum(len(reply.body) for reply in replies)


def test_refusals_and_departures_are_counted(watched: Watched) -> None:
    refused = watched.metric("vllmproxy_requests_total", ended="refused", status="401")
    gone = watched.metric("vllmproxy_requests_total", ended="client_gone")
    assert ask(watched.service, "GET", MODELS).status == 401
    raw(watched.service, "GET", MODELS, watched.key, "X-Vllmsim: stall-head").close()
    watched.records(2)
    assert watched.metric("vllmproxy_requests_total", ended="refused", status="401") == refused + 1
    assert watched.metric("vllmproxy_requests_total", ended="client_gone") == gone + 1


def test_in_flight_goes_up_and_back(watched: Watched) -> None:
    socks = [raw(watched.service, "GET", MODELS, watched.key, "X-Vllmsim: stall-head") for _ in range(5)]
    until(lambda: watched.metric("vllmproxy_in_flight_requests") == 6)  # and the one that asks
    for sock in socks:
        sock.close()
    watched.records(5)
    assert watched.metric("vllmproxy_in_flight_requests") == 1


def test_paths_that_a_caller_makes_up_do_not_become_labels(watched: Watched) -> None:
    for number in range(20):
        ask(watched.service, "GET", f"/vllm/v1/made-up-{number}", key=watched.key)
        ask(watched.service, "GET", f"/made-up-{number}")
    watched.records(40)
    text = ask(watched.service, "GET", "/metrics").body.decode()
    watched.records(1)
    assert "made-up" not in text
    assert 'route="other"' in text


def test_who_may_read_the_metrics(watched: Watched) -> None:
    service = watched.service
    assert ask(service, "GET", "/metrics").status == 200
    from_afar = {"X-Forwarded-For": "203.0.113.7"}  # a reverse proxy on this machine speaks for others
    assert ask(service, "GET", "/metrics", headers=from_afar).status == 401
    assert ask(service, "GET", "/metrics", headers={**from_afar, **bearer(watched.key)}).status == 403
    assert ask(service, "GET", "/metrics", headers={**from_afar, **bearer(MASTER_KEY)}).status == 200
    watched.records(4)


def test_open_metrics(sim: Twistd, tmp_path_factory: pytest.TempPathFactory) -> None:
    service = start_proxy(tmp_path_factory.mktemp("open"), sim.url, "--open-metrics")
    try:
        reply = ask(service, "GET", "/metrics", headers={"X-Forwarded-For": "203.0.113.7"})
        assert reply.status == 200
        assert b"vllmproxy_requests_total" in reply.body
        assert ask(service, "GET", MODELS).status == 401
    finally:
        service.stop()


def test_the_access_log_is_opened_again_after_sighup(sim: Twistd, tmp_path: Path) -> None:
    service = start_proxy(tmp_path, sim.url)
    try:
        log, rotated = tmp_path / "access.jsonl", tmp_path / "access.jsonl.1"
        ask(service, "GET", MODELS, key=MASTER_KEY)
        until(lambda: log.read_text().count("\n") == 1)
        log.rename(rotated)
        service.process.send_signal(signal.SIGHUP)
        until(log.exists)
        ask(service, "GET", MODELS, key=MASTER_KEY)
        until(lambda: log.read_text().count("\n") == 1)
        assert rotated.read_text().count("\n") == 1
    finally:
        service.stop()
