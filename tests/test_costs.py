"""What a request and an event cost, in calls of Python functions: no clock, so that no noise can trip it.

A budget is a little above what was counted when it was written down. Who needs more says why with the new figure; who
needs less lowers it.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha1
from pathlib import Path
from types import FrameType, MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from _memory import House
from hiredis import Reader
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock

from vllmproxy.keys.cache import KeyCache
from vllmproxy.keys.gate import Gate
from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.keys.masterkey import MasterKey
from vllmproxy.keys.routes import KNOWN_ROUTES
from vllmproxy.limits.ahead import Ahead
from vllmproxy.observers.fanout import FanOut
from vllmproxy.observers.jsonlines import JsonLines
from vllmproxy.observers.metrics import MetricsObserver
from vllmproxy.relay.quotas import Quotas
from vllmproxy.store.limits_lua import RESERVE
from vllmproxy.store.limits_redis import RedisLimiter
from vllmproxy.store.link import Wire
from vllmproxy.store.lookups import Lookups
from vllmproxy.store.rows import dump_row
from vllmproxy.testing import MemoryTransport
from vllmproxy.usage.bookkeeper import Bookkeeper

#: Calls for one small POST, with everything off and on (a key, three limits in Redis, exact usage, the journal, the
#: access log, metrics), and with a budget of tokens besides; for one event of a stream; and for a key that is not in
#: the cache.
BUDGETS = {
    "post off": 192,  # of which six are for gathering what is over in one turn: here, of one request
    "post on": 249,
    "post budget": 260,
    "event off": 15.5,
    "event on": 15.5,
    "event budget": 15.5,
    "look-up": 60,
}

KEY = "sk-0123456789abcdef"
BODY = b'{"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 16%b}'
ANSWER = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":'
    b'"assistant","content":"hello there"},"finish_reason":"stop"}],"usage":{"prompt_tokens":5,"total_tokens":7,'
    b'"completion_tokens":2}}'
)
EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":'
    b'{"content":"hello"},"logprobs":null,"finish_reason":null}]}\n\n'
)
USAGE = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[],"usage":'
    b'{"prompt_tokens":5,"total_tokens":105,"completion_tokens":100}}\n\n'
)
HEAD = b"HTTP/1.1 200 OK\r\ndate: Thu, 26 Nov 2026 08:00:00 GMT\r\nserver: uvicorn\r\n"
WHOLE = HEAD + b"content-length: %d\r\ncontent-type: application/json\r\n\r\n%b" % (len(ANSWER), ANSWER)
STREAM = HEAD + b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"

#: What Redis answers a call, and in it each reservation, by how many limits that is for.
DONE = b":1\r\n:1700000000000000\r\n"
GRANTED = {
    3: b"*8\r\n:%d\r\n:99999999\r\n:999999999970\r\n:99999\r\n:1\r\n:30\r\n:1\r\n:0\r\n",
    4: b"*10\r\n:%d\r\n:99999999\r\n:999999999970\r\n:99999\r\n:999999999970\r\n:1\r\n:30\r\n:1\r\n:30\r\n:20783\r\n",
}
#: What a reservation is known by.
RESERVING = {RESERVE.encode(), sha1(RESERVE.encode()).hexdigest().encode()}


def request(*, streams: bool) -> bytes:
    body = BODY % (b', "stream": true, "stream_options": {"include_usage": false}' if streams else b"")
    return (
        b"POST /vllm/v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:4000\r\nUser-Agent: bench\r\nAccept: */*\r\n"
        b"Authorization: Bearer %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
    ) % (KEY.encode(), len(body), body)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Link:
    """A connection to Redis that is always there."""

    def __init__(self, wire: Wire) -> None:
        self.ready = wire

    def get(self) -> Deferred[Wire]:
        return succeed(self.ready)


class Bench:
    """A proxy in memory, and what answers it.

    :param everything: with a key, limits, exact usage, the journal; else a caller whom nobody asks for anything.
    :param more: limits besides.
    """

    def __init__(self, directory: Path, *, everything: bool, more: Mapping[str, int] = MappingProxyType({})) -> None:
        self._house = house = House(usage="exact" if everything else "auto")
        self._sink = os.open(os.devnull, os.O_WRONLY)
        log = JsonLines(lambda lines: os.write(self._sink, lines), house.clock)
        house.relay.observer = FanOut([log, MetricsObserver(known_routes=KNOWN_ROUTES)])
        self._redis: MemoryTransport | None = None
        if everything:
            self._add_everything(directory, more)

    def _add_everything(self, directory: Path, more: Mapping[str, int]) -> None:
        house, token = self._house, hash_key(KEY)
        cache = KeyCache(house.clock, ttl=1e9)
        limits = {"rpm_limit": 10**8, "tpm_limit": 10**12, "max_parallel_requests": 10**5, **more}
        cache.put(token, VirtualKey(token=token, key_name="sk-...cdef", **limits))
        house.relay.gate = Gate(house.store, cache, MasterKey("sk-master-0123456789"), house.clock)
        wire = Wire()
        self._redis = MemoryTransport(house.clock)
        self._redis.connect(wire)
        link: Any = Link(wire)
        house.relay.quotas = Quotas(Ahead(RedisLimiter(link, house.clock), house.clock), house.clock)
        house.relay.books = Bookkeeper(house.store, house.clock, directory)
        house.relay.books.open()

    def ask(self, asked: bytes, *answers: bytes) -> None:
        """Have one request pass, the next a millisecond later."""
        self._house.client.receive(asked)
        self._answer_redis()
        for answer in answers:
            self._house.wires[0].receive(answer)
        assert self._house.client.take().startswith(b"HTTP/1.1 200 OK\r\n")
        self._house.clock.advance(0.001)
        self._answer_redis()

    def _answer_redis(self) -> None:
        commands = Reader()
        if self._redis is not None:
            commands.feed(self._redis.take())
        while words := commands.gets():
            assert self._redis is not None
            _, script, count, *rest = words
            units = rest[int(count) + 8 :: 3] if script in RESERVING else []
            granted = [GRANTED[int(count) // len(units) - 2] % max(int(number), 1) for number in units]
            self._redis.receive(b"*%d\r\n" % (len(granted) + 2) + DONE + b"".join(granted))

    def close(self) -> None:
        os.close(self._sink)


def calls_of(work: Callable[[], None]) -> float:
    """Return how many Python functions ``work`` calls, when it is done again and again."""
    count, times = 0, 20

    def seen(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call" and not frame.f_code.co_filename.endswith("task.py")  # the clock is the test's

    for _ in range(times):
        work()
    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        for _ in range(times):
            work()
    finally:
        sys.setprofile(before)
    return count / times


@pytest.fixture(params=["off", "on", "budget"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Bench]]:
    more = {"max_budget_tokens": 10**12} if request.param == "budget" else {}
    made = Bench(tmp_path, everything=request.param != "off", more=more)
    yield request.param, made
    made.close()


def test_a_small_post(bench: tuple[str, Bench]) -> None:
    name, made = bench
    asked = request(streams=False)
    assert 100 < calls_of(lambda: made.ask(asked, WHOLE)) <= BUDGETS[f"post {name}"]


def test_a_look_up() -> None:
    clock, wire = Clock(), Wire()
    redis = MemoryTransport(clock)
    redis.connect(wire)
    link: Any = Link(wire)
    lookups = Lookups(link, clock, 0.2, "the Redis")
    store: Any = SimpleNamespace(get_key=lookups.get)
    gate = Gate(store, KeyCache(clock, ttl=0), MasterKey("sk-master-0123456789"), clock)
    key = VirtualKey(token=hash_key(KEY), key_name="sk-...cdef", rpm_limit=10**8)
    row = dump_row(key).encode()
    let_in = []

    def look_up() -> None:
        caller = gate.admit(key.token)
        assert isinstance(caller, Deferred)
        caller.addCallback(let_in.append)
        assert redis.take()
        redis.receive(b"$%d\r\n%b\r\n" % (len(row), row))

    assert 10 < calls_of(look_up) <= BUDGETS["look-up"]
    assert [caller.key for caller in let_in] == [key] * 40


def test_an_event(bench: tuple[str, Bench]) -> None:
    name, made = bench
    asked = request(streams=True)
    end = chunk(USAGE) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"

    def stream(events: int) -> float:
        return calls_of(lambda: made.ask(asked, STREAM, *[chunk(EVENT)] * events, end))

    assert 5 < (stream(110) - stream(10)) / 100 <= BUDGETS[f"event {name}"]


def test_what_is_there_for_each_connection_shares_the_names_of_its_attributes(bench: tuple[str, Bench]) -> None:
    """An instance that does not costs 1.3 KiB more, and is slower to read."""
    _, made = bench
    made.ask(request(streams=False), WHOLE)
    channel, connection = made._house.client.protocol, made._house.wires[0].protocol
    for each in (channel, connection, channel._requests._reader, connection._reader):
        assert sys.getsizeof(vars(each)) < 600
