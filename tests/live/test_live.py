"""Through the proxy to a real vLLM: each way of asking, streamed and whole, its errors, and hanging up."""

import json
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from _live import Reply, Server

MESSAGES = [{"role": "user", "content": "I am going to Paris, what should I see?"}]
#: Tokens and choices of an answer that is long enough to leave in the middle of it.
LONG, MANY = 3500, 64
#: The body of the page's own chat example, with its trailing comma.
SEED_BODY = b"""{
"messages": [
{
"role": "user",
"content": "I am going to Paris, what should I see?"
}
],
"max_tokens": 2048,
"temperature": 0.8,
"top_p": 0.1,
"model": "qwen2.5-7b-instruct",
}"""


@pytest.fixture(scope="session")
def model(live: Server) -> str:
    return live.model()


def _streamed(reply: Reply) -> list[Any]:
    assert reply.status == 200
    assert (reply.header("content-type") or "").startswith("text/event-stream")
    assert reply.body.endswith(b"\n\n")
    return reply.events()


def test_models(live: Server) -> None:
    reply = live.ask("GET", "/v1/models")
    assert reply.status == 200
    assert reply.json()["object"] == "list"
    assert live.ask("GET", "/models").status == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions"])
def test_chat(live: Server, model: str, path: str) -> None:
    answer = live.ask("POST", path, {"model": model, "messages": MESSAGES, "max_tokens": 8}).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions"])
def test_chat_streamed(live: Server, model: str, path: str) -> None:
    body = {"model": model, "messages": MESSAGES, "max_tokens": 8, "ignore_eos": True, "stream": True}
    events = _streamed(live.ask("POST", path, body))
    assert events.pop() == "[DONE]"
    assert len(events) >= 8
    assert events[0]["object"] == "chat.completion.chunk"
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert not any(event.get("usage") for event in events)


def test_chat_streamed_with_usage(live: Server, model: str) -> None:
    body = {"model": model, "messages": MESSAGES, "max_tokens": 8, "ignore_eos": True, "stream": True}
    events = _streamed(live.ask("POST", "/v1/chat/completions", body | {"stream_options": {"include_usage": True}}))
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == 8


def test_completions(live: Server, model: str) -> None:
    body = {"model": model, "prompt": "Paris is", "max_tokens": 8, "ignore_eos": True}
    answer = live.ask("POST", "/v1/completions", body).json()
    assert answer["object"] == "text_completion"
    assert answer["usage"]["completion_tokens"] == 8
    events = _streamed(live.ask("POST", "/v1/completions", body | {"stream": True}))
    assert events[-1] == "[DONE]"
    assert "".join(event["choices"][0]["text"] for event in events[:-1] if event["choices"])


def test_responses(live: Server, model: str) -> None:
    body = {"model": model, "input": "What is there to see in Paris?", "max_output_tokens": 8}
    answer = live.ask("POST", "/v1/responses", body).json()
    assert answer["object"] == "response"
    assert answer["usage"]["output_tokens"] >= 1


def test_responses_streamed(live: Server, model: str) -> None:
    body = {"model": model, "input": "What is there to see in Paris?", "max_output_tokens": 8, "stream": True}
    events = _streamed(live.ask("POST", "/v1/responses", body))
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    assert events[-1]["response"]["usage"]["output_tokens"] >= 1


def test_messages(live: Server, model: str) -> None:
    answer = live.ask("POST", "/v1/messages", {"model": model, "messages": MESSAGES, "max_tokens": 8}).json()
    assert answer["type"] == "message"
    assert answer["usage"]["output_tokens"] >= 1
    counted = live.ask("POST", "/v1/messages/count_tokens", {"model": model, "messages": MESSAGES}).json()
    assert counted["input_tokens"] >= 1


def test_messages_streamed(live: Server, model: str) -> None:
    body = {"model": model, "messages": MESSAGES, "max_tokens": 8, "stream": True}
    kinds = [event["type"] for event in _streamed(live.ask("POST", "/v1/messages", body)) if event != "[DONE]"]
    assert kinds[0] == "message_start"
    assert "content_block_delta" in kinds
    assert kinds[-1] == "message_stop"


def test_tokenize_and_back(live: Server, model: str) -> None:
    tokens = live.ask("POST", "/tokenize", {"model": model, "prompt": "Paris", "add_special_tokens": False}).json()
    assert tokens["count"] == len(tokens["tokens"]) > 0
    text = live.ask("POST", "/detokenize", {"model": model, "tokens": tokens["tokens"]})
    assert text.status == 200
    assert isinstance(text.json()["prompt"], str)


def test_metrics(live: Server) -> None:
    reply = live.ask("GET", "/metrics", headers={"Content-Type": "application/json"})
    assert reply.status == 200
    assert (reply.header("content-type") or "").startswith("text/plain")
    assert b"vllm:num_requests_running" in reply.body


def test_health_and_version(live: Server) -> None:
    assert live.ask("GET", "/health").status == 200
    assert live.ask("GET", "/version").json()["version"]


def test_the_trailing_comma_is_for_vllm_to_refuse(live: Server) -> None:
    reply = live.ask("POST", "/chat/completions", SEED_BODY)
    assert reply.status == 400
    error = reply.json()["error"]
    assert error["code"] == 400  # an int: vLLM's own shape, not the proxy's
    assert error["message"]


def test_the_page_s_example_works_once_mended(live: Server) -> None:
    body = json.loads(SEED_BODY.replace(b'instruct",\n}', b'instruct"\n}'))
    reply = live.ask("POST", "/chat/completions", body | {"model": live.model(), "max_tokens": 16})
    assert reply.status == 200


def test_an_unknown_model_is_vllm_s_404(live: Server) -> None:
    reply = live.ask("POST", "/v1/chat/completions", {"model": "no-such-model", "messages": MESSAGES})
    assert reply.status == 404
    assert reply.json()["error"]["code"] == 404


def test_an_unknown_path_is_vllm_s_404(live: Server) -> None:
    reply = live.ask("GET", "/v1/no/such/path")
    assert reply.status == 404
    assert reply.json() == {"detail": "Not Found"}


def test_json_that_is_not_called_so_is_vllm_s_400(live: Server, model: str) -> None:
    body = json.dumps({"model": model, "messages": MESSAGES}).encode()
    assert live.ask("POST", "/v1/chat/completions", body, {"Content-Type": "text/plain"}).status == 400


def test_head_has_no_body(live: Server) -> None:
    reply = live.ask("HEAD", "/v1/models")
    assert reply.status == 405
    assert reply.header("allow") == "GET"
    assert reply.body == b""


def test_options_and_preflight_pass_without_a_key(live: Server) -> None:
    assert live.ask("OPTIONS", "/v1/chat/completions", auth=False).status == 405
    headers = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    reply = live.ask("OPTIONS", "/v1/chat/completions", headers=headers, auth=False)
    assert reply.header("access-control-allow-methods")


def _left(live: Server, model: str, *, stream: bool) -> bool:
    """Leave in the middle of a long answer and tell whether vLLM's own counters show that it stopped then.

    ``request_success_total{finished_reason="abort"}`` is not looked at: vLLM 0.32 does not count these there.
    """
    generated = live.metric("vllm:generation_tokens_total")
    body = {"model": model, "messages": MESSAGES, "max_tokens": LONG, "n": MANY, "ignore_eos": True, "stream": stream}
    headers = {"Content-Type": "application/json"}
    connection = live.begin("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)
    if stream:
        assert connection.getresponse().readline().startswith(b"data: ")
    _wait(lambda: live.metric("vllm:num_requests_running") > 0)
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    _wait(lambda: live.metric("vllm:num_requests_running") == 0)
    made = live.metric("vllm:generation_tokens_total") - generated
    time.sleep(0.5)
    return live.metric("vllm:generation_tokens_total") - generated == made < LONG * MANY / 2


def _wait(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline, "vLLM's metrics do not show it"
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_vllm(live: Server, model: str, stream: bool) -> None:
    # Several tries: a tiny model can outrun vLLM's own front end, which then sees nothing of its sockets till the end.
    assert any(_left(live, model, stream=stream) for _ in range(5))
