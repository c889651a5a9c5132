from collections.abc import Sequence

import pytest
from attrs import evolve
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from vllmproxy.errors import ApiError, AuthError, ExpiredKey, Forbidden, StoreDown, UnknownKey
from vllmproxy.keys.cache import KeyCache
from vllmproxy.keys.credentials import Credential
from vllmproxy.keys.gate import ANONYMOUS, MASTER, Caller, Gate
from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.keys.masterkey import MasterKey
from vllmproxy.keys.routes import Group
from vllmproxy.store.interface import StoreUnavailable

SECRET = b"sk-canary-of-a-virtual-key"
TOKEN = hash_key(SECRET)
MASTER_SECRET = b"sk-canary-of-the-master-key"
KEY = VirtualKey(token=TOKEN, key_name="sk-...-key", key_alias="team-a")
NOW = 1_700_000_000.0


class SlowStore:
    """A store whose look-ups are answered by the test."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Deferred[VirtualKey | None]]] = []

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def ping(self) -> None: ...

    def get_key(self, token: str) -> Deferred[VirtualKey | None]:
        answer: Deferred[VirtualKey | None] = Deferred()
        self.asked.append((token, answer))
        return answer

    async def find_aliases(self, aliases: Sequence[str]) -> dict[str, str]:
        return {}


class House:
    def __init__(self, *, auth: bool = True, max_stale: float = 0.0) -> None:
        self.clock = Clock()
        self.clock.advance(NOW)
        self.store = SlowStore()
        self.cache = KeyCache(self.clock, ttl=10.0, max_unknown=50, max_stale=max_stale)
        self.gate = Gate(self.store, self.cache, MasterKey(MASTER_SECRET) if auth else None, self.clock)

    def ask(self, secret: bytes = SECRET) -> Deferred[Caller]:
        answer = self.gate.identify(Credential("present", hash_key(secret)))
        assert isinstance(answer, Deferred)
        return answer

    def know(self, key: VirtualKey) -> Caller | Deferred[Caller]:
        self.cache.put(key.token, key)
        return self.gate.identify(Credential("present", TOKEN))


def failure_of(answer: Deferred[Caller]) -> BaseException:
    failures: list[Failure] = []
    answer.addErrback(failures.append)
    assert len(failures) == 1
    error = failures[0].value
    assert isinstance(error, BaseException)
    return error


def result_of(answer: Deferred[Caller]) -> Caller:
    results: list[Caller] = []
    answer.addCallback(results.append)
    assert len(results) == 1
    return results[0]


def test_no_key_and_malformed_key() -> None:
    gate = House().gate
    with pytest.raises(AuthError, match=r"^Authentication Error, No api key passed in\.") as caught:
        gate.identify(Credential("none"))
    assert (caught.value.type, caught.value.param) == ("auth_error", "None")
    assert (b"www-authenticate", b"Bearer") in caught.value.headers
    with pytest.raises(
        AuthError,
        match=r"^Authentication Error, Malformed API Key passed in\. Ensure Key has `Bearer ` prefix\.",
    ):
        gate.identify(Credential("malformed"))


def test_auth_off_takes_anything() -> None:
    gate = House(auth=False).gate
    for credential in (Credential("none"), Credential("malformed"), Credential("present", hash_key(b"anything"))):
        assert gate.identify(credential) is ANONYMOUS
    assert ANONYMOUS.key_id is None
    assert not ANONYMOUS.is_master


def test_the_master_key_needs_no_store() -> None:
    house = House()
    assert house.gate.identify(Credential("present", hash_key(MASTER_SECRET))) is MASTER
    assert house.store.asked == []
    assert house.gate.is_master_token(hash_key(MASTER_SECRET))
    assert not house.gate.is_master_token(TOKEN)


def test_a_miss_asks_the_store_once_and_a_hit_is_synchronous() -> None:
    house = House()
    answer = house.ask()
    assert [token for token, _ in house.store.asked] == [TOKEN]
    house.store.asked[0][1].callback(KEY)
    expected = Caller(TOKEN, "team-a", False, KEY)
    assert result_of(answer) == expected
    assert house.gate.identify(Credential("present", TOKEN)) == expected
    assert len(house.store.asked) == 1


def test_concurrent_misses_share_one_call_and_cancel_alone() -> None:
    house = House()
    first, second, third = house.ask(), house.ask(), house.ask()
    other = house.ask(b"sk-another-key")
    assert len(house.store.asked) == 2
    first.cancel()
    assert isinstance(failure_of(first), CancelledError)
    house.store.asked[0][1].callback(KEY)
    assert result_of(second).key_id == result_of(third).key_id == TOKEN
    assert not other.called
    house.store.asked[1][1].callback(None)
    assert isinstance(failure_of(other), UnknownKey)


def test_an_unknown_key_is_401_and_remembered() -> None:
    house = House()
    answer = house.ask()
    house.store.asked[0][1].callback(None)
    error = failure_of(answer)
    assert isinstance(error, UnknownKey)
    assert error.message.startswith("Authentication Error, Invalid proxy server token passed.")
    assert (error.status, error.type, error.param) == (401, "token_not_found_in_db", "key")
    with pytest.raises(UnknownKey):
        house.gate.identify(Credential("present", TOKEN))
    house.clock.advance(10)
    house.ask()
    assert len(house.store.asked) == 2


def test_made_up_keys_leave_a_good_one_in_the_cache() -> None:
    house = House()
    house.know(KEY)
    for number in range(500):
        answer = house.ask(b"sk-made-up-%d" % number)
        house.store.asked[-1][1].callback(None)
        assert isinstance(failure_of(answer), UnknownKey)
    assert isinstance(house.gate.identify(Credential("present", TOKEN)), Caller)
    assert len(house.cache) == 51


def test_store_down_is_503_for_all_who_wait_and_not_remembered() -> None:
    house = House()
    first, second = house.ask(), house.ask()
    house.store.asked[0][1].errback(StoreUnavailable("10.0.0.7 refused"))
    for answer in (first, second):
        error = failure_of(answer)
        assert isinstance(error, StoreDown)
        assert (b"retry-after", b"1") in error.headers
        assert "10.0.0.7" not in error.message
    third = house.ask()
    house.store.asked[1][1].callback(KEY)
    assert result_of(third).key_id == TOKEN


def test_a_fault_of_the_store_reaches_its_callers_as_it_is() -> None:
    house = House()
    answer = house.ask()
    house.store.asked[0][1].errback(ZeroDivisionError())
    assert isinstance(failure_of(answer), ZeroDivisionError)


def test_expiry_counts_at_the_second_also_for_a_cached_key() -> None:
    house = House()
    key = evolve(KEY, expires=NOW + 5)
    house.know(key)
    house.clock.advance(4.999)
    assert isinstance(house.gate.identify(Credential("present", TOKEN)), Caller)
    house.clock.advance(0.001)
    with pytest.raises(ExpiredKey, match=r"^Authentication Error - Expired Key\.") as caught:
        house.gate.identify(Credential("present", TOKEN))
    assert caught.value.type == "expired_key"
    assert "2023-11-14T22:13:25+00:00" in caught.value.message


def test_blocked() -> None:
    house = House()
    with pytest.raises(AuthError, match=r"^Authentication Error, Key is blocked\.") as caught:
        house.know(evolve(KEY, blocked=True))
    assert caught.value.type == "auth_error"


def test_a_change_takes_effect_at_once() -> None:
    house = House()
    house.know(KEY)
    house.gate.changed(TOKEN)
    answer = house.ask()
    house.store.asked[0][1].callback(None)
    assert isinstance(failure_of(answer), UnknownKey)


def test_who_waits_for_an_answer_that_is_older_than_the_change_has_the_store_asked_again() -> None:
    house = House()
    before = house.ask()
    house.gate.changed(TOKEN)
    after = house.ask()
    assert len(house.store.asked) == 2
    house.store.asked[0][1].callback(KEY)
    assert not before.called
    assert house.cache.get(TOKEN) is None
    joined = house.ask()
    assert len(house.store.asked) == 2
    house.store.asked[1][1].callback(None)
    for answer in (before, after, joined):
        assert isinstance(failure_of(answer), UnknownKey)
    assert house.cache.is_unknown(TOKEN)


def test_a_stale_key_is_asked_for_and_works_while_the_store_is_away() -> None:
    house = House(max_stale=300.0)
    house.know(KEY)
    house.clock.advance(299)
    first, second = house.ask(), house.ask()
    assert len(house.store.asked) == 1
    house.store.asked[0][1].errback(StoreUnavailable())
    assert result_of(first) == result_of(second) == Caller(TOKEN, "team-a", False, KEY)
    house.clock.advance(1)
    late = house.ask()
    house.store.asked[1][1].errback(StoreUnavailable())
    error = failure_of(late)
    assert isinstance(error, StoreDown)
    assert (b"retry-after", b"1") in error.headers


def test_an_answer_counts_more_than_what_is_stale() -> None:
    house = House(max_stale=300.0)
    house.know(KEY)
    house.clock.advance(10)
    answer = house.ask()
    house.store.asked[0][1].callback(None)
    assert isinstance(failure_of(answer), UnknownKey)
    house.clock.advance(10)
    again = house.ask()
    house.store.asked[1][1].errback(StoreUnavailable())
    assert isinstance(failure_of(again), StoreDown)


def test_a_fault_of_the_store_is_no_outage() -> None:
    house = House(max_stale=300.0)
    house.know(KEY)
    house.clock.advance(10)
    answer = house.ask()
    house.store.asked[0][1].errback(ZeroDivisionError())
    assert isinstance(failure_of(answer), ZeroDivisionError)


def test_a_stranger_is_one_for_its_time_only() -> None:
    house = House(max_stale=300.0)
    answer = house.ask()
    house.store.asked[0][1].callback(None)
    assert isinstance(failure_of(answer), UnknownKey)
    house.clock.advance(10)
    again = house.ask()
    house.store.asked[1][1].errback(StoreUnavailable())
    assert isinstance(failure_of(again), StoreDown)


@pytest.mark.parametrize(("fields", "kind"), [({"expires": NOW + 60}, ExpiredKey), ({"blocked": True}, AuthError)])
def test_what_was_known_of_a_stale_key_applies(fields: dict[str, object], kind: type[AuthError]) -> None:
    house = House(max_stale=300.0)
    house.cache.put(TOKEN, evolve(KEY, **fields))
    house.clock.advance(60)
    answer = house.ask()
    house.store.asked[0][1].errback(StoreUnavailable())
    assert type(failure_of(answer)) is kind


def test_a_key_that_was_changed_is_not_stale() -> None:
    house = House(max_stale=300.0)
    house.know(KEY)
    house.gate.changed(TOKEN)
    answer = house.ask()
    house.gate.changed(TOKEN)
    house.store.asked[0][1].errback(StoreUnavailable())
    assert isinstance(failure_of(answer), StoreDown)


def test_what_may_have_changed_is_asked_for_and_stale_meanwhile() -> None:
    house = House(max_stale=300.0)
    house.know(KEY)
    house.gate.changed(None)
    answer = house.ask()
    house.store.asked[0][1].errback(StoreUnavailable())
    assert result_of(answer).key_id == TOKEN
    asked = house.ask()
    house.gate.changed(None)
    house.store.asked[1][1].callback(KEY)  # it may be older than what was missed: it is not fresh
    assert not asked.called
    house.store.asked[2][1].errback(StoreUnavailable())
    assert result_of(asked).key_id == TOKEN
    last = house.ask()
    house.store.asked[3][1].callback(None)
    assert isinstance(failure_of(last), UnknownKey)


def test_an_answer_that_is_under_way_when_changes_may_have_been_missed_is_stale() -> None:
    """As when the store can be heard of changes only after the first key was asked for."""
    house = House(max_stale=300.0)
    first = house.ask()
    house.gate.changed(None)
    house.store.asked[0][1].callback(KEY)
    answer = house.ask()
    house.store.asked[1][1].errback(StoreUnavailable())
    assert result_of(first).key_id == result_of(answer).key_id == TOKEN


@pytest.mark.parametrize("heard", [(None, TOKEN), (TOKEN, None)])
def test_an_answer_that_is_under_way_when_its_key_is_changed_is_never_remembered(heard: tuple[str | None, ...]) -> None:
    house = House(max_stale=300.0)
    first = house.ask()
    for token in heard:
        house.gate.changed(token)
    house.store.asked[0][1].callback(KEY)
    answer = house.ask()
    house.store.asked[1][1].errback(StoreUnavailable())
    assert isinstance(failure_of(first), StoreDown)
    assert isinstance(failure_of(answer), StoreDown)


def test_a_key_that_changes_whenever_it_is_asked_for_is_given_up() -> None:
    house = House()
    answer = house.ask()
    for number in range(4):
        assert len(house.store.asked) == number + 1
        house.gate.changed(TOKEN)
        house.ask().addErrback(lambda _: None)  # somebody else asks anew each time
        house.store.asked[number][1].callback(KEY)
    assert isinstance(failure_of(answer), StoreDown)


def test_who_wants_no_stale_key_is_told_that_the_store_is_away() -> None:
    house = House(max_stale=300.0)
    house.know(KEY)
    house.gate.changed(None)
    answer = house.ask()
    sure = house.gate.admit(TOKEN, stale=False)
    assert isinstance(sure, Deferred)
    (asked,) = house.store.asked
    asked[1].errback(StoreUnavailable())
    assert result_of(answer).key_id == TOKEN
    assert isinstance(failure_of(sure), StoreDown)


def test_who_watches_hears_of_changes() -> None:
    house = House()
    heard: list[tuple[str, str | None, bool]] = []
    for name in ("one", "two"):
        house.gate.watch(lambda token, name=name: heard.append((name, token, house.cache.get(TOKEN) is None)))  # type: ignore[misc]
    house.know(KEY)
    house.gate.changed(TOKEN)
    house.know(KEY)
    house.gate.changed(None)
    assert heard == [(name, token, True) for token in (TOKEN, None) for name in ("one", "two")]


@pytest.mark.parametrize("group", ["inference", "info"])
def test_open_routes(group: Group) -> None:
    gate = House().gate
    for caller in (MASTER, ANONYMOUS, Caller(TOKEN, "team-a", False, KEY)):
        gate.check_route(caller, group, b"/x", b"")


@pytest.mark.parametrize("group", ["admin", "unknown"])
def test_shut_routes(group: Group) -> None:
    gate = House().gate
    gate.check_route(MASTER, group, b"/x", b"")
    for caller in (ANONYMOUS, Caller(TOKEN, "team-a", False, KEY)):
        with pytest.raises(Forbidden, match=r"^Virtual key is not allowed to call this route\.") as caught:
            gate.check_route(caller, group, b"/x", b"")
        assert "nly the master key may call" in caught.value.message
        assert ("--master-key-file" in caught.value.message) is (caller is ANONYMOUS)


def test_a_restricted_key_is_judged_by_its_path() -> None:
    gate = House().gate
    caller = Caller(TOKEN, "team-a", False, evolve(KEY, allowed_routes=("/v1/chat", "/sleep"), granted_by_master=True))
    gate.check_route(caller, "inference", b"/v1/chat/completions", b"")
    gate.check_route(caller, "inference", b"/gpu1/v1/chat/completions", b"/gpu1")
    gate.check_route(caller, "admin", b"/sleep", b"")
    shut: list[tuple[Group, bytes]] = [
        ("inference", b"/v1/embeddings"),
        ("inference", b"/gpu1/v1/chat/completions"),
        ("info", b"/v1/models"),
        ("admin", b"/wake_up"),
        ("unknown", b"/v1/chat/../x"),
    ]
    for group, path in shut:
        with pytest.raises(Forbidden, match=r"^Virtual key is not allowed to call this route\.") as caught:
            gate.check_route(caller, group, path, b"")
        assert (caught.value.status, caught.value.type) == (403, "auth_error")
        assert ("allowed_routes" in caught.value.message) is (group in ("inference", "info"))


def test_no_secret_in_any_refusal_or_repr() -> None:
    house = House()
    answer = house.ask()
    house.store.asked[0][1].callback(None)
    errors: list[BaseException] = [failure_of(answer)]
    for key in (evolve(KEY, blocked=True), evolve(KEY, expires=1.0)):
        with pytest.raises(ApiError) as caught:
            house.know(key)
        errors.append(caught.value)
    shown = repr(errors) + repr(house.gate) + repr(vars(house.gate)) + repr(vars(house.cache)) + repr(MASTER)
    assert "canary" not in shown
