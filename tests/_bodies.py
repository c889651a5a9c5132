"""JSON bodies in every spelling: random values, written with any spaces, escapes and member order."""

import json
from typing import Any

from hypothesis import strategies as st


class Members(tuple[tuple[str, Any], ...]):
    """The members of an object in their order, some of them perhaps twice."""

    __slots__ = ()


class Raw(str):
    """Text that stands in a body as it is."""

    __slots__ = ()


NAMES = ["model", "stream", "stream_options", "messages", "prompt", "include_usage", "continuous_usage_stats", "é", "x"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["true", "", "\ud800", "é", "\U0001f600"]),
)
NAME = st.one_of(st.sampled_from(NAMES), st.text(max_size=4))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(st.tuples(NAME, inner), max_size=3).map(Members)),
    max_leaves=6,
)
OBJECTS = st.lists(st.tuples(NAME, VALUES), max_size=6)
SPACE = st.sampled_from(["", "", " ", "\n", "\t\r\n "])


@st.composite
def written(draw: st.DrawFn, value: Any) -> str:
    """``value`` as JSON text in one of its spellings; a lone surrogate is always escaped."""

    def spelt(text: str) -> str:
        if draw(st.booleans()) or (not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)):
            return json.dumps(text)
        if draw(st.booleans()):
            units = text.encode("utf-16-be", "surrogatepass")
            return '"' + "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2)) + '"'
        return json.dumps(text, ensure_ascii=False)

    def spaced(*tokens: str) -> str:
        return "".join(token + draw(SPACE) for token in tokens)

    def put(value: Any) -> str:
        if isinstance(value, Members):
            members = (spaced(spelt(name), ":") + put(inner) for name, inner in value)
            return spaced("{") + spaced(",").join(members) + spaced("}")
        if isinstance(value, Raw):
            return spaced(value)
        if isinstance(value, list):
            return spaced("[") + spaced(",").join(map(put, value)) + spaced("]")
        return spaced(spelt(value) if isinstance(value, str) else json.dumps(value))

    return draw(SPACE) + put(value)


@st.composite
def bodies(draw: st.DrawFn, members: st.SearchStrategy[list[tuple[str, Any]]] = OBJECTS) -> bytes:
    """A JSON object as bytes."""
    return draw(written(Members(draw(members)))).encode()
