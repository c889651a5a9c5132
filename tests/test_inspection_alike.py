"""Bodies that are alike but for their messages: read with the one before in mind, and as if there had been none."""

import json
from typing import Any

import pytest
from attrs import evolve
from hypothesis import example, given
from hypothesis import strategies as st

from vllmproxy.inspection import alike
from vllmproxy.inspection.alike import _MOST, BodyReader
from vllmproxy.inspection.document import scan
from vllmproxy.inspection.request import Asked, read_request
from vllmproxy.inspection.splice import Edit, edited, model_edits, moved, usage_edits

JSON = b"application/json"
CHAT = "/v1/chat/completions"
ROUTES = (CHAT, "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/responses", "/invocations", "/pooling")


def reader_of(*bodies: bytes, route: str = CHAT) -> BodyReader:
    """Return one that has read ``bodies``, the first of which a connection's first request had."""
    reader = BodyReader(route, JSON)
    for body in bodies[:1] + bodies:
        reader.read(body)
    return reader


def edits_of(asked: Asked, route: str) -> list[Edit]:
    named = asked.surety == "named" and asked.document is not None
    return (model_edits(asked, "another-model") if named else []) + usage_edits(route, asked)


def result(asked: Asked, prompt_tokens: int, longer: int, body: bytes, route: str) -> tuple[Asked, bytes]:
    """Return all that comes of a body: what it asks for, and the body that vLLM gets."""
    sent = b"".join(map(bytes, edited(body, moved(edits_of(asked, route), asked, longer))))
    return evolve(asked, document=None, options=None, size=0, moves=0, prompt_tokens=prompt_tokens), sent


def assert_same(reader: BodyReader, body: bytes, route: str) -> Asked:
    """Assert that ``body`` is read as if it came alone, and return what it was told by."""
    asked, *more = reader.read(body)
    alone = read_request(route, body, JSON)
    assert result(asked, *more, body, route) == result(alone, alone.prompt_tokens, 0, body, route)
    return asked


def chat(content: str, *, before: str = '"model": "m", ', behind: str = ', "max_tokens": 7, "stream": true') -> bytes:
    return f'{{{before}"messages": [{{"role": "user", "content": {json.dumps(content)}}}]{behind}}}'.encode()


@pytest.mark.parametrize(
    ("route", "one", "other"),
    [
        (CHAT, chat("a"), chat("quite another text")),
        (CHAT, chat("a", before=""), chat("\N{SNOWMAN}" * 9, before="")),
        (CHAT, chat("a", before='"user": "\N{SNOWMAN}", '), chat("bb", before='"user": "\N{SNOWMAN}", ')),
        (CHAT, chat("a", behind=', "n": 2'), chat("bb", behind=', "n": 2')),
        ("/v1/messages", chat("a"), chat("b" * 900)),
        ("/v1/completions", b'{"prompt":"a","model":"m","n":3}', b'{"prompt":"bcd","model":"m","n":3}'),
        ("/v1/responses", b'{"input":"a","model":"m","stream":true}', b'{"input":"bcd","model":"m","stream":true}'),
        ("/v1/responses", b'{"input":[],"model":"m"}', b'{"input":[{"role":"user"}],"model":"m"}'),
        ("/v1/embeddings", b'{"model":"m","input":["a"]}', b'{"model":"m","input":["a","b"]}'),
    ],
)  # fmt: skip
def test_a_body_that_differs_in_its_messages_is_told_by_what_is_around_them(
    route: str, one: bytes, other: bytes
) -> None:
    reader = reader_of(one, route=route)
    asked, *_ = reader.read(one)
    assert assert_same(reader, other, route) is asked
    assert assert_same(reader, one, route) is asked


def test_several_applications_with_one_key_are_each_known() -> None:
    applications = [chat("a", before=f'"model": "m{number}", ') for number in range(_MOST)]
    reader = reader_of(*applications)
    told = [reader.read(body)[0] for body in applications]
    assert len({id(asked) for asked in told}) == _MOST
    for _ in range(3):
        for body, asked in zip(applications, told, strict=True):
            assert assert_same(reader, body.replace(b'"a"', b'"bc"'), CHAT) is asked


def test_no_more_are_known_than_some_and_those_that_were_used_last() -> None:
    applications = [chat("a", before=f'"model": "m{number}", ') for number in range(40)]
    reader = BodyReader(CHAT, JSON)
    for body in applications:
        for _ in range(16):
            assert_same(reader, body, CHAT)
        assert len(reader._templates) <= _MOST
    kept = [template.asked.model for template in reader._templates]
    assert kept == [f"m{number}" for number in range(39, 39 - _MOST, -1)]


def test_what_takes_memory_is_not_kept() -> None:
    for depth, is_kept in ((10, True), (200, False)):
        options = '"stream_options": {"include_usage": ' + "[" * depth + "]" * depth + "}"
        reader = reader_of(chat("a", behind=f', "stream": true, {options}'))
        assert bool(reader._templates) is is_kept


def test_only_one_that_may_fit_is_looked_at_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [b"}", b" }", b"  }", b"   }"]
    bodies = [b'{"model": "m", "messages": []' + end for end in ends]
    reader = reader_of(*[body for body in bodies for _ in range(2)])
    assert len(reader._templates) == len(bodies) == _MOST
    looks = []
    monkeypatch.setattr(alike, "scan", lambda *args: looks.append(args) or scan(*args))
    assert_same(reader, b'{"model": "m", "messages": []     }', CHAT)
    assert len(looks) == 2  # and once more when it is kept itself


ONE = chat("a")


@pytest.mark.parametrize(
    "other",
    [
        ONE.replace(b"7", b"8"),
        ONE.replace(b'"m"', b'"n"'),
        ONE[:-1],
        ONE + b" ",
        b" " + ONE,
        ONE.replace(b'"a"', b'"a'),
        ONE.replace(b'"a"', b'"\xff"'),
        ONE.replace(b'"a"', b'"\xed\xa0\x80"'),
        ONE.replace(b'[{"role": "user", "content": "a"}]', b"null"),
        ONE.replace(b'[{"role": "user", "content": "a"}]', b'"a"'),
        ONE.replace(b'[{"role": "user", "content": "a"}]', b""),
        ONE.replace(b"}]", b'}], "max_tokens": 9'),
        ONE.replace(b"}]", b'}], "model": "other"'),
        ONE.replace(b"}]", b'}], "messages": [{}]'),
        ONE.replace(b"}]", b"}]]"),
        ONE.replace(b"}]", b"}] "),
        ONE.replace(b'[{"role', b' [{"role'),
        ONE.replace(b'[{"role', b"[" * 100_000 + b'[{"role'),
        ONE.replace(b'"a"', b"9" * 5000),
        ONE.replace(b'"a"', b'{"data": "' + b"A" * 9000 + b'"}'),
        ONE.replace(b'"a"', b'"' + b"a," * 600_000 + b'"'),
        ONE.replace(b'"a"', b"[" + b"1," * 1_000_000 + b"1]"),
        b"{}",
        b"",
    ],
    ids=range(24),
)
def test_any_other_body_is_read_for_itself(other: bytes) -> None:
    reader = reader_of(ONE)
    asked, *_ = reader.read(ONE)
    assert assert_same(reader, other, CHAT) is not asked


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/invocations", ONE),  # whether there are messages decides what it is
        ("/v1/completions", b'{"prompt":["a","b"],"model":"m"}'),  # it is as many answers as there are prompts
        ("/v1/completions", b'{"prompt":"","prompt_embeds":["a","b"],"model":"m"}'),
        (CHAT, b'{"model":"m","messages":[],"model":"n"}'),
        (CHAT, b'{"model":"m","messages":[],"messages":[]}'),
        (CHAT, b'{"model":"m"}'),
        (CHAT, b'{"messages":[],"tools":["%b"]}' % (b"a" * 3000)),  # it would be kept for each connection
        (CHAT, b'{"messages":[],"data":{"data":"AAAA"}}'),
        (CHAT, b"no JSON"),
    ],
)
def test_what_more_may_depend_on_is_never_left_open(route: str, body: bytes) -> None:
    reader = reader_of(body, body, route=route)
    asked, *_ = reader.read(body)
    assert assert_same(reader, body, route) is not asked


def test_the_first_body_of_a_connection_is_not_kept_and_where_each_is_another_few_are() -> None:
    reader, kept = BodyReader(CHAT, JSON), 0
    for number in range(200):
        asked, *_ = reader.read(chat("a", behind=f', "max_tokens": {number}'))
        kept += asked.size > 0
    assert 0 < kept < 20
    assert BodyReader(CHAT, JSON).read(ONE)[0].size == 0


def test_a_head_that_leaves_open_how_a_body_is_read_decides() -> None:
    reader = BodyReader(CHAT, JSON, unclear="there are several headers Content-Type")
    for _ in range(3):
        asked, tokens, longer = reader.read(ONE)
        assert (asked.surety, asked.reason, tokens, longer) == ("ambiguous", asked.unclear, 0, 0)
        assert asked.unclear == "there are several headers Content-Type"


_NAMES = [
    "messages",
    "prompt",
    "input",
    "model",
    "n",
    "max_tokens",
    "stream",
    "stream_options",
    "user",
    "metadata",
    "x",
]
_SCALARS = st.none() | st.booleans() | st.integers(-2, 9) | st.sampled_from(["", "m", "\N{SNOWMAN}", '"', "data"])
_KEYS = st.sampled_from(["content", "data", "include_usage", "n"])
_VALUES = st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3))
_OBJECTS = st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=6)
_OTHERS = st.lists(st.tuples(_VALUES, st.booleans()), min_size=1, max_size=4)


@given(st.sampled_from(ROUTES), _OBJECTS, _OTHERS, st.data())
@example(CHAT, {"messages": [1], "n": 1}, [([2], False)], None)
def test_bodies_in_a_row_are_read_as_each_alone(
    route: str, first: dict[str, Any], others: list[tuple[Any, bool]], data: st.DataObject | None
) -> None:
    body = json.dumps(first, ensure_ascii=False).encode()
    reader = reader_of(body, route=route)
    assert_same(reader, body, route)
    for value, cut in others:
        name = "messages" if "messages" in first else "prompt" if "prompt" in first else "input"
        other = json.dumps({**first, name: value}, ensure_ascii=False).encode()
        if cut and data is not None:  # bytes are taken out, or put in
            at, end = sorted(data.draw(st.tuples(*[st.integers(0, len(other))] * 2)))
            other = other[:at] + data.draw(st.sampled_from([b"", b"]", b'"', b",", other[at:end] * 2])) + other[end:]
        assert_same(reader, other, route)
