"""What a body asks for, as one value: model, stream, tokens, usage, end user. Nothing ambiguous passes for clear."""

import json
from collections.abc import Collection, Mapping
from mmap import mmap
from typing import Final, Literal

import attrs
from attrs import define

from vllmproxy.inspection.attachments import Attachment, attachments_in, read_around
from vllmproxy.inspection.document import Document, TooMuch, Unreadable, read_document
from vllmproxy.inspection.form import Form, is_form, read_form
from vllmproxy.inspection.lax import MOST, count_of, truth_of
from vllmproxy.inspection.routes import bounds_of

#: How sure the model is: vLLM takes its own; it is ``Asked.model``; two readers could differ, or vLLM refuses it.
Surety = Literal["absent", "named", "ambiguous"]

LONGEST_END_USER: Final = 256

#: What ``/v1/completions`` writes at most where nothing is said (``CompletionRequest.max_tokens``).
_COMPLETION_TOKENS: Final = 16

#: Members that may be as large as the body.
_LARGE: Final = frozenset({"messages", "prompt", "prompt_embeds"})
#: The same, and one more on which nothing depends.
_UNREAD: Final = _LARGE | {"input"}
#: Members that decide on how many tokens are used, and how they are told.
_COUNTED: Final = frozenset(
    {
        *_LARGE,
        "background",
        "max_completion_tokens",
        "max_output_tokens",
        "max_tokens",
        "n",
        "sampling_params",
        "stream",
        "stream_interval",
        "stream_options",
    }
)
#: Those of ``stream_options``.
_STREAM_OPTIONS: Final = frozenset({"continuous_usage_stats", "include_usage"})
_END_USERS: Final = frozenset({"metadata", "safety_identifier", "user"})
_READ: Final = _COUNTED | _END_USERS | _UNREAD | {"model"}

#: Bytes of a body that is read a second time where it could not be read as it should.
_LONGEST_DOUBTED: Final = 1 << 20

#: Of text, about.
BYTES_PER_TOKEN: Final = 4
#: An image, a sound or a file.
_TOKENS_PER_OTHER: Final = 1024


@define(kw_only=True)  # not frozen, which takes three times as long to make
class Asked:
    """What one body asks for.

    :ivar model: ``None`` unless ``surety`` is ``"named"``.
    :ivar reason: why the model is ambiguous, as half a sentence for the caller: ``the model is given twice``.
    :ivar stream: the answer will be a stream of events.
    :ivar output_tokens: the most that all answers together may come to, at most ``MOST``; ``None`` if the body does
        not say. vLLM cuts it down to what the model's context leaves, or refuses.
    :ivar prompt_tokens: about as many as the prompt will have: one for four bytes of text, and for what else is in it a
        thousand a piece.
    :ivar interval: tokens that one event of a stream may hold (vLLM's ``stream_interval``).
    :ivar detached: what is begun goes on when its client has left (``background``).
    :ivar unclear: why nobody can say what this uses before vLLM does, though vLLM may take it, as half a sentence for
        the caller; empty where it is clear.
    :ivar usage: the client asked for the usage of a stream itself.
    :ivar end_user: printable, not empty, at most ``LONGEST_END_USER`` characters.
    :ivar document: where the members are that a splice may touch, and of their values the one that it looks at;
        ``form``: the same of a form.
    :ivar options: the members of ``stream_options``, counted from where that begins; ``None`` if it is no object.
    :ivar size: of the body that this was read from, and ``moves``: from where on a longer one has the same further on;
        where it is for several that are alike, see :class:`~vllmproxy.inspection.alike.BodyReader`.
    """

    model: str | None = None
    surety: Surety = "absent"
    reason: str = ""
    stream: bool = False
    output_tokens: int | None = None
    prompt_tokens: int = 0
    interval: int = 1
    detached: bool = False
    unclear: str = ""
    usage: bool = False
    end_user: str | None = None
    document: Document | None = attrs.field(default=None, repr=False)
    options: Document | None = attrs.field(default=None, repr=False)
    form: Form | None = attrs.field(default=None, repr=False)
    size: int = 0
    moves: int = 0


def read_request(
    path: str, body: bytes | mmap, content_type: bytes | None, content_encoding: bytes | None = None
) -> Asked:
    """Return what ``body`` asks for. It never raises: what cannot be read is ambiguous and says nothing else.

    :param path: as in :func:`vllmproxy.inspection.routes.takes_model`.
    :param content_type: the value of the only Content-Type; vLLM takes the first of several, others the last.
    :param content_encoding: of Content-Encoding; vLLM decodes none, and reads a body as if it were not there.
    """
    if content_encoding is not None and content_encoding.strip().lower() not in (b"", b"identity"):
        reason = "the body is compressed"
        return Asked(surety="ambiguous", reason=reason, unclear=reason)
    form = False
    try:
        form = is_form(content_type)
        if form:
            return _of_form(read_form(body[:], content_type or b""), path)
        attachments = attachments_in(body) if body.find(b'"data', 0) >= 0 else []
        document = read_around(body, attachments, _READ, _UNREAD) if attachments else read_document(body, _READ)
        options, unclear = _options_of(body, document)
        return _of_document(document, options, path, _prompt_tokens(body, attachments), unclear)
    except Unreadable as unreadable:
        reason = str(unreadable)
        clear = not form and not isinstance(unreadable, TooMuch) and not _takes(body[:])
        return Asked(surety="ambiguous", reason=reason, unclear="" if clear else reason)


def _takes(body: bytes) -> bool:
    """Tell whether vLLM may read ``body`` though we do not: it takes more encodings, and its Python may go deeper. Of a
    long one nobody waits for the answer."""
    if len(body) > _LONGEST_DOUBTED:
        return True
    try:
        return isinstance(json.loads(body), dict)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    except (ValueError, RecursionError):  # a bound of this Python's, for digits or depth: vLLM's may have another
        return True


def _prompt_tokens(body: bytes | mmap, attachments: list[Attachment]) -> int:
    text = len(body)
    for attachment in attachments:
        text -= attachment.end + 1 - attachment.start
    return -(-text // BYTES_PER_TOKEN) + len(attachments) * _TOKENS_PER_OTHER


def _options_of(body: bytes | mmap, document: Document) -> tuple[Document | None, str]:
    """Return what is in ``stream_options``, and why nobody can say what that asks for."""
    if not isinstance(document.values.get("stream_options"), dict):
        return None, ""
    begin, end = document.spans["stream_options"]
    try:
        options = read_document(body[begin:end], _STREAM_OPTIONS)
    except Unreadable:  # it has too many members
        return None, "stream_options cannot be read"
    return options, _twice(options.repeated)


def _of_document(document: Document, options: Document | None, path: str, prompt_tokens: int, unclear: str) -> Asked:
    values, repeated = document.values, document.repeated
    if path == "/invocations":
        path, which = _invoked(values)
        unclear = unclear or which
    model, surety, reason = _model_of(values.get("model"), "model" in repeated)
    # The others' values may be as large as the body.
    document.values = {"stream_options": values.get("stream_options")}
    return Asked(
        model=model,
        surety=surety,
        reason=reason,
        stream="stream" in values and truth_of(values["stream"]) is True,
        output_tokens=_output(values, path),
        prompt_tokens=prompt_tokens,
        interval=(count_of(values["stream_interval"]) or 1) if "stream_interval" in values else 1,
        detached="background" in values and truth_of(values["background"]) is not False,
        unclear=(_twice(repeated & _COUNTED) if repeated else "") or unclear,
        usage=options is not None and truth_of(options.values.get("include_usage")) is True,
        end_user=None if _END_USERS.isdisjoint(values) else _end_user(values),
        document=document,
        options=options,
    )


def _invoked(values: Mapping[str, object]) -> tuple[str, str]:
    """Return the route that ``/invocations`` is for such a body, and why nobody can say that.

    vLLM takes for a completion what it cannot take for a chat. For what is neither it generates nothing.
    """
    if any(values.get(name) is not None for name in ("prompt", "prompt_embeds")):
        return "/v1/completions", "" if values.get("messages") is None else "there are both messages and a prompt"
    return "/v1/chat/completions", ""


def _twice(names: Collection[str]) -> str:
    """Return what is wrong with ``names`` that are given more than once, of one of them; empty if there are none."""
    return f"{min(names)} is given twice" if names else ""


def _of_form(form: Form, path: str) -> Asked:
    # FastAPI takes an empty field of a form for none at all.
    model, surety, reason = _model_of(form.value("model"), "model" in form.repeated)
    if "model" in form.files:
        model, surety, reason = None, "ambiguous", "the model is given as a file"
    bound = next((count_of(form.value(field)) for field in bounds_of(path)), None)
    return Asked(
        model=model,
        surety=surety,
        reason=reason,
        stream=truth_of(form.value("stream")) is True,
        output_tokens=bound,
        prompt_tokens=_TOKENS_PER_OTHER,
        unclear=_twice(form.repeated - {"model", "user"}),
        usage=truth_of(form.value("stream_include_usage")) is True,
        end_user=printable(form.value("user")),
        form=form,
    )


def _model_of(value: object, repeated: bool) -> tuple[str | None, Surety, str]:
    if repeated:
        return None, "ambiguous", "the model is given twice"
    if value is None or value == "":  # vLLM takes its own model for either
        return None, "absent", ""
    if not isinstance(value, str):
        return None, "ambiguous", "the model is not a string"
    try:
        value.encode()
    except UnicodeEncodeError:
        return None, "ambiguous", "the model is not Unicode text"
    return value, "named", ""


def _answers(values: Mapping[str, object], path: str) -> int:
    """Return how many answers are asked for; an ``n`` that vLLM refuses counts as 1."""
    if path == "/inference/v1/generate":
        return _sampling(values).get("n", 1)
    if path not in ("/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions"):
        return 1
    n = count_of(values.get("n")) or 1
    if path == "/v1/completions":
        n *= max(_prompts(values.get("prompt")) + _prompts(values.get("prompt_embeds")), 1)
    elif path != "/v1/chat/completions":
        n *= max(_prompts(values.get("messages")), 1)
    return min(n, MOST)


def _prompts(value: object) -> int:
    """Return how many prompts a prompt is: a text or the tokens of one, or a list of either."""
    if isinstance(value, list):
        return 1 if value and isinstance(value[0], int) else len(value)
    return int(isinstance(value, str) and value != "")


def _output(values: Mapping[str, object], path: str) -> int | None:
    if path == "/inference/v1/generate":
        bound = _sampling(values).get("max_tokens")
    else:
        said = None
        for field in bounds_of(path):
            said = values.get(field)
            if said is not None:
                break
        if said is None and path == "/v1/completions":
            said = _COMPLETION_TOKENS
        bound = count_of(said)
    return None if bound is None else min(bound * _answers(values, path), MOST)


def _sampling(values: Mapping[str, object]) -> dict[str, int]:
    """Return the counts in ``sampling_params``, which ``/inference/v1/generate`` keeps its own in."""
    params = values.get("sampling_params")
    if not isinstance(params, dict):
        return {}
    counts = ((name, count_of(params.get(name))) for name in ("n", "max_tokens"))
    return {name: count for name, count in counts if count is not None and (count or name != "n")}


def _end_user(values: Mapping[str, object]) -> str | None:
    metadata = values.get("metadata")
    named = (
        values.get("user"),
        metadata.get("user_id") if isinstance(metadata, dict) else None,
        values.get("safety_identifier"),
    )
    for name in named:
        user = None if name is None else printable(name)
        if user is not None:
            return user
    return None


def printable(value: object) -> str | None:
    """Return ``value`` without what cannot be printed, cut off where it grows too long; ``None`` if nothing is left."""
    if not isinstance(value, str):
        return None
    text = value if value.isprintable() else "".join(filter(str.isprintable, value[: 4 * LONGEST_END_USER]))
    return text.strip()[:LONGEST_END_USER].strip() or None
