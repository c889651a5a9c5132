"""``--cut-revoked``: what a key has under way ends when the key does, here and at the other proxies."""

import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from _asking import CHAT, ask, make_key, until
from _raw import CHUNKED, Ended, Upstream, Wire, chunk, connect, request
from _redis import RedisServer
from _service import MASTER_KEY, Twistd, start_proxy
from test_tunnel import SWITCH, WANTS

CHAT_PATH = "/vllm/v1/chat/completions"
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"word"}}]}\n\n'

#: Proxies with the option, and without.
Pairs = dict[bool, list[Twistd]]


@pytest.fixture(scope="module")
def pairs(upstream: Upstream, redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pairs]:
    """Two proxies that cut, and two that do not, all on one Redis; keys are cached for long."""
    directory = tmp_path_factory.mktemp("pairs")
    options = ("--store", redis.url, "--key-cache-ttl", "3600")
    made: Pairs = {True: [], False: []}
    for name, cuts in (("one", True), ("two", True), ("three", False), ("four", False)):
        cut = ("--cut-revoked",) if cuts else ()
        made[cuts].append(start_proxy(directory / name, upstream.url, *options, *cut))
    until(lambda: b"\r\n:4\r\n" in redis.command("PUBSUB", "NUMSUB", "vllmproxy:changes"))
    yield made
    for service in made[True] + made[False]:
        service.stop()
        assert "Traceback" not in service.log


class Running:
    """A script for several requests, told apart by their ids: begins an answer, and goes on when it is told to.

    :ivar ended: of those whose connection the proxy has ended, how: ``fin`` or ``reset``.
    """

    def __init__(self) -> None:
        self.ended: dict[str, str] = {}
        self._turns: defaultdict[str, threading.Semaphore] = defaultdict(lambda: threading.Semaphore(0))

    def go_on(self, id: str) -> None:
        self._turns[id].release()

    def __call__(self, wire: Wire) -> None:
        asked = wire.message()
        id = asked.get(b"x-request-id").decode()
        first, later = (
            (SWITCH + b"early", b"later") if asked.get(b"upgrade") else (CHUNKED + chunk(EVENT), chunk(EVENT))
        )
        if not id.startswith("silent"):
            wire.send(first)
        while not wire.readable(0):
            if self._turns[id].acquire(timeout=0.02):
                wire.send(later)
        try:
            assert wire.some() == b""
            self.ended[id] = "fin"
        except Ended as ended:
            self.ended[id] = ended.how


def revoke(service: Twistd, key: str, how: str) -> None:
    body = {"keys": [key]} if how == "/key/delete" else {"key": key}
    assert ask(service, "POST", how, body, key=MASTER_KEY).status == 200


def ask_for_stream(client: Wire, key: str, id: str) -> None:
    body = json.dumps({**CHAT, "stream": True}).encode()
    lines = (b"x-api-key: " + key.encode(), b"X-Request-Id: " + id.encode())
    client.send(request(b"POST", CHAT_PATH.encode(), lines[1], body=body, key=lines[0]))


def begin(client: Wire, key: str, id: str) -> None:
    """Ask for a stream, and read the first of it."""
    ask_for_stream(client, key, id)
    assert client.head().status == 200
    assert client.chunk() == EVENT


def shake_hands(client: Wire, key: str, id: str) -> None:
    """Ask for a tunnel, and read the first of it."""
    lines = (b"x-api-key: " + key.encode(), b"X-Request-Id: " + id.encode())
    client.send(request(b"GET", b"/vllm/v1/realtime?model=m", *WANTS, lines[1], key=lines[0]))
    assert client.head().status == 101
    assert client.exactly(5) == b"early"


def record_of(service: Twistd, key: str) -> dict[str, Any]:
    """Return what the access log says of a key's only request."""
    token = hashlib.sha256(key.encode()).hexdigest()
    found = until(lambda: [record for record in service.access_records if record.get("key_id") == token])
    assert len(found) == 1
    return found[0]


every_way = pytest.mark.parametrize("how", ["/key/delete", "/key/block"])
every_place = pytest.mark.parametrize("place", [0, 1], ids=["here", "elsewhere"])


@every_way
@every_place
def test_a_stream_breaks_off(upstream: Upstream, pairs: Pairs, how: str, place: int) -> None:
    service, running = pairs[True][0], Running()
    key, kept = make_key(service)["key"], make_key(service)["key"]
    with upstream.playing(running), connect(service) as client, connect(service) as other:
        begin(client, key, "revoked")
        begin(other, kept, "kept")
        revoke(pairs[True][place], key, how)
        rest, end = client.rest()
        assert (rest, end in ("fin", "reset")) == (b"", True)  # without a last chunk: it does not look whole
        until(lambda: "revoked" in running.ended)
        running.go_on("kept")
        assert other.chunk() == EVENT
        assert "kept" not in running.ended
        record = record_of(service, key)
        assert (record["status"], record["ended"], record["error"]) == (200, "refused", "revoked")
    assert ask(service, "GET", "/vllm/v1/models", key=key).status == 401


@every_way
@every_place
def test_a_tunnel_is_cut(upstream: Upstream, pairs: Pairs, how: str, place: int) -> None:
    service, running = pairs[True][0], Running()
    key = make_key(service)["key"]
    with upstream.playing(running), connect(service) as client:
        shake_hands(client, key, "tunnel")
        revoke(pairs[True][place], key, how)
        assert client.rest()[0] == b""
        until(lambda: "tunnel" in running.ended)
        record = record_of(service, key)
        assert (record["status"], record["ended"], record["error"]) == (101, "refused", "revoked")


@every_way
@every_place
def test_who_waits_for_an_answer_is_told(upstream: Upstream, pairs: Pairs, how: str, place: int) -> None:
    service, running = pairs[True][0], Running()
    key = make_key(service)["key"]
    with upstream.playing(running), connect(service) as client:
        ask_for_stream(client, key, "silent")
        until(lambda: upstream.connections == 1)
        revoke(pairs[True][place], key, how)
        answer = client.message()
        assert answer.status == 401
        assert answer.get(b"www-authenticate") == b"Bearer"
        assert json.loads(answer.body)["error"]["type"] == "auth_error"
        until(lambda: "silent" in running.ended)


@every_way
@every_place
def test_without_the_option_all_runs_on(upstream: Upstream, pairs: Pairs, how: str, place: int) -> None:
    service, running = pairs[False][0], Running()
    key = make_key(service)["key"]
    with upstream.playing(running), connect(service) as client, connect(service) as other:
        begin(client, key, "stream")
        shake_hands(other, key, "tunnel")
        revoke(pairs[False][place], key, how)
        until(lambda: ask(service, "GET", "/vllm/v1/models", key=key).status == 401)
        for _ in range(3):
            running.go_on("stream")
            running.go_on("tunnel")
            assert client.chunk() == EVENT
            assert other.exactly(5) == b"later"
        assert not running.ended


def test_the_sdk_does_not_take_it_for_the_end(upstream: Upstream, pairs: Pairs) -> None:
    service, running = pairs[True][0], Running()
    key = make_key(service)["key"]
    with (
        upstream.playing(running),
        openai.OpenAI(
            base_url=f"{service.url}/vllm/v1", api_key=key, max_retries=0, default_headers={"X-Request-Id": "sdk"}
        ) as client,
    ):
        messages: Any = CHAT["messages"]
        stream = iter(client.chat.completions.create(model="m", messages=messages, stream=True))
        assert next(stream).choices[0].delta.content == "word"
        revoke(pairs[True][1], key, "/key/delete")
        with pytest.raises((openai.APIConnectionError, httpx.TransportError)):  # the latter: SDKs before 3
            list(stream)
