import json
import re
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.usage.withhold import LONGEST_EVENT, Withholder

FINGERPRINT = "vllm-0.32.0-e0732d49"


def chunk(**members: Any) -> bytes:
    """An event as vLLM 0.32 writes it."""
    fields = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", **members}
    return b"data: " + json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def delta(text: str, finish: str | None = None, index: int = 0, **members: Any) -> bytes:
    choice = {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}
    return chunk(choices=[choice], **members)


USAGE = {"prompt_tokens": 12, "total_tokens": 17, "completion_tokens": 5}
ROLE = chunk(
    choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}],
    prompt_token_ids=None,
    prompt_text=None,
)
EXTRA = chunk(choices=[], usage=USAGE, system_fingerprint=FINGERPRINT)
DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"
ERROR = b'data: {"error": {"message": "boom", "code": 500}}\n\n'
TEXTS = st.sampled_from(["a", "é", '"usage":{"x":1}', '{"choices":[],"usage":{}}', '"finish_reason":"stop"', "\n\n"])


def fed(pieces: Iterable[bytes]) -> bytes:
    withholder = Withholder()
    return b"".join(withholder.feed(piece) for piece in pieces) + withholder.finish()


@st.composite
def splits(draw: st.DrawFn, stream: bytes) -> list[bytes]:
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    return [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, bytes, list[bytes]]:
    """A stream with the extra event, what it would have been without, and the events before its end."""
    before = draw(
        st.lists(
            st.one_of(
                TEXTS.map(delta),
                st.just(COMMENT),
                st.tuples(TEXTS, TEXTS).map(lambda texts: delta(*texts[:1]) + delta(texts[1], "stop") + delta("on")),
            ),
            max_size=6,
        )
    )
    ends = draw(st.lists(st.tuples(TEXTS, st.sampled_from(["stop", "length", "tool_calls"])), max_size=3))
    fingerprint = draw(st.sampled_from([FINGERPRINT, None, 'a "quoted"\\ é']))
    extra = chunk(choices=[], usage=USAGE, **({"system_fingerprint": fingerprint} if fingerprint else {}))
    after = draw(st.sampled_from([b"", DONE, COMMENT + DONE, ERROR + DONE]))
    kept = [ROLE, *before, *(delta(text, finish) for text, finish in ends)]
    finished = [
        delta(text, finish, **({"system_fingerprint": fingerprint} if fingerprint else {})) for text, finish in ends
    ]
    asked = b"".join([*kept, extra]) + after
    plain = b"".join([ROLE, *before, *finished]) + after
    if draw(st.booleans()):
        asked, plain = asked.replace(b"\n", b"\r\n"), plain.replace(b"\n", b"\r\n")
        kept = [event.replace(b"\n", b"\r\n") for event in kept]
    return asked, plain, kept[: len(before) + 1]


@given(st.data())
def test_the_client_sees_what_it_would_have_seen(data: st.DataObject) -> None:
    asked, plain, _ = data.draw(streams())
    assert fed(data.draw(splits(asked))) == plain
    assert fed(asked[at : at + 1] for at in range(len(asked))) == plain


@given(st.data())
def test_a_whole_event_is_not_held_back(data: st.DataObject) -> None:
    asked, plain, kept = data.draw(streams())
    prefix = asked[: data.draw(st.integers(0, len(asked)))]
    withholder = Withholder()
    out = b"".join(withholder.feed(piece) for piece in data.draw(splits(prefix)))
    assert plain.startswith(out)
    whole = prefix.count(b"\n\n") + prefix.count(b"\n\r\n")
    before = [event for block in kept for event in re.findall(rb".*?\n\r?\n", block, re.DOTALL)][:whole]
    while before and b'"finish_reason":"' in before[-1]:  # waits for the next event
        before.pop()
    assert len(out) >= len(b"".join(before))


@given(st.data())
def test_how_a_stream_is_cut_makes_no_difference(data: st.DataObject) -> None:
    """Whatever the bytes are: nothing is lost but the extra event, and nothing comes in another order."""
    parts = st.sampled_from([ROLE, EXTRA, DONE, delta("x"), delta("x", "stop"), b"\n", b"\r\n", b":", b"data:", b"{}"])
    stream = b"".join(data.draw(st.lists(st.one_of(parts, st.binary(max_size=3)), max_size=10)))
    out = fed([stream])
    assert fed(data.draw(splits(stream))) == out
    if EXTRA not in stream:
        assert out == stream


def test_n_answers_that_end_together() -> None:
    stamp = {"system_fingerprint": FINGERPRINT}
    ends = [delta("x", "length", 0), delta("y", "length", 1)]
    plain = [delta("x", "length", 0, **stamp), delta("y", "length", 1, **stamp)]
    assert fed([ROLE, *ends, EXTRA, DONE]) == b"".join([ROLE, *plain, DONE])


def test_an_answer_that_ends_before_another_has_lost_its_fingerprint() -> None:
    events = [delta("x", "stop", 0), delta("y", None, 1), delta("z", "stop", 1)]
    end = delta("z", "stop", 1, system_fingerprint=FINGERPRINT)
    assert fed([*events, EXTRA, DONE]) == b"".join([*events[:2], end, DONE])


def test_a_fingerprint_that_is_known_is_put_in_wherever_an_answer_ends() -> None:
    first = Withholder()
    assert first.fingerprint is None
    first.feed(ROLE + EXTRA)
    second = Withholder(first.fingerprint)
    stamp = {"system_fingerprint": FINGERPRINT}
    ends = [delta("x", "stop", 0), delta("y", None, 1), delta("z", "stop", 1)]
    plain = [delta("x", "stop", 0, **stamp), delta("y", None, 1), delta("z", "stop", 1, **stamp)]
    assert second.feed(b"".join([*ends, ERROR])) == b"".join([*plain, ERROR])
    assert second.feed(ends[0]) + second.finish() == plain[0]


def test_what_the_stream_tells_counts_more_than_what_was_known() -> None:
    withholder = Withholder(b',"system_fingerprint":"old"')
    assert withholder.feed(delta("x", "stop") + EXTRA) == delta("x", "stop", system_fingerprint=FINGERPRINT)
    withholder = Withholder(b',"system_fingerprint":"old"')
    assert withholder.feed(delta("x", "stop") + chunk(choices=[], usage=USAGE)) == delta("x", "stop")
    assert withholder.fingerprint == b""


def test_the_end_waits_for_the_next_event_only() -> None:
    withholder = Withholder()
    assert withholder.feed(delta("x", "stop")) == b""
    assert withholder.feed(COMMENT) == delta("x", "stop") + COMMENT
    assert withholder.feed(EXTRA[:-1]) == b""
    assert withholder.feed(EXTRA[-1:] + DONE[:3]) == DONE[:3]
    assert withholder.feed(DONE[3:]) == DONE[3:]


@pytest.mark.parametrize("usage", [None, "", {}])
def test_usage_on_every_event_is_the_servers_own(usage: object) -> None:
    """``--enable-force-include-usage`` reports on each event and at the end, whether asked or not."""
    stream = [ROLE[:-3] + b',"usage":{"prompt_tokens":1}}\n\n', delta("x", "stop", usage=USAGE), EXTRA, DONE]
    assert fed(stream) == b"".join(stream)
    events = [delta("x", usage=usage), delta("y", "stop")]
    passes = isinstance(usage, dict)  # a null says nothing
    end = delta("y", "stop", system_fingerprint=FINGERPRINT)
    assert fed([*events, EXTRA, DONE]) == (
        b"".join([*events, EXTRA, DONE]) if passes else b"".join([events[0], end, DONE])
    )


@pytest.mark.parametrize(
    "event",
    [
        chunk(choices=[], usage=None),
        chunk(choices=[]),
        chunk(usage=USAGE),
        chunk(choices=None, usage=USAGE),
        ERROR,
        b'data: [{"choices":[],"usage":{}}]\n\n',
        b'data: {"choices":[],"usage":{}\n\n',
        b'event: x\ndata: {"choices":[],"usage":{}}\n\n',
        b'{"choices":[],"usage":{}}\n\n',
    ],
)
def test_other_events_pass(event: bytes) -> None:
    assert fed([ROLE, event, DONE]) == ROLE + event + DONE


def test_an_event_that_has_its_fingerprint_keeps_it() -> None:
    end = delta("x", "stop", system_fingerprint="other")
    assert fed([end, EXTRA, DONE]) == end + DONE


def test_the_extra_event_without_a_blank_line_at_the_end() -> None:
    assert fed([delta("x"), EXTRA.rstrip()]) == delta("x")
    assert fed([delta("x"), EXTRA[:-9]]) == delta("x") + EXTRA[:-9]


@pytest.mark.parametrize("size", [LONGEST_EVENT - 1000, LONGEST_EVENT + 1000, 3 * LONGEST_EVENT])
@pytest.mark.parametrize("step", [1000, 65536, 1 << 20])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_memory_is_bounded(size: int, step: int, newline: bytes) -> None:
    """An event too long to be held passes as it comes, and what follows is filtered as before."""
    long = delta("x" * size).replace(b"\n", newline)
    stream = long + EXTRA.replace(b"\n", newline) + DONE
    withholder = Withholder()
    fed, out = 0, b""
    for at in range(0, len(stream), step):
        piece = stream[at : at + step]
        fed += len(piece)
        out += withholder.feed(piece)
        assert fed - len(out) <= LONGEST_EVENT + len(EXTRA) + 2
    assert out + withholder.finish() == long + DONE


def test_many_long_ends_are_not_all_kept() -> None:
    ends = [delta("x" * (LONGEST_EVENT // 3), "length", index) for index in range(9)]
    withholder = Withholder()
    out = b"".join(withholder.feed(end) for end in ends)
    assert len(b"".join(ends)) - len(out) <= LONGEST_EVENT
    assert b"".join(ends).startswith(out)
