"""What becomes of a key's requests when something has changed."""

from collections.abc import Callable
from typing import Any

import pytest
from _memory import House
from attrs import evolve

from vllmproxy.http1.places import Places
from vllmproxy.keys.cache import KeyCache
from vllmproxy.keys.gate import Gate
from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.keys.masterkey import MasterKey
from vllmproxy.relay.line import Line
from vllmproxy.relay.revocation import Revocation

SECRET = b"sk-0123456789abcdef"
TOKEN = hash_key(SECRET)
GET = b"GET /vllm/v1/models HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer %b\r\n\r\n" % SECRET


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
#: The head of a request whose body the key's rules need.
POST = (
    b"POST /vllm/v1/completions HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer %b\r\nContent-Length: 9000\r\n\r\n"
    % SECRET
)


def house_of(**fields: Any) -> tuple[House, Callable[[bool], None]]:
    """A proxy with one place, which knows one key; and what blocks that, and has it looked at: ``cuts`` or not."""
    house = House(line=Line(Places(1, line=5)))
    cache = KeyCache(house.clock, ttl=1e9)
    key = VirtualKey(token=TOKEN, key_name="sk-...cdef", **fields)
    cache.put(TOKEN, key)
    gate = house.relay.gate = Gate(house.store, cache, MasterKey("sk-master-0123456789"), house.clock)

    def block(cuts: bool) -> None:
        cache.put(TOKEN, evolve(key, blocked=True))
        Revocation(gate, house.relay, cuts=cuts).changed(None)

    return house, block


@pytest.mark.parametrize(("change", "status"), [("expired", 200), ("blocked", 401), ("nothing", 200)])
def test_what_began_in_time_may_end_and_what_was_taken_away_may_not(change: str, status: int) -> None:
    house, block = house_of(expires=1010.0)
    house.client.receive(GET)
    if change == "expired":
        house.clock.advance(20)
    if change == "blocked":
        block(True)
    else:
        gate: Any = house.relay.gate
        Revocation(gate, house.relay, cuts=True).changed(None)
    house.wires[0].receive(OK)
    assert house.client.sent.startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize("cuts", [True, False])
def test_what_waits_for_a_place_is_not_forwarded_any_more(cuts: bool) -> None:
    house, block = house_of()
    house.client.receive(GET)
    waiting = house.connect()
    waiting.receive(GET)
    block(cuts)
    assert waiting.sent.startswith(b"HTTP/1.1 401 ")
    house.wires[0].receive(OK)
    assert house.client.sent.startswith(b"HTTP/1.1 401 " if cuts else b"HTTP/1.1 200 ")
    assert len(house.wires) == 1
    assert house.wires[0].sent.count(b"GET ") == 1


def test_what_is_still_coming_is_not_forwarded_any_more() -> None:
    house, block = house_of(tpm_limit=100_000)
    house.client.receive(POST + b"{")
    block(False)
    assert house.client.sent.startswith(b"HTTP/1.1 401 ")
    assert not house.wires
