"""What every store promises; the same tests on memory, on SQLite and on a real Redis."""

import json
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import pytest_twisted
from _stores import add_key, delete_keys, update_key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.task import deferLater

from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.keys.policy import KEY_TYPES
from vllmproxy.store.interface import AliasTaken, AuditEntry, Store, StoreUnavailable, TokenTaken, Writes
from vllmproxy.store.listing import SORT_FIELDS, KeyPage, KeyQuery
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
    key_type="llm_api",
    allowed_routes=("/v1/chat/*", "info"),
    granted_by_master=True,
)


def key(name: str, alias: str | None = None) -> VirtualKey:
    return VirtualKey(token=hash_key(name), key_name=f"sk-...{name[-4:]}", key_alias=alias)


@pytest_twisted.ensureDeferred
async def test_every_field_comes_back(store: Store) -> None:
    await add_key(store, FULL)
    await add_key(store, key("bare"))
    assert await store.get_key(FULL.token) == FULL
    assert await store.get_key(hash_key("bare")) == key("bare")


@pytest_twisted.ensureDeferred
async def test_unknown_key_is_none(store: Store) -> None:
    await add_key(store, FULL)
    for token in ("", "sk-full", FULL.token[:-1], "\ud800", FULL.key_alias or ""):
        assert await store.get_key(token) is None


@pytest_twisted.ensureDeferred
async def test_expired_key_is_still_known(store: Store) -> None:
    expired = attrs.evolve(key("old"), expires=1.0)
    await add_key(store, expired)
    assert await store.get_key(expired.token) == expired


@pytest_twisted.ensureDeferred
async def test_what_is_stored_is_a_copy(store: Store) -> None:
    metadata: dict[str, Any] = {"list": [1]}
    await add_key(store, attrs.evolve(key("copy"), metadata=metadata))
    metadata["list"].append(2)
    got = await store.get_key(hash_key("copy"))
    assert got is not None
    got.metadata["list"].append(3)
    again = await store.get_key(hash_key("copy"))
    assert again is not None
    assert again.metadata == {"list": [1]}


@pytest_twisted.ensureDeferred
async def test_a_taken_alias_leaves_nothing_behind(store: Store) -> None:
    await add_key(store, key("first", "name"))
    with pytest.raises(AliasTaken):
        await add_key(store, key("second", "name"))
    assert await store.get_key(hash_key("second")) is None
    assert await store.find_aliases(["name"]) == {"name": hash_key("first")}


@pytest_twisted.ensureDeferred
async def test_a_taken_token_changes_nothing(store: Store) -> None:
    await add_key(store, key("same", "one"))
    for alias in ("one", "two", None):
        with pytest.raises(TokenTaken):
            await add_key(store, key("same", alias))
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
        await add_key(store, key(f"k{number}", alias))
    named = {alias: hash_key(f"k{number}") for number, alias in enumerate(aliases) if alias is not None}
    assert await store.find_aliases(list(named)) == named


@pytest.mark.parametrize("contested", ["alias", "token"])
@pytest_twisted.ensureDeferred
async def test_of_fifty_at_once_exactly_one_wins(store: Store, contested: str) -> None:
    if contested == "alias":
        keys = [key(f"k{number}", "wanted") for number in range(50)]
    else:
        keys = [key("wanted", f"a{number}") for number in range(50)]
    results = await DeferredList([Deferred.fromCoroutine(add_key(store, each)) for each in keys], consumeErrors=True)
    won = [each for each, (success, _) in zip(keys, results, strict=True) if success]
    lost = [failure.type for success, failure in results if not success]
    assert len(won) == 1
    assert lost == [AliasTaken if contested == "alias" else TokenTaken] * 49
    found = [each for each in keys if await store.get_key(each.token) == each]
    assert found == won
    assert list((await store.find_aliases([each.key_alias or "" for each in keys])).values()) == [won[0].token]


@pytest_twisted.ensureDeferred
async def test_delete_frees_token_and_alias(store: Store) -> None:
    await add_key(store, key("one", "name"))
    await add_key(store, key("two"))
    assert await delete_keys(store, [hash_key("one")]) == [hash_key("one")]
    assert await store.get_key(hash_key("one")) is None
    assert await store.find_aliases(["name"]) == {}
    assert await store.get_key(hash_key("two")) == key("two")
    await add_key(store, key("one", "other"))
    await add_key(store, key("three", "name"))


@pytest_twisted.ensureDeferred
async def test_delete_tells_what_there_was(store: Store) -> None:
    for number in range(300):
        await add_key(store, key(f"k{number}", f"a{number}"))
    tokens = [hash_key(f"k{number}") for number in range(299, -1, -1)]
    assert await delete_keys(store, [hash_key("unknown"), *tokens, tokens[0]]) == tokens
    assert await delete_keys(store, tokens) == []
    assert await delete_keys(store, []) == []
    assert await store.find_aliases([f"a{number}" for number in range(300)]) == {}


@pytest_twisted.ensureDeferred
async def test_find_aliases_names_those_that_exist(store: Store) -> None:
    await add_key(store, key("one", "a"))
    await add_key(store, key("two", "b"))
    assert await store.find_aliases(["b", "nobody", "a", "a"]) == {"a": hash_key("one"), "b": hash_key("two")}
    assert await store.find_aliases([]) == {}


@pytest_twisted.ensureDeferred
async def test_ping_answers(store: Store) -> None:
    await store.ping()


@pytest_twisted.ensureDeferred
async def test_a_large_row(store: Store) -> None:
    large = attrs.evolve(key("large"), metadata={"text": "x" * 300_000, "many": list(range(20_000))})
    await add_key(store, large)
    assert await store.get_key(large.token) == large


@pytest_twisted.ensureDeferred
async def test_a_cancelled_call_disturbs_no_other(store: Store) -> None:
    await add_key(store, key("one"))
    calls = [store.get_key(hash_key(name)) for name in ("one", "two", "one")]
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
    await add_key(store, key("one", "a"))
    await store.close()
    await assert_unavailable(store)
    await store.close()


@pytest_twisted.ensureDeferred
async def test_store_is_unavailable_before_it_is_opened(url: str) -> None:
    store = make_store(url, reactor=reactor)
    await assert_unavailable(store)
    await store.close()


@pytest_twisted.ensureDeferred
async def test_close_fails_what_is_pending(url: str) -> None:
    store = make_store(url, reactor=reactor)
    await store.open()
    pending = [store.get_key(hash_key(f"k{number}")) for number in range(20)]
    await store.close()
    for success, result in await DeferredList(pending, consumeErrors=True):
        assert (success and result is None) or result.type is StoreUnavailable


@pytest_twisted.ensureDeferred
async def test_a_store_opened_again_works(url: str) -> None:
    store = make_store(url, reactor=reactor)
    for name in ("one", "two"):
        await store.open()
        await store.open()
        await add_key(store, key(name))
        await store.close()


@pytest_twisted.ensureDeferred
async def test_who_watches_hears_of_a_change_before_it_is_acknowledged(url: str) -> None:
    store, heard = make_store(url, reactor=reactor), set[str | None]()
    for _ in range(2):
        store.watch_keys(heard.add)
    await store.open()
    one, two = key("one", "a"), key("two", "a")
    await add_key(store, one)
    assert one.token in heard
    heard.clear()
    await store.change_keys([one.token, two.token], lambda _: Writes(put=(two,), remove=(one.token,)))
    assert {one.token, two.token} <= heard
    heard.clear()
    await update_key(store, two.token, lambda found: attrs.evolve(found, blocked=True))
    assert two.token in heard
    await store.close()


@pytest_twisted.ensureDeferred
async def test_update_changes_what_it_says_and_moves_the_alias(store: Store) -> None:
    await add_key(store, key("one", "old"))
    await add_key(store, key("two", "taken"))
    changed = await update_key(store, hash_key("one"), lambda found: attrs.evolve(found, key_alias="new", blocked=True))
    assert changed == attrs.evolve(key("one", "new"), blocked=True)
    assert await store.get_key(hash_key("one")) == changed
    assert await store.find_aliases(["old", "new", "taken"]) == {"new": hash_key("one"), "taken": hash_key("two")}
    with pytest.raises(AliasTaken):
        await update_key(store, hash_key("one"), lambda found: attrs.evolve(found, key_alias="taken", blocked=False))
    assert await store.get_key(hash_key("one")) == changed
    # To keep one's own alias is no conflict, and one without an alias can get one.
    assert await update_key(store, hash_key("one"), lambda found: attrs.evolve(found, tags=("t",))) is not None
    await update_key(store, hash_key("one"), lambda found: attrs.evolve(found, key_alias=None))
    assert await store.find_aliases(["new"]) == {}
    await update_key(store, hash_key("two"), lambda found: attrs.evolve(found, key_alias="new"))
    assert await store.find_aliases(["new", "taken"]) == {"new": hash_key("two")}
    assert await update_key(store, hash_key("nobody"), lambda found: found) is None
    assert await store.get_key(hash_key("nobody")) is None


@pytest_twisted.ensureDeferred
async def test_concurrent_updates_of_different_fields_all_survive(store: Store) -> None:
    await add_key(store, key("one"))

    def set_field(number: int) -> Callable[[VirtualKey], VirtualKey]:
        return lambda found: attrs.evolve(found, metadata={**found.metadata, str(number): number})

    calls = [update_key(store, hash_key("one"), set_field(number)) for number in range(30)]
    calls.append(update_key(store, hash_key("one"), lambda found: attrs.evolve(found, blocked=True)))
    await DeferredList([Deferred.fromCoroutine(call) for call in calls], fireOnOneErrback=True)
    got = await store.get_key(hash_key("one"))
    assert got is not None
    assert got.blocked
    assert got.metadata == {str(number): number for number in range(30)}


@pytest_twisted.ensureDeferred
async def test_what_a_decision_raises_reaches_its_caller_and_nothing_is_written(store: Store) -> None:
    await add_key(store, key("one"))

    def refuse(found: Any) -> Writes:
        raise LookupError(sorted(found))

    with pytest.raises(LookupError, match=hash_key("one")):
        await store.change_keys([hash_key("one"), hash_key("two")], refuse)
    assert await store.get_key(hash_key("one")) == key("one")
    assert await store.list_audit(10) == []


@pytest_twisted.ensureDeferred
async def test_one_key_takes_the_place_of_another_at_once(store: Store) -> None:
    await add_key(store, key("old", "name"))
    tokens = [hash_key("old"), hash_key("new")]
    kept = attrs.evolve(key("old"), expires=5.0)
    await store.change_keys(tokens, lambda found: Writes(put=(key("new", "name"), kept), audit=(entry(1),)))
    assert [await store.get_key(token) for token in tokens] == [kept, key("new", "name")]
    assert await store.find_aliases(["name"]) == {"name": hash_key("new")}
    await store.change_keys(tokens, lambda found: Writes(put=(key("old", "name"),), remove=(hash_key("new"),)))
    assert [await store.get_key(token) for token in tokens] == [key("old", "name"), None]
    assert await store.find_aliases(["name"]) == {"name": hash_key("old")}


@pytest_twisted.ensureDeferred
async def test_somebody_always_sees_one_of_the_two(store: Store) -> None:
    """While a key is replaced again and again, one of the two is there whenever anybody looks."""
    names = [hash_key("a"), hash_key("b")]
    await add_key(store, key("a", "name"))

    def swap(found: Any) -> Writes:
        (there,) = found
        other = "b" if there == names[0] else "a"
        return Writes(put=(key(other, "name"),), remove=(there,))

    async def swaps() -> None:
        for _ in range(40):
            await store.change_keys(names, swap)

    async def look() -> None:
        while not done.called:
            page = await store.list_keys(KeyQuery(search="name", sort_by="token"))
            assert page.total == 1
            assert len(await store.find_aliases(["name"])) == 1
            await deferLater(reactor, 0)

    done = Deferred.fromCoroutine(swaps())
    await look()
    await done


@pytest_twisted.ensureDeferred
async def test_a_conflict_writes_nothing_of_the_whole_change(store: Store) -> None:
    await add_key(store, key("one", "taken"))
    with pytest.raises(AliasTaken):
        await store.change_keys(
            [hash_key("two"), hash_key("three")],
            lambda found: Writes(put=(key("two", "free"), key("three", "taken")), audit=(entry(1),)),
        )
    with pytest.raises(AliasTaken):
        await store.change_keys(
            [hash_key("two"), hash_key("three")], lambda found: Writes(put=(key("two", "same"), key("three", "same")))
        )
    assert [await store.get_key(hash_key(name)) for name in ("two", "three")] == [None, None]
    assert await store.find_aliases(["free", "same"]) == {}
    assert await store.list_audit(10) == []


def entry(number: int) -> AuditEntry:
    return AuditEntry(
        time=1000.0 + number,
        actor="master",
        action="/key/update",
        target=f"t{number}",
        before={"metadata": {"lone": "\ud800"}},
        after=None,
        request_id="r",
    )


@pytest_twisted.ensureDeferred
async def test_the_audit_trail_is_read_from_its_end(store: Store) -> None:
    assert await store.list_audit(5) == []
    for number in range(7):
        if number % 2:
            await store.add_audit(entry(number))
        else:
            await store.change_keys([], lambda found, number=number: Writes(audit=(entry(number),)))  # type: ignore[misc]
    first = await store.list_audit(3)
    assert [each.fields for each in first] == [attrs.asdict(entry(number)) for number in (6, 5, 4)]
    second = await store.list_audit(3, first[-1].id)
    assert [each.fields["target"] for each in second] == ["t3", "t2", "t1"]
    assert [each.fields["target"] for each in await store.list_audit(3, second[-1].id)] == ["t0"]
    assert [each.fields["target"] for each in await store.list_audit(100)] == [f"t{n}" for n in range(6, -1, -1)]
    last = (await store.list_audit(100))[-1].id
    assert await store.list_audit(3, last) == []


async def fill(store: Store, count: int) -> list[VirtualKey]:
    keys = []
    for number in range(count):
        made = attrs.evolve(
            key(f"key-{number:03}", None if number % 3 == 0 else f"alias {number:03}"),
            user_id=f"user-{number % 4}",
            team_id="Team-A" if number % 2 else None,
            blocked=number % 10 == 0,
            expires=500.0 if number % 5 == 1 else None,
            created_at=float(1000 - number // 2),
            updated_at=float(number),
        )
        keys.append(made)
        await add_key(store, made)
    return keys


@pytest_twisted.ensureDeferred
async def test_listing_pages_cover_all_once_and_in_order(store: Store) -> None:
    keys = await fill(store, 57)
    for sort_by in SORT_FIELDS:
        for descending in (True, False):
            seen: list[VirtualKey] = []
            for page_number in range(7):
                query = KeyQuery(offset=10 * page_number, sort_by=sort_by, descending=descending)  # type: ignore[arg-type]
                page = await store.list_keys(query)
                assert page.total == 57
                seen += page.keys
            assert sorted(each.token for each in seen) == sorted(each.token for each in keys)
            values = [getattr(each, sort_by) for each in seen if getattr(each, sort_by) is not None]
            assert values == sorted(values, reverse=descending)
            assert None not in [getattr(each, sort_by) for each in seen[: len(values)]]
    newest = await store.list_keys(KeyQuery(limit=1))
    assert newest.keys[0] == max(keys, key=lambda each: (each.created_at, each.token))


@pytest.mark.parametrize(
    "query",
    [
        {"user_id": "user-2"},
        {"team_id": "Team-A"},
        {"team_id": "team-a"},
        {"key_alias": "alias 004"},
        {"key_alias": "alias"},
        {"key_alias": "alias 004", "user_id": "user-1"},
        {"token": hash_key("key-003")},
        {"token": hash_key("key-003"), "team_id": "nobody"},
        {"token": "nobody"},
        {"search": "ALIAS 01"},
        {"search": "team-a"},
        {"search": hash_key("key-005")},
        {"search": "nowhere"},
        {"status": "blocked"},
        {"status": "expired"},
        {"status": "active", "team_id": "Team-A", "sort_by": "updated_at"},
        {"aliased": True, "sort_by": "key_alias", "descending": False},
        {"sort_by": "updated_at", "offset": 500},
        {"offset": 500},
    ],
)
@pytest_twisted.ensureDeferred
async def test_listing_filters(store: Store, query: dict[str, Any]) -> None:
    keys = await fill(store, 31)
    wanted = KeyQuery(**query, limit=100, now=500.0)
    page = await store.list_keys(wanted)
    expected = [each for each in keys if wanted.matches(each)]
    assert page.total == len(expected)
    assert {each.token for each in page.keys} == ({each.token for each in expected} if not wanted.offset else set())
    assert all(each in keys for each in page.keys)


def test_what_a_listing_matches() -> None:
    found = attrs.evolve(key("one", "Équipe Rouge"), user_id="u", expires=10.0)
    table: list[tuple[dict[str, Any], bool]] = [
        ({}, True),
        ({"search": "équipe"}, True),
        ({"search": "sk-...one"}, True),
        ({"search": found.token}, True),
        ({"search": found.token[:10]}, False),
        ({"user_id": "U"}, False),
        ({"status": "active", "now": 9.9}, True),
        ({"status": "active", "now": 10.0}, False),
        ({"status": "expired", "now": 10.0}, True),
        ({"aliased": True}, True),
    ]
    assert [KeyQuery(**query).matches(found) for query, _ in table] == [expected for _, expected in table]
    assert not KeyQuery(aliased=True).matches(key("two"))


@pytest_twisted.ensureDeferred
async def test_listing_follows_changes(store: Store) -> None:
    await add_key(store, key("one"))
    await add_key(store, key("two"))
    await update_key(store, hash_key("one"), lambda found: attrs.evolve(found, created_at=99.0, user_id="u"))
    page = await store.list_keys(KeyQuery())
    assert [each.token for each in page.keys] == [hash_key("one"), hash_key("two")]
    assert (await store.list_keys(KeyQuery(user_id="u"))).total == 1
    await delete_keys(store, [hash_key("one")])
    for query in (KeyQuery(), KeyQuery(sort_by="updated_at")):
        assert [each.token for each in (await store.list_keys(query)).keys] == [hash_key("two")]
    await delete_keys(store, [hash_key("two")])
    assert await store.list_keys(KeyQuery()) == KeyPage((), 0)


@pytest_twisted.ensureDeferred
async def test_a_listing_of_many(store: Store) -> None:
    many = tuple(attrs.evolve(key(f"k{number}"), updated_at=float(number)) for number in range(1500))
    await store.change_keys([each.token for each in many], lambda found: Writes(put=many))
    page = await store.list_keys(KeyQuery(sort_by="updated_at", limit=2))
    assert (page.total, page.keys) == (1500, (many[1499], many[1498]))


async def assert_unavailable(store: Store) -> None:
    for call in (
        store.ping(),
        add_key(store, key("late")),
        store.get_key(hash_key("one")),
        store.find_aliases(["a"]),
        store.find_aliases([]),
        delete_keys(store, [hash_key("one")]),
        delete_keys(store, []),
        update_key(store, hash_key("one"), lambda key: key),
        store.change_keys([], lambda _: Writes()),
        store.list_keys(KeyQuery()),
        store.list_keys(KeyQuery(search="a")),
        store.add_audit(entry(1)),
        store.list_audit(10),
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
    key_type=st.sampled_from(sorted(KEY_TYPES)),
    allowed_routes=st.lists(st.sampled_from(["/v1/chat", "/*", "info", "/key/list"]), max_size=3).map(tuple),
    granted_by_master=st.booleans(),
)


@given(virtual_keys)
def test_rows_round_trip(value: VirtualKey) -> None:
    row = dump_row(value)
    assert row.isascii()
    assert load_row(row) == value
    assert load_row(row.encode()) == value


@given(virtual_keys)
def test_a_row_that_says_everything_is_the_same_key(value: VirtualKey) -> None:
    """As versions wrote it that left nothing out."""
    fields = attrs.asdict(value, recurse=False, filter=lambda a, _: a.init)
    assert load_row(json.dumps(fields)) == value


def test_a_row_says_what_is_not_as_by_default() -> None:
    assert json.loads(dump_row(key("bare"))) == {"token": hash_key("bare"), "key_name": key("bare").key_name}
    assert json.loads(dump_row(attrs.evolve(key("bare"), blocked=True, rpm_limit=0, tags=("a",)))) == {
        "token": hash_key("bare"),
        "key_name": key("bare").key_name,
        "blocked": True,
        "rpm_limit": 0,
        "tags": ["a"],
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{}",
        '{"token":"t"}',
        '{"token":"t","key_name":"n","max":1}',
        '{"token":"t","key_name":"n","key_type":"newer"}',
        '{"token":"t","key_name":"n","allowed_routes":["newer"]}',
        '{"token":"t","key_name":"n","rpm_limit":100.0}',
        '{"token":"t","key_name":"n","blocked":1}',
        '{"token":"t","key_name":"n","key_alias":5}',
        '{"token":"t","key_name":"n","model_rpm_limit":{"m":5.5}}',
    ],
)
def test_anything_else_is_no_row(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        load_row(text)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=virtual_keys)
@pytest_twisted.ensureDeferred
async def test_any_key_round_trips_through_every_store(every_store: list[Store], value: VirtualKey) -> None:
    for store in every_store:
        await add_key(store, value)
        assert await store.get_key(value.token) == value
        if value.key_alias is not None:
            assert await store.find_aliases([value.key_alias]) == {value.key_alias: value.token}
        assert await delete_keys(store, [value.token]) == [value.token]
        assert await store.get_key(value.token) is None
