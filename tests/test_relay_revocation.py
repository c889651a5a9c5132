"""What becomes of a key's requests when something has changed."""

import pytest
from _memory import House
from attrs import evolve

from vllmproxy.keys.cache import KeyCache
from vllmproxy.keys.gate import Gate
from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.keys.masterkey import MasterKey
from vllmproxy.relay.revocation import Revocation

SECRET = b"sk-0123456789abcdef"
TOKEN = hash_key(SECRET)
GET = b"GET /vllm/v1/models HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer %b\r\n\r\n" % SECRET


@pytest.mark.parametrize(("change", "status"), [("expired", 200), ("blocked", 401), ("nothing", 200)])
def test_what_began_in_time_may_end_and_what_was_taken_away_may_not(change: str, status: int) -> None:
    house = House()
    cache = KeyCache(house.clock, ttl=1e9)
    key = VirtualKey(token=TOKEN, key_name="sk-...cdef", expires=house.clock.seconds() + 10)
    cache.put(TOKEN, key)
    gate = house.relay.gate = Gate(house.store, cache, MasterKey("sk-master-0123456789"), house.clock)
    house.client.receive(GET)
    if change == "expired":
        house.clock.advance(20)
    elif change == "blocked":
        cache.put(TOKEN, evolve(key, blocked=True))
    Revocation(gate, house.relay).changed(None)
    house.wires[0].receive(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert house.client.sent.startswith(b"HTTP/1.1 %d " % status)
