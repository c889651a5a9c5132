"""Images, sounds and files in a JSON body, in base64, as OpenAI's and Anthropic's forms have them.

They may be all but a few bytes of it. What is around them is read without them: they are looked at once, and neither
decoded nor copied. A slash in it may be written ``\\/``, as PHP's ``json_encode`` does.

Of a long one only the beginning is known to be base64. Of the rest no more is asked than that it is ASCII without
blanks and without other escapes, which takes a third of the time: nothing in it ends the string, and it is no text, but
for one that is written so on purpose. Control characters, with which the body is no JSON, are left to vLLM to find.
"""

import re
from bisect import bisect_right
from collections.abc import Collection
from mmap import mmap
from typing import Final

from attrs import define

from vllmproxy.inspection.document import Document, read_document

#: From so many characters of base64 on it is none of the short ones, which the pattern takes whole.
_LONG: Final = 4096
#: How one begins. With less base64 it counts as text.
_BEGINNING: Final = re.compile(rb'"data(?::[\w/+.\\-]*;base64,|"\s*:\s*")([\w+/=\\]{256,%d})' % _LONG)
#: An escape of something else than a slash.
_OTHER_ESCAPE: Final = re.compile(rb"\\(?!/)")
#: Bytes that are looked at in one step: a copy of them is made in the processor's cache.
_STEP: Final = 65_536


@define  # not frozen, which takes three times as long to make
class Attachment:
    """Where one is in a body.

    :ivar start: its opening quote, or that of the name before it.
    :ivar begun: behind its first characters, which are all that a short one has; ``end``: its closing quote. Between
        the two there are no escapes but whole ones of slashes.
    """

    start: int
    begun: int
    end: int


def attachments_in(body: bytes | mmap) -> list[Attachment]:
    """Return those in ``body``, in order. They may stand where no JSON value can; the body is no JSON then, with or
    without them."""
    found: list[Attachment] = []
    match = _BEGINNING.search(body)
    while match is not None:
        begun = end = match.end()
        if begun - match.start(1) == _LONG:
            end = body.find(b'"', begun)
            if end < 0:
                break
            if body[begun - 1 : begun] == b"\\":
                begun -= 1
        if body[end : end + 1] == b'"' and _goes_on(body, match.start(1), end):
            found.append(Attachment(match.start(), begun, end))
            end += 1
        match = _BEGINNING.search(body, end)
    return found


def _goes_on(body: bytes | mmap, start: int, end: int) -> bool:
    """Tell whether it goes on as it began, as far as is asked."""
    escapes = False
    for at in range(start, end, _STEP):
        piece = body[at : min(at + _STEP, end)]
        if not piece.isascii() or b" " in piece:
            return False
        escapes = escapes or b"\\" in piece
    return not escapes or _OTHER_ESCAPE.search(body, start, end) is None


def read_around(
    body: bytes | mmap, attachments: list[Attachment], wanted: Collection[str], unread: Collection[str]
) -> Document:
    """Read ``body`` as :func:`~vllmproxy.inspection.document.read_document` does, without its attachments.

    :param unread: names whose value nobody reads: attachments in it are cut off behind their beginning. For one in any
        other value, all of the body is read.
    :raises Unreadable: as there.
    """
    pieces, at = [], 0
    cuts, gone = [], [0]  # where in what is left some is left out, and how much is before that
    for attachment in attachments:
        if attachment.begun == attachment.end:
            continue
        pieces.append(body[at : attachment.begun])
        cuts.append(attachment.begun - gone[-1])
        gone.append(gone[-1] + attachment.end - attachment.begun)
        at = attachment.end
    document = read_document(b"".join([*pieces, body[at:]]), wanted)
    for name, (start, end) in document.spans.items():
        before, within = bisect_right(cuts, start), bisect_right(cuts, end)
        if before != within and name not in unread:
            return read_document(body, wanted)
        document.spans[name] = start + gone[before], end + gone[within]
    return document
