"""Every shape of answer that vLLM has, and what is to be read out of it."""

import json
from typing import Any

from vllmproxy.usage.tokens import Usage

MODEL = "qwen2.5-7b-instruct"

Result = tuple[str | None, Usage | None]


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


def choice(index: int, said: int, prompt: int = 11, **more: object) -> dict[str, Any]:
    """Return a chunk of one choice of several, with ``continuous_usage_stats``: vLLM tells what that one used."""
    return chunk("x", choices=[{"index": index, "delta": {"content": "x"}}], usage=tokens(prompt, said), **more)


def completion(index: int, said: int, prompt: int) -> dict[str, Any]:
    """Return the same of a completion, each with its own prompt."""
    return choice(index, said, prompt, object="text_completion")


def tokens(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


def reported(prompt: int | None, completion: int | None, total: int | None, cached: int | None = None) -> Usage:
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=total, cached_prompt_tokens=cached)


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
            "object": "chat.completion",
            "created": 1790000000,
            "model": MODEL,
            "choices": [{"index": 0, "message": {"content": '"usage":{"prompt_tokens":9}'}, "logprobs": None}],
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
    "a usage without a prompt": (
        {"usage": {"completion_tokens": 4, "total_tokens": 15}},
        (None, reported(None, 4, 15)),
    ),
    "a null usage": ({"model": MODEL, "usage": None}, (MODEL, None)),
    "numbers that are none": (
        {"model": MODEL, "usage": {"prompt_tokens": -1, "completion_tokens": 10**30, "seconds": 10**400}},
        (MODEL, None),
    ),
    "seconds that are none": ({"usage": {"seconds": float("inf")}}, (None, None)),
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
    "a null usage after the real one": (
        events(chunk("a", usage=tokens(11, 1)), chunk("", usage=None), "[DONE]"),
        (MODEL, reported(11, 1, 12)),
    ),
    "chat with continuous_usage_stats": (
        events(chunk("a", usage=tokens(11, 1)), chunk("b", usage=tokens(11, 2)), chunk(None, usage=tokens(11, 9))),
        (MODEL, reported(11, 9, 20)),
    ),
    "the same cut short": (
        events(chunk("a", usage=tokens(11, 1)), chunk("b", usage=tokens(11, 2))) + b'data: {"id',
        (MODEL, reported(11, 2, 13)),
    ),
    "several choices cut short": (
        events(*(choice(index, said) for said in (0, 1, 2) for index in range(12))) + events(choice(3, 3)),
        (MODEL, reported(11, 25, 36)),
    ),
    "several choices": (
        events(choice(0, 1), choice(1, 1), choice(0, 2), chunk(None, usage=tokens(11, 9)), "[DONE]"),
        (MODEL, reported(11, 9, 20)),
    ),
    "several prompts cut short": (
        events(completion(0, 1, 100), completion(1, 1, 7), completion(0, 2, 100), {"error": {}}, "[DONE]"),
        (MODEL, reported(107, 3, 110)),
    ),
    "a report of one choice that is too long": (
        events(choice(0, 5), choice(1, 7) | {"usage": {"x": "x" * 600, **tokens(11, 7)}}),
        (MODEL, reported(11, 5, 16)),
    ),
    "several choices whose index is not told first": (
        events(*(chunk("x", choices=[{"text": "x", "index": index}], usage=tokens(3, 4)) for index in range(2))),
        (MODEL, reported(3, 4, 7)),
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
