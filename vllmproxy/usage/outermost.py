"""The outermost ``usage`` of a JSON document that passes and is too long to be kept."""

import json
import re
from typing import Final

from vllmproxy.usage.tokens import Usage, usage_from

#: So much of the document is looked at again with what follows: all that is kept of a ``usage``, too.
LONGEST: Final = 4 << 10
_KEY: Final = re.compile(rb'"usage"\s{0,64}:\s{0,64}(?=\{)')
_NAME: Final = b'"usage"'
_NOT_STRUCTURE: Final = bytes(set(range(256)) - set(b'"{}[]'))
_raw_decode: Final = json.JSONDecoder().raw_decode


class Outermost:
    """Finds it wherever it stands. Brackets are counted from there on only: what comes last costs next to nothing.

    In a string the quotes of the key would be escaped. One that is deeper down has more brackets to be closed behind it
    than the one of the outermost object; a document that was cut off seldom has as many as that.
    """

    def __init__(self) -> None:
        self._rest = b""  # what has not been looked at
        self._found: bytes | None = None  # the least deep one so far, and what follows it
        self._depth = 0  # where what was looked at ends, as compared with it
        self._in_string = False  # that ends in one

    def feed(self, data: bytes) -> None:
        """Take the next piece of the document."""
        data = self._rest + data
        end = max(len(data) - LONGEST, 0)
        # Not between a backslash and what it escapes.
        end -= (end - len(data[:end].rstrip(b"\\"))) & 1
        self._look(data, end)
        self._rest = data[end:]

    def finish(self) -> Usage | None:
        """Return it; ``None`` if there is none, or the document does not end here."""
        ends = self._rest.rstrip().endswith(b"}")
        self._look(self._rest, len(self._rest))
        if self._found is None or not ends or self._in_string or self._depth != -1:
            return None
        _, _, value = self._found.decode("utf-8", "replace").partition(":")
        try:
            return usage_from(_raw_decode(value.lstrip())[0])
        except (ValueError, RecursionError):
            return None

    def _look(self, data: bytes, end: int) -> None:
        at = 0
        for match in _KEY.finditer(data) if _NAME in data else ():
            if match.start() >= end:
                break
            if data[match.start() - 1 : match.start()] == b"\\":  # another name ends like that
                continue
            if self._found is not None:
                self._count(data[at : match.start()])
            if self._found is None or self._depth <= 0:
                self._found, self._depth = data[match.start() : match.start() + LONGEST], 0
            at = match.start()
        if self._found is not None:
            self._count(data[at:end])

    def _count(self, data: bytes) -> None:
        """Count the brackets in ``data`` that are in no string."""
        if b"\\" in data:
            data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
        texts = data.translate(None, _NOT_STRUCTURE).split(b'"')
        outside = b"".join(texts[self._in_string :: 2])
        self._in_string ^= len(texts) % 2 == 0
        self._depth += 2 * len(outside.translate(None, b"]}")) - len(outside)
