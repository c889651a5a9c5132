"""What a body asks for, as one value: model, stream, tokens, usage, end user. Nothing ambiguous passes for clear."""

import json
import re
from typing import Final, Literal

import attrs
from attrs import frozen

from vllmproxy.inspection.document import Document, Member, TooMuch, Unreadable, read_document
from vllmproxy.inspection.form import Form, is_form, read_form
from vllmproxy.inspection.lax import MOST, count_of, truth_of
from vllmproxy.inspection.routes import bounds_of, writes_nothing

#: How sure the model is: vLLM takes its own; it is ``Asked.model``; two readers could differ, or vLLM refuses it.
Surety = Literal["absent", "named", "ambiguous"]

LONGEST_END_USER: Final = 256

#: What ``/v1/completions`` writes at most where nothing is said (``CompletionRequest.max_tokens``).
_COMPLETION_TOKENS: Final = 16

#: Members that may be as large as the body: that they are there is kept, and not what they are.
_LARGE: Final = frozenset({"messages", "prompt", "prompt_embeds"})
_KEPT: Final = _LARGE | {"model", "stream", "stream_options"}
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
_READ: Final = _KEPT | _COUNTED | {"metadata", "safety_identifier", "user"}

#: What is no text in a prompt: images, sounds and files, in base64, in OpenAI's and Anthropic's forms.
_OTHERS: Final = re.compile(rb'"data:[\w/+.-]*;base64,[\w+/=]{256,}"|"data"\s*:\s*"[\w+/=]{256,}"')
_BYTES_PER_TOKEN: Final = 4
_TOKENS_PER_OTHER: Final = 1024


@frozen(kw_only=True)
class Asked:
    """What one body asks for.

    :ivar model: ``None`` unless ``surety`` is ``"named"``.
    :ivar reason: why the model is ambiguous, as half a sentence for the caller: ``the model is given twice``.
    :ivar stream: the answer will be a stream of events.
    :ivar answers: how many will be written: ``n`` for each prompt.
    :ivar output_tokens: the most that all of them together may come to, at most ``MOST``; ``None`` if the body does
        not say. vLLM cuts it down to what the model's context leaves, or refuses.
    :ivar prompt_tokens: about as many as the prompt will have: one for four bytes of text, and for what else is in it a
        thousand a piece.
    :ivar interval: tokens that one event of a stream may hold (vLLM's ``stream_interval``).
    :ivar detached: what is begun goes on when its client has left (``background``).
    :ivar unclear: why nobody can say what this uses before vLLM does, though vLLM may take it, as half a sentence for
        the caller; empty where it is clear.
    :ivar usage: the client asked for the usage of a stream itself.
    :ivar end_user: printable, not empty, at most ``LONGEST_END_USER`` characters.
    :ivar document: where the members are that a splice may touch; ``form``: the same of a form.
    """

    model: str | None = None
    surety: Surety = "absent"
    reason: str = ""
    stream: bool = False
    answers: int = 1
    output_tokens: int | None = None
    prompt_tokens: int = 0
    interval: int = 1
    detached: bool = False
    unclear: str = ""
    usage: bool = False
    end_user: str | None = None
    document: Document | None = attrs.field(default=None, repr=False)
    form: Form | None = attrs.field(default=None, repr=False)


def read_request(path: str, body: bytes, content_type: bytes | None, content_encoding: bytes | None = None) -> Asked:
    """Return what ``body`` asks for. It never raises: what cannot be read is ambiguous and says nothing else.

    :param path: as in :func:`vllmproxy.inspection.routes.takes_model`.
    :param content_type: the value of the only Content-Type; vLLM takes the first of several, others the last.
    :param content_encoding: of Content-Encoding; vLLM decodes none.
    """
    if content_encoding is not None and content_encoding.strip().lower() not in (b"", b"identity"):
        return Asked(surety="ambiguous", reason="the body is compressed")
    form = False
    try:
        form = is_form(content_type)
        if form:
            return _of_form(read_form(body, content_type or b""), path)
        return _of_document(read_document(body, _READ), path, _prompt_tokens(body))
    except Unreadable as unreadable:
        reason = str(unreadable)
        clear = not form and not isinstance(unreadable, TooMuch) and not _takes(body)
        return Asked(surety="ambiguous", reason=reason, unclear="" if clear else reason)


def _takes(body: bytes) -> bool:
    """Tell whether vLLM may read ``body`` though we do not: it takes more encodings."""
    try:
        return isinstance(json.loads(body), dict)
    except (ValueError, RecursionError):
        return False


def _prompt_tokens(body: bytes) -> int:
    others = [len(match[0]) for match in _OTHERS.finditer(body)]
    return -(-(len(body) - sum(others)) // _BYTES_PER_TOKEN) + len(others) * _TOKENS_PER_OTHER


def _of_document(document: Document, path: str, prompt_tokens: int) -> Asked:
    model, surety, reason = _model_of(document.value("model"), "model" in document.repeated)
    options = document.value("stream_options")
    answers = _answers(document, path)
    return Asked(
        model=model,
        surety=surety,
        reason=reason,
        stream=truth_of(document.value("stream")) is True,
        answers=answers,
        output_tokens=_output(document, path, answers),
        prompt_tokens=prompt_tokens,
        interval=max(count_of(document.value("stream_interval")) or 1, 1),
        detached=truth_of(document.value("background")) is not False,
        unclear=_unclear(document),
        usage=isinstance(options, dict) and truth_of(options.get("include_usage")) is True,
        end_user=_end_user(document),
        document=_pruned(document),
    )


def _unclear(document: Document) -> str:
    twice = sorted(document.repeated & _COUNTED)
    return f"{twice[0]} is given twice" if twice else ""


def _pruned(document: Document) -> Document:
    """Return ``document`` with what a splice needs to know, and nothing large."""
    members = {}
    for name, member in document.members.items():
        if name in _LARGE:
            members[name] = Member(value=None, start=member.start, end=member.end)
        elif name in _KEPT:
            members[name] = member
    return Document(members=members, repeated=document.repeated, opening=document.opening, empty=document.empty)


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
        unclear=next((f"{name} is given twice" for name in sorted(form.repeated - {"model", "user"})), ""),
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


def _answers(document: Document, path: str) -> int:
    """Return how many answers are asked for; an ``n`` that vLLM refuses counts as 1."""
    if path == "/inference/v1/generate":
        return _sampling(document).get("n", 1)
    if path not in ("/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions"):
        return 1
    n = count_of(document.value("n")) or 1
    if path == "/v1/completions":
        n *= max(_prompts(document.value("prompt")) + _prompts(document.value("prompt_embeds")), 1)
    elif path != "/v1/chat/completions":
        n *= max(_prompts(document.value("messages")), 1)
    return min(n, MOST)


def _prompts(value: object) -> int:
    """Return how many prompts a prompt is: a text or the tokens of one, or a list of either."""
    if isinstance(value, list):
        return 1 if value and isinstance(value[0], int) else len(value)
    return int(isinstance(value, str) and value != "")


def _output(document: Document, path: str, answers: int) -> int | None:
    if writes_nothing(path):
        return 0
    if path == "/inference/v1/generate":
        bound = _sampling(document).get("max_tokens")
    else:
        values = (document.value(field) for field in bounds_of(path))
        said = next((value for value in values if value is not None), None)
        if said is None and path == "/v1/completions":
            said = _COMPLETION_TOKENS
        bound = count_of(said)
    return None if bound is None else min(bound * answers, MOST)


def _sampling(document: Document) -> dict[str, int]:
    """Return the counts in ``sampling_params``, which ``/inference/v1/generate`` keeps its own in."""
    params = document.value("sampling_params")
    if not isinstance(params, dict):
        return {}
    counts = ((name, count_of(params.get(name))) for name in ("n", "max_tokens"))
    return {name: count for name, count in counts if count is not None and (count or name != "n")}


def _end_user(document: Document) -> str | None:
    metadata = document.value("metadata")
    named = (
        document.value("user"),
        metadata.get("user_id") if isinstance(metadata, dict) else None,
        document.value("safety_identifier"),
    )
    return next((user for user in map(printable, named) if user), None)


def printable(value: object) -> str | None:
    """Return ``value`` without what cannot be printed, cut off where it grows too long; ``None`` if nothing is left."""
    if not isinstance(value, str):
        return None
    text = value if value.isprintable() else "".join(filter(str.isprintable, value[: 4 * LONGEST_END_USER]))
    return text.strip()[:LONGEST_END_USER].strip() or None
