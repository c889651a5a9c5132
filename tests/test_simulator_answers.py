"""The shapes of the simulated vLLM's answers."""

import base64
import json
import struct
from typing import Any

import pytest
from _simulated import Memory, post, request
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.simulator import shapes
from vllmproxy.simulator.config import DEFAULT_MODEL

CHAT = {"model": DEFAULT_MODEL, "messages": [{"role": "user", "content": "hello big world"}]}
SAYS = "the quick brown"


def ask(path: str, body: Any, **headers: str) -> Any:
    return Memory().ask(post(path, body, **headers))


def test_chat_carries_the_request_id_the_text_and_the_usage() -> None:
    answer = ask("/v1/chat/completions", CHAT | {"max_tokens": 3}, x_request_id="abc").json()
    assert answer["id"] == "chatcmpl-abc"
    assert answer["choices"][0]["message"]["content"] == SAYS
    assert answer["choices"][0]["finish_reason"] == "length"
    assert [answer["usage"][n] for n in ("prompt_tokens", "completion_tokens", "total_tokens")] == [3, 3, 6]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_either_limit_of_chat_is_honoured(name: str) -> None:
    assert ask("/v1/chat/completions", CHAT | {name: 5}).json()["usage"]["completion_tokens"] == 5


def test_without_a_limit_an_answer_stops_by_itself_after_sixteen_tokens() -> None:
    answer = ask("/v1/chat/completions", CHAT).json()
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_natural_length_ends_an_answer_before_its_limit() -> None:
    memory = Memory(answer_tokens=4)
    assert memory.ask(post("/v1/chat/completions", CHAT | {"max_tokens": 9})).json()["usage"]["completion_tokens"] == 4
    assert memory.ask(post("/v1/chat/completions", CHAT)).json()["choices"][0]["finish_reason"] == "stop"


def chat_events(**options: Any) -> list[Any]:
    body = CHAT | {"stream": True, "max_tokens": 2} | options
    answer = ask("/v1/chat/completions", body)
    assert answer.header("content-type") == "text/event-stream; charset=utf-8"
    assert answer.complete
    events: list[Any] = answer.events()
    return events


def test_a_chat_stream_has_no_usage_unless_asked_for() -> None:
    events = chat_events()
    assert events[-1] == "[DONE]"
    assert all("usage" not in event for event in events[:-1])
    assert [event["choices"][0]["delta"]["content"] for event in events[:-1]] == ["", "the", " quick"]
    assert events[-2]["choices"][0]["finish_reason"] == "length"


def test_include_usage_adds_one_chunk_without_choices() -> None:
    events = chat_events(stream_options={"include_usage": True})
    assert events[-2]["choices"] == []
    assert events[-2]["usage"] == {"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2}
    assert all("usage" not in event for event in events[:-2])


def test_continuous_usage_counts_on_every_chunk() -> None:
    events = chat_events(stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert [event["usage"]["completion_tokens"] for event in events[:-1]] == [0, 1, 2, 2]


def test_continuous_usage_is_that_of_one_choice() -> None:
    events = chat_events(n=2, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert [event["usage"]["completion_tokens"] for event in events[:-1]] == [0, 0, 1, 1, 2, 2, 4]
    body = {"prompt": ["a b", "c"], "n": 2, "max_tokens": 1, "stream": True}
    events = ask(
        "/v1/completions", {**body, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    ).events()
    usage = [(event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"]) for event in events[:-1]]
    assert usage == [(2, 1), (2, 1), (1, 1), (1, 1), (3, 4)]


def test_a_stream_with_several_choices_ends_each_of_them() -> None:
    ends = [
        event["choices"][0]["index"]
        for event in chat_events(n=2)[:-1]
        if event["choices"][0]["finish_reason"] == "length"
    ]
    assert ends == [0, 1]


def test_completions_answer_every_prompt_n_times() -> None:
    body = {"prompt": ["a b", "c"], "n": 2, "max_tokens": 2}
    answer = ask("/v1/completions", body, x_request_id="r").json()
    assert answer["id"] == "cmpl-r"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 8


def test_a_completion_stream_ends_with_usage_when_asked() -> None:
    body = {"prompt": "a", "stream": True, "max_tokens": 2, "stream_options": {"include_usage": True}}
    events = ask("/v1/completions", body).events()
    assert [e["choices"][0]["text"] for e in events[:2]] == ["the", " quick"]
    assert events[2]["usage"]["completion_tokens"] == 2
    assert events[3] == "[DONE]"


def test_token_in_token_out_streams_and_answers_whole() -> None:
    body = {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 2}}
    whole = ask("/inference/v1/generate", body).json()
    assert whole["choices"][0]["token_ids"] == [0, 1]
    assert whole["usage"]["prompt_tokens"] == 3
    events = ask("/inference/v1/generate", body | {"stream": True}).events()
    assert [e["choices"][0]["token_ids"] for e in events[:-1]] == [[0], [1]]


def test_a_response_stream_ends_in_completed_with_usage_and_no_done() -> None:
    answer = ask("/v1/responses", {"input": "hello there", "max_output_tokens": 2, "stream": True})
    events = answer.events()
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] == "response.completed"
    usage = events[-1]["response"]["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (2, 2, 4)
    assert b"[DONE]" not in answer.body
    assert b"event: response.completed\n" in answer.body


def test_a_whole_response_says_why_it_is_incomplete() -> None:
    cut = ask("/v1/responses", {"input": "hello", "max_output_tokens": 3}).json()
    assert cut["output"][0]["content"][0]["text"] == SAYS
    assert (cut["status"], cut["incomplete_details"]["reason"]) == ("incomplete", "max_output_tokens")
    assert ask("/v1/responses", {"input": "hello"}).json()["status"] == "completed"


MESSAGE = {"model": DEFAULT_MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": "hello you"}]}


def test_messages_count_in_anthropics_words() -> None:
    answer = ask("/v1/messages", MESSAGE).json()
    assert answer["usage"] == {"input_tokens": 2, "output_tokens": 2}
    assert answer["stop_reason"] == "max_tokens"
    events = ask("/v1/messages", MESSAGE | {"stream": True}).events()
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"]["usage"] == {"input_tokens": 2, "output_tokens": 0}
    assert events[-2]["usage"] == {"input_tokens": 2, "output_tokens": 2}


def test_counting_tokens_of_messages() -> None:
    body = {"model": DEFAULT_MODEL, "system": "be brief", "messages": MESSAGE["messages"]}
    assert ask("/v1/messages/count_tokens", body).json()["input_tokens"] == 4


def test_embeddings_as_numbers_base64_and_bytes() -> None:
    body = {"input": ["one two", "three"]}
    numbers = ask("/v1/embeddings", body).json()
    vectors = [row["embedding"] for row in numbers["data"]]
    assert numbers["usage"]["prompt_tokens"] == 3
    packed = ask("/v1/embeddings", body | {"encoding_format": "base64"}).json()["data"]
    first = struct.unpack("<8f", base64.b64decode(packed[0]["embedding"]))
    assert first == pytest.approx(vectors[0])
    octets = ask("/pooling", body | {"encoding_format": "bytes"})
    assert octets.header("content-type") == "application/octet-stream"
    metadata = json.loads(octets.header("metadata"))
    place = metadata["data"][1]
    second = struct.unpack("<8f", octets.body[place["start"] : place["end"]])
    assert second == pytest.approx(vectors[1])


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_scores_compare_one_with_many(path: str) -> None:
    answer = ask(path, {"text_1": "a b", "text_2": ["c", "d e"]}).json()
    assert len(answer["data"]) == 2
    assert answer["usage"]["prompt_tokens"] == 5


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_ranks_are_the_best_first(path: str) -> None:
    answer = ask(path, {"query": "a", "documents": ["b c", "d"], "top_n": 1}).json()
    assert [(r["index"], r["document"]["text"]) for r in answer["results"]] == [(0, "b c")]
    assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 4}


def test_classes_have_probabilities() -> None:
    data = ask("/classify", {"input": ["a", "b"]}).json()["data"]
    assert [sum(row["probs"]) for row in data] == [1.0, 1.0]


def test_tokens_and_their_text_go_both_ways() -> None:
    tokens = ask("/tokenize", {"prompt": "one two three"}).json()
    assert tokens["tokens"] == [0, 1, 2]
    assert ask("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": SAYS}


@pytest.mark.parametrize(
    ("body", "prefix"),
    [
        (CHAT, "chatcmpl-"),
        ({"prompt": "x"}, "cmpl-"),
        ({"input": "x"}, "embd-"),
        ({"text_1": "a", "text_2": "b"}, "score-"),
    ],
)
def test_invocations_go_by_the_look_of_the_body(body: Any, prefix: str) -> None:
    assert ask("/invocations", body).json()["id"].startswith(prefix)


def test_audio_is_multipart_and_counted_in_seconds() -> None:
    form = {"content_type": "multipart/form-data; boundary=x"}
    memory = Memory()
    answer = memory.ask(request("POST", "/v1/audio/transcriptions", b"a" * 64001, **form)).json()
    assert answer["usage"] == {"type": "duration", "seconds": 3}
    assert memory.ask(post("/v1/audio/translations", {})).status == 400


@pytest.mark.parametrize(
    ("path", "body", "status", "type_", "param"),
    [
        ("/v1/chat/completions", b'{"a":1,}', 400, "Bad Request", "body.7"),
        ("/v1/chat/completions", b"", 400, "Bad Request", "body"),
        ("/v1/chat/completions", b"[]", 400, "Bad Request", "body"),
        ("/v1/chat/completions", b"\xff\xfe\x00", 400, "Bad Request", "body.0"),
        ("/v1/chat/completions", {}, 400, "Bad Request", "body.messages"),
        ("/v1/chat/completions", CHAT | {"model": "nope"}, 404, "NotFoundError", "model"),
        ("/v1/chat/completions", CHAT | {"max_tokens": 0}, 400, "BadRequestError", "max_tokens"),
        ("/v1/chat/completions", CHAT | {"max_tokens": 10**6}, 400, "BadRequestError", "max_tokens"),
        ("/v1/chat/completions", CHAT | {"max_tokens": "x"}, 400, "Bad Request", "body.max_tokens"),
        ("/v1/completions", {}, 400, "BadRequestError", "prompt"),
        ("/v1/responses", {}, 400, "Bad Request", "body.input"),
        ("/v1/messages", {}, 400, "Bad Request", "body.model"),
    ],
)
def test_errors_have_vllms_shape(path: str, body: Any, status: int, type_: str, param: str) -> None:
    answer = ask(path, body)
    assert answer.status == status
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == (type_, param, status)


def test_a_wrong_content_type_is_refused_before_the_body_is_read() -> None:
    answer = ask("/v1/chat/completions", CHAT, content_type="text/plain")
    assert answer.status == 400
    assert "Only 'application/json' is allowed" in answer.json()["error"]["message"]


def test_an_unknown_model_on_messages_takes_anthropics_shape() -> None:
    answer = ask("/v1/messages", MESSAGE | {"model": "nope"})
    assert (answer.status, answer.json()["type"], answer.json()["error"]["type"]) == (
        404,
        "error",
        "NotFoundError",
    )


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_fields = ["messages", "prompt", "input", "model", "max_tokens", "stream", "stream_options", "n", "token_ids"]
_fields += [
    "sampling_params",
    "query",
    "documents",
    "text_1",
    "text_2",
    "tokens",
    "top_n",
    "max_output_tokens",
]
_paths = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"]
_paths += [
    "/rerank",
    "/score",
    "/classify",
    "/tokenize",
    "/detokenize",
    "/inference/v1/generate",
    "/invocations",
]


@given(path=st.sampled_from(_paths), body=st.dictionaries(st.sampled_from(_fields), _json))
def test_no_json_body_is_answered_with_anything_but_an_answer(path: str, body: Any) -> None:
    if isinstance(body.get("max_tokens"), int):
        body["max_tokens"] = min(body["max_tokens"], 50)
    assert ask(path, body).status in (200, 400, 404)


@given(st.lists(st.text("ab ", max_size=9)))
def test_a_prompts_tokens_are_its_words(prompts: list[str]) -> None:
    assert shapes.count_tokens(prompts) == len(" ".join(prompts).split())
