"""Usage and model out of every shape of answer that vLLM has, in whatever pieces it passes."""

import json
import tracemalloc
from typing import Any

import pytest
from _usage_shapes import ANSWERS, MODEL, STREAMS, Result, chunk, counted, events, reported, tokens
from hypothesis import example, given
from hypothesis import strategies as st

from vllmproxy.usage.jsonbody import LONGEST_WHOLE, TAIL, _of_chat, _of_document
from vllmproxy.usage.reader import UsageReader, reader_for
from vllmproxy.usage.sse import LONGEST_LINE, SseReader
from vllmproxy.usage.tokens import Usage

JSON, SSE = b"application/json", b"text/event-stream; charset=utf-8"


def reader(content_type: bytes) -> UsageReader:
    make = reader_for(200, content_type, None)
    assert make is not None
    return make()


def read(content_type: bytes, *pieces: bytes) -> Result:
    found = reader(content_type)
    for piece in pieces:
        found.feed(piece)
    return found.finish()


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
    found = SseReader()
    found.feed(events(chunk("a", usage=tokens(1, 1)), chunk(None, usage=tokens(1, 1)), "[DONE]"))
    assert found.counted == 1


def pieces_of(data: bytes) -> st.SearchStrategy[list[bytes]]:
    cuts = st.lists(st.integers(0, len(data)), max_size=12).map(sorted)
    return cuts.map(lambda at: [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)])


@given(
    st.lists(st.sampled_from([stream for stream, _ in STREAMS.values()]), max_size=3).map(b"".join).flatmap(pieces_of)
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


@given(st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=20), max_size=30), st.sampled_from([JSON, SSE]))
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


def unread(size: int) -> str:
    """Return what looks like structure to a careless reader."""
    return ('[{"usage": {"prompt_tokens": 9}}}}]],\\\\"é' * (size // 40))[:size]


@pytest.mark.parametrize("piece", [1000, 65536, 10**8])
@pytest.mark.parametrize("form", [{"separators": (",", ":")}, {"indent": 1}], ids=["compact", "indented"])
def test_long_json_tells_in_its_middle(piece: int, form: dict[str, Any]) -> None:
    """As a chat does with the log probabilities of its prompt, and behind a tool's input that is like it."""
    decoy = {"usage": tokens(1, 1), "deeper": [{"usage": tokens(2, 2)}, unread(50_000)]}
    answer = {
        "model": "m",
        "choices": [{"content": unread(LONGEST_WHOLE), "input": decoy}],
        "usage": tokens(5000, 1500),
        "prompt_logprobs": [
            None,
            *({"1": {"decoded_token": unread(50), "usage": tokens(3, 3)}} for _ in range(20_000)),
        ],
    }
    body = json.dumps(answer, ensure_ascii=False, **form).encode()
    assert read(JSON, *(body[at : at + piece] for at in range(0, len(body), piece))) == (
        "m",
        reported(5000, 1500, 6500),
    )


PADDING = b'"data":"' + b"x" * (2 * LONGEST_WHOLE) + b'"'


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"{" + PADDING + b',"deep":{"usage":{"prompt_tokens":6}}}', id="deeper down"),
        pytest.param(b"{" + PADDING + b',"usage":{"prompt_tokens":6}', id="cut off"),
        pytest.param(b"{" + PADDING + b',"usage":{"prompt_tokens":6},"more":"', id="cut off later"),
        pytest.param(b"{" + PADDING + b',"deep":["usage",{"prompt_tokens":6}]}', id="no key"),
        pytest.param(b'{"data":"' + b"x" * (2 * LONGEST_WHOLE) + rb'\"usage\":{\"prompt_tokens\":6}"}', id="text"),
        pytest.param(b'{"usage":{"prompt_tokens":6' + b"0" * 2 * LONGEST_WHOLE + b"}}", id="cut in a number"),
        pytest.param(b'[{"usage":{"prompt_tokens":6}},{' + PADDING + b"}]", id="in an array"),
        pytest.param(b'{"deep":{"usage":{"prompt_tokens":6},' + PADDING + b"}}", id="deeper down, in the middle"),
        pytest.param(b'{"usage":{"prompt_tokens":6' + b" " * 5000 + b"}," + PADDING + b"}", id="as long as that"),
        pytest.param(b'{"a":"' + b"x" * 5000 + b'","usage":{"prompt_tokens":6},' + PADDING, id="cut off behind"),
        pytest.param(b'{"a":"' + b"x" * 5000 + b'","usage":{"prompt_tokens":6},' + PADDING[:-1], id="cut in a text"),
        pytest.param(
            b'{"a":"' + b"x" * 5000 + b'\\"usage":{"prompt_tokens":6},"b":{' + PADDING + b"}}", id="a longer key"
        ),
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


_COUNTS: Any = st.integers(0, 10**10) | st.none() | st.sampled_from([-1, 1.5, True, "3", 2**60])
_USAGES = st.dictionaries(st.sampled_from([*tokens(1, 2), "prompt_tokens_details", "x"]), _COUNTS, max_size=5)
_TEXTS = st.text(max_size=20) | st.sampled_from(['"usage":{"prompt_tokens":9}', '"model":"x",', "}", '\\"'])
_MORE = st.dictionaries(st.sampled_from(["model", "usage", "metrics", "a"]), st.none() | _USAGES, max_size=2)


@given(
    st.tuples(st.sampled_from(["m", "org/m-7b", "", "\N{SNOWMAN}", '"']), _TEXTS),
    st.integers(-1, 10**10),
    _USAGES | st.builds(tokens, st.integers(0, 10**10), st.integers(0, 9)),
    _MORE,
    st.booleans(),
)
def test_what_is_told_by_beginning_and_end_is_what_the_document_says(
    texts: tuple[str, str], created: int, usage: dict[str, Any], more: dict[str, Any], deeper: bool
) -> None:
    model, text = texts
    choices = [{"index": 0, "message": {"content": text, "usage": tokens(8, 9)}}]
    inner = {"id": text, "object": "chat.completion", "created": created, "model": model, "choices": choices}
    end = {"usage": usage, **more}
    body = json.dumps({**inner, **({"deeper": end} if deeper else end)}, separators=(",", ":")).encode()
    told = _of_chat(body)
    if told is not None:
        assert told == _of_document(body)
    for cut in () if deeper else range(1, 4):
        assert _of_chat(body[:-cut]) is None


def test_most_answers_are_told_by_their_beginning_and_end() -> None:
    chat: Any = ANSWERS["chat"][0]
    body = json.dumps(chat, separators=(",", ":")).encode()
    assert _of_chat(body) == _of_document(body)
    assert _of_chat(body) is not None


@pytest.mark.parametrize("extra", [-1, 0, 1, 10_000])
@pytest.mark.parametrize("piece", [4096, 10**8])
def test_a_line_longer_than_the_limit_is_passed_over(extra: int, piece: int) -> None:
    head, tail = b'data: {"choices":[{"text":"', b'"}]}'
    line = head + b"x" * (LONGEST_LINE + extra - len(head) - len(tail)) + tail
    before = events(chunk("a")) + line
    stream = before + b"\n\n" + events(*[chunk("b")] * 100)
    expected = counted(102 if extra <= 0 else 101)
    assert read(SSE, *(stream[at : at + piece] for at in range(0, len(stream), piece))) == (MODEL, expected)
    assert read(SSE, before, stream[len(before) :]) == (MODEL, expected)


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


@pytest.mark.parametrize("events", [0, 1, 5])
def test_the_role_that_a_chat_begins_with_is_no_token(events: int) -> None:
    role = b'data: {"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    delta = b'data: {"model":"m","choices":[{"index":0,"delta":{"content":"word"}}]}\n\n'
    for pieces in ([role + delta * events], [role, *[delta] * events]):
        assert read(SSE, *pieces) == ("m", Usage(completion_tokens=events, source="counted") if events else None)
