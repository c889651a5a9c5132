"""The outermost members of a JSON object, each with the bytes that its value takes up in the body as sent.

vLLM reads a body with ``json.loads(bytes)`` (``starlette.requests.Request.json``), and so does this, by the same
decoder, but for what two readers could take differently. Refused here and accepted there are: UTF-16 and UTF-32, a byte
order mark, surrogates encoded as if they were UTF-8, and a document that is no object.
"""

import json
import re
from collections.abc import Collection
from mmap import mmap
from operator import itemgetter
from typing import Final

from attrs import define

#: A body with more is not read: it would hold up the process, and no request of vLLM's is like that. Values are told by
#: the commas and brackets, wherever they stand; a million of them take 0.1 s.
MOST_MEMBERS: Final = 1000
MOST_VALUES: Final = 1_000_000
#: Bytes in which they are looked for in one step.
_STEP: Final = 65_536

#: Returns the value that begins at an index, and where it ends. It raises ``StopIteration`` where none begins.
scan: Final = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # typeshed leaves it out

_BLANK: Final = r"[ \t\n\r]*"
_OPENING: Final = re.compile(_BLANK + r"\{")
_CLOSING: Final = re.compile(_BLANK + r"\}" + _BLANK)
_COLON: Final = re.compile(_BLANK + ":" + _BLANK)
#: What stands before the first name, and before each further one; then the same with a name that has no escapes, up to
#: where its value begins. That is nearly every name, found by one call.
_BEFORE: Final = (re.compile(_BLANK), re.compile(_BLANK + "," + _BLANK))
_NAMED: Final = tuple(re.compile(before.pattern + r'"([^"\\\x00-\x1f]*)"' + _COLON.pattern) for before in _BEFORE)


class Unreadable(Exception):
    """The body cannot be read in the one way that every reader would; the message says why, for the caller."""


class TooMuch(Unreadable):
    """Reading the body, or what says what it is, would take too long."""


#: Where a value's bytes begin in a body, and where they end.
Span = tuple[int, int]


@define(kw_only=True)  # not frozen: that takes three times as long to make, and there is one for each request
class Document:
    """An object's members by name, with escapes in it undone; of members with one name the last, as vLLM takes it.

    :ivar values: as ``json.loads`` gives them.
    :ivar spans: where they are.
    :ivar repeated: the names that were given more than once.
    :ivar opening: where the byte after the opening brace is.
    :ivar empty: there are no members at all.
    """

    values: dict[str, object]
    spans: dict[str, Span]
    repeated: set[str]
    opening: int
    empty: bool


def read_document(body: bytes | mmap, wanted: Collection[str] | None = None) -> Document:
    """Read ``body``, a JSON object and nothing else.

    :param wanted: the names to keep; ``None`` keeps all. What is not kept is checked as JSON all the same.
    :raises Unreadable: it is no such thing.
    """
    if len(body) > MOST_VALUES and _values_in(body) > MOST_VALUES:
        raise TooMuch("the body holds too many values")
    text = _text_of(body)
    opening = _OPENING.match(text)
    if opening is None:
        raise Unreadable("the body is not a JSON object")
    begin = opening.end()
    try:
        values, spans, repeated, number = _read_members(text, begin, wanted)
    except RecursionError:
        raise Unreadable("the body is nested too deeply") from None
    except (json.JSONDecodeError, StopIteration):
        raise Unreadable("the body is not JSON") from None
    except ValueError:  # of int()
        raise Unreadable("the body holds a number of too many digits") from None
    if len(text) != len(body):
        _count_in_bytes(text, spans)
    return Document(values=values, spans=spans, repeated=repeated, opening=begin, empty=number == 0)


def _values_in(body: bytes | mmap) -> int:
    others = (body[at : at + _STEP].translate(None, b",[{") for at in range(0, len(body), _STEP))
    return len(body) - sum(map(len, others))


def _text_of(body: bytes | mmap) -> str:
    try:
        return str(body, "utf-8")
    except UnicodeDecodeError:
        raise Unreadable("the body is not UTF-8") from None


def _read_members(
    text: str, end: int, wanted: Collection[str] | None
) -> tuple[dict[str, object], dict[str, Span], set[str], int]:
    """Return the members from ``end`` to the end of ``text``, their spans in characters, the names that are repeated,
    and how many members there are in all."""
    values: dict[str, object] = {}
    spans: dict[str, Span] = {}
    repeated: set[str] = set()
    number = 0
    before, following = _NAMED
    while True:
        match = before.match(text, end)
        if match is not None:
            name, start = match[1], match.end()
        elif _CLOSING.fullmatch(text, end) is not None:
            return values, spans, repeated, number
        else:
            name, start = _name_with_escapes(text, end, number)
        value, end = scan(text, start)
        number += 1
        if number > MOST_MEMBERS:
            raise TooMuch("the body has too many members")
        if wanted is None or name in wanted:
            if name in values:
                repeated.add(name)
            values[name] = value
            spans[name] = start, end
        before = following


def _name_with_escapes(text: str, at: int, number: int) -> tuple[str, int]:
    """Return the name that comes next, the first if ``number`` is 0, and where its value begins.

    :raises StopIteration: there is no name.
    """
    before = _BEFORE[number > 0].match(text, at)
    if before is None or not text.startswith('"', before.end()):
        raise StopIteration
    name, at = scan(text, before.end())
    colon = _COLON.match(text, at)
    if colon is None:
        raise StopIteration
    return name, colon.end()


def _count_in_bytes(text: str, spans: dict[str, Span]) -> None:
    """Have ``spans``, which count in characters, count in bytes."""
    seen, at = 0, 0  # so many characters, so many bytes
    for name, (start, end) in sorted(spans.items(), key=itemgetter(1)):
        begin = at + len(text[seen:start].encode())
        at = begin + len(text[start:end].encode())
        spans[name] = begin, at
        seen = end
