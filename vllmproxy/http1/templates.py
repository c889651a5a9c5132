"""A head that comes again on its connection, alike but for its length: it need not be parsed anew.

That is how clients go on asking, and how vLLM answers within one second. Nothing is guessed: two heads that differ in
nothing but the digits of their one Content-Length mean the same, and only a message that is here whole is taken so.
"""

import re
from typing import Final, Generic

from vllmproxy.http1.message import Head

#: A whole line of a head: what follows a line's end is no part of a value (RFC 9112 §5.2: folded ones are refused).
_LENGTH: Final = re.compile(rb"\r\ncontent-length: ?([0-9]{1,18})\r\n", re.IGNORECASE)
_MOST_DIGITS: Final = 18
#: Bytes of the longest head that is kept: there is one for each connection.
_LONGEST: Final = 4096


class HeadTemplate(Generic[Head]):
    """A head that has passed every check, with the digits of its Content-Length left open."""

    __slots__ = ("_after", "_before", "_head", "_place")

    def __init__(self, head: Head, before: bytes, after: bytes) -> None:
        self._head: Head = head
        self._place = [name.lower() for name, _ in head.headers].index(b"content-length")
        self._before = before
        self._after = after

    def match(self, data: bytes) -> tuple[Head, bytes] | None:
        """Return the head and the body of the one message that ``data`` is; ``None`` where it is anything else."""
        before, after = self._before, self._after
        if not data.startswith(before):
            return None
        start = len(before)
        end = data.find(b"\r", start, start + _MOST_DIGITS + 1)
        digits = data[start:end]
        if not digits.isdigit() or not data.startswith(after, end):
            return None
        body = data[end + len(after) :]
        if not body or int(digits) != len(body):
            return None
        return self._head.with_length(digits, self._place), body


def template_of(raw: bytes, head: Head) -> HeadTemplate[Head] | None:
    """Return the template of a head, ``None`` where it has none.

    :param raw: its bytes, the empty line included.
    """
    if not (head.content_length and head.is_plain and len(raw) <= _LONGEST):
        return None
    found = _LENGTH.search(raw)
    return None if found is None else HeadTemplate(head, raw[: found.start(1)], raw[found.end(1) :])
