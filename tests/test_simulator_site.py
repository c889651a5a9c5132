"""Routes, refusals, CORS, keys and counters of the simulated vLLM."""

import json

import pytest
from _simulated import Memory, post, request

from vllmproxy.simulator.table import is_admin


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("GET", "/ping", 200),
        ("POST", "/ping", 200),
        ("GET", "/version", 200),
        ("GET", "/load", 200),
        ("GET", "/v1/models", 200),
        ("GET", "/v1/mod%65ls", 200),
        ("GET", "http://sim.example/v1/models?a=b", 200),
        ("GET", "/tokenizer_info", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/chat/completions", 404),
        ("GET", "//health", 404),
        ("OPTIONS", "*", 404),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/chat/completions", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("GET", "/v1/realtime", 404),
    ],
)
def test_routes(method: str, path: str, status: int) -> None:
    answer = Memory().ask(request(method, path))
    assert answer.status == status
    assert answer.header("vary") == "Origin"
    assert answer.header("server") == "uvicorn"
    detail = {404: "Not Found", 405: "Method Not Allowed"}.get(status)
    if detail is not None:
        assert answer.json() == {"detail": detail}


def test_head_is_answered_as_by_starlette_with_no_body() -> None:
    memory = Memory()
    assert memory.send(request("HEAD", "/v1/models")) != []
    head, _, rest = memory.client.data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 405 Method Not Allowed\r\n")
    assert b"\r\nallow: GET" in head
    assert b"\r\ncontent-length: 31" in head
    assert rest == b""


def test_a_trailing_slash_is_redirected_to_the_host_that_was_asked_for() -> None:
    answer = Memory().ask(post("/v1/chat/completions/?a=%20b", {}))
    assert answer.status == 307
    assert answer.header("location") == "http://sim.example/v1/chat/completions?a=%20b"


def preflight(method: str = "POST", **config: tuple[str, ...]):  # type: ignore[no-untyped-def]
    asked = {"origin": "http://page", "access_control_request_method": method}
    return Memory(**config).ask(request("OPTIONS", "/v1/x", access_control_request_headers="authorization", **asked))


def test_preflights_as_vllm_answers_them_by_default() -> None:
    answer = preflight("PROPFIND")
    assert (answer.status, answer.body) == (400, b"Disallowed CORS origin, method")


@pytest.mark.parametrize(("origins", "shown"), [(("*",), "*"), (("http://page",), "http://page")])
def test_an_allowed_origin_may_read_the_answer(origins: tuple[str, ...], shown: str) -> None:
    answer = preflight(allowed_origins=origins)
    assert (answer.status, answer.body) == (200, b"OK")
    assert answer.header("access-control-allow-origin") == shown
    assert answer.header("access-control-allow-headers") == "authorization"
    simple = Memory(allowed_origins=origins).ask(request("GET", "/health", origin="http://page"))
    assert simple.header("access-control-allow-origin") == shown


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models", 401),
        ("POST", "/v2/rerank", 401),
        ("POST", "/inference/v1/generate", 401),
        ("OPTIONS", "/v1/models", 405),
        ("GET", "/metrics", 200),
        ("POST", "/sleep", 200),
    ],
)
def test_a_key_guards_what_vllm_guards(method: str, path: str, status: int) -> None:
    answer = Memory(api_key="right").ask(request(method, path))
    assert answer.status == status
    if status == 401:
        assert answer.json() == {"error": "Unauthorized"}


@pytest.mark.parametrize(
    ("value", "status"), [("Bearer right", 200), ("bearer right", 200), ("Bearer wrong", 401), ("right", 401)]
)
def test_the_key_comes_as_a_bearer(value: str, status: int) -> None:
    assert Memory(api_key="right").ask(request("GET", "/v1/models", authorization=value)).status == status


@pytest.mark.parametrize(
    "path",
    [
        "/sleep",
        "/%73leep",
        "/v1/load_lora_adapter",
        "/adapters/x",
        "/reset_prefix_cache",
        "/update_weights",
        "/pause",
    ],
)
def test_an_admin_route_answers_and_is_counted(path: str) -> None:
    memory = Memory()
    assert memory.ask(request("POST", path)).status == 200
    assert sum(memory.stats.admin.values()) == 1


def test_an_admin_route_with_a_slash_too_many_is_counted_and_redirected() -> None:
    memory = Memory()
    answer = memory.ask(request("POST", "/sleep/"))
    assert (answer.status, answer.header("location")) == (307, "http://sim.example/sleep")
    assert memory.stats.admin == {"/sleep/": 1}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/metrics", "/", "/sleepy", "/v1/sleep"])
def test_other_routes_are_not_admin(path: str) -> None:
    assert not is_admin(path)


def test_a_post_is_counted_under_its_request_id_when_its_body_is_complete() -> None:
    memory = Memory()
    whole = post("/v1/completions", {"prompt": "a b", "max_tokens": 2}, x_request_id="one")
    memory.send(whole[:-1])
    assert memory.stats.executed == {}
    memory.send(whole[-1:] + whole)
    assert memory.stats.executed == {"one": 2}
    assert memory.stats.requests == {"/v1/completions": 2}
    assert (memory.stats.prompt_tokens, memory.stats.generation_tokens) == (4, 4)


def test_stats_are_shown_and_reset_without_counting_themselves() -> None:
    memory = Memory()
    memory.ask(request("GET", "/nowhere"))
    shown = memory.ask(request("GET", "/vllmsim/stats")).json()
    assert shown["requests"] == {"unknown": 1}
    assert shown["connections_open"] == 1
    assert shown["bytes_received"] > 0
    memory.ask(request("POST", "/vllmsim/reset"))
    after = memory.ask(request("GET", "/vllmsim/stats")).json()
    assert (after["requests"], after["executed"], after["connections_open"]) == ({}, {}, 1)


def test_executed_requests_are_forgotten_oldest_first() -> None:
    stats = Memory().stats
    for number in range(20000):
        stats.execute(str(number))
    assert len(stats.executed) < 20000
    assert "19999" in stats.executed
    assert "0" not in stats.executed


def test_metrics_have_vllms_names_and_values() -> None:
    memory = Memory()
    memory.ask(post("/v1/completions", {"prompt": "a b c", "max_tokens": 2}))
    answer = memory.ask(request("GET", "/metrics"))
    assert answer.header("content-type") == "text/plain; version=1.0.0; charset=utf-8"
    lines = dict(line.rsplit(" ", 1) for line in answer.body.decode().splitlines() if line[0] != "#")
    labels = '{engine="0",model_name="qwen2.5-7b-instruct"}'
    assert lines[f"vllm:prompt_tokens_total{labels}"] == "3.0"
    assert lines[f"vllm:generation_tokens_total{labels}"] == "2.0"
    assert lines[f"vllm:num_requests_running{labels}"] == "0.0"
    finished = '{engine="0",finished_reason="length",model_name="qwen2.5-7b-instruct"}'
    assert lines[f"vllm:request_success_total{finished}"] == "1.0"


def test_a_json_body_over_the_limit_is_counted_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllmproxy.simulator.routes.BODY_LIMIT", 100)
    memory = Memory()
    assert memory.ask(post("/v1/completions", json.dumps({"prompt": "x" * 200}).encode())).status == 413
