"""The two changes ever made to a body, each of a few bytes; every other byte stays as it was sent.

Both take the bytes and what :func:`vllmproxy.inspection.request.read_request` read in exactly these. To make both, make
one, and read the outcome again for the other.
"""

import json
from collections.abc import Iterable

from vllmproxy.inspection.document import Document, Member, Unreadable, read_document
from vllmproxy.inspection.lax import truth_of
from vllmproxy.inspection.request import Asked
from vllmproxy.inspection.routes import needed_of, streams_usage

_Edit = tuple[int, int, bytes]


def with_model(body: bytes, asked: Asked, model: str) -> bytes:
    """Return ``body`` with ``model`` in place of the value that it names.

    :raises ValueError: it names none, or ``model`` cannot stand in a form's field.
    """
    if asked.surety == "named" and asked.document is not None:
        member = asked.document.members["model"]
        return _spliced(body, [(member.start, member.end, json.dumps(model).encode())])
    if asked.surety == "named" and asked.form is not None and model.isprintable():
        field = asked.form.fields["model"]
        return _spliced(body, [(field.start, field.end, model.encode())])
    raise ValueError("there is no model to be replaced")


def with_usage(path: str, body: bytes, asked: Asked) -> bytes | None:
    """Return ``body`` with what makes vLLM tell the usage of the stream in one more event, and changes nothing else.

    :param path: as in :func:`vllmproxy.inspection.routes.takes_model`.
    :return: ``None`` if it is not to be touched: another route; no stream; the client asked for usage itself; what
        says so is given twice; or it is plain that vLLM refuses the request, whose error may count the members.
    """
    document = asked.document
    if document is None or not asked.stream or asked.usage or not streams_usage(path):
        return None
    if not document.repeated.isdisjoint(("stream", "stream_options")) or needed_of(path).isdisjoint(document.members):
        return None
    options = document.members.get("stream_options")
    if options is None:
        return _spliced(body, [(document.opening, document.opening, b'"stream_options":{"include_usage":true},')])
    if options.value is None:
        return _spliced(body, [(options.start, options.end, b'{"include_usage":true}')])
    edits = _edits_within(body, options)
    return None if edits is None else _spliced(body, edits)


def _edits_within(body: bytes, options: Member) -> list[_Edit] | None:
    try:
        inner = read_document(body[options.start : options.end])
    except Unreadable:  # it is no object
        return None
    if not inner.repeated.isdisjoint(("include_usage", "continuous_usage_stats")):
        return None
    include = truth_of(inner.value("include_usage"))
    continuous = truth_of(inner.value("continuous_usage_stats"))
    if include is None or continuous is None:
        return None
    edits = [_set_true(inner)]
    if continuous:  # without include_usage, vLLM passes over it
        member = inner.members["continuous_usage_stats"]
        edits.append((member.start, member.end, b"false"))
    return [(options.start + start, options.start + end, new) for start, end, new in edits]


def _set_true(inner: Document) -> _Edit:
    member = inner.members.get("include_usage")
    if member is not None:
        return member.start, member.end, b"true"
    return inner.opening, inner.opening, b'"include_usage":true' + (b"" if inner.empty else b",")


def _spliced(body: bytes, edits: Iterable[_Edit]) -> bytes:
    """Return ``body`` with each span, none of which overlaps another, replaced."""
    pieces, at = [], 0
    for start, end, new in sorted(edits):
        pieces += [body[at:start], new]
        at = end
    return b"".join([*pieces, body[at:]])
