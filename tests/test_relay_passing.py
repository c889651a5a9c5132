"""A stream on its way past: what the client gets and what is counted are the reader's and the withholder's own."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.http1.message import ResponseHead
from vllmproxy.relay.passing import Passing
from vllmproxy.upstreams.server import Told
from vllmproxy.usage.sse import LONGEST_LINE, SseReader
from vllmproxy.usage.withhold import Withholder

HEAD = ResponseHead(200, b"OK", [(b"content-type", b"text/event-stream; charset=utf-8")], b"1.1")
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
    fields = {"id": "chatcmpl-1", "created": 1, "model": "m", "choices": choices, **more}
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


def chunk(text: str, finish: str | None = None, index: int = 0, **more: Any) -> bytes:
    return event([{"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}], **more)


def completion(text: str, finish: str | None = None) -> bytes:
    return event([{"index": 0, "text": text, "finish_reason": finish}])


TEXTS = [
    "a",
    "",
    " tok",
    'say "x"',
    "\n",
    "\n\n",
    "back\\",
    '"},',
    "é",
    "data: {}",
    '"usage":{}',
    '"finish_reason":"stop"',
]
EVENTS = [
    *(make(text) for text in TEXTS for make in (chunk, completion)),
    *(chunk("a", "stop"), chunk("b", index=1), chunk("a", usage=None), chunk("a", usage=USAGE), event([], usage=USAGE)),
    *(
        completion("a", "length"),
        b"data: [DONE]\n\n",
        b": comment\n\n",
        b"\n\n",
        b"\n",
        b"\r\n",
        b"data: x\ndata: y\n\n",
    ),
    b'event: content_block_delta\ndata: {"delta":{"text":"a"}}\n\n',
]
#: What is like an event in its beginning, its end, or both, and is none.
TORN = [
    chunk("a")[: chunk("a").index(b'a"')] + chunk("a")[chunk("a").index(b'a"') + 2 :],
    chunk("a")[:-1],
    chunk("a")[:-2],
    chunk("a").replace(b'"a"', b'"a\n\nb"'),
    chunk("a").replace(b'"a"', b'"a"b"'),
    chunk("a").replace(b'"a"', b'"usage":{'),
    chunk("a").replace(b'"a"', b'"usage":{"'),
    chunk("a")[:60],
    chunk("a")[60:],
]


def agrees(pieces: list[bytes], *, withholds: bool) -> None:
    told = Told()
    passing = Passing(HEAD, told, withholds=withholds)
    reader, withholder = SseReader(), Withholder() if withholds else None
    for piece in pieces:
        reader.feed(piece)
        assert passing.feed(piece) == (piece if withholder is None else withholder.feed(piece))
    assert passing.finish() == (b"" if withholder is None else withholder.finish())
    passing.read()
    assert (passing.model, passing.usage) == reader.finish()
    assert told.fingerprint == (None if withholder is None else withholder.fingerprint)


@given(st.lists(st.sampled_from(EVENTS + TORN), max_size=12), st.booleans())
def test_events_one_by_one(pieces: list[bytes], withholds: bool) -> None:
    agrees(pieces, withholds=withholds)
    agrees([chunk("first"), *pieces], withholds=withholds)


@given(st.lists(st.lists(st.sampled_from([*EVENTS, *TORN, *[chunk("a")] * 40]), max_size=5), max_size=5), st.booleans())
def test_several_events_in_a_piece(pieces: list[list[bytes]], withholds: bool) -> None:
    agrees([chunk("first"), *(b"".join(events) for events in pieces)], withholds=withholds)


@given(st.lists(st.sampled_from([*EVENTS, *[chunk("a")] * 40]), max_size=8).map(b"".join), st.data())
def test_any_pieces(stream: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    agrees(pieces, withholds=data.draw(st.booleans()))


@pytest.mark.parametrize("size", [LONGEST_LINE - 200, LONGEST_LINE, LONGEST_LINE + 1])
@pytest.mark.parametrize("withholds", [True, False])
def test_a_long_text(size: int, withholds: bool) -> None:
    agrees([chunk("a"), chunk("x" * size), chunk("b"), chunk("c") * 3], withholds=withholds)


def test_the_last_usage_counts_though_the_event_is_like_an_earlier_one() -> None:
    other = {**USAGE, "completion_tokens": 9}
    agrees([chunk("a", usage=USAGE), chunk("a", usage=other)] * 6, withholds=False)


def test_each_event_of_a_long_stream_is_counted() -> None:
    passing = Passing(HEAD, Told(), withholds=True)
    pieces = [chunk("first"), *[chunk("a")] * 50, chunk("b") * 50, chunk("c", "stop")]
    assert b"".join(map(passing.feed, pieces)) + passing.finish() == b"".join(pieces)
    passing.read()
    assert passing.usage is not None
    assert passing.usage.completion_tokens == 102


@pytest.mark.parametrize(
    ("content_type", "streamed"),
    [
        (b"text/event-stream", True),
        (b"Text/Event-Stream ; charset=utf-8", True),
        (b"text/event-streams", False),
        (b"application/json", False),
    ],
)
def test_what_is_read_as_events_is_recorded_as_streamed(content_type: bytes, streamed: bool) -> None:
    head = ResponseHead(200, b"OK", [(b"content-type", content_type)], b"1.1")
    passing = Passing(head, Told(), withholds=False)
    assert (passing.streamed, passing.counts_events) == (streamed, streamed)
