"""Heads that come again with another length: what is taken for one is read as if it had been parsed."""

import random
from typing import Any

import attrs
import pytest
from _fuzz import ANSWER_TOKENS, ANSWERS, REQUEST_TOKENS, REQUESTS, mutated
from hypothesis import given, settings
from hypothesis import strategies as st

from vllmproxy.http1 import templates
from vllmproxy.http1.message import BadAnswer, Limits, RequestHead
from vllmproxy.http1.requests import RequestReader
from vllmproxy.http1.responses import ResponseReader
from vllmproxy.http1.templates import KnownHeads, Whence

SOURCES = st.randoms(use_true_random=False)
LIMITS = Limits(body=5000)
HERE = ("192.0.2.1", False)

NAMES = st.sampled_from(["Content-Length", "content-length", "CONTENT-LENGTH", "content-LENGTH"])
OTHER_LINES = st.lists(
    st.sampled_from(
        [
            b"Accept: */*",
            b"X-Content-Length: 7",
            b"Content-Length-X: 7",
            b"X-Note: content-length: 7",
            b"Connection: keep-alive",
            b"Connection: close",
            b"Connection: upgrade\r\nUpgrade: h2c",
            b"Expect: 100-continue",
            b"Transfer-Encoding: chunked",
            b"Content-Length: 7",
            b"X-Request-ID: 7",
            b"x-request-id: of-another",
            b"X-Empty:",
        ]
    ),
    max_size=4,
)


def fields_in(head: Any) -> dict[str, Any]:
    """Return all of a head but what others keep with it."""
    return attrs.asdict(head, filter=attrs.filters.exclude("memo"))


class Seen:
    """What a reader of requests found."""

    def __init__(self) -> None:
        self.requests: list[list[Any]] = []
        self.pieces: list[bytes] = []

    def request_begun(self, head: RequestHead) -> None:
        self.requests.append([fields_in(head), b"", False])

    def body_read(self, data: bytes) -> None:
        self.requests[-1][1] += data
        self.pieces.append(data)

    def request_read(self) -> None:
        self.requests[-1][2] = True

    def whole_request(self, head: RequestHead, body: bytes) -> None:
        self.request_begun(head)
        self.body_read(body)
        self.request_read()


class Requests:
    """A reader, and what it has found since it was asked last."""

    def __init__(self, known: KnownHeads | None = None, whence: Whence = HERE, limits: Limits = LIMITS) -> None:
        self.seen = Seen()
        self.known = known or KnownHeads()
        self.reader = RequestReader(self.seen, limits, self.known, whence)

    def feed(self, data: bytes) -> bool:
        """Read ``data``; tell whether that took no parsing."""
        taken = self.reader.take(data)
        if not taken:
            self.reader.feed(data)
        return taken

    def read(self, data: bytes) -> list[Any]:
        self.seen.requests = []
        self.feed(data)
        error = self.reader.error
        said = None if error is None else (error.status, error.message)
        return [self.seen.requests, said, self.reader.in_head, self.reader.early, self.reader.body_left]

    def learn(self, data: bytes) -> None:
        """Read a request so often that its head is kept."""
        self.read(data)
        if self.is_open():
            self.read(data)

    def is_open(self) -> bool:
        """Whether the requests so far are whole, and another may follow."""
        ended = all(whole and head["keep_alive"] for head, _, whole in self.seen.requests)
        return ended and not (self.reader.error or self.reader.in_head or self.reader.early is not None)


def answer_in(reader: ResponseReader, method: bytes, data: bytes) -> list[Any]:
    """Return what a reader finds in an answer to ``method``."""
    informed: list[Any] = []
    reader.begin(method, upgrade=False, inform=informed.append)
    try:
        reader.feed(data)
    except BadAnswer:
        return ["bad"]
    head = None if reader.head is None else fields_in(reader.head)
    flags = (reader.whole, reader.extra, reader.reusable, reader.tunnel)
    return [head, b"".join(reader.pieces), flags, list(map(fields_in, informed))]


def request(lines: list[bytes], name: str, length: int, place: int = 0, gap: bytes = b" ") -> bytes:
    lines = lines.copy()
    lines.insert(place % (len(lines) + 1), b"%s:%s%d" % (name.encode(), gap, length))
    return b"POST /vllm/v1/x HTTP/1.1\r\nHost: h\r\n%s\r\n\r\n%s" % (b"\r\n".join(lines), b"x" * length)


def answer(lines: list[bytes], name: str, length: int, place: int = 0) -> bytes:
    lines = lines.copy()
    lines.insert(place % (len(lines) + 1), b"%s: %d" % (name.encode(), length))
    return b"HTTP/1.1 200 OK\r\n%s\r\n\r\n%s" % (b"\r\n".join(lines), b"y" * length)


# that it is taken at all


def test_a_request_alike_is_taken_without_the_parser() -> None:
    reading = Requests()
    reading.learn(request([b"Accept: */*"], "Content-Length", 5))
    reading.reader._parser = None
    assert reading.read(request([b"Accept: */*"], "Content-Length", 1234)) == Requests().read(
        request([b"Accept: */*"], "Content-Length", 1234)
    )


def test_an_answer_alike_is_taken_without_the_parser() -> None:
    reader = ResponseReader(LIMITS)
    for length in (5, 7):
        answer_in(reader, b"POST", answer([b"server: uvicorn"], "content-length", length))
    parser, reader._parser = reader._parser, pytest.fail
    found = answer_in(reader, b"GET", answer([b"server: uvicorn"], "content-length", 12))
    reader._parser = parser
    assert found == answer_in(ResponseReader(LIMITS), b"GET", answer([b"server: uvicorn"], "content-length", 12))
    # The parser has not seen that one, and goes on where it was.
    other = answer([b"server: other"], "content-length", 3)
    assert answer_in(reader, b"GET", other) == answer_in(ResponseReader(LIMITS), b"GET", other)


@pytest.mark.parametrize(
    "head",
    [
        b"POST / HTTP/1.0\r\nHost: h\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2 \r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nX: %s\r\nContent-Length: 2\r\n\r\n" % (b"x" * 5000),
    ],
)
def test_heads_out_of_the_ordinary_are_parsed_each_time(head: bytes) -> None:
    reading = Requests()
    reading.learn(head + b"ok")
    assert reading.seen.requests[0][2]
    assert not reading.feed(head + b"ok")


def traced(number: int) -> bytes:
    """Return a request with a head of its own."""
    return request([b"X-Trace: %d" % number], "Content-Length", 5)


def test_heads_that_come_once_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "_MOST_SEEN", 20)
    reading = Requests()
    for number in range(100):
        assert reading.read(traced(number))[0][0][2]
        assert len(reading.known._seen) <= 20
    assert reading.known._known == reading.known._former == {}


def test_no_more_heads_are_kept_than_there_is_memory_for_and_those_that_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(templates, "_MOST", 10 * (2 * templates._LINE + templates._WORKED_OUT))
    reading = Requests()
    for number in range(100):
        reading.learn(traced(number))
        assert reading.feed(traced(0))
        assert reading.feed(traced(number))
        assert len(reading.known._known) <= 10
        assert len(reading.known._former) <= 10
    assert not reading.feed(traced(50))


def test_heads_of_many_lines_take_the_place_of_more() -> None:
    reading, lines = Requests(), [b"X%d:" % number for number in range(120)]
    for number in range(300):
        reading.learn(request([b"X-Trace: %d" % number, *lines], "Content-Length", 5))
    assert len(reading.known._known) + len(reading.known._former) < 280


def test_a_head_is_known_on_other_connections() -> None:
    first = Requests()
    first.learn(traced(1))
    second = Requests(first.known)
    assert second.feed(traced(1))
    assert not second.feed(traced(2))
    assert second.feed(traced(1))


@pytest.mark.parametrize("whence", [("192.0.2.2", False), ("192.0.2.1", True)])
def test_a_head_that_comes_from_elsewhere_is_another(whence: Whence) -> None:
    first = Requests()
    first.learn(traced(1))
    other = Requests(first.known, whence)
    other.learn(traced(1))
    assert other.reader._head is not None
    (kept,) = (head for key, (head, _) in first.known._known.items() if key[0] == HERE)
    assert other.reader._head.memo is not kept.memo


def test_what_is_known_of_a_head_is_there_though_the_body_comes_in_pieces() -> None:
    reading = Requests()
    reading.learn(traced(1))
    (known,) = reading.known._known.values()
    wire = traced(1)
    assert not reading.feed(wire[:-2])
    assert reading.reader._head is not None
    assert reading.reader._head.memo is known[0].memo is not None
    reading.feed(wire[-2:])
    assert reading.known._known == {next(iter(reading.known._known)): known}


# that it changes nothing


@given(lines=OTHER_LINES, name=NAMES, place=st.integers(0, 9), lengths=st.tuples(*[st.integers(0, 6000)] * 2))
def test_requests_that_differ_in_their_length(
    lines: list[bytes], name: str, place: int, lengths: tuple[int, int]
) -> None:
    reading, fresh = Requests(), Requests()
    reading.learn(request(lines, name, lengths[0], place))
    if reading.is_open():
        second = request(lines, name, lengths[1], place)
        assert reading.read(second) == fresh.read(second)


IDS = st.sampled_from(
    [b"7", b"a.b:c_d-E", b"x" * 127, b"x" * 128, b"x" * 129, b"", b" ", b"a b", b"\xff", b'"q"', b"a\tb"]
)


@given(
    lines=OTHER_LINES,
    places=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    names=st.tuples(NAMES, st.sampled_from(["X-Request-ID", "x-request-id", "X-REQUEST-Id"])),
    ids=st.tuples(IDS, IDS),
    lengths=st.tuples(*[st.integers(0, 300)] * 2),
)
def test_requests_that_differ_in_their_length_and_their_id(
    lines: list[bytes],
    places: tuple[int, int],
    names: tuple[str, str],
    ids: tuple[bytes, bytes],
    lengths: tuple[int, int],
) -> None:
    reading, fresh, found = Requests(), Requests(), []
    for id, length in zip(ids, lengths, strict=True):
        named = lines.copy()
        named.insert(places[0] % (len(lines) + 1), b"%s: %s" % (names[1].encode(), id))
        found.append(request(named, names[0], length, places[1]))
    reading.learn(found[0])
    if reading.is_open():
        assert reading.read(found[1]) == fresh.read(found[1])


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_head_with_another_id_is_taken_without_the_parser(place: int) -> None:
    def named(id: bytes) -> bytes:
        return request([b"Accept: */*", b"X-Request-ID: " + id, b"User-Agent: x"], "Content-Length", 5, place)

    reading = Requests()
    reading.learn(named(b"one"))
    assert reading.feed(named(b"two:2"))
    assert reading.feed(named(b"x" * 128))
    assert not reading.feed(named(b"x" * 129))
    assert not reading.feed(named(b"not one"))
    assert Requests(reading.known).read(named(b"two:2")) == Requests().read(named(b"two:2"))


def test_a_head_with_two_ids_is_parsed_each_time() -> None:
    reading, twice = Requests(), request([b"X-Request-ID: a", b"X-Request-ID: b"], "Content-Length", 5)
    for _ in range(4):
        assert not reading.feed(twice)


@given(lines=OTHER_LINES, name=NAMES, length=st.integers(1, 60), source=SOURCES)
@settings(max_examples=600)
def test_any_bytes_behind_a_request(lines: list[bytes], name: str, length: int, source: random.Random) -> None:
    reading, fresh = Requests(), Requests()
    reading.learn(request(lines, name, length))
    if not reading.is_open():
        return
    second = mutated(source, [request(lines, name, source.randint(0, 120)), *REQUESTS[:1]], REQUEST_TOKENS)
    cut = source.choice([len(second), source.randint(0, len(second))])
    assert reading.read(second[:cut]) == fresh.read(second[:cut])
    assert reading.read(second[cut:]) == fresh.read(second[cut:])


@given(length=st.integers(1, 9), source=SOURCES)
@settings(max_examples=1000)
def test_reads_in_a_row(length: int, source: random.Random) -> None:
    """Whatever comes before, a request is only taken so where one can begin."""
    reading, parsing = Requests(), Requests()
    for _ in range(source.randint(2, 6)):
        whole = request([], "Content-Length", length)
        at = source.randint(0, len(whole))
        piece = source.choice([whole, whole, whole[:at], whole[at:], b"\r", b"\n", b"\r\n", b"x"])
        parsing.reader._known = KnownHeads()
        assert reading.read(piece) == parsing.read(piece)


@pytest.mark.parametrize(
    "digits", [b"+2", b"0x2", b"2_", b" 2", b"2 ", b"-2", b"2.", b"", b"\xb2", b"0" * 18 + b"2", b"3", b"1"]
)
def test_a_length_that_is_another(digits: bytes) -> None:
    reading, fresh = Requests(), Requests()
    like = request([], "Content-Length", 2)
    reading.learn(like)
    odd = like.replace(b": 2\r", b": " + digits + b"\r")
    assert reading.read(odd) == fresh.read(odd)


def test_an_empty_body_is_none() -> None:
    reading, fresh = Requests(), Requests()
    reading.learn(request([], "Content-Length", 2))
    reading.seen.pieces.clear()
    nothing = request([], "Content-Length", 0)
    assert reading.read(nothing) == fresh.read(nothing)
    assert reading.seen.pieces == []


def test_a_body_that_is_too_large() -> None:
    reading, fresh = Requests(), Requests()
    reading.learn(request([], "Content-Length", 2))
    too_much = request([], "Content-Length", LIMITS.body + 1)
    assert reading.read(too_much) == fresh.read(too_much)
    assert reading.reader.error is not None


def test_a_request_behind_half_an_empty_line() -> None:
    reading = Requests()
    reading.learn(request([], "Content-Length", 5))
    reading.read(b"\r")
    assert reading.read(request([], "Content-Length", 5))[1] is not None


def test_a_request_within_the_body_of_another() -> None:
    reading, inner = Requests(), request([], "Content-Length", 5)
    reading.learn(inner)
    reading.read(request([], "Content-Length", 100 + len(inner))[: -len(inner)])
    requests = reading.seen.requests
    reading.feed(inner)
    assert [(len(body), whole) for _, body, whole in requests] == [(100 + len(inner), True)]


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_request_behind_the_last_one(version: bytes) -> None:
    known, last = Requests().known, b"GET / HTTP/%b\r\nHost: h\r\nConnection: close\r\n\r\n" % version
    Requests(known).learn(traced(1))
    reading, fresh = Requests(known), Requests()
    assert reading.read(last) == fresh.read(last)
    assert reading.read(traced(1)) == fresh.read(traced(1))
    assert reading.reader.error is not None


def test_the_rest_of_a_head_is_no_head() -> None:
    reading, whole = Requests(), request([], "Content-Length", 5)
    for _ in range(3):
        reading.read(whole[:2])
        assert reading.read(whole[2:])[0][0][2]
    assert reading.read(whole[2:])[1] is not None


@pytest.mark.parametrize("number", range(0, len(REQUESTS), 50))
def test_the_corpus_behind_a_request_and_behind_itself(number: int) -> None:
    for wire in REQUESTS[number : number + 50]:
        for first in (request([], "Content-Length", 5), wire):
            reading, fresh = Requests(), Requests()
            reading.learn(first)
            if reading.is_open():
                assert reading.read(wire) == fresh.read(wire)


@given(
    lines=OTHER_LINES,
    name=NAMES,
    place=st.integers(0, 9),
    lengths=st.tuples(*[st.integers(0, 300)] * 2),
    methods=st.tuples(*[st.sampled_from([b"GET", b"POST", b"HEAD"])] * 2),
)
def test_answers_that_differ_in_their_length(
    lines: list[bytes], name: str, place: int, lengths: tuple[int, int], methods: tuple[bytes, bytes]
) -> None:
    reader = ResponseReader(LIMITS)
    found = answer_in(reader, methods[0], answer(lines, name, lengths[0], place))
    if found != ["bad"] and reader.whole and reader.reusable and not reader.extra:
        found = answer_in(reader, methods[0], answer(lines, name, lengths[0], place))
    if found != ["bad"] and reader.whole and reader.reusable and not reader.extra:
        second = answer(lines, name, lengths[1], place)
        assert answer_in(reader, methods[1], second) == answer_in(ResponseReader(LIMITS), methods[1], second)


@given(length=st.integers(1, 60), source=SOURCES)
@settings(max_examples=600)
def test_any_bytes_behind_an_answer(length: int, source: random.Random) -> None:
    reader = ResponseReader(LIMITS)
    for _ in range(2):
        answer_in(reader, b"GET", answer([b"server: uvicorn"], "content-length", length))
    like = answer([b"server: uvicorn"], "content-length", source.randint(0, 120))
    second = mutated(source, [like, source.choice(ANSWERS)], ANSWER_TOKENS)
    assert answer_in(reader, b"GET", second) == answer_in(ResponseReader(LIMITS), b"GET", second)


def test_an_answer_behind_half_a_head() -> None:
    reader, fresh, like = ResponseReader(LIMITS), ResponseReader(LIMITS), answer([], "content-length", 5)
    for _ in range(2):
        answer_in(reader, b"GET", like)
    for each in (reader, fresh):
        each.begin(b"GET", upgrade=False, inform=None)
        each.feed(b"HTTP/1.1 200 OK\r\nx-note: ")
        each.feed(like)
    assert reader.head == fresh.head
    assert reader.head is not None
    assert reader.head.get(b"x-note") == b"HTTP/1.1 200 OK"


def test_an_answer_that_closes_is_no_template() -> None:
    reader = ResponseReader(LIMITS)
    answer_in(reader, b"GET", answer([], "content-length", 5))
    closing = answer([b"connection: close"], "content-length", 5)
    answer_in(reader, b"GET", closing)
    assert reader._template.match(closing) is None


@pytest.mark.parametrize(("digits", "passes"), [(b"02", True), (b"002", False)])
def test_the_limits_of_a_head_are_kept(digits: bytes, passes: bool) -> None:
    like = request([], "Content-Length", 2)
    room = len(b"Hosth") + len(b"Content-Length2") + 2 * 4 + 1
    reading = Requests(limits=Limits(head=room))
    reading.learn(like)
    error = reading.read(like.replace(b": 2", b": " + digits))[1]
    assert (error is None) is passes


@pytest.mark.parametrize(("id", "passes"), [(b"of", True), (b"off", False)])
def test_the_limits_of_a_head_are_kept_with_another_id(id: bytes, passes: bool) -> None:
    like = request([b"X-Request-ID: a"], "Content-Length", 2)
    room = len(b"Hosth") + len(b"Content-Length2") + len(b"X-Request-IDa") + 3 * 4 + 1
    reading = Requests(limits=Limits(head=room))
    reading.learn(like)
    error = reading.read(like.replace(b": a", b": " + id))[1]
    assert (error is None) is passes


@pytest.mark.parametrize(("digits", "passes"), [(b"02", True), (b"002", False)])
def test_the_limits_of_an_answer_are_kept(digits: bytes, passes: bool) -> None:
    like = answer([], "content-length", 2)
    reader = ResponseReader(Limits(answer_head=len(b"content-length2") + 4 + 1))
    for _ in range(2):
        answer_in(reader, b"GET", like)
    assert (answer_in(reader, b"GET", like.replace(b": 2", b": " + digits)) != ["bad"]) is passes


def test_nothing_is_kept_of_heads_that_come_once() -> None:
    reading = Requests()
    reading.read(request([], "Content-Length", 2))
    assert reading.reader._head is not None
    assert reading.reader._head.memo is None
