"""Through the proxy to a real vLLM that nobody else uses: what it says that it read and made is what we say was used.

``VLLMPROXY_LIVE_MASTER`` is the master key: keys are made with it, and usage is read.
"""

import os
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from _live import Reply, Server

MESSAGES = [{"role": "user", "content": "I am going to Paris, what should I see?"}]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 9}),
    "chat, two answers": ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 9, "n": 2, "temperature": 1}),
    "completions": ("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 9}),
    "completions, two prompts": ("/v1/completions", {"prompt": ["Once", "Twice upon"], "max_tokens": 9}),
    "responses": ("/v1/responses", {"input": "Once upon a time", "max_output_tokens": 9}),
    "messages": ("/v1/messages", {"messages": MESSAGES, "max_tokens": 9}),
}


@pytest.fixture(scope="session")
def master() -> Server:
    """The proxy's own API."""
    url = os.environ["VLLMPROXY_LIVE_URL"].rstrip("/").removesuffix("/vllm")
    return Server(url, os.environ["VLLMPROXY_LIVE_MASTER"])


@pytest.fixture
def make(master: Server) -> Callable[..., Server]:
    """Make a key, and return vLLM as who has it sees it."""

    def make(**fields: Any) -> Server:
        made = master.ask("POST", "/key/generate", {"duration": "1h", **fields})
        assert made.status == 200, made.body
        return Server(os.environ["VLLMPROXY_LIVE_URL"], made.json()["key"])

    return make


def told_by_vllm(live: Server) -> tuple[float, float]:
    """Return the tokens that vLLM has read and made since it began."""
    return live.metric("vllm:prompt_tokens_total"), live.metric("vllm:generation_tokens_total")


def settled(read: Callable[[], Any]) -> Any:
    """Return what ``read`` returns once it has stayed the same for a second."""
    last = read()
    for _ in range(60):
        time.sleep(1)
        now = read()
        if now == last:
            return now
        last = now
    raise AssertionError("it does not come to rest")


def summed(master: Server, end_user: str) -> dict[str, Any]:
    found: dict[str, Any] = master.ask("GET", f"/usage?end_user={end_user}").json()["total"]
    return found


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_used_is_what_vllm_says(
    live: Server, master: Server, make: Callable[..., Server], kind: str, streamed: bool
) -> None:
    path, body = KINDS[kind]
    who, user = make(tpm_limit=10**6), uuid.uuid4().hex
    before = settled(lambda: told_by_vllm(live))
    body = {"model": live.model(), "ignore_eos": True, "temperature": 0, "stream": streamed} | body
    reply = who.ask("POST", path, body, {"x-litellm-end-user-id": user})
    assert reply.status == 200, reply.body
    after = settled(lambda: told_by_vllm(live))
    total = settled(lambda: summed(master, user))
    assert (total["requests"], total["estimated_requests"], total["unknown_requests"]) == (1, 0, 0)
    # In its metrics, though not in the usage that it reports, vLLM reads a prompt anew for each answer to it.
    read = total["prompt_tokens"] * body.get("n", 1)
    assert (read, total["completion_tokens"]) == (after[0] - before[0], after[1] - before[1])
    assert total["completion_tokens"] > 0


def test_reading_is_counted_too(live: Server, master: Server, make: Callable[..., Server]) -> None:
    who, user = make(tpm_limit=10**6), uuid.uuid4().hex
    who.ask("POST", "/tokenize", {"model": live.model(), "prompt": "some text"}, {"x-litellm-end-user-id": user})
    total = settled(lambda: summed(master, user))
    assert (total["requests"], total["total_tokens"], total["unknown_requests"]) == (1, 0, 0)


def shape(reply: Reply) -> list[Any]:
    """Return a stream's events without what differs from one request to the next."""
    events = reply.events()
    for event in events:
        if event != "[DONE]":
            event.pop("id", None)
            event.pop("created", None)
    return events


@pytest.mark.parametrize(
    "extra",
    [{}, {"stream_options": None}, {"stream_options": {"include_usage": False}}, {"logprobs": True}],
    ids=str,
)
def test_a_stream_whose_usage_was_asked_for_looks_as_if_it_had_not_been(
    live: Server, make: Callable[..., Server], extra: dict[str, Any]
) -> None:
    body = {
        "model": live.model(),
        "messages": MESSAGES,
        "max_tokens": 12,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "seed": 1,
        **extra,
    }
    exact, plain = (who.ask("POST", "/v1/chat/completions", body) for who in (make(tpm_limit=10**6), make()))
    assert shape(exact) == shape(plain)
    assert b'"usage"' not in exact.body


def test_limits_and_models(live: Server, make: Callable[..., Server]) -> None:
    model = live.model()
    chat = {"model": model, "messages": MESSAGES, "max_tokens": 5}
    assert make(models=[model]).ask("POST", "/v1/chat/completions", chat).status == 200
    refused = make(models=["another"]).ask("POST", "/v1/chat/completions", chat)
    assert (refused.status, refused.json()["error"]["type"]) == (403, "key_model_access_denied")
    aliased = make(aliases={"fast": model}).ask("POST", "/v1/chat/completions", {**chat, "model": "fast"})
    assert (aliased.status, aliased.json()["model"]) == (200, model)
    limited = make(rpm_limit=1)
    assert [limited.ask("POST", "/v1/chat/completions", chat).status for _ in range(2)] == [200, 429]
    poor = make(max_budget_tokens=60)
    assert [settled(lambda: poor.ask("POST", "/v1/chat/completions", chat).status)] == [422]
