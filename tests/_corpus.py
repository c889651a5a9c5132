"""Reads ``tests/corpus/wire.toml``: what may pass the wire and what may not, as values."""

import re
import tomllib
from pathlib import Path
from typing import Any

from attrs import define, frozen

FILE = Path(__file__).parent / "corpus" / "wire.toml"

#: The two virtual keys that the corpus asks with: one that opens inference, and one for the model ``m`` only.
KEY = "sk-corpus-0123456789abcdef"
MODELS_KEY = "sk-models-0123456789abcdef"

_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|\{([^}]*)\}|(.))", re.DOTALL)
_REPEATED = re.compile(r"(.+)\*([0-9]+)\Z", re.DOTALL)
_LETTERS = {"r": b"\r", "n": b"\n", "t": b"\t", "\\": b"\\"}


@frozen
class Forwarded:
    """A request as the upstream must see it.

    :ivar start: method and target.
    :ivar has: patterns that a header line has to match each; ``lacks``: that nothing of the head may match.
    """

    start: bytes
    body: bytes = b""
    has: tuple[bytes, ...] = ()
    lacks: tuple[bytes, ...] = ()


@frozen
class RequestCase:
    """What a client sends, and what may come of it.

    :ivar status: of the last answer; the ones before it are 200, one for each request forwarded.
    :ivar late: it breaks in its body: its beginning may be forwarded if it came by itself, never all of it.
    :ivar ours: a rule of this proxy's, which the standard leaves open.
    :ivar repair: another proxy may forward what does not match this.
    :ivar keeps: the connection may stay open.
    """

    id: str
    part: str
    wire: bytes
    status: tuple[int, ...]
    forwarded: tuple[Forwarded, ...]
    late: bool
    ours: bool
    repair: bytes | None
    keeps: bool


@frozen
class AnswerCase:
    """What an upstream answers, and what may come of it.

    :ivar end: what it does then: ``open``, ``fin`` or ``reset``.
    :ivar allowed: of ``502``, ``cut`` and ``whole``.
    :ivar status: and ``body``: where the answer passes whole.
    :ivar discarded: the connection must not be used again.
    """

    id: str
    part: str
    wire: bytes
    method: bytes
    end: str
    allowed: tuple[str, ...]
    status: int
    body: bytes
    discarded: bool


@define
class Corpus:
    """All cases, in the file's order."""

    requests: list[RequestCase]
    answers: list[AnswerCase]


def load() -> Corpus:
    """Read the file. Raises ``KeyError`` or ``ValueError`` where it is wrong."""
    table = tomllib.loads(FILE.read_text(encoding="utf-8"))
    words: dict[str, bytes] = {}
    for name, text in table["words"].items():
        words[name] = unescape(text, words)
    requests = [_request(group | case, words) for group in table["request"] for case in group["cases"]]
    answers = [_answer(group | case, words) for group in table["answer"] for case in group["cases"]]
    for group in (*table["request"], *table["answer"]):
        if not (group["about"] and group["rfc"] and group["asks"]):
            raise ValueError(f"a group does not say what the standard asks: {group['about']!r}")
    return Corpus(requests, answers)


def unescape(text: str, words: dict[str, bytes]) -> bytes:
    r"""Return the bytes that ``text`` stands for: ``\r \n \t \\ \xHH``, ``\{word}`` and ``\{text*count}``."""
    done, at = [], 0
    for found in _ESCAPE.finditer(text):
        done.append(text[at : found.start()].encode("ascii"))
        done.append(_meaning(found, words))
        at = found.end()
    done.append(text[at:].encode("ascii"))
    return b"".join(done)


def _meaning(found: re.Match[str], words: dict[str, bytes]) -> bytes:
    code, word, letter = found.groups()
    if code is not None:
        return bytes([int(code, 16)])
    if letter is not None:
        return _LETTERS[letter]
    repeated = _REPEATED.match(word)
    return words[word] if repeated is None else unescape(repeated[1], words) * int(repeated[2])


def _request(fields: dict[str, Any], words: dict[str, bytes]) -> RequestCase:
    return RequestCase(
        id=fields["id"],
        part=fields["part"],
        wire=unescape(fields["wire"], words),
        status=tuple(fields["status"]),
        forwarded=tuple(_forwarded(each, words) for each in fields.get("forwarded", ())),
        late=fields.get("late", False),
        ours=fields.get("ours", False),
        repair=fields["repair"].encode("ascii") if "repair" in fields else None,
        keeps=fields.get("keeps", False),
    )


def _forwarded(fields: dict[str, Any], words: dict[str, bytes]) -> Forwarded:
    return Forwarded(
        start=unescape(fields["start"], words),
        body=unescape(fields.get("body", ""), words),
        has=tuple(each.encode("ascii") for each in fields.get("has", ())),
        lacks=tuple(each.encode("ascii") for each in fields.get("lacks", ())),
    )


def _answer(fields: dict[str, Any], words: dict[str, bytes]) -> AnswerCase:
    return AnswerCase(
        id=fields["id"],
        part=fields["part"],
        wire=unescape(fields["wire"], words),
        method=fields.get("method", "GET").encode("ascii"),
        end=fields.get("end", "open"),
        allowed=tuple(fields["allowed"]),
        status=fields.get("status", 0),
        body=unescape(fields.get("body", ""), words),
        discarded=fields.get("discarded", True),
    )
