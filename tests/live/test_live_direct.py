"""The answer through the proxy against the answer without it, byte for byte where vLLM is deterministic."""

import re
from operator import itemgetter
from typing import Any

import pytest
from _live import Reply, Server
from test_live import MESSAGES, SEED_BODY

#: What differs between two answers of the same vLLM: the time, and ids that it makes up.
_VARYING = re.compile(
    rb'"(created|created_at|completed_at|id|item_id|request_id)":\s*("[^"]*"|[0-9.]+)'
    rb"|(chatcmpl|cmpl|resp|msg|modelperm)[-_][0-9a-f-]+"
)
#: What the proxy adds (docs/headers.rst), and the time.
_ADDED = frozenset(["date", "x-request-id", "via"])
#: … for a key with limits.
_ADDED_LIMITS = "x-ratelimit-api_key-"
#: vLLM makes its ids of the request's: without one, those through the proxy would be longer than its own.
_SAME_ID = {"X-Request-Id": "one-for-both"}

_CHAT: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0, "seed": 7, "ignore_eos": True}
_PROMPT = {"prompt": "Paris is", "max_tokens": 12, "temperature": 0, "seed": 7}
_INPUT = {"input": "Paris is", "max_output_tokens": 12, "temperature": 0}
_TO_CLAUDE = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0}
_USAGE = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}

_POSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", _CHAT),
    "chat with logprobs": ("/v1/chat/completions", _CHAT | {"logprobs": True, "top_logprobs": 3}),
    "chat streamed": ("/v1/chat/completions", _CHAT | {"stream": True}),
    "chat streamed with usage": ("/v1/chat/completions", _CHAT | _USAGE),
    "completions": ("/v1/completions", _PROMPT),
    "completions streamed": ("/v1/completions", _PROMPT | {"stream": True}),
    "responses": ("/v1/responses", _INPUT),
    "responses streamed": ("/v1/responses", _INPUT | {"stream": True}),
    "messages": ("/v1/messages", _TO_CLAUDE),
    "messages streamed": ("/v1/messages", _TO_CLAUDE | {"stream": True}),
    "count_tokens": ("/v1/messages/count_tokens", {"messages": MESSAGES}),
    "tokenize": ("/tokenize", {"prompt": "Paris"}),
    "detokenize": ("/detokenize", {"tokens": [40, 41, 42]}),
    "wrong type": ("/v1/chat/completions", {"messages": "not a list"}),
    "nothing said": ("/v1/chat/completions", {}),
    "too long": ("/v1/completions", {"prompt": "a", "max_tokens": 10**9}),
    "messages without messages": ("/v1/messages", {"max_tokens": 1}),
}


def _same(through: Reply, direct: Reply) -> None:
    assert (through.status, through.reason) == (direct.status, direct.reason)
    assert _lines(through) == _lines(direct)
    assert _VARYING.sub(b"*", through.body) == _VARYING.sub(b"*", direct.body)


def _lines(reply: Reply) -> list[tuple[str, str]]:
    """The header lines by name: only the order of lines of one name means anything (RFC 9110 §5.3)."""
    lines = (line for line in reply.headers if line[0] not in _ADDED and not line[0].startswith(_ADDED_LIMITS))
    return sorted(lines, key=itemgetter(0))


@pytest.mark.parametrize("name", _POSTS)
def test_a_post_is_answered_as_without_the_proxy(live: Server, direct: Server, name: str) -> None:
    path, body = _POSTS[name]
    body = {"model": direct.model(), **body}
    through, without = (server.ask("POST", path, body, _SAME_ID) for server in (live, direct))
    assert without.status in (200, 400)
    _same(through, without)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("HEAD", "/v1/models"),
        ("OPTIONS", "/v1/models"),
        ("PUT", "/v1/models"),
        ("DELETE", "/v1/chat/completions"),
        ("GET", "/v1/models/no-such-model"),
        ("GET", "/v1/no/such/path?a=1&a=2&b=%20"),
        ("GET", "/health"),
        ("GET", "/ping"),
        ("GET", "/version"),
        ("GET", "/load"),
        ("GET", "/openapi.json"),
    ],
)
def test_a_request_without_a_body_is_answered_as_without_the_proxy(
    live: Server, direct: Server, method: str, path: str
) -> None:
    through, without = (server.ask(method, path, headers=_SAME_ID) for server in (live, direct))
    _same(through, without)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (SEED_BODY, "application/json"),
        (b"", "application/json"),
        (b"{}", "text/plain"),
        (b"\xff\xfe{", "application/json"),
    ],
)
def test_a_body_that_vllm_refuses_is_refused_in_its_words(live: Server, direct: Server, body: bytes, kind: str) -> None:
    through, without = (
        server.ask("POST", "/v1/chat/completions", body, {"Content-Type": kind}) for server in (live, direct)
    )
    assert without.status == 400
    _same(through, without)


def test_the_caller_s_request_id_becomes_the_base_of_vllm_s(live: Server, direct: Server) -> None:
    body = {"model": direct.model(), **_CHAT}
    through, without = (
        server.ask("POST", "/v1/chat/completions", body, {"X-Request-Id": "my-own.id"}) for server in (live, direct)
    )
    assert through.json()["id"] == without.json()["id"] == "chatcmpl-my-own.id"
    assert through.header("x-request-id") == "my-own.id"


def test_metrics_have_the_same_names(live: Server, direct: Server) -> None:
    through, without = (server.ask("GET", "/metrics") for server in (live, direct))
    assert through.header("content-type") == without.header("content-type")
    assert _names(through) == _names(without)


def _names(reply: Reply) -> set[str]:
    return {line for line in reply.body.decode().splitlines() if line.startswith("# ")}
