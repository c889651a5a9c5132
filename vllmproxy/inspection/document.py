"""The outermost members of a JSON object, each with the bytes that its value takes up in the body as sent.

vLLM reads a body with ``json.loads(bytes)`` (``starlette.requests.Request.json``), and so does this, by the same
decoder, but for what two readers could take differently. Refused here and accepted there are: UTF-16 and UTF-32, a byte
order mark, surrogates encoded as if they were UTF-8, and a document that is no object.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Final

from attrs import frozen

#: A body with more is not read: it would hold up the process, and no request of vLLM's is like that. Values are told by
#: the commas and brackets, wherever they stand; a million of them take 0.1 s.
MOST_MEMBERS: Final = 1000
MOST_VALUES: Final = 1_000_000

_raw_decode: Final = json.JSONDecoder().raw_decode
_SPACE: Final = re.compile(r"[ \t\n\r]*")


class Unreadable(Exception):
    """The body cannot be read in the one way that every reader would; the message says why, for the caller."""


class TooMuch(Unreadable):
    """Reading the body would take too long."""


@frozen(kw_only=True)
class Member:
    """One member of an object.

    :ivar value: as ``json.loads`` gives it.
    :ivar start: where the value's bytes begin in the body; ``end``: where they end.
    """

    value: object
    start: int
    end: int


@frozen(kw_only=True)
class Document:
    """An object's members.

    :ivar members: by name, with escapes in the name undone; of members with one name the last, as vLLM takes it.
    :ivar repeated: the names in ``members`` that were given more than once.
    :ivar opening: where the byte after the opening brace is.
    :ivar empty: there are no members at all.
    """

    members: Mapping[str, Member]
    repeated: frozenset[str]
    opening: int
    empty: bool

    def value(self, name: str) -> object:
        """Return the value of the member ``name``, ``None`` if there is none."""
        member = self.members.get(name)
        return None if member is None else member.value


def read_document(body: bytes, wanted: Collection[str] | None = None) -> Document:
    """Read ``body``, a JSON object and nothing else.

    :param wanted: the names to keep; ``None`` keeps all. What is not kept is checked as JSON all the same.
    :raises Unreadable: it is no such thing.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise TooMuch("the body holds too many values")
    text = _text_of(body)
    ascii = len(text) == len(body)
    members: dict[str, Member] = {}
    repeated = set()
    empty = True
    seen, at = 0, 0  # so many characters, so many bytes
    for number, (name, value, start, end) in enumerate(_members(text), 1):
        empty = False
        if number > MOST_MEMBERS:
            raise TooMuch("the body has too many members")
        if wanted is not None and name not in wanted:
            continue
        if ascii:
            member = Member(value=value, start=start, end=end)
        else:
            first = at + len(text[seen:start].encode())
            seen, at = end, first + len(text[start:end].encode())
            member = Member(value=value, start=first, end=at)
        if name in members:
            repeated.add(name)
        members[name] = member
    return Document(members=members, repeated=frozenset(repeated), opening=body.index(b"{") + 1, empty=empty)


def _text_of(body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        raise Unreadable("the body is not UTF-8") from None


def _members(text: str) -> Iterator[tuple[str, object, int, int]]:
    """Yield name, value, and where the value begins and ends in ``text``, in their order.

    :raises Unreadable: ``text`` is not one JSON object.
    """
    at = _after_space(text, 0)
    if not text.startswith("{", at):
        raise Unreadable("the body is not a JSON object")
    try:
        at = _after_space(text, at + 1)
        more = not text.startswith("}", at)
        while more:
            name, at = _name(text, at)
            start = _after(text, ":", at)
            value, end = _raw_decode(text, start)
            yield name, value, start, end
            at = _after_space(text, end)
            more = text.startswith(",", at)
            if more:
                at = _after_space(text, at + 1)
        at = _after(text, "}", at)
    except RecursionError:
        raise Unreadable("the body is nested too deeply") from None
    except ValueError:
        raise Unreadable("the body is not JSON") from None
    if at != len(text):
        raise Unreadable("the body is not JSON")


def _name(text: str, at: int) -> tuple[str, int]:
    if not text.startswith('"', at):
        raise ValueError
    name, at = _raw_decode(text, at)
    return str(name), _after_space(text, at)


def _after(text: str, mark: str, at: int) -> int:
    """Return where the next thing begins after ``mark``, which must stand at ``at``."""
    if not text.startswith(mark, at):
        raise ValueError
    return _after_space(text, at + 1)


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return at if match is None else match.end()
