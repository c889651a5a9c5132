"""The Redis store against servers that refuse, stall, die and come back, and over TLS."""

import json
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import attrs
import pytest
import pytest_twisted
import trustme
from _reactor import until
from _redis import RedisServer, redis_server
from _stores import add_key, delete_keys, update_key
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, DeferredList
from twisted.internet.endpoints import SSL4ServerEndpoint
from twisted.internet.ssl import PrivateCertificate
from twisted.internet.task import deferLater
from twisted.protocols.portforward import ProxyFactory

from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.store.interface import CannotOpenStore, StoreUnavailable
from vllmproxy.store.listing import KeyQuery
from vllmproxy.store.redis import RedisStore

CANARY = "canary-s3cret"
KEY = VirtualKey(token=hash_key("sk-one"), key_name="sk-...-one", key_alias="one")

#: Seconds after which a call has hung, on however busy a machine; its deadline is 2 at most.
HUNG = 20.0


@pytest.fixture(scope="module")
def guarded() -> Iterator[RedisServer]:
    """A server with a password for the default user and for ``me``."""
    acl = ("--user", "me", "on", f">{CANARY}-me", "~vllmproxy:*", "+@all")
    with redis_server("--requirepass", CANARY, *acl) as started:
        yield started


@pytest.fixture
def store(redis_store: RedisStore) -> RedisStore:
    return redis_store


async def eventually(call: Callable[[], Awaitable[object]]) -> None:
    """Wait until ``call`` no longer raises StoreUnavailable; each try must end in time."""
    give_up = time.monotonic() + HUNG
    while True:
        started = time.monotonic()
        try:
            await call()
        except StoreUnavailable:
            assert time.monotonic() - started < HUNG
            assert time.monotonic() < give_up
            await deferLater(reactor, 0.05)
        else:
            return


async def until_refused(store: RedisStore, why: str) -> str:
    """Look a key up until the failure says ``why``, and return all of what it says."""
    give_up = time.monotonic() + HUNG
    while True:
        with pytest.raises(StoreUnavailable) as caught:
            await store.get_key(KEY.token)
        if why in str(caught.value):
            return repr(caught.value)
        assert time.monotonic() < give_up
        await deferLater(reactor, 0.02)


async def refusal(url: str) -> str:
    store = RedisStore(url, reactor)
    started = time.monotonic()
    with pytest.raises(CannotOpenStore) as caught:
        await store.open()
    assert time.monotonic() - started < HUNG
    with pytest.raises(StoreUnavailable):
        await store.ping()
    shown = "".join(repr(error) for error in (caught.value, caught.value.__cause__, caught.value.__context__))
    assert "canary" not in shown + repr(store)
    return str(caught.value)


@pytest_twisted.ensureDeferred
async def test_passwords_open_the_door(guarded: RedisServer) -> None:
    place = f"127.0.0.1:{guarded.port}/0"
    unix = f"{guarded.socket}?db=0"
    for url in (
        f"redis://:{CANARY}@{place}",
        f"redis://me:{CANARY}-me@{place}",
        f"redis://me:%63anary-s3cret-me@{place}",
        f"unix://:{CANARY}@{unix}",
    ):
        store = RedisStore(url, reactor)
        await store.open()
        await add_key(store, KEY)
        assert await store.get_key(KEY.token) == KEY
        assert await delete_keys(store, [KEY.token]) == [KEY.token]
        await store.close()


@pytest_twisted.ensureDeferred
async def test_a_wrong_password_is_a_reason_that_does_not_repeat_it(guarded: RedisServer, logged: list[str]) -> None:
    place = f"127.0.0.1:{guarded.port}/0"
    assert "WRONGPASS" in await refusal(f"redis://:wrong-{CANARY}@{place}")
    assert "WRONGPASS" in await refusal(f"redis://me:wrong-{CANARY}@{place}")
    assert "NOAUTH" in await refusal(f"redis://{place}")
    assert "canary" not in "".join(logged)


@pytest_twisted.ensureDeferred
async def test_a_server_that_repeats_the_password_does_not_get_it_through(logged: list[str]) -> None:
    with redis_server("--rename-command", "AUTH", "") as server:
        assert b"canary" in server.command("AUTH", CANARY)
        reason = await refusal(f"redis://:{CANARY}@127.0.0.1:{server.port}")
    assert "unknown command" in reason
    assert "canary" not in "".join(logged)


@pytest_twisted.ensureDeferred
async def test_a_password_changed_under_way_is_not_shown_either(server: RedisServer, logged: list[str]) -> None:
    server.command("CONFIG", "SET", "requirepass", CANARY)
    store = RedisStore(f"redis://:{CANARY}@127.0.0.1:{server.port}", reactor)
    await store.open()
    server.command("CONFIG", "SET", "requirepass", "another", login=(CANARY,))
    server.command("CLIENT", "KILL", "TYPE", "normal", login=("another",))
    reason = await until_refused(store, "WRONGPASS")
    server.command("CONFIG", "SET", "requirepass", CANARY, login=("another",))
    await eventually(store.ping)  # a failed AUTH is not the end
    await store.close()
    assert "WRONGPASS" in "".join(logged)
    assert "canary" not in "".join(logged) + reason


@pytest_twisted.ensureDeferred
async def test_nobody_there_is_a_reason() -> None:
    with redis_server() as server:
        url, unix = server.url, server.unix_url
    assert "refused" in await refusal(url)
    assert "redis.sock" in await refusal(unix)
    assert await refusal("redis://not..a..host/")


@pytest_twisted.ensureDeferred
async def test_another_schema_version_is_refused_and_left_alone(server: RedisServer) -> None:
    server.command("SET", "vllmproxy:schema", "99")
    reason = await refusal(server.url)
    assert "99" in reason
    assert "--store" in reason
    assert server.command("GET", "vllmproxy:schema") == b"$2\r\n99\r\n"
    store = RedisStore(f"redis://127.0.0.1:{server.port}/1", reactor)
    await store.open()
    await store.close()


@pytest_twisted.ensureDeferred
async def test_the_layout(server: RedisServer, store: RedisStore) -> None:
    await add_key(store, KEY)
    assert server.command("GET", "vllmproxy:schema") == b"$1\r\n3\r\n"
    assert server.command("GET", "vllmproxy:alias:one").endswith(KEY.token.encode() + b"\r\n")
    assert server.command("TTL", f"vllmproxy:{{{KEY.token}}}:key") == b":-1\r\n"
    assert server.command("ZSCORE", "vllmproxy:keys", KEY.token) == b"$1\r\n0\r\n"
    await delete_keys(store, [KEY.token])
    assert server.command("DBSIZE") == b":1\r\n"


@pytest_twisted.ensureDeferred
async def test_a_foreign_value_is_not_an_unknown_key(server: RedisServer, store: RedisStore) -> None:
    name = f"vllmproxy:{{{KEY.token}}}:key"
    server.command("HSET", name, "row", "{}")
    with pytest.raises(StoreUnavailable, match="row"):
        await store.get_key(KEY.token)
    server.command("SET", name, "text")
    with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
        await store.get_key(KEY.token)


@pytest_twisted.ensureDeferred
async def test_a_stalled_server_ends_calls_in_time_and_is_back_by_itself(server: RedisServer) -> None:
    store = RedisStore(server.url, reactor, timeout=1.1)
    await store.open()
    await add_key(store, KEY)
    server.stall()
    for _ in range(2):  # the later ones meet a connection that is being made, or none
        for call in (lambda: store.get_key(KEY.token), store.ping, lambda: store.find_aliases(["one"])):
            started = time.monotonic()
            with pytest.raises(StoreUnavailable):
                await call()
            assert time.monotonic() - started < HUNG
    server.resume()
    await eventually(store.ping)
    assert await store.get_key(KEY.token) == KEY
    await store.close()


@pytest_twisted.ensureDeferred
async def test_a_lookup_gives_up_before_its_caller_notices(server: RedisServer) -> None:
    store = RedisStore(server.url, reactor, timeout=HUNG)
    await store.open()
    server.stall()
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"within 0\.2 s"):
        await store.get_key(KEY.token)
    assert 0.15 < time.monotonic() - started < HUNG / 2
    server.resume()
    await store.close()


@pytest_twisted.ensureDeferred
async def test_closing_does_not_wait_for_a_stalled_server(server: RedisServer) -> None:
    store = RedisStore(server.url, reactor)
    await store.open()
    server.stall()
    pending = Deferred.fromCoroutine(add_key(store, KEY))
    started = time.monotonic()
    await store.close()
    assert time.monotonic() - started < HUNG
    with pytest.raises(StoreUnavailable, match="closed"):
        await pending


@pytest_twisted.ensureDeferred
async def test_opening_can_be_given_up(server: RedisServer) -> None:
    server.stall()
    store = RedisStore(server.url, reactor)
    opening = Deferred.fromCoroutine(store.open())
    await deferLater(reactor, 0.1)
    opening.cancel()
    with pytest.raises(CancelledError):
        await opening
    server.resume()
    await store.open()
    await store.ping()
    await store.close()


@pytest_twisted.ensureDeferred
async def test_a_cancelled_call_leaves_the_replies_in_order(server: RedisServer) -> None:
    store = RedisStore(server.url, reactor, timeout=HUNG, lookup_timeout=HUNG)
    await store.open()
    await add_key(store, KEY)
    server.stall()
    first = store.get_key("unknown")
    second = store.get_key(KEY.token)
    third = Deferred.fromCoroutine(store.find_aliases(["one"]))
    first.cancel()
    with pytest.raises(CancelledError):
        await first
    server.resume()
    assert await second == KEY
    assert await third == {"one": KEY.token}
    await store.close()


@pytest_twisted.ensureDeferred
async def test_an_add_that_has_failed_for_its_caller_is_not_done_later(server: RedisServer) -> None:
    hasty = RedisStore(server.url, reactor, timeout=0.3)  # too short for the connection to be dropped
    await hasty.open()
    server.stall()
    with pytest.raises(StoreUnavailable):
        await add_key(hasty, KEY)
    await deferLater(reactor, 0.1)
    server.resume()
    await eventually(hasty.ping)
    assert await hasty.get_key(KEY.token) is None
    assert await hasty.find_aliases(["one"]) == {}
    await add_key(hasty, KEY)
    await hasty.close()


@pytest_twisted.ensureDeferred
async def test_an_add_that_runs_after_its_time_adds_nothing(server: RedisServer, store: RedisStore) -> None:
    wire = await store._link.get()
    wire.offset -= 3600  # as if the script had been on its way for an hour
    with pytest.raises(StoreUnavailable, match="late"):
        await add_key(store, KEY)
    assert b"calls=2," in server.command("INFO", "commandstats").partition(b"cmdstat_eval:")[2][:20]
    assert server.command("DBSIZE") == b":1\r\n"
    wire.offset += 3600
    await add_key(store, KEY)


@pytest_twisted.ensureDeferred
async def test_a_killed_server_fails_fast_and_a_new_one_is_found(
    server: RedisServer, store: RedisStore, logged: list[str]
) -> None:
    await add_key(store, KEY)
    server.kill()
    results = await DeferredList([store.get_key(KEY.token) for _ in range(200)], consumeErrors=True)
    assert {failure.type for success, failure in results if not success} == {StoreUnavailable}
    await until_refused(store, "refused")
    assert sum("no connection to" in line for line in logged) <= 2
    server.start()
    await eventually(store.ping)
    assert await store.get_key(KEY.token) is None  # this server keeps nothing
    await add_key(store, KEY)
    assert await store.get_key(KEY.token) == KEY
    assert server.command("GET", "vllmproxy:schema") == b"$1\r\n3\r\n"


@pytest_twisted.ensureDeferred
async def test_a_connection_closed_while_idle_is_replaced_unnoticed(server: RedisServer, store: RedisStore) -> None:
    patient = RedisStore(server.url, reactor, timeout=HUNG, lookup_timeout=HUNG)
    await patient.open()
    await add_key(patient, KEY)
    server.command("CLIENT", "KILL", "TYPE", "normal")
    await deferLater(reactor, 0.2)
    assert await patient.get_key(KEY.token) == KEY
    await patient.close()


@pytest_twisted.ensureDeferred
async def test_scripts_come_back_after_a_flush(server: RedisServer, store: RedisStore) -> None:
    await add_key(store, KEY)
    server.command("SCRIPT", "FLUSH")
    assert await delete_keys(store, [KEY.token]) == [KEY.token]
    await add_key(store, KEY)
    server.command("SCRIPT", "FLUSH")
    assert await delete_keys(store, [KEY.token]) == [KEY.token]


class Tls:
    """A Redis behind a TLS server, and the authority that vouches for it."""

    def __init__(self, directory: Path, *names: str, days: int = 30) -> None:
        """``days``: when the certificate ends, from now."""
        directory.mkdir(exist_ok=True)
        self.authority = trustme.CA()
        self.ca = directory / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.ca))
        not_after = datetime.now(UTC) + timedelta(days)
        certificate = self.authority.issue_cert(*names, not_before=not_after - timedelta(60), not_after=not_after)
        pem = certificate.private_key_and_cert_chain_pem.bytes()
        self.options = PrivateCertificate.loadPEM(pem).options()


async def tls_refusal(server: RedisServer, tls: Tls, query: str) -> str:
    """Return why ``rediss://localhost`` in front of ``server`` cannot be opened."""
    factory = ProxyFactory("127.0.0.1", server.port)
    port = await SSL4ServerEndpoint(reactor, 0, tls.options, interface="127.0.0.1").listen(factory)
    try:
        return await refusal(f"rediss://:{CANARY}@localhost:{port.getHost().port}/0{query}")
    finally:
        await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_tls_with_an_authority_of_ones_own(guarded: RedisServer, tmp_path: Path) -> None:
    tls = Tls(tmp_path, "localhost", "127.0.0.1")
    factory = ProxyFactory("127.0.0.1", guarded.port)
    port = await SSL4ServerEndpoint(reactor, 0, tls.options, interface="127.0.0.1").listen(factory)
    for host in ("localhost", "127.0.0.1"):
        store = RedisStore(f"rediss://:{CANARY}@{host}:{port.getHost().port}/0?ca={tls.ca}", reactor)
        heard: list[str | None] = []
        store.watch_keys(heard.append)
        await store.open()
        await until(lambda heard=heard: None in heard)  # type: ignore[misc]
        await add_key(store, KEY)
        assert await store.get_key(KEY.token) == KEY
        await until(lambda heard=heard: KEY.token in heard)  # type: ignore[misc]
        await delete_keys(store, [KEY.token])
        await store.close()
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_tls_refuses_whom_it_cannot_verify(guarded: RedisServer, tmp_path: Path) -> None:
    other = Tls(tmp_path / "other", "localhost")
    good = Tls(tmp_path, "localhost")
    elsewhere = Tls(tmp_path / "elsewhere", "redis.example")
    expired = Tls(tmp_path / "expired", "localhost", days=-1)
    empty = tmp_path / "empty.pem"
    empty.touch()
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    assert "verify failed" in await tls_refusal(guarded, good, f"?ca={other.ca}")
    assert "verify failed" in await tls_refusal(guarded, good, "")
    assert "another host" in await tls_refusal(guarded, elsewhere, f"?ca={elsewhere.ca}")
    assert "verify failed" in await tls_refusal(guarded, expired, f"?ca={expired.ca}")
    assert "missing.pem" in await tls_refusal(guarded, good, f"?ca={tmp_path}/missing.pem")
    assert "damaged" in await tls_refusal(guarded, good, f"?ca={broken}")
    assert "holds no certificate" in await tls_refusal(guarded, good, f"?ca={empty}")


@pytest_twisted.ensureDeferred
async def test_version_1_is_brought_up(server: RedisServer) -> None:
    """As the first release wrote it: no index, no audit trail, rows without the newer fields."""
    server.command("SET", "vllmproxy:schema", "1")
    for number in range(700):
        token = hash_key(f"k{number}")
        fields = {"token": token, "key_name": f"k{number}", "key_alias": f"a{number}"}
        odd = {"created_at": 7, "lone": "\ud800", "text": '"created_at":7'}
        rest = {"metadata": odd, "tags": ["t"], "blocked": True, "created_at": 1000.5 + number}
        row = json.dumps({**fields, **rest, "created_by": '"created_at":7'}, separators=(",", ":"))
        server.command("HSET", f"vllmproxy:{{{token}}}:key", "row", row, "alias", f"a{number}")
        server.command("SET", f"vllmproxy:alias:a{number}", token)
    server.command("HSET", "vllmproxy:{broken}:key", "row", "no json")
    stores = [RedisStore(server.url, reactor) for _ in range(3)]
    await DeferredList([Deferred.fromCoroutine(store.open()) for store in stores], fireOnOneErrback=True)
    assert server.command("GET", "vllmproxy:schema") == b"$1\r\n3\r\n"
    assert server.command("ZCARD", "vllmproxy:keys") == b":701\r\n"
    first = stores[0]
    page = await first.list_keys(KeyQuery(limit=3))
    assert ([key.key_name for key in page.keys], page.total) == (["k699", "k698", "k697"], 701)
    key = await first.get_key(hash_key("k7"))
    assert key is not None
    assert (key.blocked, key.tags, key.created_at, key.key_type, key.allowed_routes) == (
        True,
        ("t",),
        1007.5,
        "default",
        (),
    )
    changed = await update_key(first, key.token, lambda old: attrs.evolve(old, key_alias="new", metadata={}))
    assert await stores[1].get_key(key.token) == changed
    assert await stores[2].find_aliases(["a7", "new"]) == {"new": key.token}
    await delete_keys(first, [key.token])
    assert server.command("ZCARD", "vllmproxy:keys") == b":700\r\n"
    for store in stores:
        await store.close()


@pytest_twisted.ensureDeferred
async def test_version_2_is_brought_up(server: RedisServer) -> None:
    """It had nothing that is kept otherwise now; to be asked for a version is all that it needs."""
    server.command("SET", "vllmproxy:schema", "2")
    row = json.dumps({"token": "t", "key_name": "n", "created_at": 5}, separators=(",", ":"))
    server.command("HSET", "vllmproxy:{t}:key", "row", row)
    server.command("ZADD", "vllmproxy:keys", "5", "t")
    stores = [RedisStore(server.url, reactor) for _ in range(3)]
    await DeferredList([Deferred.fromCoroutine(store.open()) for store in stores], fireOnOneErrback=True)
    assert server.command("GET", "vllmproxy:schema") == b"$1\r\n3\r\n"
    assert [key.key_name for key in (await stores[0].list_keys(KeyQuery())).keys] == ["n"]
    for store in stores:
        await store.close()


@pytest_twisted.ensureDeferred
async def test_an_interrupted_migration_is_begun_again(server: RedisServer) -> None:
    server.command("SET", "vllmproxy:schema", "1")
    row = json.dumps({"token": "t", "key_name": "n", "created_at": 5}, separators=(",", ":"))
    server.command("HSET", "vllmproxy:{t}:key", "row", row)
    server.command("ZADD", "vllmproxy:keys", "1", "t")  # as far as somebody had come
    store = RedisStore(server.url, reactor)
    await store.open()
    assert server.command("ZSCORE", "vllmproxy:keys", "t") == b"$1\r\n5\r\n"
    await store.close()


@pytest_twisted.ensureDeferred
async def test_what_another_version_keeps_of_a_key_is_not_overwritten(server: RedisServer, store: RedisStore) -> None:
    row = json.dumps({"token": KEY.token, "key_name": "n", "newer": [1]})
    server.command("HSET", f"vllmproxy:{{{KEY.token}}}:key", "row", row, "beside", "it")
    with pytest.raises(StoreUnavailable, match="newer"):
        await update_key(store, KEY.token, lambda key: attrs.evolve(key, blocked=True))
    assert row.encode() in server.command("HGET", f"vllmproxy:{{{KEY.token}}}:key", "row")


@pytest_twisted.ensureDeferred
async def test_updates_from_two_proxies_lose_nothing(server: RedisServer, store: RedisStore) -> None:
    other = RedisStore(server.url, reactor)
    await other.open()
    await add_key(store, KEY)

    def set_field(number: int) -> Callable[[VirtualKey], VirtualKey]:
        return lambda key: attrs.evolve(key, metadata={**key.metadata, str(number): number})

    calls = [update_key((store, other)[number % 2], KEY.token, set_field(number)) for number in range(40)]
    await DeferredList([Deferred.fromCoroutine(call) for call in calls], fireOnOneErrback=True)
    key = await store.get_key(KEY.token)
    assert key is not None
    assert sorted(key.metadata.values()) == list(range(40))
    await other.close()
