"""What becomes of a key's requests when something has changed."""

from collections.abc import Callable
from typing import Any

import pytest
from _memory import House
from attrs import evolve
from twisted.internet.defer import Deferred

from vllmproxy.http1.places import Places
from vllmproxy.keys.cache import KeyCache
from vllmproxy.keys.gate import Gate
from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.keys.masterkey import MasterKey
from vllmproxy.limits.values import Ask, Denied, Granted
from vllmproxy.relay.line import Line
from vllmproxy.relay.quotas import Quotas
from vllmproxy.relay.revocation import Revocation
from vllmproxy.store.interface import StoreUnavailable

SECRET = b"sk-0123456789abcdef"
TOKEN = hash_key(SECRET)
MASTER = "sk-master-0123456789"
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
    gate = house.relay.gate = Gate(house.store, cache, MasterKey(MASTER), house.clock)

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


class Asked:
    """A store that answers when the test says so, with what the key was when it was asked."""

    def __init__(self, key: VirtualKey | None) -> None:
        self.key = key
        self._asked: list[tuple[Deferred[VirtualKey | None], VirtualKey | None]] = []

    def get_key(self, token: str) -> Deferred[VirtualKey | None]:
        answer: Deferred[VirtualKey | None] = Deferred()
        self._asked.append((answer, self.key))
        return answer

    def answer(self) -> None:
        while self._asked:
            answer, key = self._asked.pop(0)
            answer.callback(key)

    def fail(self) -> None:
        while self._asked:
            self._asked.pop(0)[0].errback(StoreUnavailable("away"))


def asking_house(*, cuts: bool, max_stale: float = 0.0, **fields: Any) -> tuple[House, Asked, Gate]:
    """A proxy with one place whose store is :class:`Asked`."""
    house = House(line=Line(Places(1, line=5)))
    asked = Asked(VirtualKey(token=TOKEN, key_name="sk-...cdef", **fields))
    store: Any = asked
    cache = KeyCache(house.clock, ttl=1e9, max_stale=max_stale)
    gate = house.relay.gate = Gate(store, cache, MasterKey(MASTER), house.clock)
    gate.watch(Revocation(gate, house.relay, cuts=cuts).changed)
    return house, asked, gate


def forwarded(house: House) -> int:
    return b"".join(wire.sent for wire in house.wires).count(b" /v1/")


@pytest.mark.parametrize("cuts", [True, False])
@pytest.mark.parametrize("token", [TOKEN, None])
def test_who_is_being_looked_up_when_the_key_is_taken_away(cuts: bool, token: str | None) -> None:
    house, store, gate = asking_house(cuts=cuts)
    house.client.receive(GET)
    store.key = None
    gate.changed(token)
    store.answer()
    assert house.client.sent.startswith(b"HTTP/1.1 401 ")
    assert not house.wires


def test_a_store_that_is_away_when_a_key_is_taken_away_is_asked_until_it_answers() -> None:
    house, store, gate = asking_house(cuts=True)
    house.client.receive(GET.replace(SECRET, MASTER.encode()))  # it has the place
    waiting = house.connect()
    waiting.receive(GET)
    store.answer()
    store.key = None
    gate.changed(TOKEN)
    for _ in range(3):
        store.fail()
        assert not waiting.sent
        house.clock.advance(2)
    store.answer()
    assert waiting.sent.startswith(b"HTTP/1.1 401 ")
    house.wires[0].receive(OK)
    assert forwarded(house) == 1
    house.clock.advance(10)
    assert not store._asked  # nothing of that key is left


def test_that_a_key_was_good_before_the_store_was_away_is_no_answer() -> None:
    """The subscription may be back before anything else is: it is told of once that keys may have changed."""
    house, store, gate = asking_house(cuts=True, max_stale=300.0)
    house.client.receive(GET)
    store.answer()
    store.key = None
    gate.changed(None)
    store.fail()
    assert not house.client.sent
    house.clock.advance(2)
    store.answer()
    assert house.client.sent.startswith(b"HTTP/1.1 401 ")


class Unhurried:
    """A limiter that never answers."""

    def reserve(self, ask: Ask) -> Deferred[Granted | Denied]:
        return Deferred()


def test_who_waits_for_a_place_gets_none_from_another_request_of_its_key() -> None:
    for _ in range(30):  # they are in a set
        house, store, gate = asking_house(cuts=False, model_rpm_limit={"big": 10})
        limiter: Any = Unhurried()
        house.relay.quotas = Quotas(limiter, house.clock)
        body = b'{"model":"big","prompt":"x"}'
        house.client.receive(POST.replace(b"9000", b"%d" % len(body)) + body)  # has the place, and waits for its limit
        waiting = house.connect()
        waiting.receive(GET)  # waits for the place alone
        store.answer()
        store.key = None
        gate.changed(TOKEN)
        store.answer()
        assert waiting.sent.startswith(b"HTTP/1.1 401 ")
        assert not house.wires


def test_what_is_still_coming_is_not_forwarded_any_more() -> None:
    house, block = house_of(tpm_limit=100_000)
    house.client.receive(POST + b"{")
    block(False)
    assert house.client.sent.startswith(b"HTTP/1.1 401 ")
    assert not house.wires
