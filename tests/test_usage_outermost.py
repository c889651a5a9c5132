import json

from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.usage.outermost import LONGEST, Outermost
from vllmproxy.usage.tokens import Usage, usage_from

USAGE = {"prompt_tokens": 5, "completion_tokens": 2}
LONG = "[{}" * LONGEST  # behind it, what was before is looked at no more

TEXTS = st.text(st.sampled_from('"\\\\{}[]:,é\\n' + "usage"), max_size=8) | st.sampled_from(
    ["usage", LONG, '"usage":{']
)
VALUES = st.recursive(
    st.none() | TEXTS | st.just(USAGE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


def found(*pieces: bytes) -> Usage | None:
    outermost = Outermost()
    for piece in pieces:
        outermost.feed(piece)
    return outermost.finish()


@given(st.dictionaries(TEXTS, VALUES, max_size=4), st.integers(0, 20_000), st.booleans())
def test_the_outermost_is_found_and_no_other(document: dict[str, object], cut: int, ascii_only: bool) -> None:
    body = json.dumps(document, ensure_ascii=ascii_only).encode()
    usage = document.get("usage")
    outcome = found(body)
    assert found(body[:cut], body[cut:]) == outcome
    if not isinstance(usage, dict):
        assert outcome is None
    elif len(json.dumps(usage)) < LONGEST - 20:  # of a longer one no more is kept
        assert outcome == usage_from(usage)


@given(VALUES, st.integers(100, 20_000))
def test_how_it_is_split_makes_no_difference(value: object, step: int) -> None:
    body = json.dumps({"a": value, "usage": USAGE, "b": value}, ensure_ascii=False).encode()
    assert found(*(body[at : at + step] for at in range(0, len(body), step))) == found(body) == usage_from(USAGE)


def test_a_document_that_was_cut_off_tells_nothing() -> None:
    body = json.dumps({"a": LONG, "usage": USAGE, "b": [LONG, {}]}).encode()
    assert found(body) == usage_from(USAGE)
    assert [found(body[:-cut]) for cut in (1, 2, 3, 4, 6, 100)] == [None] * 6
    deeper = json.dumps({"deep": {"usage": USAGE}})[:-1]
    assert found(f"{deeper},1".encode()) is found(f'{deeper},"}}'.encode()) is None
