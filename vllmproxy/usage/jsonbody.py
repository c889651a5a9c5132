"""Usage out of an answer that is one JSON document."""

import json
import re
from collections.abc import Iterator
from typing import Final

from vllmproxy.usage.outermost import Outermost
from vllmproxy.usage.tokens import Usage, member, model_from, usage_from

#: A body no longer than this is kept whole; of a longer one only its two ends, and what :class:`Outermost` finds.
LONGEST_WHOLE = 1 << 20
#: How much of the ends is read of anything longer than ``TAIL``: vLLM writes ``model`` before the data, and
#: ``usage`` before it (rerank) or after it (all others), where only a chat's ``prompt_logprobs`` are long.
HEAD = 4 << 10
TAIL = 64 << 10

_USAGE = b'"usage"'
#: How vLLM begins a chat or a completion, and how it ends one (``ChatCompletionResponse``, ``CompletionResponse``). A
#: set of what may come is a third quicker to match than one of what may not.
_TEXT = rb"[ !#-\[\]-~]"
_BEGINNING = re.compile(rb'\{"id":"%b*","object":"[a-z._]*","created":[0-9]+,"model":"(%b{1,256})",' % (_TEXT, _TEXT))
_COUNT = rb"(0|[1-9][0-9]{0,8})"
_COUNTS = re.compile(rb'"usage":\{"prompt_tokens":%b,"total_tokens":%b,"completion_tokens":%b' % ((_COUNT,) * 3))
_REST = re.compile(rb'(?:,"[a-z_]+_details":null)*\}(?:,"[a-z_]+":null)*\}')
_LONGEST_REST = 1024
_TRIES = 8
_decoder = json.JSONDecoder()
_raw_decode = _decoder.raw_decode
_scan = _decoder.scan_once  # type: ignore[attr-defined]  # typeshed leaves it out


class JsonReader:
    """Keeps at most ``LONGEST_WHOLE`` bytes of a JSON answer and reads them once, at its end.

    Decoding a megabyte of embeddings would hold the reactor up for 10 ms, so a body over ``TAIL`` bytes is
    decoded whole only if its two ends do not tell.
    """

    def __init__(self) -> None:
        self._first = b""  # all of it, where it came in one piece: nearly always
        self._body = bytearray()
        self._head: tuple[str | None, Usage | None] | None = None  # what that of a longer one told
        self._outermost: Outermost | None = None

    def feed(self, data: bytes) -> None:
        """Take the next piece of the body, of any length."""
        if not self._body:
            if not self._first and len(data) <= TAIL:
                self._first = data
                return
            self._body += self._first
            self._first = b""
        self._body += data
        if len(self._body) <= LONGEST_WHOLE and self._head is None:
            return
        if self._head is None:
            self._head = _of_head(bytes(self._body[:HEAD]))
            self._outermost = None if self._head[1] else Outermost()
        if len(self._body) > 2 * TAIL:
            self._drop()

    def _drop(self) -> None:
        """Keep the end only."""
        if self._outermost is not None:
            for at in range(0, len(self._body) - TAIL, TAIL):
                self._outermost.feed(bytes(self._body[at : min(at + TAIL, len(self._body) - TAIL)]))
        del self._body[:-TAIL]

    def finish(self) -> tuple[str | None, Usage | None]:
        """Return the model and the usage of the body fed; ``None`` for each that it does not clearly tell."""
        if self._head is None and len(self._body) <= TAIL:
            body = self._first or bytes(self._body)
            return _of_chat(body) or _of_document(body)
        model, usage = self._head or _of_head(bytes(self._body[:HEAD]))
        usage = usage or _of_tail(bytes(self._body[-TAIL:]))
        if usage is None and self._head is None and _USAGE in self._body:
            return _of_document(bytes(self._body))
        if usage is None and self._outermost is not None:
            self._outermost.feed(bytes(self._body))
            usage = self._outermost.finish()
        return model, usage


class _Ends:
    """How answers go on behind the counts: those of one server as the one before."""

    def __init__(self) -> None:
        self._last = b""

    def are(self, rest: bytes) -> bool:
        """Tell whether an answer may go on so."""
        if rest != self._last:
            if len(rest) > _LONGEST_REST or _REST.fullmatch(rest) is None:
                return False
            self._last = rest
        return True


_ends: Final = _Ends()


def _of_chat(body: bytes) -> tuple[str | None, Usage | None] | None:
    """Return what :func:`_of_document` does where ``body`` begins and ends as nearly all do, in a third of the time.

    From the last ``"usage"`` on there are its members, others that are null and one brace: so it is a member of the
    outermost object, as in :func:`_of_tail`.
    """
    begins = _BEGINNING.match(body)
    counts = None if begins is None else _COUNTS.match(body, body.rfind(_USAGE))
    if begins is None or counts is None or not _ends.are(body[counts.end() :]):
        return None
    prompt, total, completion = counts.groups()
    usage = Usage(prompt_tokens=int(prompt), completion_tokens=int(completion), total_tokens=int(total))
    return begins[1].decode("ascii"), usage


def _of_document(body: bytes) -> tuple[str | None, Usage | None]:
    try:
        answer = decoded(body)
    except (ValueError, RecursionError):
        return None, None
    if not isinstance(answer, dict):
        return None, None
    # Cohere's pooling answers say it in ``meta``.
    usage = usage_from(answer.get("usage")) or usage_from(answer.get("meta"))
    return model_from(answer), usage


def decoded(body: bytes) -> object:
    """Return what ``json.loads`` does, in fewer steps where ``body`` is an object in UTF-8 with nothing around it.
    Raises ``ValueError``, ``RecursionError``."""
    if body.startswith(b'{"'):
        text = body.decode("utf-8", "surrogatepass")
        answer: object = None
        try:
            answer, end = _scan(text, 0)
        except StopIteration:  # a value is missing; who reads it again says where
            end = -1
        if end == len(text):
            return answer
    return json.loads(body)


def _of_head(head: bytes) -> tuple[str | None, Usage | None]:
    found = dict(_leading_members(head.decode("utf-8", "replace")))
    return model_from(found), usage_from(found.get("usage"))


def _leading_members(text: str) -> Iterator[tuple[str, object]]:
    """Yield the members of the JSON object ``text`` begins with, up to the first that is cut off or wrong."""
    at = _skip_space(text, 0)
    if text[at : at + 1] != "{":
        return
    try:
        while True:
            key, at = _raw_decode(text, _skip_space(text, at + 1))
            at = _skip_space(text, at)
            if not isinstance(key, str) or text[at : at + 1] != ":":
                return
            value, at = _raw_decode(text, _skip_space(text, at + 1))
            yield key, value
            at = _skip_space(text, at)
            if text[at : at + 1] != ",":
                return
    except (ValueError, RecursionError):
        return


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def _of_tail(tail: bytes) -> Usage | None:
    """Return the usage that ends a document of which only ``tail`` is known.

    From a member of the outermost object on, and only from there, the rest of the document is the rest of one
    object: with a brace put before it, it decodes to its very end. A ``"usage"`` deeper down, or a body that
    was cut off, does not.
    """
    at = len(tail)
    for _ in range(_TRIES):
        at = tail.rfind(_USAGE, 0, at)
        if at < 0:
            return None
        try:
            return usage_from(member(json.loads(b"{" + tail[at:]), "usage"))
        except (ValueError, RecursionError):
            continue
    return None
