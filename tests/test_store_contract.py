"""What every store promises; the same tests on memory, on SQLite and on a real Redis."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import pytest_twisted
from _redis import RedisServer, redis_server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredList

from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.store.interface import AliasTaken, Store, StoreUnavailable, TokenTaken
from vllmproxy.store.opening import make_store
from vllmproxy.store.rows import dump_row, load_row

FULL = VirtualKey(
    token=hash_key("sk-full"),
    key_name="sk-...full",
    key_alias="équipe ☃ 'quoted' \" }{ \0",
    user_id="user-1",
    team_id="team-1",
    metadata={
        "ключ": ["é", {"deep": {"er": [1, -2.5, 1e300, None, True, ""]}}],
        "lone": "\ud800",
        "n": 10**30,
    },
    tags=("a", "b", "ü"),
    blocked=True,
    expires=1234567890.125,
    created_at=1700000000.25,
    updated_at=1700000001.75,
    created_by="master",
    updated_by="someone",
)


def key(name: str, alias: str | None = None) -> VirtualKey:
    return VirtualKey(token=hash_key(name), key_name=f"sk-...{name[-4:]}", key_alias=alias)


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture(params=["memory", "sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis")
        server.command("FLUSHALL")
        return server.url
    return {"memory": "memory:", "sqlite": f"sqlite:{tmp_path / 'keys.sqlite3'}"}[request.param]


@pytest_twisted.async_yield_fixture
async def store(url: str) -> AsyncIterator[Store]:
    made = make_store(url, reactor=reactor)
    await made.open()
    yield made
    await made.close()


@pytest_twisted.async_yield_fixture
async def every_store(redis: RedisServer, tmp_path: Path) -> AsyncIterator[list[Store]]:
    redis.command("FLUSHALL")
    stores = [make_store(url, reactor=reactor) for url in ("memory:", f"sqlite:{tmp_path / 'every'}", redis.unix_url)]
    for store in stores:
        await store.open()
    yield stores
    for store in stores:
        await store.close()


@pytest_twisted.ensureDeferred
async def test_every_field_comes_back(store: Store) -> None:
    await store.add_key(FULL)
    await store.add_key(key("bare"))
    assert await store.get_key(FULL.token) == FULL
    assert await store.get_key(hash_key("bare")) == key("bare")


@pytest_twisted.ensureDeferred
async def test_unknown_key_is_none(store: Store) -> None:
    await store.add_key(FULL)
    for token in ("", "sk-full", FULL.token[:-1], "\ud800", FULL.key_alias or ""):
        assert await store.get_key(token) is None


@pytest_twisted.ensureDeferred
async def test_expired_key_is_still_known(store: Store) -> None:
    expired = attrs.evolve(key("old"), expires=1.0)
    await store.add_key(expired)
    assert await store.get_key(expired.token) == expired


@pytest_twisted.ensureDeferred
async def test_what_is_stored_is_a_copy(store: Store) -> None:
    metadata: dict[str, Any] = {"list": [1]}
    await store.add_key(attrs.evolve(key("copy"), metadata=metadata))
    metadata["list"].append(2)
    got = await store.get_key(hash_key("copy"))
    assert got is not None
    got.metadata["list"].append(3)
    again = await store.get_key(hash_key("copy"))
    assert again is not None
    assert again.metadata == {"list": [1]}


@pytest_twisted.ensureDeferred
async def test_a_taken_alias_leaves_nothing_behind(store: Store) -> None:
    await store.add_key(key("first", "name"))
    with pytest.raises(AliasTaken):
        await store.add_key(key("second", "name"))
    assert await store.get_key(hash_key("second")) is None
    assert await store.find_aliases(["name"]) == {"name": hash_key("first")}


@pytest_twisted.ensureDeferred
async def test_a_taken_token_changes_nothing(store: Store) -> None:
    await store.add_key(key("same", "one"))
    for alias in ("one", "two", None):
        with pytest.raises(TokenTaken):
            await store.add_key(key("same", alias))
    assert await store.get_key(hash_key("same")) == key("same", "one")
    assert await store.find_aliases(["two"]) == {}


@pytest_twisted.ensureDeferred
async def test_aliases_are_compared_exactly_and_none_is_no_alias(store: Store) -> None:
    aliases = [
        "1.0",
        "1",
        "007",
        "A",
        "a",
        "a ",
        "\uff41",
        "é",
        "e\u0301",
        "",
        "\ud800",
        "\udc00",
        None,
        None,
    ]
    for number, alias in enumerate(aliases):
        await store.add_key(key(f"k{number}", alias))
    named = {alias: hash_key(f"k{number}") for number, alias in enumerate(aliases) if alias is not None}
    assert await store.find_aliases(list(named)) == named


@pytest.mark.parametrize("contested", ["alias", "token"])
@pytest_twisted.ensureDeferred
async def test_of_fifty_at_once_exactly_one_wins(store: Store, contested: str) -> None:
    if contested == "alias":
        keys = [key(f"k{number}", "wanted") for number in range(50)]
    else:
        keys = [key("wanted", f"a{number}") for number in range(50)]
    results = await DeferredList([Deferred.fromCoroutine(store.add_key(each)) for each in keys], consumeErrors=True)
    won = [each for each, (success, _) in zip(keys, results, strict=True) if success]
    lost = [failure.type for success, failure in results if not success]
    assert len(won) == 1
    assert lost == [AliasTaken if contested == "alias" else TokenTaken] * 49
    found = [each for each in keys if await store.get_key(each.token) == each]
    assert found == won
    assert list((await store.find_aliases([each.key_alias or "" for each in keys])).values()) == [won[0].token]


@pytest_twisted.ensureDeferred
async def test_delete_frees_token_and_alias(store: Store) -> None:
    await store.add_key(key("one", "name"))
    await store.add_key(key("two"))
    assert await store.delete_keys([hash_key("one")]) == [hash_key("one")]
    assert await store.get_key(hash_key("one")) is None
    assert await store.find_aliases(["name"]) == {}
    assert await store.get_key(hash_key("two")) == key("two")
    await store.add_key(key("one", "other"))
    await store.add_key(key("three", "name"))


@pytest_twisted.ensureDeferred
async def test_delete_tells_what_there_was(store: Store) -> None:
    for number in range(300):
        await store.add_key(key(f"k{number}", f"a{number}"))
    tokens = [hash_key(f"k{number}") for number in range(299, -1, -1)]
    assert await store.delete_keys([hash_key("unknown"), *tokens, tokens[0]]) == tokens
    assert await store.delete_keys(tokens) == []
    assert await store.delete_keys([]) == []
    assert await store.find_aliases([f"a{number}" for number in range(300)]) == {}


@pytest_twisted.ensureDeferred
async def test_find_aliases_names_those_that_exist(store: Store) -> None:
    await store.add_key(key("one", "a"))
    await store.add_key(key("two", "b"))
    assert await store.find_aliases(["b", "nobody", "a", "a"]) == {"a": hash_key("one"), "b": hash_key("two")}
    assert await store.find_aliases([]) == {}


@pytest_twisted.ensureDeferred
async def test_ping_answers(store: Store) -> None:
    await store.ping()


@pytest_twisted.ensureDeferred
async def test_a_large_row(store: Store) -> None:
    large = attrs.evolve(key("large"), metadata={"text": "x" * 300_000, "many": list(range(20_000))})
    await store.add_key(large)
    assert await store.get_key(large.token) == large


@pytest_twisted.ensureDeferred
async def test_a_cancelled_call_disturbs_no_other(store: Store) -> None:
    await store.add_key(key("one"))
    calls = [Deferred.fromCoroutine(store.get_key(hash_key(name))) for name in ("one", "two", "one")]
    calls[0].addErrback(lambda failure: failure.type.__name__)
    calls[0].cancel()
    # A store without waiting has answered before it could be cancelled.
    assert await calls[0] in ("CancelledError", key("one"))
    assert await calls[1] is None
    assert await calls[2] == key("one")
    assert await store.get_key(hash_key("two")) is None


@pytest_twisted.ensureDeferred
async def test_closed_store_is_unavailable_and_closes_twice(url: str) -> None:
    store = make_store(url, reactor=reactor)
    await store.close()
    await store.open()
    await store.add_key(key("one", "a"))
    await store.close()
    await store.close()
    await assert_unavailable(store)


@pytest_twisted.ensureDeferred
async def test_store_is_unavailable_before_it_is_opened(url: str) -> None:
    await assert_unavailable(make_store(url, reactor=reactor))


@pytest_twisted.ensureDeferred
async def test_close_fails_what_is_pending(url: str) -> None:
    store = make_store(url, reactor=reactor)
    await store.open()
    pending = [Deferred.fromCoroutine(store.get_key(hash_key(f"k{number}"))) for number in range(20)]
    await store.close()
    for success, result in await DeferredList(pending, consumeErrors=True):
        assert (success and result is None) or result.type is StoreUnavailable


@pytest_twisted.ensureDeferred
async def test_a_store_opened_again_works(url: str) -> None:
    store = make_store(url, reactor=reactor)
    for name in ("one", "two"):
        await store.open()
        await store.open()
        await store.add_key(key(name))
        await store.close()


async def assert_unavailable(store: Store) -> None:
    for call in (
        store.ping(),
        store.add_key(key("late")),
        store.get_key(hash_key("one")),
        store.find_aliases(["a"]),
        store.find_aliases([]),
        store.delete_keys([hash_key("one")]),
        store.delete_keys([]),
    ):
        with pytest.raises(StoreUnavailable):
            await call


names = st.text(st.characters(codec=None, exclude_categories=()), max_size=12)
times = st.floats(min_value=0, max_value=1e11)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
virtual_keys = st.builds(
    VirtualKey,
    token=names,
    key_name=names,
    key_alias=st.none() | names,
    user_id=st.none() | names,
    team_id=st.none() | names,
    metadata=st.dictionaries(names, json_values, max_size=4),
    tags=st.lists(names, max_size=3).map(tuple),
    blocked=st.booleans(),
    expires=st.none() | times,
    created_at=times,
    updated_at=times,
    created_by=st.none() | names,
    updated_by=st.none() | names,
)


@given(virtual_keys)
def test_rows_round_trip(value: VirtualKey) -> None:
    row = dump_row(value)
    assert row.isascii()
    assert load_row(row) == value
    assert load_row(row.encode()) == value


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"token":"t"}', '{"token":"t","key_name":"n","max":1}'])
def test_anything_else_is_no_row(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        load_row(text)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=virtual_keys)
@pytest_twisted.ensureDeferred
async def test_any_key_round_trips_through_every_store(every_store: list[Store], value: VirtualKey) -> None:
    for store in every_store:
        await store.add_key(value)
        assert await store.get_key(value.token) == value
        if value.key_alias is not None:
            assert await store.find_aliases([value.key_alias]) == {value.key_alias: value.token}
        assert await store.delete_keys([value.token]) == [value.token]
        assert await store.get_key(value.token) is None
