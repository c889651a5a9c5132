"""Bodies for the API: who may have one held, and how much of all of them, in memory."""

import json
from typing import Any

import pytest
from _memory import Hangups, render
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from vllmproxy.api.app import Api
from vllmproxy.api.branch import ApiBranch
from vllmproxy.http1.factory import ServerFactory
from vllmproxy.keys.cache import KeyCache
from vllmproxy.keys.gate import Gate
from vllmproxy.keys.masterkey import MasterKey
from vllmproxy.relay.headers import TrustedProxies
from vllmproxy.store.memory import MemoryStore
from vllmproxy.testing import MemoryObserver, MemoryTransport

MASTER = "sk-canary-of-the-master-key"
KEY = b"Authorization: Bearer %s\r\n" % MASTER.encode()
BODY = b'{"key_alias": "a"}'


class House:
    """The API behind a server whose clients are the test."""

    def __init__(self, *, auth: bool = True, max_body: int = 1000, max_held: int = 2000) -> None:
        self.clock = Clock()
        self.clock.advance(1_700_000_000)
        self.observer = MemoryObserver()
        store = MemoryStore()
        Deferred.fromCoroutine(store.open())
        gate = Gate(store, KeyCache(self.clock, ttl=1.0), MasterKey(MASTER) if auth else None, self.clock)
        api: Any = Api(
            gate,
            store,
            self.clock,
            metrics_text=lambda: (b"text/plain", b""),
            open_metrics=False,
            version="1",
            is_well=Deferred,
        )
        self.branch = ApiBranch(
            self.clock, gate, api.site(), api.routes, self.observer, TrustedProxies(()), max_body, max_held
        )
        hangups: Any = Hangups()
        self.factory = ServerFactory(self.clock, self.branch.handle, render, hangups)

    def send(self, data: bytes) -> MemoryTransport:
        """Send ``data`` on a connection of its own."""
        client = MemoryTransport(self.clock)
        client.connect(self.factory.buildProtocol(IPv4Address("TCP", "192.0.2.1", 50_000)))
        client.receive(data)
        return client

    def end(self) -> list[int]:
        """Give the connections their time; return with what the requests ended."""
        self.clock.advance(10)
        self.clock.advance(10)
        assert not self.branch.held
        assert not self.observer.in_flight
        return [record.status for record in self.observer.records]


def post(lines: bytes = b"", body: bytes = BODY, length: int | None = None, target: bytes = b"/key/generate") -> bytes:
    size = len(body) if length is None else length
    return b"POST %s HTTP/1.1\r\nHost: h\r\n%sContent-Length: %d\r\n\r\n%s" % (target, lines, size, body)


def status(client: MemoryTransport) -> int:
    return int(client.sent[9:12] or 0)


@pytest.mark.parametrize("lines", [b"", b"Authorization: Basic eA==\r\n", b"x-api-key: a b\r\n"])
@pytest.mark.parametrize("target", [b"/key/generate", b"/key/sk-x/regenerate?a=b"])
def test_a_body_without_a_key_is_refused_at_its_head(lines: bytes, target: bytes) -> None:
    house = House()
    client = house.send(post(lines + b"Expect: 100-continue\r\n", b"", 900, target))
    assert status(client) == 401
    assert b"www-authenticate: Bearer\r\n" in client.sent
    assert b"connection: close\r\n" in client.sent
    assert json.loads(client.sent.partition(b"\r\n\r\n")[2])["error"]["code"] == "401"
    assert house.end() == [401]


def test_a_body_with_a_key_is_read_and_then_it_is_asked_whose_it_is() -> None:
    house = House()
    for lines, expected in ((KEY, 200), (b"x-api-key: sk-nobody-has-this\r\n", 401)):
        client = house.send(post(lines, BODY[:5], len(BODY)))
        assert house.branch.held == 5
        assert not client.sent
        client.receive(BODY[5:])
        house.clock.advance(0)
        assert status(client) == expected
        assert not house.branch.held
    assert house.end() == [200, 401]


def test_while_auth_is_off_nobody_has_a_key() -> None:
    house = House(auth=False)
    client = house.send(post(b"", BODY[:5], len(BODY)))
    assert not client.sent
    client.receive(BODY[5:])
    assert status(client) == 403


def test_all_bodies_together_have_a_bound() -> None:
    house = House()
    holding = [house.send(post(KEY, b"x" * 900, 1000)) for _ in range(2)]
    assert house.branch.held == 1800
    refused = house.send(post(KEY, b"x" * 201, 1000))
    assert status(refused) == 503
    assert b"retry-after: 1\r\n" in refused.sent
    assert b"connection: close\r\n" in refused.sent
    assert house.branch.held == 1800
    assert status(house.send(post(KEY))) == 200
    holding[0].receive(b"x" * 100)
    assert status(holding[0]) == 400  # that is no JSON, but whole
    assert house.branch.held == 900
    holding[1].reset_from_peer()
    assert not house.branch.held
    assert house.end() == [503, 200, 400, 0]


def test_a_body_that_grows_beyond_the_bound_is_let_go_of() -> None:
    house = House(max_body=5000)
    client = house.send(post(KEY, b"x" * 1900, 4000))
    assert house.branch.held == 1900
    client.receive(b"x" * 101)
    assert status(client) == 503
    assert not house.branch.held
    client.receive(b"x" * 1999)
    assert house.end() == [503]
