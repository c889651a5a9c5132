"""A proxy of two workers, as real processes: they share the work, and what becomes of one is nothing to the other."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from _asking import CHAT, ask, make_key, until
from _raw import LAST_CHUNK, Wire, connect, request
from _redis import RedisServer
from _service import MASTER_KEY, Twistd
from _workers import both_again, connections, metric, one_on_each, serving, start_workers, workers

MODELS = request(b"GET", b"/vllm/v1/models")
REQUESTS = 'vllmproxy_requests_total{ended="done",method="GET",route="/v1/models",status="200"}'


@pytest.fixture(scope="module")
def service(sim: Twistd, redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twistd]:
    made = start_workers(tmp_path_factory.mktemp("workers"), sim.url, redis, "--drain-timeout", "1")
    yield made
    pids = workers(made)
    assert made.stop() in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert "Traceback" not in made.log
    assert "Unhandled" not in made.log


def metrics(service: Twistd) -> str:
    reply = ask(service, "GET", "/metrics")
    assert reply.status == 200
    return reply.body.decode()


def test_connections_that_are_opened_at_once_are_shared_out(service: Twistd) -> None:
    count = 400
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(service.connect())
        one, other = workers(service)
        until(lambda: connections(one, service.port) + connections(other, service.port) == count)
        assert 0.35 * count < connections(one, service.port) < 0.65 * count


def test_whichever_is_asked_answers_for_all(service: Twistd) -> None:
    before = 0 if REQUESTS not in metrics(service) else metric(metrics(service), REQUESTS)
    wires = one_on_each(service, connect)
    for number, wire in enumerate(wires.values(), 1):
        for _ in range(10 * number):
            wire.send(MODELS)
            assert wire.message().status == 200
    for wire in wires.values():
        wire.send(b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n")
        text = wire.message().body.decode()
        assert metric(text, REQUESTS) == before + 30
        assert metric(text, "vllmproxy_workers") == 2
        assert metric(text, "vllmproxy_connections") == 2
        for worker in ("1", "2", "parent"):
            assert metric(text, f'process_resident_memory_bytes{{worker="{worker}"}}') > 0
        wire.send(b"GET /health/readiness HTTP/1.1\r\nHost: h\r\n\r\n")
        answer = wire.message()
        assert answer.status == 200
        assert b'"workers": {"ready": 2, "of": 2}' in answer.body
    for wire in wires.values():
        wire.close()


def test_a_worker_that_is_killed_is_started_again_and_nobody_else_notices(service: Twistd) -> None:
    wires = one_on_each(service, connect)
    stream = request(b"GET", b"/vllm/x", b"X-Vllmsim: bytes; length=40; chunk=1; delay=0.1; chunked=1")
    (killed, cut), (_, kept) = wires.items()
    for wire in (cut, kept):
        wire.send(stream)
        assert wire.head().status == 200
    counted = metric(metrics(service), REQUESTS)
    os.kill(killed, signal.SIGKILL)
    for _ in range(30):
        assert ask(service, "GET", "/vllm/v1/models", key=MASTER_KEY).status == 200
        assert metric(metrics(service), REQUESTS) > counted
        counted = metric(metrics(service), REQUESTS)
    assert LAST_CHUNK not in cut.rest()[0]
    assert len(b"".join(iter(kept.chunk, b""))) == 40
    both_again(service, killed)
    assert metric(metrics(service), REQUESTS) == counted
    restarts = [metric(metrics(service), f'vllmproxy_worker_restarts_total{{worker="{n}"}}') for n in (1, 2)]
    assert sum(restarts) == service.log.count(" ended by SIGKILL; another is started now") == 1
    one_on_each(service, connect)


def test_what_a_killed_worker_had_under_way_is_counted_by_the_next(service: Twistd) -> None:
    key = make_key(service, max_budget_tokens=10**9)["key"]
    body = b'{"model": "qwen2.5-7b-instruct", "messages": [], "max_tokens": 500, "stream": true}'
    with connect(service) as wire:
        line = b"Authorization: Bearer " + key.encode()
        wire.send(request(b"POST", b"/vllm/v1/chat/completions", b"X-Vllmsim: tpot=0.1", body=body, key=line))
        assert wire.head().status == 200
        killed = serving(service, wire)
        os.kill(killed, signal.SIGKILL)
        until(lambda: _usage(service, key).get("estimated_requests") == 1)
    both_again(service, killed)
    assert ask(service, "POST", "/vllm/v1/chat/completions", CHAT, key=key).status == 200
    until(lambda: _usage(service, key)["requests"] == 2)


def _usage(service: Twistd, key: str) -> dict[str, int]:
    rows = ask(service, "GET", f"/usage?group_by=key&key={key}", key=MASTER_KEY).json()["usage"]
    return rows[0] if rows else {}


def test_one_that_is_asked_to_stop_lets_its_streams_end_and_is_started_again(service: Twistd) -> None:
    with connect(service) as wire:
        wire.send(request(b"GET", b"/vllm/x", b"X-Vllmsim: bytes; length=5; chunk=1; delay=0.1; chunked=1"))
        wire.head()
        asked = serving(service, wire)
        for _ in range(3):
            os.kill(asked, signal.SIGTERM)
        assert len(b"".join(iter(wire.chunk, b""))) == 5
    both_again(service, asked)


def test_one_that_finishes_what_it_has_is_not_counted_among_those_that_accept(service: Twistd) -> None:
    with connect(service) as wire:
        wire.send(request(b"GET", b"/vllm/x", b"X-Vllmsim: bytes; length=40000; chunk=1; delay=0.1; chunked=1"))
        wire.head()
        asked = serving(service, wire)
        os.kill(asked, signal.SIGTERM)
        until(lambda: ask(service, "GET", "/health/readiness").json()["workers"] == {"ready": 1, "of": 2}, 30)
        assert metric(metrics(service), "vllmproxy_workers") == 1
        wire.chunk()
        assert asked in workers(service)
    both_again(service, asked)


def test_each_line_of_the_access_log_is_whole(service: Twistd) -> None:
    wires = one_on_each(service, connect)
    before = len(service.access_records)

    def ask_often(wire: Wire) -> None:
        for _ in range(200):
            wire.send(MODELS)
            wire.message()

    threads = [threading.Thread(target=ask_often, args=(wire,)) for wire in wires.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: len(service.access_records) >= before + 400)
