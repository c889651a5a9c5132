"""Follows a body in the chunked coding, beside llhttp, and holds its lines to the grammar (RFC 9112 §7.1). Pure.

llhttp takes any number of zeros before a size, and extensions with a name or a value missing.
"""

import re
from typing import Literal

from vllmproxy.http1.message import WireError

#: Bytes of a line: a chunk's size with its extensions, or a trailer.
LONGEST_LINE = 16_384

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_QUOTED = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"'
_SIZE = rb"[0-9A-Fa-f]{1,16}"
_EXTENSION = rb"[ \t]*;[ \t]*" + _TOKEN + rb"(?:[ \t]*=[ \t]*(?:" + _TOKEN + rb"|" + _QUOTED + rb"))?"
_LINE = re.compile(rb"(" + _SIZE + rb")(?:" + _EXTENSION + rb")*\r\n")


class Chunks:
    """Where one body ends. A trailer's lines are not looked at.

    :ivar whole: the end has come.
    """

    def __init__(self) -> None:
        self.whole = False
        self._left = 0  # bytes of a chunk's data
        self._begun = b""  # what earlier reads brought of a line
        self._next: Literal["size", "end of data", "trailer"] = "size"

    def feed(self, data: bytes, at: int = 0) -> int:
        """Follow ``data`` from ``at`` on, and return where the body ends in it, else its length.

        :raises WireError: at a line that the chunked coding does not have.
        """
        while at < len(data) and not self.whole:
            if self._left:
                passed = min(self._left, len(data) - at)
                self._left -= passed
                at += passed
                continue
            end = data.find(b"\n", at) + 1 or len(data)
            line = self._begun + data[at:end]
            at, self._begun = end, b""
            if len(line) > LONGEST_LINE:
                raise WireError(431, f"A chunk extension or a trailer has more than {LONGEST_LINE} bytes.")
            if line.endswith(b"\n"):
                self._read(line)
            else:
                self._begun = line
        return at

    def _read(self, line: bytes) -> None:
        if self._next == "trailer":
            self.whole = line == b"\r\n"
        elif self._next == "end of data":
            if line != b"\r\n":
                raise WireError(400, "A chunk is longer than it says.")
            self._next = "size"
        else:
            parts = _LINE.fullmatch(line)
            if parts is None:
                raise WireError(400, "A chunk's size or its extension is malformed.")
            self._left = int(parts[1], 16)
            self._next = "end of data" if self._left else "trailer"
