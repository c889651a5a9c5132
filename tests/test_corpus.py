"""Every case of ``tests/corpus/wire.toml`` against a real proxy with a counting upstream, and at every split point."""

import json
import re
from contextlib import suppress

import pytest
from _asking import until
from _corpus import KEY, MODELS_KEY, AnswerCase, Forwarded, RequestCase, load
from _memory import Upstream as MemoryUpstream
from _memory import Wire as MemoryWire
from _raw import OK, PATIENCE, Message, Upstream, Wire, connect
from _service import MASTER_KEY, Twistd
from _spellings import spellings
from _wire import ask
from _witness import Witness, answers_in, converse

from vllmproxy.keys.routes import KNOWN_ROUTES, group_of

PROXY_OPTIONS = ("--max-inspected-body", "65536", "--store", "memory:")

CORPUS = load()
REQUESTS = {case.id: case for case in CORPUS.requests}
ANSWERS = {case.id: case for case in CORPUS.answers}
NEXT = b"GET /vllm/v1/models?next HTTP/1.1\r\nHost: proxy.test\r\nAuthorization: Bearer %s\r\n\r\n" % KEY.encode()
#: Wires up to here are cut at each of their bytes.
SPLIT = 600


@pytest.fixture(scope="module")
def service(scripted_proxy: Twistd) -> Twistd:
    """The proxy, with the corpus's two virtual keys."""
    for fields in ({"key": KEY}, {"key": MODELS_KEY, "models": ["m"]}):
        body = json.dumps(fields).encode()
        answer = ask(
            scripted_proxy, "/key/generate", "Content-Type: application/json", method="POST", body=body, key=MASTER_KEY
        )
        assert answer.status == 200, answer
    return scripted_proxy


def test_the_corpus_is_large_and_has_good_and_bad() -> None:
    assert len(REQUESTS) == len(CORPUS.requests) >= 250
    assert len(ANSWERS) == len(CORPUS.answers) >= 100
    assert sum(bool(case.forwarded) for case in CORPUS.requests) >= 50
    assert sum("whole" in case.allowed for case in CORPUS.answers) >= 30


# requests


def check_refusal(answer: Message, case: RequestCase) -> None:
    """Check a refusal of our own: its status, and an error object in it."""
    assert answer.status in case.status
    assert answer.get(b"content-type") == b"application/json"
    error = json.loads(answer.body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == str(answer.status)
    assert error["message"]


def check_forwarded(message: Message, wanted: Forwarded) -> None:
    """Check that a request is at the upstream as it was meant."""
    assert message.start == wanted.start + b" HTTP/1.1"
    assert message.body == wanted.body
    for pattern in wanted.has:
        assert re.search(b"(?im)" + pattern, message.head.replace(b"\r\n", b"\n")), pattern
    for pattern in wanted.lacks:
        assert not re.search(b"(?im)" + pattern, message.head.replace(b"\r\n", b"\n")), pattern


@pytest.mark.parametrize("id", REQUESTS)
def test_a_request(id: str, service: Twistd, upstream: Upstream) -> None:
    case, witness = REQUESTS[id], Witness()
    passes = 200 in case.status
    count = len(case.forwarded) + (not passes)
    bodiless = case.wire.startswith(b"HEAD ")

    def enough(heard: bytes) -> bool:
        return case.keeps and len(answers_in(heard, bodiless=bodiless)[0]) >= count

    with upstream.playing(witness):
        with connect(service) as client:
            heard, how = converse(client.sock, case.wire, enough, PATIENCE)
        with connect(service) as another:  # whatever it was, it took nothing down
            another.send(NEXT)
            assert another.message().status == 200
    answers, rest = answers_in(heard, bodiless=bodiless)
    assert (len(answers), rest) == (count, b""), heard[-300:]
    assert [answer.status for answer in answers[: len(case.forwarded)]] == [200] * len(case.forwarded)
    if not passes:
        check_refusal(answers[-1], case)
    if not case.keeps:
        assert how == "fin"
        assert answers[-1].get(b"connection") == b"close"
    assert len(witness.whole) == len(case.forwarded) + 1
    for message, wanted in zip(witness.whole, case.forwarded, strict=False):
        check_forwarded(message, wanted)
    assert witness.whole[-1].target == b"/v1/models?next"
    if not case.late or len(case.wire) < 4096:
        assert witness.partial == 0, witness.raw
    assert "Traceback" not in service.log


@pytest.mark.parametrize("id", [id for id, case in REQUESTS.items() if case.late and len(case.wire) <= SPLIT])
def test_a_body_that_breaks_behind_a_head_that_was_passed_on(id: str, service: Twistd, upstream: Upstream) -> None:
    case, witness = REQUESTS[id], Witness()
    head, blank, body = case.wire.partition(b"\r\n\r\n")
    with upstream.playing(witness), connect(service) as client:
        client.send(head + blank)
        until(lambda: witness.began)
        heard, how = converse(client.sock, body, lambda _: False, PATIENCE)
        until(lambda: bool(witness.endings))
    answers, rest = answers_in(heard)
    assert (len(answers), rest, how) == (1, b"", "fin")
    check_refusal(answers[0], case)
    assert (witness.whole, witness.endings) == ([], ["reset"])


def in_memory(id: str) -> bool:
    """Whether a case is the wire's own matter, and short: then it is cut at every byte."""
    case = REQUESTS[id]
    return (
        case.part in ("framing", "heads", "good") and len(case.wire) <= SPLIT and b"Bearer sk-models" not in case.wire
    )


@pytest.mark.parametrize("id", [id for id in REQUESTS if in_memory(id)])
def test_a_request_cut_anywhere(id: str) -> None:
    case = REQUESTS[id]
    for cut in range(len(case.wire)):
        wire = MemoryWire(answer=True)
        wire.feed_split(case.wire, cut)
        check_in_memory(case, wire)
    wire = MemoryWire(answer=True)
    wire.feed_split(case.wire, *range(1, len(case.wire)))
    check_in_memory(case, wire)


def check_in_memory(case: RequestCase, wire: MemoryWire) -> None:
    """Check what the channel made of a request; paths are the relay's, so here it is methods and bodies."""
    whole = [(method, body) for method, _, body, complete in wire.seen if complete]
    assert whole == [(each.start.partition(b" ")[0], each.body) for each in case.forwarded]
    if 200 not in case.status:
        assert wire.refused in case.status
        assert case.late or len(wire.streams) == len(case.forwarded)
        wire.feed(NEXT)
        assert len([each for each in wire.seen if each[3]]) == len(case.forwarded)


# targets


DENIED = sorted(
    {route.decode() for route in KNOWN_ROUTES if group_of(route) == "admin"}
    | {"/adapters", "/adapters/one", "/reset_mm_cache", "/update_weights", "/init_weight_transfer_engine"}
)


@pytest.mark.parametrize("path", DENIED)
def test_no_spelling_of_a_denied_route_reaches_the_upstream(path: str, service: Twistd, upstream: Upstream) -> None:
    witness, ways = Witness(), spellings(path)
    assert len(ways) >= 150
    with upstream.playing(witness):
        for way in ways:
            for method in ("POST", "GET"):
                answer = ask(service, "/vllm" + way, method=method, key=KEY)
                assert answer.status in (400, 403), (way, answer)
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert (upstream.connections, witness.bytes) == (0, 0)


# answers


def outcome_of(heard: bytes, how: str, method: bytes) -> tuple[str, Message | None]:
    """Return what became of an answer, as in the corpus, and the answer if it is whole."""
    answers, rest = answers_in(heard, bodiless=method == b"HEAD")
    if not answers:
        assert how in ("fin", "reset"), heard[-300:]
        return "cut", None
    (answer,) = answers
    assert rest == b""
    if answer.status == 502:
        assert json.loads(answer.body or b'{"error": {"code": "502"}}')["error"]["code"] == "502"  # HEAD has none
        return "502", answer
    return "whole", answer


def playing(case: AnswerCase, wires: list[Wire]) -> object:
    """Return the upstream's script: the case's bytes for the first request, a plain answer for any other."""

    def script(wire: Wire) -> None:
        wires.append(wire)
        wire.message(bodiless=True)
        if len(wires) == 1:
            with suppress(OSError):  # the proxy does not have to listen to the end
                wire.send(case.wire)
            if case.end == "fin":
                wire.half_close()
            elif case.end == "reset":
                wire.reset()
                return
            if case.discarded:
                wire.gone_at()
                return
            wire.message(bodiless=True)
        wire.send(OK)

    return script


@pytest.mark.parametrize("id", ANSWERS)
def test_an_answer(id: str, service: Twistd, upstream: Upstream) -> None:
    case = ANSWERS[id]
    wires: list[Wire] = []
    with upstream.playing(playing(case, wires)), connect(service) as client, connect(service) as another:
        asked = NEXT.replace(b"GET", case.method, 1)
        heard, how = converse(
            client.sock, asked, lambda data: bool(answers_in(data, bodiless=case.method == b"HEAD")[0]), PATIENCE
        )
        outcome, answer = outcome_of(heard, how, case.method)
        another.send(NEXT)
        assert another.message().body == b"ok"
    assert outcome in case.allowed
    if answer is not None and outcome == "whole":
        assert (answer.status, answer.body) == (case.status, case.body)
    assert upstream.connections == (2 if case.discarded else 1)
    assert "Traceback" not in service.log


@pytest.mark.parametrize("id", [id for id, case in ANSWERS.items() if len(case.wire) <= SPLIT])
def test_an_answer_cut_anywhere(id: str) -> None:
    case = ANSWERS[id]
    for cuts in [*([cut] for cut in range(len(case.wire) + 1)), list(range(1, len(case.wire)))]:
        upstream = MemoryUpstream()
        pending = upstream.ask(case.method)
        wire = upstream.wires[0]
        for start, end in zip([0, *cuts], [*cuts, len(case.wire)], strict=True):
            if end > start:
                wire.receive(case.wire[start:end])
        if case.end != "open":
            (wire.close_from_peer if case.end == "fin" else wire.reset_from_peer)()
        upstream.clock.advance(1)
        upstream.settle()
        if pending.error is not None:
            outcome = "502"
        else:
            outcome = {"answer_finished": "whole", "answer_failed": "cut"}[pending.receiver.events[-1]]
        assert outcome in case.allowed, cuts
        if outcome == "whole":
            assert pending.answer is not None
            assert (pending.answer.head.status, pending.whole) == (case.status, case.body), cuts
        assert wire.lost is case.discarded, cuts
