"""Requests whose heads are alike: what was worked out of the first is not kept beyond its truth."""

from ipaddress import ip_network
from typing import Any

import pytest
from _memory import House, MemoryEndpoint
from attrs import evolve

from vllmproxy.http1.agent import UpstreamAgent
from vllmproxy.http1.requests import RequestReader
from vllmproxy.http1.streaming import StreamingClient
from vllmproxy.keys.cache import KeyCache
from vllmproxy.keys.gate import Gate
from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.keys.masterkey import MasterKey
from vllmproxy.relay.headers import TrustedProxies
from vllmproxy.upstreams.server import Server
from vllmproxy.upstreams.upstream import Upstream

SECRET = "sk-0123456789abcdef"
ANSWER = b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-length: 2\r\n\r\nok"


@pytest.fixture
def house() -> House:
    return House()


@pytest.fixture(autouse=True)
def cache(house: House) -> KeyCache:
    """What the gate knows of keys: there is one."""
    known = KeyCache(house.clock, ttl=1e9)
    known.put(hash_key(SECRET), VirtualKey(token=hash_key(SECRET), key_name="sk-...cdef"))
    house.relay.gate = Gate(house.store, known, MasterKey("sk-master-0123456789"), house.clock)
    return known


def ask(house: House, body: bytes, lines: bytes = b"") -> None:
    head = b"POST /vllm/v1/x HTTP/1.1\r\nHost: h\r\n%bAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n"
    house.client.receive(head % (lines, SECRET.encode(), len(body)) + body)


def seen(house: House, at: int = 0) -> tuple[bytes, bytes]:
    """Answer what an upstream connection got; return its head, without the request id, and its body."""
    head, _, body = house.wires[at].take().partition(b"\r\n\r\n")
    house.wires[at].receive(ANSWER)
    assert house.client.take().endswith(b"\r\n\r\nok")
    return b"\n".join(line for line in head.split(b"\r\n") if not line.startswith(b"x-request-id")), body


@pytest.fixture
def warm(house: House) -> House:
    """The same, when it knows the head that comes again."""
    for body in (b"one", b"two"):
        ask(house, body)
        seen(house)
    return house


def test_only_the_length_and_the_body_are_others(house: House) -> None:
    found = []
    for body in (b"first", b"and the second", b"x", b"y" * 70):
        ask(house, body)
        head, got = seen(house)
        assert got == body
        assert b"content-length: %d" % len(body) in head
        found.append(head.replace(b"content-length: %d" % len(body), b""))
    assert found[0] == found[1] == found[2] == found[3]
    assert len({record.request_id for record in house.observer.records}) == 4


@pytest.mark.parametrize("length", [1, 8000, 20_000])
def test_the_first_request_of_a_connection_whose_head_is_known_needs_no_parsing(
    warm: House, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RequestReader, "feed", pytest.fail)
    warm.client = warm.connect()
    ask(warm, b"x" * length)
    head, got = seen(warm)
    assert got == b"x" * length
    assert b"\nx-forwarded-for: 192.0.2.1\n" in head


def test_each_request_has_the_id_that_its_caller_gave_it(house: House) -> None:
    for id in (b"a", b"b:1", b"c" * 128, b"not one", b"d"):
        ask(house, b"x", b"X-Request-ID: %b\r\n" % id)
        expected = house.streams[-1].head.fields[b"x-request-id"]
        assert expected == [id]
        lines = house.wires[0].take().split(b"\r\n")
        house.wires[0].receive(ANSWER)
        assert (b"x-request-id: " + id in lines) is (id != b"not one")
        assert (b"x-request-id: " + id + b"\r\n" in house.client.take()) is (id != b"not one")
        assert (house.observer.records[-1].request_id == id.decode()) is (id != b"not one")


def test_clients_with_the_same_head_are_told_apart(warm: House) -> None:
    for peer in ("192.0.2.1", "192.0.2.2", "192.0.2.2", "192.0.2.2", "192.0.2.1"):
        warm.client = warm.connect(peer)
        ask(warm, b"another")
        assert b"\nx-forwarded-for: %b\n" % peer.encode() in seen(warm)[0]
        assert warm.observer.records[-1].client == peer


@pytest.mark.parametrize("change", ["blocked", "expired", "deleted"])
def test_a_key_that_is_good_no_longer(warm: House, cache: KeyCache, change: str) -> None:
    key = cache.get(hash_key(SECRET))
    assert key is not None
    now = warm.clock.seconds()
    cache.put(key.token, {"blocked": evolve(key, blocked=True), "expired": evolve(key, expires=now)}.get(change))
    ask(warm, b"another")
    assert warm.client.take().startswith(b"HTTP/1.1 401 ")
    assert warm.wires[0].take() == b""


def test_an_upstream_that_was_exchanged(warm: House) -> None:
    endpoint = MemoryEndpoint(warm.clock)
    upstream = Upstream.parse("http://gpu2:8000/other")
    agent = UpstreamAgent(warm.clock, endpoint, upstream.origin)
    warm.relay.serve(Server(upstream, agent, StreamingClient(agent), b"authorization: Bearer other\r\n"))
    ask(warm, b"another")
    (wire,) = endpoint.connections
    head = wire.take()
    assert head.startswith(b"POST /other/v1/x HTTP/1.1\r\n")
    assert b"\r\nhost: gpu2:8000\r\n" in head
    assert b"\r\nauthorization: Bearer other\r\n" in head
    assert warm.wires[0].take() == b""


def test_proxies_that_are_trusted_from_now_on(warm: House) -> None:
    warm.relay.trusted = TrustedProxies((ip_network("192.0.2.0/24"),))
    ask(warm, b"another", b"X-Forwarded-For: 203.0.113.9\r\n")
    seen(warm)
    for _ in range(3):
        ask(warm, b"another", b"X-Forwarded-For: 203.0.113.9\r\n")
        assert b"x-forwarded-for: 203.0.113.9, 192.0.2.1" in seen(warm)[0]
    assert [record.client for record in warm.observer.records[2:]] == ["203.0.113.9"] * 4
    warm.relay.trusted = TrustedProxies(())
    ask(warm, b"another", b"X-Forwarded-For: 203.0.113.9\r\n")
    assert b"x-forwarded-for: 192.0.2.1\n" in seen(warm)[0]


# bodies that are alike but for their messages


def chat(house: House, text: bytes, *, model: bytes = b"small", more: bytes = b', "stream": true') -> bytes:
    """Ask for a chat of a few words; return the body that vLLM got, or what the client got instead."""
    body = b'{"model": "%b", "messages": [{"role": "user", "content": "%b"}], "max_tokens": 4%b}' % (model, text, more)
    head = b"POST /vllm/v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
    house.client.receive(
        head + b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b" % (SECRET.encode(), len(body), body)
    )
    if not (house.wires and house.wires[0].sent):
        return house.client.take()
    return seen(house)[1]


def change(cache: KeyCache, **fields: Any) -> None:
    key = cache.get(hash_key(SECRET))
    assert key is not None
    cache.put(key.token, evolve(key, **fields))


def test_each_body_is_changed_where_it_has_to_be(house: House, cache: KeyCache) -> None:
    change(cache, aliases={"small": "a-longer-name"}, tpm_limit=10**6)
    for text in (b"a", b"b" * 500, b"", "\N{SNOWMAN}".encode() * 9, b"c"):
        expected = (
            b'{"stream_options":{"include_usage":true},"model": "a-longer-name", "messages": [{"role": "user", '
            b'"content": "%b"}], "max_tokens": 4, "stream": true}'
        )
        assert chat(house, text) == expected % text
    chat(house, b"d" * 4000)
    assert [record.ended for record in house.observer.records] == ["done"] * 6


def test_a_member_behind_the_messages_is_changed_where_it_is_now(house: House, cache: KeyCache) -> None:
    change(cache, tpm_limit=10**6)
    for text in (b"a", b"b" * 500, b"", "\N{SNOWMAN}".encode() * 9, b"c"):
        sent = chat(house, text, more=b', "stream": true, "stream_options": {"include_usage": false}')
        assert sent.endswith(
            b'%b"}], "max_tokens": 4, "stream": true, "stream_options": {"include_usage": true}}' % text
        )


def test_what_its_prompt_is_expected_to_use_is_its_own(house: House, cache: KeyCache) -> None:
    change(cache, tpm_limit=300)
    for _ in range(3):
        assert b'"content": "a"' in chat(house, b"a")
    assert b" 429 " in chat(house, b"b" * 1200)
    assert b'"content": "a"' in chat(house, b"a")


def test_a_key_that_may_use_other_models_from_now_on(house: House, cache: KeyCache) -> None:
    change(cache, models=("small",))
    for _ in range(3):
        assert b'"small"' in chat(house, b"a")
    change(cache, models=("big",))
    assert b" 403 " in chat(house, b"a")
    change(cache, models=("small",), aliases={"small": "tiny"})
    for _ in range(3):
        assert b'"tiny"' in chat(house, b"a")


def test_a_key_that_opens_the_way_no_longer(house: House, cache: KeyCache) -> None:
    change(cache, models=("small",))
    for _ in range(3):
        assert b'"small"' in chat(house, b"a")
    change(cache, key_type="read_only")
    for _ in range(2):
        assert b" 403 " in chat(house, b"a")
    change(cache, allowed_routes=("/v1/chat/completions",), key_type="default")
    assert b'"small"' in chat(house, b"a")


def test_a_model_that_the_key_may_not_use_after_many_that_it_may(house: House, cache: KeyCache) -> None:
    change(cache, models=("small",), aliases={"small": "tiny"})
    for _ in range(3):
        assert b'"tiny"' in chat(house, b"a")
    assert b" 403 " in chat(house, b"a", model=b"large")
    assert b'"tiny"' in chat(house, b"a")


def test_usage_that_is_to_be_known_in_another_way_from_now_on(house: House, cache: KeyCache) -> None:
    change(cache, models=("small",))
    for usage, asks in (("auto", False), ("auto", False), ("auto", False), ("exact", True), ("passive", False)):
        house.relay.usage = usage
        assert (b"include_usage" in chat(house, b"a")) is asks
