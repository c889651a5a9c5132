"""Requests that wait for their turn, in memory."""

import json
from ipaddress import ip_network
from typing import Any

from _memory import OK, House, caller_of
from test_relay_exchange import GET, POST, SWITCH, WEBSOCKET

from vllmproxy.errors import AuthError
from vllmproxy.http1.places import Places
from vllmproxy.relay.headers import TrustedProxies
from vllmproxy.relay.line import Line
from vllmproxy.relay.waits import Timeouts
from vllmproxy.testing import MemoryTransport


def house_with(most: int = 1, line: int = 0, per_client: int = 0, **shared: Any) -> House:
    return House(line=Line(Places(most, line=line, per_client=per_client)), **shared)


def status_of(client: MemoryTransport) -> int:
    return int(client.sent[9:12]) if client.sent else 0


def test_one_too_many_is_told_when_to_come_again() -> None:
    house = house_with(most=1)
    house.client.receive(GET)
    other = house.connect()
    other.receive(GET)
    head, _, body = other.sent.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1" in head
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("overloaded_error", "503")
    assert (house.record.ended, house.record.error) == ("refused", "overloaded_error")
    assert len(house.wires) == 1
    house.wires[0].receive(OK)
    other.take()
    other.receive(GET)
    house.wires[0].receive(OK)
    assert status_of(other) == 200
    assert house.relay.line.refused == {"no_place": 1}


def test_turns_come_in_order() -> None:
    house = house_with(most=2, line=3)
    clients = [house.client, *(house.connect() for _ in range(5))]
    for client in clients:
        client.receive(GET)
    assert status_of(clients[5]) == 503
    assert house.relay.line.refused == {"line_full": 1}
    assert len(house.wires) == 2
    for expected in range(3):
        house.wires[expected % 2].receive(OK)
        assert [status_of(client) for client in clients[:5]] == [200] * (expected + 1) + [0] * (4 - expected)
    assert (house.relay.line.places.taken, house.relay.line.places.waiting) == (2, 0)


def test_the_next_request_on_a_connection_finds_the_place_of_the_one_before() -> None:
    house = house_with(most=1)
    house.client.receive(GET + GET + GET)
    for _ in range(3):
        house.wires[0].receive(OK)
    assert [record.status for record in house.observer.records] == [200] * 3


def test_who_waits_too_long_is_told_so() -> None:
    house = house_with(most=1, line=1, timeouts=Timeouts(line=30))
    house.client.receive(GET)
    other = house.connect()
    other.receive(POST + b"hello")
    house.clock.pump([1] * 29)
    assert not other.sent
    house.clock.pump([1] * 3)
    assert status_of(other) == 503
    assert house.relay.line.refused == {"late": 1}
    assert house.relay.line.places.waiting == 0
    assert len(house.wires) == 1


def test_who_leaves_the_line_makes_room_in_it() -> None:
    house = house_with(most=1, line=1)
    house.client.receive(GET)
    leaver, stayer = house.connect(), house.connect()
    leaver.receive(GET)
    leaver.reset_from_peer()
    stayer.receive(GET)
    assert not stayer.sent
    house.wires[0].receive(OK)
    house.wires[0].receive(OK)
    assert status_of(stayer) == 200
    assert [record.ended for record in house.observer.records] == ["client_gone", "done", "done"]


def test_a_body_stays_where_it_is_while_its_request_waits() -> None:
    house = house_with(most=1, line=1)
    house.client.receive(GET)
    other = house.connect()
    other.receive(POST.replace(b"Length: 5", b"Length: 200000") + b"x" * 100_000)
    assert not other.reading
    house.wires[0].receive(OK)
    assert other.reading
    other.receive(b"x" * 100_000)
    assert house.wires[0].sent.endswith(b"x" * 200_000)


def test_a_request_without_a_key_takes_no_place() -> None:
    house = house_with(most=1)
    house.client.receive(GET)
    house.gate.error = AuthError("no")
    other = house.connect()
    other.receive(GET)
    assert status_of(other) == 401


def test_a_preflight_waits_as_any_other() -> None:
    house = house_with(most=1, line=1)
    house.client.receive(GET)
    other = house.connect()
    other.receive(GET.replace(b"GET", b"OPTIONS"))
    assert len(house.wires) == 1
    house.wires[0].receive(OK)
    house.wires[0].receive(OK)
    assert status_of(other) == 200


def test_a_tunnel_has_a_place_until_it_ends() -> None:
    house = house_with(most=1, line=1)
    house.client.receive(WEBSOCKET)
    house.wires[0].receive(SWITCH)
    other = house.connect()
    other.receive(GET)
    assert not other.sent
    house.client.reset_from_peer()
    house.turn()
    house.wires[1].receive(OK)
    assert status_of(other) == 200


def test_a_long_line_of_requests_that_come_to_nothing() -> None:
    """Each lets in the one behind it: that must not go deeper for each."""
    house = house_with(most=1, line=5000)
    house.gate.caller = caller_of(rpm_limit=1)
    house.client.receive(GET)
    clients = [house.connect() for _ in range(5000)]
    for client in clients:
        client.receive(GET)
    house.wires[0].receive(OK)
    assert {status_of(client) for client in clients} == {429}
    assert house.relay.line.places.taken == 0


def test_an_address_may_have_only_so_many() -> None:
    house = house_with(most=0, per_client=2)
    clients = [house.connect(peer) for peer in ("192.0.2.1", "192.0.2.1", "192.0.2.1", "192.0.2.2")]
    for client in clients:
        client.receive(GET)
    assert [status_of(client) for client in clients] == [0, 0, 503, 0]
    assert house.relay.line.refused == {"client_full": 1}
    clients[0].reset_from_peer()
    clients[2].take()
    clients[2].receive(GET)
    assert status_of(clients[2]) == 0


def test_behind_a_trusted_proxy_it_is_the_address_that_it_names() -> None:
    house = house_with(most=0, per_client=1)
    house.relay.trusted = TrustedProxies((ip_network("192.0.2.0/24"),))
    statuses = []
    for line in (b"X-Forwarded-For: 198.51.100.1", b"X-Forwarded-For: 198.51.100.1", b"X-Forwarded-For: 198.51.100.2"):
        client = house.connect()
        client.receive(GET.replace(b"Host", line + b"\r\nHost"))
        statuses.append(status_of(client))
    for _ in range(3):  # whose they are, nobody says
        client = house.connect()
        client.receive(GET)
        statuses.append(status_of(client))
    assert statuses == [0, 503, 0, 0, 0, 0]


def test_when_the_proxy_stops_nobody_is_sent_on_to_be_cut_off() -> None:
    house = house_with(most=1, line=9)
    house.client.receive(GET)
    for _ in range(9):
        house.connect().receive(GET)
    house.relay.line.close()
    house.factory.close()
    house.turn()
    assert len(house.wires) == 1
    assert [record.ended for record in house.observer.records] == ["client_gone"] * 10
