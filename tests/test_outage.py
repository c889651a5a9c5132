"""Redis is killed, stopped or failed over under real proxies: who goes on working, who does not, and the way back."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from _asking import Reply, ask, make_key, until
from _redis import RedisServer
from _sentinel import sentinel_group
from _service import MASTER_KEY, Start, Twistd

from vllmproxy.keys.key import hash_key

MODELS = "/vllm/v1/models"

SHORT, LONG = 2.5, 30.0


def end(redis: RedisServer, outage: str) -> None:
    """Begin an outage."""
    if outage == "killed":
        redis.kill()
    else:
        redis.stall()


def mend(redis: RedisServer, outage: str) -> None:
    """End it."""
    if outage == "killed":
        redis.start()
    else:
        redis.resume()


class Asker(threading.Thread):
    """Asks with one key all the time, until it is told to stop."""

    def __init__(self, service: Twistd, key: str) -> None:
        super().__init__()
        self.replies: list[Reply] = []
        self._service = service
        self._key = key
        self._stop_it = threading.Event()

    def run(self) -> None:
        while not self._stop_it.wait(0.02):
            self.replies.append(ask(self._service, "GET", MODELS, key=self._key))

    def stop(self) -> None:
        self._stop_it.set()
        self.join(60)


@contextmanager
def asking(service: Twistd, *keys: str) -> Iterator[list[Asker]]:
    askers = [Asker(service, key) for key in keys]
    for asker in askers:
        asker.start()
    try:
        yield askers
    finally:
        for asker in askers:
            asker.stop()


def is_store_down(reply: Reply) -> bool:
    """Tell whether it is the 503 of an outage, and is as it must be."""
    if reply.status != 503:
        return False
    assert reply.error["type"] == "no_db_connection"
    assert int(reply.headers["retry-after"]) >= 1
    return True


def opens(service: Twistd, key: str) -> bool:
    return ask(service, "GET", MODELS, key=key).status == 200


def make_keys(start: Start, url: str, *fields: dict[str, object]) -> list[str]:
    """Make keys at a proxy that is started for it: those that are started later hear of no change of them.

    A proxy that is told of a change forgets the key, and that may come after it was asked for the first time.
    """
    maker = start("--store", url)
    return [make_key(maker, **each)["key"] for each in fields]


def survive(start: Start, redis: RedisServer, outage: str, seconds: float) -> None:
    """Go through one outage, with a key that was used, one that was not, and one that does not exist."""
    known, unused = make_keys(start, redis.url, {}, {})
    service, other = start("--store", redis.url), start("--store", redis.url)
    stranger = "sk-nobody-has-this-one"
    assert opens(service, known)
    assert opens(other, known)
    end(redis, outage)
    try:
        until(lambda: is_store_down(ask(service, "GET", MODELS, key=unused)))
        with asking(service, known, unused, stranger) as (works, waits, strange), asking(other, known) as (too,):
            time.sleep(seconds)
    finally:
        mend(redis, outage)
    assert {reply.status for reply in works.replies + too.replies} == {200}
    assert all(map(is_store_down, waits.replies + strange.replies))
    assert min(len(asker.replies) for asker in (works, waits, strange, too)) > 3
    until(lambda: opens(service, unused))
    until(lambda: ask(service, "GET", MODELS, key=stranger).status == 401)
    until(lambda: ask(other, "GET", "/health/readiness").status == 200)
    assert opens(other, make_key(service)["key"])


@pytest.mark.parametrize("outage", ["killed", "stopped"])
def test_keys_in_an_outage(start: Start, durable: RedisServer, outage: str) -> None:
    survive(start, durable, outage, SHORT)


@pytest.mark.long
@pytest.mark.parametrize("outage", ["killed", "stopped"])
def test_keys_in_a_long_outage(start: Start, durable: RedisServer, outage: str) -> None:
    survive(start, durable, outage, LONG)


def test_a_key_works_for_as_long_as_it_may_be_stale(start: Start, durable: RedisServer) -> None:
    (key,) = make_keys(start, durable.url, {})
    service = start("--store", durable.url, "--key-max-stale", "6")
    assert opens(service, key)
    durable.kill()
    answer = ask(service, "GET", MODELS, key=key)
    assert (answer.status, answer.body[:200] if answer.status != 200 else b"") == (200, b"")
    until(lambda: is_store_down(ask(service, "GET", MODELS, key=key)))
    durable.start()
    until(lambda: opens(service, key))


@pytest.mark.parametrize("outage", ["killed", "stopped"])
def test_limits_fail_closed(start: Start, durable: RedisServer, outage: str) -> None:
    limited, free = make_keys(start, durable.url, {"rpm_limit": 1000}, {})
    service = start("--store", durable.url)
    assert opens(service, limited)
    assert opens(service, free)
    end(durable, outage)
    try:
        for _ in range(10):
            assert is_store_down(ask(service, "GET", MODELS, key=limited))
            assert opens(service, free)
    finally:
        mend(durable, outage)
    until(lambda: opens(service, limited))


@pytest.mark.parametrize("outage", ["killed", "stopped"])
def test_limits_fall_to_a_share(start: Start, durable: RedisServer, outage: str) -> None:
    key, slow = make_keys(start, durable.url, {"rpm_limit": 9}, {"max_parallel_requests": 2})
    service = start("--store", durable.url, "--store-outage", "local", "--local-share", "0.5")
    assert opens(service, key)
    assert opens(service, slow)
    end(durable, outage)
    try:
        replies = [ask(service, "GET", MODELS, key=key) for _ in range(8)]
        assert [reply.status for reply in replies] == [200] * 4 + [429] * 4
        with service.connect() as client:
            head = f"GET {MODELS} HTTP/1.1\r\nHost: a\r\nx-api-key: {slow}\r\nX-Vllmsim: stall; after=10\r\n\r\n"
            client.sendall(head.encode())
            assert client.recv(100)
            assert ask(service, "GET", MODELS, key=slow).status == 429
        until(lambda: opens(service, slow))  # its place was given back, where it was taken
    finally:
        mend(durable, outage)
    # The limit counts again, and what was taken before the outage.
    until(lambda: ask(service, "GET", "/health/readiness").status == 200)
    assert [ask(service, "GET", MODELS, key=key).status for _ in range(9)] == [200] * 8 + [429]


def test_a_failover_by_sentinel(start: Start) -> None:
    with sentinel_group() as group:
        known, unused = make_keys(start, group.url, {}, {})
        service, other = start("--store", group.url), start("--store", group.url)
        assert opens(service, known)
        assert ask(other, "GET", "/health/readiness").status == 200  # its store is open
        until(lambda: group.master.command("WAIT", "1", "1000") == b":1\r\n")  # the replica has them
        with asking(service, known, unused, "sk-nobody-has-this-one") as (works, waits, strange):
            group.master.kill()
            group.wait_for_failover()
            until(lambda: opens(other, unused))
            until(lambda: opens(service, unused))
        assert {reply.status for reply in works.replies} == {200}
        assert {reply.status for reply in waits.replies} <= {200, 503}
        assert {reply.status for reply in strange.replies} <= {401, 503}
        ask(service, "POST", "/key/delete", {"keys": [known]}, key=MASTER_KEY)
        until(lambda: ask(other, "GET", MODELS, key=known).status == 401)


@pytest.mark.parametrize("change", ["/key/block", "/key/delete"])
def test_a_key_that_is_revoked_elsewhere_ends_at_once(start: Start, durable: RedisServer, change: str) -> None:
    one, two = (start("--store", durable.url, "--key-cache-ttl", "3600") for _ in range(2))
    key, kept = make_key(one)["key"], make_key(one)["key"]
    until(lambda: b"\r\n:2\r\n" in durable.command("PUBSUB", "NUMSUB", "vllmproxy:changes"))
    assert opens(two, key)
    assert opens(two, kept)
    body = {"keys": [key]} if change == "/key/delete" else {"key": key}
    assert ask(one, "POST", change, body, key=MASTER_KEY).status == 200
    until(lambda: not opens(two, key))
    assert opens(two, kept)


def test_what_was_missed_is_asked_for(start: Start, durable: RedisServer) -> None:
    """A change of which nobody is told, and then a subscription that is lost, as if it had been on its way."""
    service = start("--store", durable.url, "--key-cache-ttl", "3600")
    made = make_key(service)
    until(lambda: b"\r\n:1\r\n" in durable.command("PUBSUB", "NUMSUB", "vllmproxy:changes"))
    assert opens(service, made["key"])
    durable.command("DEL", f"vllmproxy:{{{made['token']}}}:key")
    assert opens(service, made["key"])
    durable.command("CLIENT", "KILL", "TYPE", "pubsub")
    until(lambda: ask(service, "GET", MODELS, key=made["key"]).status == 401)


def test_a_revocation_during_an_outage_is_heard_of_when_it_is_over(start: Start, durable: RedisServer) -> None:
    (key,) = make_keys(start, durable.url, {})
    service = start("--store", durable.url, "--key-cache-ttl", "3600")
    until(lambda: b"\r\n:2\r\n" in durable.command("PUBSUB", "NUMSUB", "vllmproxy:changes"))
    assert opens(service, key)
    durable.kill()
    until(lambda: is_store_down(ask(service, "GET", MODELS, key="sk-nobody-has-this-one")))
    assert opens(service, key)
    durable.start()
    durable.command("DEL", f"vllmproxy:{{{hash_key(key)}}}:key")
    until(lambda: ask(service, "GET", MODELS, key=key).status == 401)
