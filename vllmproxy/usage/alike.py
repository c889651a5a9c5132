"""Events of a stream that are like one before them but for their text: nearly all are, and a few calls tell."""

import re
from typing import Final

from vllmproxy.usage.sse import LONGEST_LINE, USAGE

#: A chunk of a chat or of a completion: what is before its text, the text, and what is behind that.
_CHUNK: Final = re.compile(
    rb'(data:[^\n]*?"choices":[^\n]*?"(?:content|reasoning|reasoning_content|text)":")[^"\\\n]*("[},][^\n]*\n\n)'
)
_LONGEST: Final = 4096
#: A number: to look for bytes, Python tries first whether they are one, and fails.
_QUOTE: Final = ord('"')
#: So many events are looked at for one that the others may be like; more would not pay.
_MOST_LOOKS: Final = 8


class Alike:
    """Knows one event of a stream, and finds those that are the same before and behind their text.

    Where there is no quotation mark in the text, no member begins or ends in it: if the one event has no usage and does
    not end an answer, neither do the others.
    """

    __slots__ = ("_before", "_begin", "_behind", "_between", "_end", "_looks")  # one for each stream that is open

    def __init__(self) -> None:
        self._looks = 0
        self._before = self._behind = self._between = b""
        self._begin = self._end = 0  # of the text; 0: no event is known

    def learn(self, data: bytes) -> bool:
        """Take the event that ``data`` ends with, which went by as it was, for the one to know, if it can be that.

        :return: whether it is any use to go on.
        """
        if self._looks < _MOST_LOOKS:
            self._looks += 1
            event = data[data.rfind(b"\n", 0, -2) + 1 :]
            match = _CHUNK.fullmatch(event) if len(event) <= _LONGEST else None
            if match is not None and USAGE.search(event) is None:
                self._before, self._behind = match.groups()
                self._between = self._behind + self._before
                self._begin, self._end = len(self._before), -len(self._behind)
            return True
        return self._begin > 0

    def count(self, data: bytes) -> int:
        """Return how many events ``data`` is if all of them are like the one that is known, else 0."""
        if not self._begin or len(data) > LONGEST_LINE:
            return 0
        if not data.startswith(self._before) or not data.endswith(self._behind):
            return 0
        text = data[self._begin : self._end]
        if _QUOTE not in text:
            return 1
        texts = text.split(self._between)
        return 0 if _QUOTE in b"".join(texts) else len(texts)
