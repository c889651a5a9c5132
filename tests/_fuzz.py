"""Mutations of the corpus, and what has to hold for any bytes, with h11 as the second opinion."""

import random
import re

import h11
from _corpus import load
from _memory import Upstream, Wire

#: What is mutated: the corpus's short cases, good and bad.
_LONGEST = 400
#: h11 takes at most 20 digits for a chunk's size, zeros included; of answers we take more.
_ZEROS = b"0" * 21
_CORPUS = load()
REQUESTS = [case.wire for case in _CORPUS.requests if len(case.wire) <= _LONGEST]
ANSWERS = [case.wire for case in _CORPUS.answers if len(case.wire) <= _LONGEST and _ZEROS not in case.wire]

_TOKENS = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\r\n\r\n",
    b" ",
    b"\t",
    b":",
    b",",
    b";",
    b'"',
    b"\x00",
    b"\x0b",
    b"\xff",
    b"0",
    b"0\r\n\r\n",
    b"2\r\nok\r\n",
    b";x=y",
    b"chunked",
    b"Content-Length: 3\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Connection: close\r\n",
    b"HTTP/1.0",
    b"HTTP/1.1 ",
]
REQUEST_TOKENS = [
    *_TOKENS,
    b"Connection: upgrade\r\nUpgrade: h2c\r\n",
    b"Host: h\r\n",
    b"GET / HTTP/1.1\r\nHost: h\r\n\r\n",
]
ANSWER_TOKENS = [
    *_TOKENS,
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b" 204 ",
    b" 304 ",
]

Request = tuple[bytes, bytes, bytes]


def mutated(source: random.Random, corpus: list[bytes], tokens: list[bytes]) -> bytes:
    """Return one to three of the corpus in a row, with a few pieces put in, taken out or doubled."""
    data = b"".join(source.choices(corpus, k=source.randint(1, 3)))
    for _ in range(source.randint(0, 4)):
        at, take = source.randint(0, len(data)), source.randint(0, 8)
        put = source.choice([b"", source.choice(tokens), source.randbytes(source.randint(1, 3))])
        if source.random() < 0.5:
            put += data[at : at + take] * 2
        data = data[:at] + put + data[at + take :]
    return data


def cuts_in(source: random.Random, data: bytes) -> list[int]:
    """Return up to four places to cut at."""
    return sorted(source.randint(0, len(data)) for _ in range(source.randint(0, 4)))


# requests


def first_by_h11(data: bytes) -> tuple[Request | None, bytes]:
    """Return the first request that h11 takes for whole (method, target, body) and what follows it, if anything may."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1_000_000)
    connection.receive_data(data)
    head, body = None, b""
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                last = connection.their_state is h11.MUST_CLOSE and not _kept_by_1_0(head)
                return (head.method, head.target, body), b"" if last else connection.trailing_data[0]
            else:
                return None, b""
    except h11.RemoteProtocolError:
        return None, b""


def _kept_by_1_0(head: h11.Request) -> bool:
    """Whether an HTTP/1.0 request asks for its connection to stay open (RFC 9112 §C.2.2); h11 never does that."""
    options = [
        option.strip().lower() for name, value in head.headers if name == b"connection" for option in value.split(b",")
    ]
    return head.http_version == b"1.0" and b"keep-alive" in options and b"close" not in options


def accepted_by_h11(data: bytes) -> list[Request]:
    """Return the requests that h11 takes for whole before the first error. Unlike h11, llhttp passes over empty lines
    before a request (RFC 9112 §2.2), and we take an Upgrade that we do not know for none (RFC 9110 §7.8)."""
    requests = []
    while data := data.lstrip(b"\r\n"):
        request, data = first_by_h11(data)
        if request is None:
            break
        requests.append(request)
    return requests


def _origin_form(target: bytes) -> bytes:
    if target.startswith(b"/"):
        return target
    rest = re.sub(rb"\A(?i:https?)://[^/?#]*", b"", target)
    return rest if rest.startswith(b"/") else b"/" + rest


def check_request(data: bytes, cuts: list[int]) -> int:
    """Check that no more requests are whole than h11 sees, and none differently; return how many are."""
    wire = Wire(answer=True)
    wire.feed_split(data, *cuts)
    whole = [request[:3] for request in wire.seen if request[3]]
    theirs = [(method, _origin_form(target), body) for method, target, body in accepted_by_h11(data)]
    assert whole == theirs[: len(whole)], data
    return len(whole)


# answers


def answer_by_h11(data: bytes, method: bytes, fin: bool) -> tuple[int, bytes] | None:
    """Return the status and body of the answer that h11 takes for whole, 1xx left out."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=2_000_000)
    connection.send(h11.Request(method=method, target=b"/", headers=[(b"Host", b"h")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    if fin:
        connection.receive_data(b"")
    head, body = None, b""
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                return head.status_code, body
            elif not isinstance(event, h11.InformationalResponse):
                return None
    except h11.RemoteProtocolError:
        return None


def check_answer(data: bytes, cuts: list[int], method: bytes, end: str) -> bool:
    """Check that an answer passes as whole only where h11 takes it for whole, with the same status and body, that its
    request ends once, and that the connection is lost or in order; return whether it passed.

    :param end: what the upstream does behind ``data``: ``fin`` or ``reset``.
    """
    upstream = Upstream()
    pending = upstream.ask(method)
    wire = upstream.wires[0]
    for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
        if stop > start:
            wire.receive(data[start:stop])
    (wire.close_from_peer if end == "fin" else wire.reset_from_peer)()
    upstream.clock.advance(1)
    upstream.settle()
    whole = None if pending.whole is None or pending.answer is None else (pending.answer.head.status, pending.whole)
    if whole is not None:
        # What follows an answer is not its own; a connection that breaks is no end of a body.
        assert whole == answer_by_h11(data, method, end == "fin"), data
    ends = pending.receiver.events.count("answer_finished") + pending.receiver.events.count("answer_failed")
    assert ends + (pending.failure is not None) == 1, data
    assert wire.lost, data
    upstream.agent.close()
    upstream.settle()
    assert not upstream.clock.getDelayedCalls(), data
    return whole is not None
