"""A body that comes again, alike but for its messages or its prompt: what it asks for need not be read anew.

That is how an application goes on asking. Nothing is guessed: where what is before and behind that one value is the
same, byte for byte, and one JSON value of the same kind is all that is between, every other member is the same, and
nothing that a body asks for depends on the value.
"""

from mmap import mmap
from typing import Final

from vllmproxy.inspection.document import MOST_VALUES, scan
from vllmproxy.inspection.request import BYTES_PER_TOKEN, Asked, read_request
from vllmproxy.recurring import is_worth_keeping

#: By route, the member that is left open, and how its value may begin: on any other one more may depend.
_OPEN: Final = {
    "/v1/chat/completions": ("messages", b"["),
    "/v1/completions": ("prompt", b'"'),
    "/v1/embeddings": ("input", b'"['),
    "/v1/messages": ("messages", b"["),
    "/v1/responses": ("input", b'"['),
}
#: Bytes around it of the longest body that is kept, and of the longest ``stream_options``, of which the values are.
_LONGEST: Final = 2048
_LONGEST_OPTIONS: Final = 256
#: Bodies that are kept for one head: who calls with one key may be several applications.
_MOST: Final = 4


class _Template:
    """A body with one of its values left open.

    :param start: where that begins; ``end``: behind it.
    """

    __slots__ = ("_before", "_behind", "_kind", "_rest", "_start", "asked")

    def __init__(self, body: bytes, asked: Asked, start: int, end: int) -> None:
        self.asked = asked
        self._before, self._behind = body[:start], body[end:]
        self._start, self._rest = len(self._before.decode()), len(self._behind.decode())  # in characters
        self._kind = list if body[start] == ord("[") else str

    def fits(self, body: bytes) -> bool | None:
        """Tell whether ``body`` is the same with another value; ``None`` where what is around that is not the same."""
        if not (body.startswith(self._before) and body.endswith(self._behind)):
            return None
        if len(body) > MOST_VALUES or body.find(b'"data') >= 0:  # it may be too much, or have attachments
            return False
        try:
            text = body.decode("utf-8")
            value, end = scan(text, self._start)
        except (ValueError, StopIteration, RecursionError):
            return False
        return end == len(text) - self._rest and type(value) is self._kind and value != ""


class BodyReader:
    """Reads the bodies of requests whose heads are alike, but for their lengths.

    :param route: as in :func:`vllmproxy.inspection.routes.takes_model`.
    :param content_type: as in :func:`~vllmproxy.inspection.request.read_request`, and so is ``content_encoding``.
    :param unclear: why these heads leave open how a body is read, as half a sentence for the caller.
    """

    __slots__ = ("_encoding", "_missed", "_route", "_templates", "_type", "_unclear")

    def __init__(
        self, route: str, content_type: bytes | None, content_encoding: bytes | None = None, unclear: str = ""
    ) -> None:
        self._route = route
        self._type = content_type
        self._encoding = content_encoding
        self._unclear = unclear
        self._templates: list[_Template] = []  # the one that was used last first
        self._missed = -1  # bodies in a row that were not alike; the very first one counts for none

    def read(self, body: bytes | mmap) -> tuple[Asked, int, int]:
        """Return what ``body`` asks for, about how many tokens its prompt has, and by how many bytes it is longer than
        the one that the former was read from: bodies that are alike have the same, which nobody is to change.
        """
        if self._unclear:
            return Asked(surety="ambiguous", reason=self._unclear, unclear=self._unclear), 0, 0
        for place, template in enumerate(self._templates):
            fits = isinstance(body, bytes) and template.fits(body)
            if fits:
                self._missed = 0
                if place:
                    self._templates.insert(0, self._templates.pop(place))
                asked = template.asked
                return asked, -(-len(body) // BYTES_PER_TOKEN), len(body) - asked.size
            if fits is False:  # to look as closely at another would take too long
                break
        asked = read_request(self._route, body, self._type, self._encoding)
        self._learn(asked, body)
        return asked, asked.prompt_tokens, 0

    def _learn(self, asked: Asked, body: bytes | mmap) -> None:
        """Keep a body for the next ones to be compared with, if they may be alike."""
        self._missed += 1
        if not is_worth_keeping(self._missed):
            return
        name, beginnings = _OPEN.get(self._route, ("", b""))
        document = asked.document
        if document is None or document.repeated or name not in document.spans or not isinstance(body, bytes):
            return
        start, end = document.spans[name]
        begin, stop = document.spans.get("stream_options", (0, 0))
        if len(body) - (end - start) > _LONGEST or stop - begin > _LONGEST_OPTIONS or body[start] not in beginnings:
            return
        template = _Template(body, asked, start, end)
        if template.fits(body):  # as long as it has no attachments, and is none of the empty texts
            asked.size, asked.moves = len(body), end
            self._templates = [template, *self._templates[: _MOST - 1]]
