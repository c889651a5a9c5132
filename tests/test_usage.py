"""Usage and model out of every shape of answer that vLLM has, in whatever pieces it passes."""

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllmproxy.usage.jsonbody import LONGEST_WHOLE, TAIL
from vllmproxy.usage.reader import UsageReader, reader_for
from vllmproxy.usage.sse import LONGEST_LINE
from vllmproxy.usage.tokens import Usage

JSON, SSE = b"application/json", b"text/event-stream; charset=utf-8"
MODEL = "qwen2.5-7b-instruct"

Result = tuple[str | None, Usage | None]


def reader(content_type: bytes) -> UsageReader:
    found = reader_for(200, content_type, None)
    assert found is not None
    return found


def read(content_type: bytes, *pieces: bytes) -> Result:
    found = reader(content_type)
    for piece in pieces:
        found.feed(piece)
    return found.finish()


def events(*data: str | dict[str, Any], named: bool = False) -> bytes:
    """Return a stream as vLLM writes it; ``named`` with an ``event:`` line before each, as two of its APIs do."""
    stream = b""
    for each in data:
        name = f"event: {each['type']}\n" if named and isinstance(each, dict) else ""
        text = each if isinstance(each, str) else json.dumps(each, separators=(",", ":"))
        stream += f"{name}data: {text}\n\n".encode()
    return stream


def chunk(content: str | None, **more: object) -> dict[str, Any]:
    """Return a chunk of a streamed chat; ``None`` is the one without choices."""
    choices = [] if content is None else [{"index": 0, "delta": {"content": content}, "finish_reason": None}]
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": MODEL, "choices": choices, **more}


def tokens(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


def reported(
    prompt: int | None, completion: int | None, total: int | None, cached: int | None = None
) -> Usage:
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=total, cached_prompt_tokens=cached
    )


def counted(completion: int, prompt: int | None = None) -> Usage:
    total = None if prompt is None else prompt + completion
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=total, source="counted")


RESPONSES_USAGE = {
    "input_tokens": 11,
    "input_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 0, "input_tokens_per_turn": []},
    "output_tokens": 4,
    "output_tokens_details": {"reasoning_tokens": 0, "tool_output_tokens": 0},
    "total_tokens": 15,
}
COHERE_USAGE = {
    "billed_units": {"input_tokens": 11.0, "output_tokens": 4.0},
    "tokens": {"input_tokens": 11.0, "output_tokens": 4.0},
    "cached_tokens": 8.0,
}

ANSWERS: dict[str, tuple[dict[str, Any], Result]] = {
    "chat": (
        {
            "id": "chatcmpl-9af6",
            "model": MODEL,
            "choices": [
                {"index": 0, "message": {"content": '"usage":{"prompt_tokens":9}'}, "logprobs": None}
            ],
            "usage": {**tokens(11, 4), "prompt_tokens_details": None, "completion_tokens_details": None},
            "prompt_logprobs": None,
            "kv_transfer_params": None,
        },
        (MODEL, reported(11, 4, 15)),
    ),
    "chat with cache details": (
        {"model": MODEL, "usage": {**tokens(11, 4), "prompt_tokens_details": {"cached_tokens": 8}}},
        (MODEL, reported(11, 4, 15, cached=8)),
    ),
    "completion": (
        {"id": "cmpl-1", "model": MODEL, "choices": [{"text": "x"}], "usage": tokens(2, 3)},
        (MODEL, reported(2, 3, 5)),
    ),
    "responses": (
        {"id": "resp_1", "metadata": {"model": "no"}, "model": MODEL, "usage": RESPONSES_USAGE, "user": None},
        (MODEL, reported(11, 4, 15, cached=8)),
    ),
    "messages": (
        {
            "id": "chatcmpl-1",
            "type": "message",
            "model": MODEL,
            "usage": {"input_tokens": 11, "output_tokens": 4},
        },
        (MODEL, reported(11, 4, 15)),
    ),
    "messages with cache": (
        {
            "model": MODEL,
            "usage": {
                "input_tokens": 2,
                "output_tokens": 4,
                "cache_read_input_tokens": 8,
                "cache_creation_input_tokens": 1,
            },
        },
        (MODEL, reported(11, 4, 15, cached=8)),
    ),
    "embeddings": (
        {"object": "list", "model": MODEL, "data": [{"embedding": [0.5]}], "usage": tokens(6, 0)},
        (MODEL, reported(6, 0, 6)),
    ),
    "rerank": (
        {"id": "rerank-1", "model": MODEL, "usage": {"prompt_tokens": 7, "total_tokens": 7}, "results": []},
        (MODEL, reported(7, None, 7)),
    ),
    "transcription": (
        {"text": "hello", "usage": {"type": "duration", "seconds": 6}},
        (None, Usage(audio_seconds=6.0)),
    ),
    "cohere chat": ({"id": "1", "message": {}, "usage": COHERE_USAGE}, (None, reported(11, 4, 15, cached=8))),
    "cohere embed": (
        {
            "id": "embd-1",
            "embeddings": {},
            "meta": {"billed_units": {"input_tokens": 6, "image_tokens": None}},
        },
        (None, reported(6, None, None)),
    ),
    "models": ({"object": "list", "data": [{"id": MODEL}]}, (None, None)),
    "tokenize": ({"count": 2, "max_model_len": 4096, "tokens": [74, 75]}, (None, None)),
    "an unknown usage": (
        {"model": MODEL, "usage": {"prompt_tokens": "11", "total_tokens": True}},
        (MODEL, None),
    ),
    "a null usage": ({"model": MODEL, "usage": None}, (MODEL, None)),
    "numbers that are none": (
        {"model": MODEL, "usage": {"prompt_tokens": -1, "completion_tokens": 10**30, "seconds": 10**400}},
        (MODEL, None),
    ),
    "a model that is none": ({"model": ["x"], "usage": tokens(1, 1)}, (None, reported(1, 1, 2))),
    "a model too long": ({"model": "x" * 300, "usage": tokens(1, 1)}, (None, reported(1, 1, 2))),
}

MESSAGE_START = {
    "type": "message_start",
    "message": {"id": "1", "model": MODEL, "usage": {"input_tokens": 11, "output_tokens": 0}},
}
CONTENT = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "cls"}, "index": 0}


def response_event(kind: str, usage: dict[str, Any] | None) -> dict[str, Any]:
    tool = {"parameters": {"properties": {"usage": {"type": "string"}, "model": {"type": "string"}}}}
    response = {"id": "resp_1", "tools": [tool], "model": MODEL, "usage": usage}
    return {"response": response, "sequence_number": 0, "type": f"response.{kind}"}


TEXT_DELTA = {"delta": " ho", "logprobs": [], "type": "response.output_text.delta"}

STREAMS: dict[str, tuple[bytes, Result]] = {
    "chat": (events(chunk("a"), chunk("b"), "[DONE]"), (MODEL, counted(2))),
    "chat with include_usage": (
        events(chunk("a"), chunk("b"), chunk(None, usage=tokens(11, 4)), "[DONE]"),
        (MODEL, reported(11, 4, 15)),
    ),
    "chat with a null usage on each chunk": (
        events(chunk("a", usage=None), chunk("b", usage=None), chunk(None, usage=tokens(11, 4)), "[DONE]"),
        (MODEL, reported(11, 4, 15)),
    ),
    "chat with continuous_usage_stats": (
        events(
            chunk("a", usage=tokens(11, 1)), chunk("b", usage=tokens(11, 2)), chunk(None, usage=tokens(11, 9))
        ),
        (MODEL, reported(11, 9, 20)),
    ),
    "the same cut short": (
        events(chunk("a", usage=tokens(11, 1)), chunk("b", usage=tokens(11, 2))) + b'data: {"id',
        (MODEL, reported(11, 2, 13)),
    ),
    "chat about usage": (
        events(chunk("usage"), chunk('"usage":{"prompt_tokens":9}'), "[DONE]"),
        (MODEL, counted(2)),
    ),
    "completions": (
        events({"model": MODEL, "choices": [{"text": "x"}]}, {"choices": [{"text": "y"}]}, "[DONE]"),
        (MODEL, counted(2)),
    ),
    "generate": (
        events({"request_id": "1", "choices": [{"token_ids": [1]}]}, {"choices": [], "usage": tokens(2, 1)}),
        (None, reported(2, 1, 3)),
    ),
    "responses": (
        events(
            response_event("created", None),
            response_event("in_progress", None),
            TEXT_DELTA,
            TEXT_DELTA,
            response_event("completed", RESPONSES_USAGE),
            named=True,
        ),
        (MODEL, reported(11, 4, 15, cached=8)),
    ),
    "responses, incomplete": (
        events(response_event("created", None), response_event("incomplete", RESPONSES_USAGE), named=True),
        (MODEL, reported(11, 4, 15, cached=8)),
    ),
    "responses cut short": (
        events(response_event("created", None), TEXT_DELTA, TEXT_DELTA, named=True),
        (MODEL, counted(2)),
    ),
    "messages": (
        events(
            MESSAGE_START,
            {"type": "content_block_start", "content_block": {"type": "text", "text": ""}, "index": 0},
            CONTENT,
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {}, "usage": {"input_tokens": 11, "output_tokens": 4}},
            {"type": "message_stop"},
            named=True,
        ),
        (MODEL, reported(11, 4, 15)),
    ),
    "messages whose end tells of the output only": (
        events(MESSAGE_START, CONTENT, {"type": "message_delta", "usage": {"output_tokens": 4}}, named=True),
        (MODEL, reported(11, 4, 15)),
    ),
    "messages cut short": (
        events(MESSAGE_START, CONTENT, CONTENT, named=True),
        (MODEL, counted(2, prompt=11)),
    ),
    "messages cut before the first token": (
        events(MESSAGE_START, named=True),
        (MODEL, counted(0, prompt=11)),
    ),
    "transcription": (
        events(chunk("hello", object="transcription.chunk"), chunk(None, usage=tokens(1500, 4)), "[DONE]"),
        (MODEL, reported(1500, 4, 1504)),
    ),
    "cohere chat": (
        events(
            {"type": "message-start", "id": "1"},
            {"type": "content-delta", "delta": {"message": {"content": {"text": "x"}}}},
            {"type": "message-end", "delta": {"finish_reason": "COMPLETE", "usage": COHERE_USAGE}},
            "[DONE]",
        ),
        (None, reported(11, 4, 15, cached=8)),
    ),
    "an error": (events({"error": {"message": "boom", "code": 500}}, "[DONE]"), (None, None)),
    "an error in the middle": (
        events(chunk("a"), {"error": {"message": "x"}}, "[DONE]"),
        (MODEL, counted(1)),
    ),
    "comments, CRLF and other fields": (
        b": keep-alive\r\n\r\nid: 7\r\nretry: 5\r\nevent: x\r\ndata:"
        + json.dumps(chunk("a")).encode()
        + b"\r\n\r\n: keep-alive\r\n\r\ndata: "
        + json.dumps(chunk(None, usage=tokens(1, 1))).encode()
        + b"\r\n\r\ndata: [DONE]\r\n\r\n",
        (MODEL, reported(1, 1, 2)),
    ),
    "data in several lines": (
        b'data: {"model": "m",\ndata: "choices": [],\ndata:"usage":\ndata: {"prompt_tokens": 3}}\n\n',
        ("m", reported(3, None, None)),
    ),
    "no blank line at the end": (
        b'data: {"model":"m","usage":{"prompt_tokens":3}}\n',
        ("m", reported(3, None, None)),
    ),
    "usage that does not decode": (
        b'data: {"model":"m","choices":[{}]}\n\ndata: {"usage": {"prompt_tokens": 3}\n\n',
        ("m", counted(1)),
    ),
    "nothing": (b"", (None, None)),
    "done at once": (events("[DONE]"), (None, None)),
}


@pytest.mark.parametrize(("answer", "expected"), ANSWERS.values(), ids=list(ANSWERS))
@pytest.mark.parametrize("form", [{"separators": (",", ":")}, {"indent": 2}], ids=["compact", "indented"])
def test_json_answers(answer: dict[str, Any], expected: Result, form: dict[str, Any]) -> None:
    body = json.dumps(answer, **form).encode()
    assert read(JSON, body) == expected
    assert read(JSON, *(body[at : at + 1] for at in range(len(body)))) == expected


@pytest.mark.parametrize(("stream", "expected"), STREAMS.values(), ids=list(STREAMS))
def test_streams(stream: bytes, expected: Result) -> None:
    assert read(SSE, stream) == expected
    assert read(SSE, *(stream[at : at + 1] for at in range(len(stream)))) == expected
    assert read(SSE, stream.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")) == expected


def test_a_report_of_usage_is_not_counted() -> None:
    found = reader(SSE)
    found.feed(events(chunk("a", usage=tokens(1, 1)), chunk(None, usage=tokens(1, 1)), "[DONE]"))
    assert found.counted == 1


def pieces_of(data: bytes) -> st.SearchStrategy[list[bytes]]:
    cuts = st.lists(st.integers(0, len(data)), max_size=12).map(sorted)
    return cuts.map(lambda at: [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)])


@given(
    st.lists(st.sampled_from([stream for stream, _ in STREAMS.values()]), max_size=3)
    .map(b"".join)
    .flatmap(pieces_of)
)
def test_how_a_stream_is_split_makes_no_difference(pieces: list[bytes]) -> None:
    assert read(SSE, *pieces) == read(SSE, b"".join(pieces))


FRAGMENTS = [
    *(
        b"data:",
        b"data: ",
        b"event: x",
        b"\n",
        b"\r\n",
        b"\r",
        b"\n\n",
        b": c\n",
        b"[DONE]",
        b"\xff",
        b"\x00",
    ),
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"\\",
        b"1e999",
        b"NaN",
        b"null",
        b'"model":"m"',
        b'"choices":[{',
    ),
    *(b'"usage"', b'"usage":null', b'"usage":{"prompt_tokens":1}', b'"delta"', b"[" * 100_000, b"9" * 5000),
]


@given(
    st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=20), max_size=30), st.sampled_from([JSON, SSE])
)
@example([b"[" * 100_000], JSON)
@example([b'{"model":"m","data":', b"[" * 100_000], JSON)
@example([b"data: ", b"[" * 100_000, b"\n\n"], SSE)
@example([b'{"usage":', b"9" * 5000, b"}"], JSON)
@example([b'{"usage":{"seconds":1e999,"prompt_tokens":NaN}}'], JSON)
@example([b'\xff\xfe{\x00"\x00}\x00'], JSON)
def test_nothing_raises_and_no_splitting_matters(pieces: list[bytes], content_type: bytes) -> None:
    assert read(content_type, *pieces) == read(content_type, b"".join(pieces))


SIZES = [100, TAIL - 200, TAIL + 10, LONGEST_WHOLE - 200, LONGEST_WHOLE + 10, 3 * LONGEST_WHOLE]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("piece", [1000, 65536, 10**8])
@pytest.mark.parametrize("usage_last", [True, False])
def test_long_json_tells_at_its_ends(size: int, piece: int, usage_last: bool) -> None:
    usage = b'"usage": {"prompt_tokens": 6, "total_tokens": 6, "completion_tokens": 0}'
    data = b'"data": [' + b"0.25, " * (size // 6) + b"1]"
    members = [b'"object": "list"', b'"model": "m"', *([data, usage] if usage_last else [usage, data])]
    body = b"{" + b", ".join(members) + b"}"
    pieces = [body[at : at + piece] for at in range(0, len(body), piece)]
    assert read(JSON, *pieces) == ("m", reported(6, 0, 6))


PADDING = b'"data":"' + b"x" * (2 * LONGEST_WHOLE) + b'"'


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"{" + PADDING + b',"deep":{"usage":{"prompt_tokens":6}}}', id="deeper down"),
        pytest.param(b"{" + PADDING + b',"usage":{"prompt_tokens":6}', id="cut off"),
        pytest.param(b"{" + PADDING + b',"usage":{"prompt_tokens":6},"more":"', id="cut off later"),
        pytest.param(b"{" + PADDING + b',"deep":["usage",{"prompt_tokens":6}]}', id="no key"),
        pytest.param(
            b'{"data":"' + b"x" * (2 * LONGEST_WHOLE) + rb'\"usage\":{\"prompt_tokens\":6}"}', id="text"
        ),
        pytest.param(b'{"usage":{"prompt_tokens":6' + b"0" * 2 * LONGEST_WHOLE + b"}}", id="cut in a number"),
        pytest.param(b'[{"usage":{"prompt_tokens":6}},{' + PADDING + b"}]", id="in an array"),
    ],
)
def test_a_doubtful_end_of_a_long_body_tells_nothing(body: bytes) -> None:
    assert read(JSON, body) == (None, None)


def test_the_outermost_usage_is_found_behind_deeper_ones() -> None:
    deeper = b'"usage":{"prompt_tokens":5},"trace":{"usage":{"prompt_tokens":6},"x":"usage"}'
    assert read(JSON, b"{" + PADDING + b"," + deeper + b"}") == (None, reported(5, None, None))


def test_usage_between_two_long_members_is_found_in_a_body_kept_whole() -> None:
    long = "x" * 2 * TAIL
    body = json.dumps({"model": "m", "a": long, "usage": tokens(1, 2), "b": long}).encode()
    assert read(JSON, body) == ("m", reported(1, 2, 3))


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("piece", [4096, 10**8])
def test_a_line_longer_than_the_limit_is_passed_over(extra: int, piece: int) -> None:
    head, tail = b'data: {"choices":[{"text":"', b'"}]}'
    line = head + b"x" * (LONGEST_LINE + extra - len(head) - len(tail)) + tail
    stream = events(chunk("a")) + line + b"\n\n" + events(chunk("b"))
    expected = counted(3 if extra <= 0 else 2)
    assert read(SSE, *(stream[at : at + piece] for at in range(0, len(stream), piece))) == (MODEL, expected)


@pytest.mark.parametrize(
    ("content_type", "start", "piece"),
    [
        pytest.param(JSON, b'{"data":[', b"0.25," * 2000, id="json"),
        pytest.param(SSE, b"data: ", b"x" * 10_000, id="one line"),
        pytest.param(SSE, b"", b"data: x\n" * 1250, id="one event of many lines"),
        pytest.param(SSE, b"", events(chunk("x", usage=tokens(1, 1))) * 40, id="many events"),
    ],
)
def test_memory_is_bounded(content_type: bytes, start: bytes, piece: bytes) -> None:
    found = reader(content_type)
    tracemalloc.start()
    try:
        found.feed(start)
        for _ in range(1000):  # ten megabytes
            found.feed(piece)
        found.finish()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize(
    ("status", "content_type", "content_encoding", "reads"),
    [
        (200, b"application/json", None, True),
        (201, b"application/json", b"identity", True),
        (200, b"Application/JSON ; charset=utf-8", b"", True),
        (200, b"application/problem+json", None, True),
        (200, b"Text/Event-Stream", None, True),
        (200, b"application/json", b"gzip", False),
        (200, b"text/event-stream", b"br", False),
        (200, b"application/octet-stream", None, False),
        (200, b"text/plain; version=0.0.4", None, False),
        (200, b"", None, False),
        (200, None, None, False),
        (101, b"application/json", None, False),
        (400, b"application/json", None, False),
        (503, b"text/event-stream", None, False),
    ],
)
def test_what_is_read_at_all(
    status: int, content_type: bytes | None, content_encoding: bytes | None, reads: bool
) -> None:
    assert (reader_for(status, content_type, content_encoding) is not None) == reads
