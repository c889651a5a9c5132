"""Heads that come again, alike but for their length: they need not be parsed anew.

That is how clients go on asking, and how vLLM answers within one second. Nothing is guessed: two heads that differ in
nothing but the digits of their one Content-Length mean the same, and only a message that is here whole is taken so. Of
requests the one X-Request-ID may be another, too, as far as it is a plain word: balancers give each its own.
"""

import re
from typing import Final

from vllmproxy.http1.message import REQUEST_ID, SANE_ID, RequestHead, ResponseHead
from vllmproxy.http1.rules import MOST_DIGITS
from vllmproxy.recurring import is_worth_keeping

_DIGITS: Final = rb"content-length: ?([0-9]{1,%d})" % MOST_DIGITS
#: A whole line of a head: what follows a line's end is no part of a value (RFC 9112 §5.2: folded ones are refused).
_LENGTH: Final = re.compile(rb"\r\n%b\r\n" % _DIGITS, re.IGNORECASE)
_OPEN: Final = re.compile(rb"\r\n(?:%b|%b: ?(%b))\r\n" % (_DIGITS, REQUEST_ID, SANE_ID), re.IGNORECASE)
#: Bytes of the longest head that is kept.
_LONGEST: Final = 2048
#: Bytes of the heads of requests that are kept, about, and as many of those that came before; what one line takes, and
#: what is worked out of a head. And those of which it is only known that they have come.
_MOST: Final = 8 << 20
_LINE: Final = 512
_WORKED_OUT: Final = 4096
_MOST_SEEN: Final = 8192

#: What a head's meaning depends on besides: the address of the other end, and whether the connection is encrypted.
Whence = tuple[str, bool]
#: A head with the digits of its Content-Length left open, and its X-Request-ID: whence it comes, what is before the
#: first of these, between them, and behind.
_Key = tuple[Whence, bytes, bytes, bytes]
#: A head as it is looked for; the digits of its length, its id or nothing, and where its body begins.
Cut = tuple[_Key, bytes, bytes, int]
#: A head, and the bytes that digits and id may have together.
_Known = tuple[RequestHead, int]


def cut(data: bytes, whence: Whence) -> Cut | None:
    """Return the head that ``data`` begins with; ``None`` where it is not whole, too long, or says no length."""
    end = data.find(b"\r\n\r\n", 0, _LONGEST) + 4
    first = _OPEN.search(data, 0, end) if end > 3 else None
    if first is None:
        return None
    digits, id = first.groups()
    start, stop = first.span(2 if digits is None else 1)
    second = _OPEN.search(data, stop, end)
    if second is None:
        return None if digits is None else ((whence, data[:start], b"", data[stop:end]), digits, b"", end)
    more, last = second.span(1 if digits is None else 2)
    if last < 0:  # the same header twice
        return None
    return (whence, data[:start], data[stop:more], data[last:end]), digits or second[1], id or second[2], end


class KnownHeads:
    """Heads of requests, on all connections: a client may open one for each request, and a balancer puts the requests
    of many on each of its own.

    One is kept when it comes for the second time: some are like no other.
    """

    __slots__ = ("_former", "_known", "_seen", "_size")

    def __init__(self) -> None:
        self._known: dict[_Key, _Known] = {}
        self._size = 0
        self._former: dict[_Key, _Known] = {}
        self._seen: set[int] = set()

    def match(self, cut: Cut, size: int) -> RequestHead | None:
        """Return the head that was cut if it is known, and its body has ``size`` bytes."""
        key, digits, id, _ = cut
        if not size or digits != str(size).encode("ascii"):
            return None
        known = self._known.get(key) or self._former_one(key)
        return None if known is None or len(digits) + len(id) > known[1] else known[0].again(size, id)

    def learn(self, cut: Cut, head: RequestHead, room: int) -> None:
        """Take over a head that has passed every check.

        :param room: bytes by which it may grow.
        """
        key, digits, id, _ = cut
        if not (head.content_length and head.is_plain) or (id and len(head.fields[REQUEST_ID]) > 1):
            return
        known = self._known.get(key) or self._former_one(key)
        if known is not None:  # its body came in several pieces
            head.memo = known[0].memo
        elif self._has_seen(hash(key)):
            head.memo = {}
            self._keep(key, (head, len(digits) + len(id) + room))

    def _former_one(self, key: _Key) -> _Known | None:
        """Return one that came before those that are known, and is known again now."""
        known = self._former.get(key)
        if known is not None:
            self._keep(key, known)
        return known

    def _keep(self, key: _Key, known: _Known) -> None:
        if self._size >= _MOST:
            self._former, self._known, self._size = self._known, {}, 0
        self._known[key] = known
        _, before, between, behind = key
        self._size += len(before) + len(between) + len(behind) + _LINE * len(known[0].headers) + _WORKED_OUT

    def _has_seen(self, mark: int) -> bool:
        if mark in self._seen:
            return True
        if len(self._seen) >= _MOST_SEEN:
            self._seen.clear()
        self._seen.add(mark)
        return False


class AnswerTemplate:
    """The head that a connection's answers had last, with the digits of its Content-Length left open."""

    __slots__ = ("_after", "_before", "_head", "_missed", "_most")

    def __init__(self) -> None:
        self._head: ResponseHead | None = None
        self._before = self._after = b""
        self._most = 0  # digits
        self._missed = -1  # answers in a row that had another head; the very first one counts for none

    def match(self, data: bytes) -> tuple[ResponseHead, bytes] | None:
        """Return the head and the body of the one answer that ``data`` is; ``None`` where it is anything else."""
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
        return head.with_length(len(body)), body

    def learn(self, head: ResponseHead, data: bytes | bytearray, start: int, room: int) -> None:
        """Take over a head that has passed every check.

        A connection's first one is passed over, as it may be the only one. So are most where each is another: to keep
        one takes as long as a match saves.

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
