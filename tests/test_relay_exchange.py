"""One exchange, in memory: a real channel in front, a real agent behind, the test at both ends."""

import json
from typing import Any

import pytest
from _memory import OK, House, caller_of
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionRefusedError as Refused
from twisted.logger import LogEvent, formatEvent

from vllmproxy.errors import AuthError, Forbidden, StoreDown
from vllmproxy.http1.client import ClientConnection
from vllmproxy.http1.message import ResponseHead
from vllmproxy.http1.stream import Stream
from vllmproxy.keys.credentials import Credential
from vllmproxy.keys.gate import ANONYMOUS
from vllmproxy.keys.key import hash_key
from vllmproxy.relay.bill import Bill
from vllmproxy.relay.passing import Passing
from vllmproxy.testing import MemoryTransport

GET = b"GET /vllm/v1/models HTTP/1.1\r\nHost: proxy\r\n\r\n"
POST = b"POST /vllm/v1/chat/completions HTTP/1.1\r\nHost: proxy\r\nContent-Length: 5\r\n\r\n"
WEBSOCKET = b"GET /vllm/v1/realtime HTTP/1.1\r\nHost: proxy\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def error_of(house: House) -> Any:
    """Return the JSON error that the client was sent."""
    head, _, body = house.client.sent.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    return json.loads(body)["error"]


def test_there_and_back() -> None:
    house = House(authorization=b"authorization: Bearer up\r\n")
    house.client.receive(POST.replace(b"Host", b"Authorization: Bearer sk-caller\r\nX-Request-Id: r1\r\nHost") + b"he")
    (wire,) = house.wires
    head, _, body = wire.sent.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nhost: gpu1:8000\r\n")
    assert b"content-length: 5\r\n" in head
    assert b"sk-caller" not in head
    assert b"authorization: Bearer up\r\n" in head
    assert house.gate.seen == [Credential("present", hash_key(b"sk-caller"))]
    house.client.receive(b"llo")
    assert body == b"he"
    assert wire.sent.endswith(b"\r\n\r\nhello")
    house.clock.advance(3)
    wire.receive(STREAM + b"5\r\ndata:\r\n")
    assert house.client.sent.endswith(b"\r\n\r\n5\r\ndata:\r\n")
    assert b"x-request-id: r1\r\nvia: 1.1 vllmproxy\r\n" in house.client.take()
    wire.receive(b"3\r\n x\n\r\n0\r\n\r\n")
    assert house.client.take() == b"3\r\n x\n\r\n0\r\n\r\n"
    record = house.record
    assert (record.status, record.ended, record.error) == (200, "done", None)
    assert (record.bytes_in, record.bytes_out) == (5, 8)
    assert (record.request_id, record.route, record.method) == ("r1", "/v1/chat/completions", "POST")
    assert (record.time_to_first_byte, record.duration) == (3, 3)
    assert house.observer.in_flight == 0
    house.client.receive(GET)
    assert len(house.wires) == 1


@pytest.mark.parametrize("url", ["http://gpu1:8000", "http://gpu1:8000/v1"])
def test_the_raw_target_is_kept(url: str) -> None:
    house = House(url)
    house.client.receive(b"GET /vllm/chat/a%20b%C3%A9/?q=1&q=%31&&x=//../;%2f HTTP/1.1\r\nHost: h\r\n\r\n")
    assert house.wires[0].sent.startswith(b"GET /v1/chat/a%20b%C3%A9/?q=1&q=%31&&x=//../;%2f HTTP/1.1\r\n")


@pytest.mark.parametrize("path", [b"/vllm/../x", b"/vllm//x", b"/vllm/v1/%2e%2e/sleep", b"/vllm/a%2fb", b"/vllm/a;b"])
def test_an_unsafe_path_is_refused_before_the_key_is_looked_at(path: bytes) -> None:
    house = House()
    house.client.receive(b"GET %s HTTP/1.1\r\nHost: h\r\n\r\n" % path)
    assert house.client.sent.startswith(b"HTTP/1.1 400 ")
    assert not house.gate.seen
    assert not house.wires
    assert house.record.ended == "refused"


@pytest.mark.parametrize("where", ["identify", "route", "late"])
def test_a_refused_upload_costs_one_answer(where: str) -> None:
    house = House()
    error = AuthError("no") if where == "identify" else Forbidden("no") if where == "route" else StoreDown("no")
    house.gate.hold = where == "late"
    if where == "route":
        house.gate.route_error = error
    else:
        house.gate.error = error
    upload = POST.replace(b"Content-Length: 5", b"Content-Length: 10000000000\r\nExpect: 100-continue")
    house.client.receive(upload)
    if where == "late":
        assert not house.client.sent
        house.gate.waiting[0].errback(error)
    assert house.client.sent.startswith(b"HTTP/1.1 %d " % error.status)
    assert b"100 Continue" not in house.client.sent
    assert b"connection: close\r\n" in house.client.sent
    assert error_of(house)["message"] == "no"
    assert not house.wires
    assert (house.record.ended, house.record.status) == ("refused", error.status)


def test_a_fault_of_the_store_is_not_the_callers_to_read(logged_errors: list[LogEvent]) -> None:
    house = House()
    house.gate.hold = True
    house.client.receive(GET)
    house.gate.waiting[0].errback(ValueError("sk-secret at 10.0.0.1"))
    assert house.client.sent.startswith(b"HTTP/1.1 500 ")
    assert b"sk-secret" not in house.client.sent
    assert house.record.ended == "refused"
    assert len(logged_errors) == 1
    logged_errors.clear()


def test_a_fault_of_ours_at_a_request_is_not_the_one_s_before(logged_errors: list[LogEvent]) -> None:
    house = House()
    house.client.receive(GET + GET + GET)
    house.gate.error = ValueError("a fault")
    house.wires[0].receive(OK)
    house.turn()
    first, *others = house.client.take().split(b"HTTP/1.1 ")[1:]
    assert [first[:3], *(each[:3] for each in others)] == [b"200", b"500", b"500"]
    assert sorted(record.ended for record in house.observer.records) == ["done", "upstream_failed", "upstream_failed"]
    assert house.observer.in_flight == 0
    assert len(logged_errors) == 2
    logged_errors.clear()


def test_continue_is_said_when_the_key_is_good() -> None:
    house = House()
    house.gate.hold = True
    house.client.receive(POST.replace(b"Host", b"Expect: 100-continue\r\nHost"))
    assert not house.client.sent
    house.gate.waiting[0].callback(ANONYMOUS)
    assert house.client.take() == b"HTTP/1.1 100 Continue\r\n\r\n"
    house.client.receive(b"hello")
    assert house.wires[0].sent.endswith(b"\r\n\r\nhello")
    assert b"expect" not in house.wires[0].sent.lower()


def test_a_preflight_needs_no_key() -> None:
    house = House()
    house.gate.error = AuthError("no")
    house.client.receive(GET.replace(b"GET", b"OPTIONS"))
    assert house.wires[0].sent.startswith(b"OPTIONS /v1/models ")
    assert not house.gate.seen


FAILURES = {
    "refused": (503, None),
    "fin": (502, lambda wire: wire.close_from_peer()),
    "rst": (502, lambda wire: wire.reset_from_peer()),
    "part of a head": (502, lambda wire: (wire.receive(b"HTTP/1.1 200 OK\r\nX"), wire.close_from_peer())),
    "garbage": (502, lambda wire: wire.receive(b"<html>")),
    "unasked 101": (502, lambda wire: wire.receive(SWITCH)),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("request_bytes", [GET, POST + b"hello", POST])
def test_no_answer(name: str, request_bytes: bytes, logged_errors: list[LogEvent]) -> None:
    status, happens = FAILURES[name]
    house = House()
    if happens is None:
        house.endpoint.refuse = Refused()
    house.client.receive(request_bytes)
    if happens is not None:
        happens(house.wires[0])
    house.turn()
    assert house.client.sent.startswith(b"HTTP/1.1 %d " % status)
    assert error_of(house)["code"] == str(status)
    for secret in (b"gpu1", b":8000", b"Traceback", b"<html"):
        assert secret not in house.client.sent
    assert (house.record.ended, house.record.status) == ("upstream_failed", status)
    assert all(wire.ending == "abort" or wire.lost for wire in house.wires)


@pytest.mark.parametrize("where", ["connect", "made", "send"])
@pytest.mark.parametrize("admitted", ["at once", "later"])
def test_a_fault_of_ours_on_the_way_to_the_upstream(
    where: str, admitted: str, monkeypatch: pytest.MonkeyPatch, logged_errors: list[LogEvent]
) -> None:
    house = House()
    house.gate.hold = admitted == "later"

    def fails(*_: object) -> None:
        raise ValueError("gpu1:8000 is odd")

    if where == "connect":
        monkeypatch.setattr(house.endpoint, "connect", fails)
    elif where == "made":
        monkeypatch.setattr(MemoryTransport, "registerProducer", fails)
    else:
        monkeypatch.setattr(ClientConnection, "write", fails)
    house.client.receive(POST + b"hello")
    if admitted == "later":
        house.gate.waiting[0].callback(ANONYMOUS)
    house.turn()
    assert house.client.sent.startswith(b"HTTP/1.1 502 ")
    assert b"gpu1" not in house.client.sent
    assert (house.record.ended, house.record.status) == ("upstream_failed", 502)
    assert all(wire.lost for wire in house.wires)
    assert house.agent.is_idle
    assert len(logged_errors) == 1
    logged_errors.clear()


def test_a_fault_of_ours_on_a_connection_that_is_used_again(
    monkeypatch: pytest.MonkeyPatch, logged_errors: list[LogEvent]
) -> None:
    house = House()
    house.client.receive(GET)
    house.wires[0].receive(OK)
    house.client.take()
    with monkeypatch.context() as patch:
        patch.delattr(ClientConnection, "write")
        house.client.receive(GET)
    assert house.client.take().startswith(b"HTTP/1.1 502 ")
    house.client.receive(GET)
    house.wires[1].receive(OK)
    assert house.client.sent.startswith(b"HTTP/1.1 200 ")
    house.turn()
    assert house.wires[0].lost
    assert len(logged_errors) == 1
    logged_errors.clear()


@pytest.mark.parametrize(("where", "sent"), [("head", b"HTTP/1.1 500 "), ("body", b"")])
def test_a_fault_of_ours_with_the_answer(
    where: str, sent: bytes, monkeypatch: pytest.MonkeyPatch, logged_errors: list[LogEvent]
) -> None:
    house = House()
    monkeypatch.delattr(Stream, "set_producer") if where == "body" else monkeypatch.delattr(ResponseHead, "get")
    house.client.receive(GET)
    house.wires[0].receive(STREAM + b"5\r\nhello\r\n")
    house.turn()
    assert house.client.sent[:13] == sent
    assert house.client.lost == (where == "body")
    assert house.wires[0].lost
    assert house.record.ended == "upstream_failed"
    assert house.observer.in_flight == 0
    assert len(logged_errors) == 1
    logged_errors.clear()


def test_an_answer_that_is_late() -> None:
    house = House()
    house.client.receive(POST)
    house.clock.advance(20)  # the client's own time
    house.client.receive(b"hello")
    house.clock.advance(599)
    assert not house.client.sent
    house.clock.advance(3)
    assert house.client.sent.startswith(b"HTTP/1.1 504 ")
    assert house.wires[0].ending == "abort"
    assert house.record.ended == "upstream_failed"
    house.turn()
    house.client.take()
    house.client.receive(GET)
    house.wires[1].receive(OK)
    assert house.client.sent.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("framing", [b"Content-Length: 10", b"Transfer-Encoding: chunked"])
def test_a_truncated_answer_ends_in_a_reset(clean: bool, framing: bytes) -> None:
    house = House()
    house.client.receive(GET)
    wire = house.wires[0]
    wire.receive(b"HTTP/1.1 200 OK\r\n%s\r\n\r\n2\r\nok\r\n" % framing)
    wire.close_from_peer() if clean else wire.reset_from_peer()
    assert house.client.ending == "abort"
    assert not house.client.sent.endswith(b"0\r\n\r\n")
    assert (house.record.ended, house.record.error) == ("upstream_failed", "truncated")


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("when", ["admitting", "connecting", "waiting", "uploading", "answering"])
def test_a_client_that_goes_takes_its_request_along(how: str, when: str) -> None:
    house = House()
    house.gate.hold = when == "admitting"
    house.endpoint.hold = when == "connecting"
    house.client.receive(POST if when == "uploading" else POST + b"hello")
    if when == "answering":
        house.wires[0].receive(STREAM + b"2\r\nok\r\n")
    (house.client.close_from_peer if how == "fin" else house.client.reset_from_peer)()
    house.turn()
    assert all(wire.lost for wire in house.wires)
    assert house.endpoint.cancelled == int(when == "connecting")
    assert (house.record.ended, house.observer.in_flight) == ("client_gone", 0)
    if when == "admitting":
        house.gate.waiting[0].callback(ANONYMOUS)
        assert not house.wires
        assert len(house.observer.records) == 1


def test_many_that_leave_at_once_are_told_of_before_they_are_settled(logged_errors: list[LogEvent]) -> None:
    house = House()
    clients = [house.connect() for _ in range(3)]
    for client in clients:
        client.receive(GET)
    for wire in house.wires:
        wire.receive(STREAM + b"5\r\nhello\r\n")
    for client in clients[:2]:
        client.reset_from_peer()
    assert [wire.ending for wire in house.wires] == ["abort", "abort", ""]
    assert not house.observer.records
    house.observer.finished = lambda _: 1 / 0  # type: ignore[assignment, method-assign]
    house.turn()
    assert len(logged_errors) == 2
    logged_errors.clear()
    del house.observer.finished
    clients[2].reset_from_peer()
    Deferred.fromCoroutine(house.relay.close())  # which waits for no turn
    assert [record.ended for record in house.observer.records] == ["client_gone"]


def test_an_upload_that_stops_is_too_slow() -> None:
    house = House()
    house.client.receive(POST)
    house.clock.pump([1] * 100)
    assert house.client.sent.startswith(b"HTTP/1.1 408 ")
    assert house.wires[0].lost
    assert (house.record.ended, house.record.error) == ("refused", "too_slow")


def test_a_broken_upload_is_one_request_and_one_record() -> None:
    house = House()
    chunked = POST.replace(b"Content-Length: 5", b"Transfer-Encoding: chunked")
    house.client.receive(chunked + b"5\r\nhello\r\n")
    house.client.receive(b"zz\r\n")
    house.turn()
    assert house.client.sent.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert house.wires[0].lost
    assert not house.wires[0].sent.endswith(b"0\r\n\r\n")
    assert (house.record.status, house.record.ended) == (400, "refused")
    assert house.observer.in_flight == 0


def test_a_client_that_does_not_read_stops_the_upstream() -> None:
    house = House()
    house.client.receive(GET)
    (wire,) = house.wires
    house.client.stall()
    wire.receive(b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + b"x" * 100_000)
    assert not wire.reading
    house.client.drain()
    assert wire.reading
    wire.receive(b"x" * 100_000)
    house.turn()
    assert house.record.bytes_out == 200_000


def test_the_last_piece_to_a_client_that_does_not_read_leaves_the_upstream_free_for_others() -> None:
    """The connection goes back to the pool as its answer ends: pausing it then would stop somebody else's answer."""
    house = House()
    house.client.receive(GET)
    (wire,) = house.wires
    house.client.stall()
    wire.receive(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 60_000)
    assert wire.reading
    wire.receive(b"x" * 40_000)
    assert house.record.ended == "done"
    other = house.connect()
    other.receive(GET)
    assert len(house.wires) == 1
    wire.receive(OK)
    assert other.sent.endswith(b"ok")


def test_an_upstream_that_does_not_read_stops_the_client() -> None:
    house = House()
    house.client.receive(POST.replace(b"Length: 5", b"Length: 200000"))
    (wire,) = house.wires
    wire.stall()
    house.client.receive(b"x" * 100_000)
    assert not house.client.reading
    wire.drain()
    assert house.client.reading
    house.client.receive(b"x" * 100_000)
    wire.receive(OK)
    assert house.record.bytes_in == 200_000


@pytest.mark.parametrize("answer", [b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno"])
def test_an_early_answer_reaches_a_client_that_still_sends(answer: bytes) -> None:
    house = House()
    house.client.receive(POST.replace(b"Length: 5", b"Length: 200000") + b"x" * 1000)
    house.wires[0].receive(answer)
    house.turn()
    assert house.client.sent.startswith(b"HTTP/1.1 413 Too Large\r\n")
    assert house.client.sent.endswith(b"no")
    assert b"connection: close\r\n" in house.client.sent
    assert house.wires[0].lost
    house.client.receive(b"x" * 100_000)
    assert not house.client.ending
    assert (house.record.ended, house.record.status) == ("done", 413)


@pytest.mark.parametrize(
    ("key", "why"),
    [
        (b"", "it wants a key"),
        (b"authorization: Bearer sk-of-the-upstream\r\n", "it does not accept the key that the proxy has for it"),
    ],
)
def test_an_upstream_that_refuses_the_proxys_key_is_told_of_once(
    key: bytes, why: str, logged_errors: list[LogEvent]
) -> None:
    house = House(authorization=key)
    for _ in range(3):
        house.client.receive(GET)
        house.wires[0].receive(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\n{}")
        assert house.client.take().startswith(b"HTTP/1.1 401 Unauthorized\r\n")
    (event,) = logged_errors
    assert formatEvent(event) == f"http://gpu1:8000 answers 401: {why} (--upstream-key-file, VLLM_API_KEY)"
    logged_errors.clear()


def test_informational_answers_pass() -> None:
    house = House()
    house.client.receive(GET)
    house.wires[0].receive(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
    assert house.client.take().startswith(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n")
    house.wires[0].receive(OK)
    assert house.client.sent.startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_tunnel_both_ways() -> None:
    house = House()
    house.client.receive(WEBSOCKET + b"early")
    (wire,) = house.wires
    assert b"upgrade: websocket" in wire.sent
    assert b"early" not in wire.take()
    wire.receive(SWITCH + b"hello")
    house.turn()
    assert house.client.take().endswith(b"\r\n\r\nhello")
    assert wire.take() == b"early"
    house.client.receive(b"\x81")
    assert wire.take() == b"\x81"
    wire.stall()
    house.client.receive(b"x" * 100_000)
    assert not house.client.reading
    wire.drain()
    assert house.client.reading
    house.client.stall()
    wire.receive(b"y" * 100_000)
    assert not wire.reading
    house.client.drain()
    assert wire.reading
    house.client.close_from_peer()
    assert wire.write_closed
    wire.receive(b"bye")
    wire.close_from_peer()
    house.turn()
    house.turn()
    assert house.client.sent.endswith(b"bye")
    assert (house.record.ended, house.record.status) == ("done", 101)
    assert (house.record.bytes_in, house.record.bytes_out) == (100_006, 100_008)
    assert house.client.lost
    assert wire.lost


@pytest.mark.parametrize("what", ["waiting", "answering", "tunnelling"])
def test_what_is_cut_off_at_the_end_is_not_a_client_that_left(what: str) -> None:
    house = House()
    house.client.receive(WEBSOCKET if what == "tunnelling" else GET)
    if what != "waiting":
        house.wires[0].receive(SWITCH if what == "tunnelling" else STREAM + b"5\r\nhello\r\n")
    house.relay.end()
    house.factory.close()
    house.turn()
    assert house.wires[0].lost
    assert (house.record.ended, house.record.error) == ("refused", "stopping")


@pytest.mark.parametrize(("side", "why"), [("client", "client_gone"), ("upstream", "upstream_failed")])
def test_a_tunnel_that_is_reset(side: str, why: str) -> None:
    house = House()
    house.client.receive(WEBSOCKET)
    (wire,) = house.wires
    wire.receive(SWITCH)
    (house.client if side == "client" else wire).reset_from_peer()
    house.turn()
    assert (wire if side == "client" else house.client).ending == "abort"
    assert house.record.ended == why


@pytest.mark.parametrize("seconds", ["1e306", "1e308", "-1", "1e999"])
def test_an_absurd_usage_passes(seconds: str) -> None:
    house = House()
    body = b'{"text":"","usage":{"type":"duration","seconds":%b}}' % seconds.encode()
    house.client.receive(POST + b"hello")
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    house.wires[0].receive(head % len(body) + body)
    assert house.client.sent.endswith(body)
    assert house.record.ended == "done"


def test_what_cannot_be_counted_keeps_no_place(monkeypatch: pytest.MonkeyPatch, logged_errors: list[LogEvent]) -> None:
    def fail(*_: Any) -> None:
        raise OverflowError

    house = House()
    house.gate.caller = caller_of(max_parallel_requests=1)
    monkeypatch.setattr(Bill, "_event", fail)
    for _ in range(2):
        house.client.receive(POST + b"hello")
        house.wires[0].receive(OK)
        assert house.client.take().startswith(b"HTTP/1.1 200 OK\r\n")
    assert len(house.observer.records) == 2
    assert house.relay.line.places.taken == 0
    assert len(logged_errors) == 2
    logged_errors.clear()


@pytest.mark.parametrize("reads", [1, 2])
def test_a_reader_that_fails_leaves_nothing_waiting(
    reads: int, monkeypatch: pytest.MonkeyPatch, logged_errors: list[LogEvent]
) -> None:
    def fail(*_: Any) -> None:
        raise OverflowError

    house = House()
    monkeypatch.setattr(Passing, "read", fail)
    house.client.receive(POST + b"hello")
    for data in (OK,) if reads == 1 else (OK[:-1], OK[-1:]):
        house.wires[0].receive(data)
    assert house.client.ending == "abort"
    assert house.record.ended == "upstream_failed"
    assert house.relay.line.places.taken == 0
    assert not house.wires[0].ending  # it may have its next request already
    assert len(logged_errors) == 1
    logged_errors.clear()


@pytest.mark.parametrize("url", ["http://gpu1:8000", "http://gpu1:8000/gpu1", "http://gpu1:8000/v1", "http://h/a/v1"])
def test_a_route_has_the_same_name_whatever_the_upstreams_path(url: str) -> None:
    house = House(url)
    house.client.receive(GET if not url.endswith("/v1") else GET.replace(b"/v1/", b"/"))
    house.wires[0].receive(OK)
    assert house.record.route == "/v1/models"


def test_a_route_that_nobody_knows_is_named_as_it_is_forwarded() -> None:
    house = House("http://gpu1:8000/gpu1")
    house.client.receive(GET.replace(b"models", b"%7Bnew%7D").replace(b"/v1", b"/new"))
    house.wires[0].receive(OK)
    assert house.record.route == "/gpu1/new/%7Bnew%7D"
