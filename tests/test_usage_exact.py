"""``--usage exact``: the client of a stream gets, byte for byte, what it would have got without a proxy."""

import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from _asking import CHAT, Reply, ask, make_key, until
from _raw import CHUNKED, LAST_CHUNK, Message, Upstream, Wire, chunk, connect, request
from _service import MASTER_KEY, Twistd, start_proxy, start_simulator

PROXY_OPTIONS = ("--usage", "exact", "--store", "memory:")
CHAT_PATH, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
STREAM: dict[str, Any] = {**CHAT, "stream": True, "max_tokens": 6}
TEXT: dict[str, Any] = {"model": CHAT["model"], "prompt": "once upon a time", "stream": True, "max_tokens": 6}

#: Route and body of what is asked, directly and through the proxy.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT_PATH, STREAM),
    "chat n=2": (CHAT_PATH, {**STREAM, "n": 2}),
    "chat with tools": (CHAT_PATH, {**STREAM, "tools": TOOLS, "tool_choice": "auto"}),
    "chat n=2 with tools": (CHAT_PATH, {**STREAM, "n": 2, "tools": TOOLS}),
    "chat of one token": (CHAT_PATH, {**STREAM, "max_tokens": 1}),
    "chat asking for usage": (CHAT_PATH, {**STREAM, "stream_options": {"include_usage": True}}),
    "chat asking for none": (CHAT_PATH, {**STREAM, "stream_options": {"include_usage": False}}),
    "chat with empty options": (CHAT_PATH, {**STREAM, "stream_options": {}}),
    "chat with null options": (CHAT_PATH, {**STREAM, "stream_options": None}),
    "chat asking for usage always": (
        CHAT_PATH,
        {**STREAM, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "chat asking for it always and not": (CHAT_PATH, {**STREAM, "stream_options": {"continuous_usage_stats": True}}),
    "chat in one piece": (CHAT_PATH, {**STREAM, "stream": False}),
    "chat refused by vLLM": (CHAT_PATH, {**STREAM, "model": "no-such-model"}),
    "completion": (COMPLETIONS, TEXT),
    "completion n=2": (COMPLETIONS, {**TEXT, "n": 2}),
    "completion of several prompts": (COMPLETIONS, {**TEXT, "prompt": ["one", "two words"], "n": 2}),
    "completion asking for usage": (COMPLETIONS, {**TEXT, "stream_options": {"include_usage": True}}),
    "completion in one piece": (COMPLETIONS, {**TEXT, "stream": False}),
    "messages": ("/v1/messages", STREAM),
    "responses": ("/v1/responses", {"model": CHAT["model"], "input": "hello", "stream": True, "max_output_tokens": 6}),
}
#: What vLLM counts for each of these that is an answer, prompt and output.
TOKENS = {
    "chat": (1, 6),
    "chat n=2": (1, 12),
    "chat with tools": (1, 6),
    "completion": (4, 6),
    "completion of several prompts": (3, 24),
    "messages": (1, 6),
}


@pytest.fixture(scope="module")
def own_sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twistd]:
    service = start_simulator(tmp_path_factory.mktemp("sim"), "--ttft", "0", "--tpot", "0")
    yield service
    service.stop()


@pytest.fixture(scope="module")
def exact(own_sim: Twistd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twistd]:
    service = start_proxy(tmp_path_factory.mktemp("exact"), own_sim.url, *PROXY_OPTIONS)
    yield service
    service.stop()
    assert "Traceback" not in service.log


def answer(service: Twistd, path: str, body: object, *, key: str | None = None, **headers: str) -> Reply:
    return ask(service, "POST", path, body, key=key, headers={"X-Request-Id": "the-same", **headers})


def timeless(body: bytes) -> bytes:
    """Take out of an answer what differs each time that one asks."""
    body = re.sub(rb'"(created|created_at|completed_at)":[0-9.]+', rb'"\1":0', body)
    return re.sub(rb'"(id|item_id)":"(resp|msg)_[0-9a-f-]+"', rb'"\1":"\2"', body)


def lines_of(reply: Reply) -> dict[str, str]:
    """Return the headers that are vLLM's."""
    own = ("date", "x-request-id", "via")
    return {name: value for name, value in reply.headers.items() if name not in own}


@pytest.mark.parametrize("comments", ["", "; comments=0.001; tpot=0.004"], ids=["", "with comments"])
@pytest.mark.parametrize("case", CASES)
def test_the_simulator_s_stream_is_the_same(own_sim: Twistd, exact: Twistd, case: str, comments: str) -> None:
    path, body = CASES[case]
    pace = f"ttft=0{comments}"
    direct = answer(own_sim, path, body, **{"X-Vllmsim": pace})
    key = make_key(exact)["key"]
    name = f"user of {case}"
    headers = {"X-Vllmsim": pace, "x-litellm-customer-id": name}
    through = answer(exact, f"/vllm{path}", body, key=key, **headers)
    assert through.status == direct.status
    assert _without_comments(timeless(through.body)) == _without_comments(timeless(direct.body))
    assert lines_of(through) == lines_of(direct)
    if case in TOKENS:
        prompt, output = TOKENS[case]
        until(lambda: _tokens(exact, key) == {name: (1, 0, prompt, output)})


def _without_comments(body: bytes) -> bytes:
    """How many there are is a matter of time; they are events of their own."""
    return body.replace(b": keep-alive\n\n", b"")


def _tokens(service: Twistd, key: str) -> dict[str, tuple[int, int, int, int]]:
    rows = ask(service, "GET", f"/usage?group_by=end_user&key={key}", key=MASTER_KEY).json()["usage"]
    names = ("requests", "estimated_requests", "prompt_tokens", "completion_tokens")
    return {row["end_user"]: tuple(row[name] for name in names) for row in rows}


# what the simulator does not say


def event(path: str, **members: Any) -> bytes:
    """Write an event as vLLM does."""
    kind = "chat.completion.chunk" if path == CHAT_PATH else "text_completion"
    fields = {"id": "x-1", "object": kind, "created": 1, "model": "m", **members}
    return b"data: " + json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def piece(delta: dict[str, Any], finish: str | None = None, index: int = 0, **members: Any) -> bytes:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
    return event(CHAT_PATH, choices=[choice], **members)


def call(name: str | None, arguments: str, place: int = 0) -> dict[str, Any]:
    function = {"arguments": arguments} | ({"name": name} if name else {})
    begun = {"id": f"call_{place}", "type": "function"} if name else {}
    return {"tool_calls": [{"index": place, **begun, "function": function}]}


FINGERPRINT = {"system_fingerprint": 'vllm-0.32.0-"quoted"'}
ROLE = {"role": "assistant", "content": ""}
USAGE = {"usage": {"prompt_tokens": 9, "total_tokens": 16, "completion_tokens": 7}}


def tool_stream(*, asked: bool) -> bytes:
    """A stream with two tool calls in two choices, whose arguments read like the events that are looked for."""
    last = {} if asked else FINGERPRINT
    stream = piece(ROLE, prompt_token_ids=None) + piece(ROLE, index=1)
    for index, place in itertools.product((0, 1), (0, 1)):
        stream += piece(call("weather", "", place), index=index)
        stream += piece(call(None, '{"usage":{"completion_tokens":1},"choices":[],', place), index=index)
        stream += b": keep-alive\n\n"
        stream += piece(call(None, '"finish_reason":"stop","town":"Zürich \\n\\n"}', place), index=index)
    stream += piece({}, "tool_calls", **last) + piece({"content": "é"}, "stop", 1, **last)
    if asked:
        stream += event(CHAT_PATH, choices=[], **USAGE, **FINGERPRINT)
    return stream + b"data: [DONE]\n\n"


def text_stream(*, asked: bool) -> bytes:
    """A stream of two texts."""
    last = {} if asked else FINGERPRINT
    stream = b""
    for word, index in itertools.product(["one ", '"usage":{', "\n\ndata: "], (0, 1)):
        choices = [{"index": index, "text": word, "logprobs": None, "finish_reason": None}]
        stream += event(COMPLETIONS, choices=choices)
    for index in (0, 1):
        choices = [{"index": index, "text": "end", "logprobs": None, "finish_reason": "length"}]
        stream += event(COMPLETIONS, choices=choices, **last)
    if asked:
        stream += event(COMPLETIONS, choices=[], **USAGE, **FINGERPRINT)
    return stream + b"data: [DONE]\n\n"


def cut(stream: bytes, places: Sequence[int]) -> list[bytes]:
    ends = [0, *sorted(places), len(stream)]
    return [stream[start:end] for start, end in itertools.pairwise(ends) if end > start]


def splits_of(stream: bytes) -> list[list[bytes]]:
    """Every byte by itself; at each place around the end of the stream, where something is taken out; anywhere."""
    end = stream.index(b'"choices":[],"usage"')
    spots = [*range(end - 200, end + 40, 3), *range(len(stream) - 30, len(stream))]
    chance = random.Random(0)
    anywhere = [chance.sample(range(len(stream)), chance.randint(1, 12)) for _ in range(40)]
    return [
        cut(stream, range(len(stream))),
        *(cut(stream, [spot]) for spot in spots),
        *(cut(stream, a) for a in anywhere),
    ]


def replay(splits: Sequence[Sequence[bytes]], seen: list[Message]) -> Any:
    """Return a script that answers each request on a connection with the next of ``splits``, a chunk for each piece."""
    left = iter(splits)

    def script(wire: Wire) -> None:
        while True:
            seen.append(wire.message())
            wire.send(CHUNKED)
            for data in next(left):
                wire.send(chunk(data))
            wire.send(LAST_CHUNK)

    return script


REPLAYED = {
    "chat with tools": (CHAT_PATH, {**STREAM, "n": 2, "tools": TOOLS}, tool_stream),
    "completions": (COMPLETIONS, {**TEXT, "n": 2}, text_stream),
}


@pytest.mark.parametrize("case", REPLAYED)
def test_wherever_it_is_split(upstream: Upstream, scripted_proxy: Twistd, case: str) -> None:
    path, body, stream = REPLAYED[case]
    key = b"x-api-key: " + make_key(scripted_proxy)["key"].encode()
    splits, seen = splits_of(stream(asked=True)), list[Message]()
    sent = json.dumps(body).encode()
    with upstream.playing(replay(splits, seen)), connect(scripted_proxy) as client:
        for split in splits:
            client.send(request(b"POST", b"/vllm" + path.encode(), body=sent, key=key))
            got = client.message()
            assert got.status == 200
            assert got.body == stream(asked=False), split
    assert len(seen) == len(splits)
    added = b'{"stream_options":{"include_usage":true},'
    assert {asked.body for asked in seen} == {added + sent[1:]}
