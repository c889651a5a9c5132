import json

import pytest
from _bodies import bodies
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.inspection.document import Unreadable, read_document

PIECES = st.sampled_from(
    [
        *(b"{", b"}", b"[", b"]", b",", b":", b" ", b"\n", b'"', b"\\", b"-", b"{}", b'{"a":1}', b'"a"', b'"\\u0061"'),
        *(b"1", b"1e5", b"NaN", b"-Infinity", b"null", b"true", b"\x00", b"\xc3\xa9", b"\xff"),
        *(b"\xed\xa0\x80", b"\xef\xbb\xbf"),
    ]
)


def same(one: object, other: object) -> bool:
    """Equality that takes NaN for itself, and true for no 1."""
    return repr(one) == repr(other)


def agrees(body: bytes) -> None:
    """Either it cannot be read, or it reads as json.loads reads it and each span holds just its value."""
    try:
        document = read_document(body)
    except Unreadable:
        return
    assert same(document.values, json.loads(body))
    pairs = json.loads(body, object_pairs_hook=lambda pairs: pairs)
    assert document.repeated == {name for name, _ in pairs if [other for other, _ in pairs].count(name) > 1}
    assert document.empty is (pairs == [])
    assert body[: document.opening].strip() == b"{"
    assert document.spans.keys() == document.values.keys()
    for name, (start, end) in document.spans.items():
        span = body[start:end]
        assert same(json.loads(span), document.values[name])
        assert span == span.strip()


@given(bodies())
def test_an_object_reads_as_json_loads_reads_it(body: bytes) -> None:
    read_document(body)  # is not refused
    agrees(body)


@given(st.one_of(st.binary(max_size=30), st.lists(PIECES, max_size=12).map(b"".join)))
def test_any_bytes_read_as_json_loads_reads_them_or_not_at_all(body: bytes) -> None:
    agrees(body)
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        with pytest.raises(Unreadable):
            read_document(body)
        return
    if isinstance(value, dict) and _plainly_utf8(body):
        read_document(body)


def _plainly_utf8(body: bytes) -> bool:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return False
    return "\x00" not in text and not text.startswith("\ufeff")


@given(bodies(), st.data())
def test_a_body_cut_short_or_changed_reads_alike(body: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(body)))
    agrees(body[:at] + data.draw(PIECES) + body[at + data.draw(st.integers(0, 2)) :])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "cp1252"])
def test_another_encoding_is_refused_though_json_loads_may_take_it(encoding: str) -> None:
    with pytest.raises(Unreadable):
        read_document('{"model": "é"}'.encode(encoding))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not a JSON object"),
        (b"  ", "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b'"model"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"\xef\xbb\xbf{}", "not a JSON object"),
        (b'{"x":"\xed\xa0\x80"}', "not UTF-8"),
        (b'{"model":"a"', "not JSON"),
        (b'{"model":"a"}}', "not JSON"),
        (b'{"model":"a"} x', "not JSON"),
        (b'{"model":"a",}', "not JSON"),
        (b"{'model':'a'}", "not JSON"),
        (b'{"model":"\n"}', "not JSON"),
        (b'{"model" "a"}', "not JSON"),
        (b'{1:"a"}', "not JSON"),
        (b'{"x":' + b"[" * 200_000, "nested too deeply"),
        (b'{"x":' + b"1" * 5000 + b"}", "too many digits"),
    ],
)
def test_what_cannot_be_read_says_why(body: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        read_document(body)


def test_only_what_is_wanted_is_kept_and_all_is_checked() -> None:
    body = ' {"é": [1], "mod\\u0065l" : "a", "x": "é", "x": 2, "model":"\U0001f600" }'.encode()
    document = read_document(body, {"model"})
    start = body.rindex(b":") + 1
    assert document.values == {"model": "\U0001f600"}
    assert document.spans == {"model": (start, start + 6)}
    assert document.repeated == {"model"}
    assert not document.empty
    with pytest.raises(Unreadable):
        read_document(b'{"model":"a","x":01}', {"model"})
