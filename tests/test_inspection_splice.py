import json
from typing import Any

import pytest
from _bodies import OBJECTS, Members, Raw, bodies, written
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.inspection.document import read_document
from vllmproxy.inspection.lax import truth_of
from vllmproxy.inspection.request import read_request
from vllmproxy.inspection.splice import edited, model_edits, usage_edits

CHAT = "/v1/chat/completions"
JSON = b"application/json"
FALSE = st.sampled_from([False, None, 0, 0.0, "false", "no"])
TRUE = st.sampled_from([True, 1, "true", "YES"])


def usage(body: bytes, path: str = CHAT) -> bytes | None:
    edits = usage_edits(path, read_request(path, body, JSON))
    return b"".join(edited(body, edits)) if edits else None


def with_model(body: bytes, model: str) -> bytes:
    return b"".join(edited(body, model_edits(read_request(CHAT, body, JSON), model)))


@st.composite
def stream_bodies(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A streamed chat whose client did not ask for usage, spelt in any way, and what it must become."""
    options = draw(st.sampled_from(["absent", "null", "object"]))
    members = [("stream", draw(TRUE)), ("messages", [{}]), ("é", "\U0001f600"), ("model", "a")]
    if options != "absent":
        members.append(("stream_options", Raw("@")))
    text = draw(written(Members(draw(st.permutations(members)))))
    if options == "absent":
        start = text.index("{") + 1
        return text.encode(), (text[:start] + '"stream_options":{"include_usage":true},' + text[start:]).encode()
    old, new = ("null", '{"include_usage":true}') if options == "null" else draw(stream_options())
    return text.replace("@", old).encode(), text.replace("@", new).encode()


@st.composite
def stream_options(draw: st.DrawFn) -> tuple[str, str]:
    """An object that does not ask for usage, and what it must become."""
    inner = [("include_usage", Raw("#")), ("continuous_usage_stats", Raw("$")), ("é", "x")]
    text = draw(written(Members(draw(st.lists(st.sampled_from(inner), unique=True))))).strip()
    include, continuous = draw(FALSE), draw(st.one_of(FALSE, TRUE))
    old = text.replace("#", json.dumps(include)).replace("$", json.dumps(continuous))
    new = text.replace("#", "true").replace("$", "false" if truth_of(continuous) else json.dumps(continuous))
    if "#" not in text:
        new = '{"include_usage":true' + ("" if text[1:].strip() == "}" else ",") + new[1:]
    return old, new


@given(stream_bodies())
def test_usage_is_asked_for_and_nothing_else_changes(bodies: tuple[bytes, bytes]) -> None:
    body, expected = bodies
    spliced = usage(body)
    assert spliced == expected
    old, new = json.loads(body), json.loads(spliced)
    options = dict(old.get("stream_options") or {})
    if truth_of(options.get("continuous_usage_stats")):
        options["continuous_usage_stats"] = False
    assert new == {**old, "stream_options": {**options, "include_usage": True}}
    assert usage(spliced) is None  # it asks now


@pytest.mark.parametrize(
    ("body", "spliced"),
    [
        (b' {"stream":true,"messages":[]}', b' {S"stream":true,"messages":[]}'),
        (b'{ "messages":[], "stream":1 }\n', b'{S "messages":[], "stream":1 }\n'),
        (
            b'{"messages":[],"stream":true,"stream_options": null }',
            b'{"messages":[],"stream":true,"stream_options": N }',
        ),
        (b'{"messages":0,"stream":true,"stream_options":{}}', b'{"messages":0,"stream":true,"stream_options":{I}}'),
        (b'{"messages":0,"stream":true,"stream_options":{ }}', b'{"messages":0,"stream":true,"stream_options":{I }}'),
        (
            b'{"messages":0,"stream":true,"stream_options":{"x":1}}',
            b'{"messages":0,"stream":true,"stream_options":{I,"x":1}}',
        ),
        (
            b'{"messages":0,"stream":true,"stream_options":{"include_us\\u0061ge" : "no" }}',
            b'{"messages":0,"stream":true,"stream_options":{"include_us\\u0061ge" : true }}',
        ),
        (
            b'{"messages":0,"stream":true,"stream_options":{"continuous_usage_stats":true}}',
            b'{"messages":0,"stream":true,"stream_options":{I,"continuous_usage_stats":false}}',
        ),
        (
            b'{"messages":0,"stream":true,"stream_options":{"continuous_usage_stats":1,"include_usage":null}}',
            b'{"messages":0,"stream":true,"stream_options":{"continuous_usage_stats":false,"include_usage":true}}',
        ),
    ],
)
def test_where_usage_is_written(body: bytes, spliced: bytes) -> None:
    spliced = spliced.replace(b"S", b'"stream_options":{"include_usage":true},')
    spliced = spliced.replace(b"N", b'{"include_usage":true}').replace(b"I", b'"include_usage":true')
    assert usage(body) == spliced


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": [], "stream": False},
        {"messages": [], "stream": "maybe"},
        {"stream": True},
        {"prompt": "x", "stream": True},
        {"messages": [], "stream": True, "stream_options": {"include_usage": True}},
        {"messages": [], "stream": True, "stream_options": {"include_usage": "yes", "continuous_usage_stats": True}},
        {"messages": [], "stream": True, "stream_options": {"include_usage": 2}},
        {"messages": [], "stream": True, "stream_options": {"continuous_usage_stats": "maybe"}},
        {"messages": [], "stream": True, "stream_options": []},
        {"messages": [], "stream": True, "stream_options": "x"},
        b'{"messages":[],"stream":true,"stream":true}',
        b'{"messages":[],"stream":true,"stream_options":null,"stream_options":null}',
        b'{"messages":[],"stream":true,"stream_options":{"include_usage":false,"include_usage":false}}',
        b'{"messages":[],"stream":true,"stream_options":{"continuous_usage_stats":0,"continuous_usage_stats":0}}',
        b'{"messages":[],"stream":true,"stream_options":{' + b",".join(b'"%d":1' % n for n in range(1001)) + b"}}",
        b'{"messages":[],"stream":true',
        b"",
    ],
)
def test_what_is_not_touched(body: object) -> None:
    assert usage(body if isinstance(body, bytes) else json.dumps(body).encode()) is None


@pytest.mark.parametrize(
    ("path", "body", "touched"),
    [
        ("/v1/completions", {"prompt": "x"}, True),
        ("/v1/completions", {"prompt_embeds": "x"}, True),
        ("/v1/completions", {"messages": []}, False),
        ("/v1/responses", {"input": "x", "messages": []}, False),
        ("/v1/messages", {"messages": []}, False),
        ("/invocations", {"messages": []}, True),
        ("/invocations", {"prompt": "x"}, True),
        ("/invocations", {"input": "x"}, False),
    ],
)
def test_other_routes(path: str, body: dict[str, Any], touched: bool) -> None:
    assert (usage(json.dumps({**body, "stream": True}).encode(), path) is not None) is touched


def test_a_model_given_twice_is_no_matter_to_usage() -> None:
    assert usage(b'{"model":"a","model":"b","messages":[],"stream":true}') is not None


@st.composite
def model_bodies(draw: st.DrawFn) -> bytes:
    """Any object with one model in it, and perhaps others deeper down."""
    others = [member for member in draw(OBJECTS) if member[0] != "model"]
    name = draw(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8))
    return draw(bodies(st.permutations([*others, ("model", name)])))


@given(model_bodies(), st.text(max_size=20))
def test_the_models_value_alone_is_replaced(body: bytes, model: str) -> None:
    spliced = with_model(body, model)
    start, end = read_document(body).spans["model"]
    assert spliced == body[:start] + json.dumps(model).encode() + body[end:]
    changed = {**json.loads(body), "model": model}
    assert repr(json.loads(spliced)) == repr(changed)


@given(stream_bodies(), st.text(max_size=20))
def test_both_splices_go_together(bodies: tuple[bytes, bytes], model: str) -> None:
    body, _ = bodies
    asked = read_request(CHAT, body, JSON)
    both = b"".join(edited(body, model_edits(asked, model) + usage_edits(CHAT, asked)))
    assert both == usage(with_model(body, model))
    second = usage(body)
    assert second is not None
    assert both == with_model(second, model)


def test_what_stays_is_not_copied() -> None:
    body = b'{"model":"a","messages":[' + b" " * 1000 + b"]}"
    pieces = edited(body, [(9, 12, b'"longer"')])
    assert b"".join(pieces) == body.replace(b'"a"', b'"longer"')
    assert [piece.obj is body for piece in pieces if isinstance(piece, memoryview)] == [True, True]


@pytest.mark.parametrize("body", [b'{"model":"a","model":"b"}', b'{"model":null}', b"{}", b"[]", b'{"model":5}'])
def test_no_model_no_splice(body: bytes) -> None:
    with pytest.raises(ValueError, match="no model"):
        with_model(body, "b")
