"""The two changes ever made to a body, each of a few bytes; every other byte stays as it was sent.

Both follow from what :func:`vllmproxy.inspection.request.read_request` read in exactly the bytes that are changed, and
concern different members: they are made together.
"""

import json
from mmap import mmap

from vllmproxy.inspection.document import Document
from vllmproxy.inspection.lax import truth_of
from vllmproxy.inspection.request import Asked
from vllmproxy.inspection.routes import needed_of, streams_usage

#: From where to where, and what is there instead.
Edit = tuple[int, int, bytes]


def model_edits(asked: Asked, model: str) -> list[Edit]:
    """Return what puts ``model`` in place of the value that a body names.

    :raises ValueError: it names none, or ``model`` cannot stand in a form's field.
    """
    if asked.surety == "named" and asked.document is not None:
        return [(*asked.document.spans["model"], json.dumps(model).encode())]
    if asked.surety == "named" and asked.form is not None and model.isprintable():
        field = asked.form.fields["model"]
        return [(field.start, field.end, model.encode())]
    raise ValueError("there is no model to be replaced")


def usage_edits(path: str, asked: Asked) -> list[Edit]:
    """Return what makes vLLM tell the usage of the stream in one more event, and changes nothing else.

    :param path: as in :func:`vllmproxy.inspection.routes.takes_model`.
    :return: nothing if ``body`` is not to be touched: another route; no stream; the client asked for usage itself;
        what says so is given twice; or it is plain that vLLM refuses the request, whose error may count the members.
    """
    document = asked.document
    if document is None or not asked.stream or asked.usage or not streams_usage(path):
        return []
    if not document.repeated.isdisjoint(("stream", "stream_options")) or needed_of(path).isdisjoint(document.spans):
        return []
    options = document.spans.get("stream_options")
    if options is None:
        return [(document.opening, document.opening, b'"stream_options":{"include_usage":true},')]
    if document.values["stream_options"] is None:
        return [(*options, b'{"include_usage":true}')]
    return [] if asked.options is None else _edits_within(asked.options, options[0])


def _edits_within(inner: Document, begin: int) -> list[Edit]:
    if inner.repeated:
        return []
    include = truth_of(inner.values.get("include_usage"))
    continuous = truth_of(inner.values.get("continuous_usage_stats"))
    if include is None or continuous is None:
        return []
    edits = [_set_true(inner)]
    if continuous:  # without include_usage, vLLM passes over it
        edits.append((*inner.spans["continuous_usage_stats"], b"false"))
    return [(begin + start, begin + end, new) for start, end, new in edits]


def _set_true(inner: Document) -> Edit:
    include = inner.spans.get("include_usage")
    if include is not None:
        return *include, b"true"
    return inner.opening, inner.opening, b'"include_usage":true' + (b"" if inner.empty else b",")


def moved(edits: list[Edit], asked: Asked, by: int) -> list[Edit]:
    """Return ``edits`` of the body that ``asked`` was read from as one needs them that is alike and so much longer."""
    return [(start + by, end + by, new) if start >= asked.moves else (start, end, new) for start, end, new in edits]


def edited(body: bytes | mmap, edits: list[Edit]) -> list[bytes | memoryview | mmap]:
    """Return ``body`` with ``edits`` made, none of which overlaps another: in pieces, and what stays is not copied."""
    view, at = memoryview(body), 0
    pieces: list[bytes | memoryview | mmap] = []
    for start, end, new in sorted(edits):
        pieces += [view[at:start], new]
        at = end
    return [*pieces, view[at:]]
