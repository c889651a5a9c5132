"""A head that comes again on its connection, alike but for its length: it need not be parsed anew.

That is how clients go on asking, and how vLLM answers within one second. Nothing is guessed: two heads that differ in
nothing but the digits of their one Content-Length mean the same, and only a message that is here whole is taken so.
"""

import re
from typing import Any, Final, Generic

from vllmproxy.http1.message import Head
from vllmproxy.http1.rules import MOST_DIGITS
from vllmproxy.recurring import is_worth_keeping

#: A whole line of a head: what follows a line's end is no part of a value (RFC 9112 §5.2: folded ones are refused).
_LENGTH: Final = re.compile(rb"\r\ncontent-length: ?([0-9]{1,%d})\r\n" % MOST_DIGITS, re.IGNORECASE)
#: Bytes of the longest head that is kept: there is one for each connection.
_LONGEST: Final = 2048


class HeadTemplate(Generic[Head]):
    """The head that a connection's messages had last, with the digits of its Content-Length left open."""

    __slots__ = ("_after", "_before", "_head", "_missed", "_most")

    def __init__(self) -> None:
        self._head: Head | None = None
        self._before = self._after = b""
        self._most = 0  # digits
        self._missed = -1  # messages in a row that had another head; the very first one counts for none

    def match(self, data: bytes) -> tuple[Head, bytes] | None:
        """Return the head and the body of the one message that ``data`` is; ``None`` where it is anything else."""
        head, before, after = self._head, self._before, self._after
        if head is None or not data.startswith(before):
            return None
        start = len(before)
        end = data.find(b"\r", start, start + self._most + 1)
        if end < 0 or not data.startswith(after, end):
            return None
        body = data[end + len(after) :]
        if not body or data[start:end] != str(len(body)).encode("ascii"):
            return None
        self._missed = 0
        alike: Any = head.with_length(len(body))
        return alike, body

    def learn(self, head: Head, data: bytes | bytearray, start: int, room: int) -> None:
        """Take over a head that has passed every check.

        A connection's first one is passed over, as it may be the only one. So are most where each is another, as behind
        a balancer that puts the requests of many clients on one connection: to keep one takes as long as a match saves.

        :param data: where it was read, whole, from ``start`` on.
        :param room: bytes by which it may grow.
        """
        self._head = None
        self._missed += 1
        if not is_worth_keeping(self._missed):
            return
        if not (head.content_length and head.is_plain):
            return
        raw = bytes(data[start : data.find(b"\r\n\r\n", start, start + _LONGEST) + 4])
        found = _LENGTH.search(raw)
        if found is not None:
            self._head, self._before, self._after = head, raw[: found.start(1)], raw[found.end(1) :]
            self._most = min(len(found[1]) + room, MOST_DIGITS)
            head.memo = {}

    def forget(self) -> None:
        """The next message is to be parsed."""
        self._head = None
