import pytest
from twisted.internet.task import Clock

from vllmproxy.keys.cache import KeyCache
from vllmproxy.keys.key import VirtualKey


def key(token: str) -> VirtualKey:
    return VirtualKey(token=token, key_name="sk-...aaaa")


def test_a_key_is_believed_for_its_time() -> None:
    clock = Clock()
    cache = KeyCache(clock, ttl=1.0)
    assert cache.get("a") is None
    cache.put("a", key("a"))
    clock.advance(0.999)
    assert cache.get("a") == key("a")
    clock.advance(0.001)
    assert cache.get("a") is None
    assert len(cache) == 0


@pytest.mark.parametrize(("ttl", "seconds"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (60.0, 1.0)])
def test_a_stranger_is_remembered_as_long_as_a_key_and_for_a_second_at_most(ttl: float, seconds: float) -> None:
    clock = Clock()
    cache = KeyCache(clock, ttl=ttl)
    assert not cache.is_unknown("a")
    cache.put("a", None)
    clock.advance(seconds * 0.9)
    assert cache.is_unknown("a") is (seconds > 0)
    assert cache.get("a") is None
    clock.advance(seconds * 0.1)
    assert not cache.is_unknown("a")
    assert len(cache) == 0


def test_one_answer_replaces_the_other() -> None:
    cache = KeyCache(Clock())
    cache.put("a", None)
    cache.put("a", key("a"))
    assert not cache.is_unknown("a")
    cache.put("a", None)
    assert cache.get("a") is None


def test_forget_drops_both_kinds() -> None:
    cache = KeyCache(Clock())
    cache.put("a", key("a"))
    cache.put("b", None)
    cache.forget("a")
    cache.forget("b")
    cache.forget("c")
    assert cache.get("a") is None
    assert not cache.is_unknown("b")


def test_the_least_recently_used_goes_first() -> None:
    cache = KeyCache(Clock(), max_entries=2)
    cache.put("a", key("a"))
    cache.put("b", key("b"))
    assert cache.get("a") is not None
    cache.put("c", key("c"))
    assert cache.get("b") is None
    assert cache.get("a") is not None
    assert cache.get("c") is not None


def test_made_up_keys_are_bounded_and_push_no_real_one_out() -> None:
    cache = KeyCache(Clock(), max_entries=10, max_unknown=5)
    cache.put("a", key("a"))
    for number in range(1000):
        cache.put(f"made-up-{number}", None)
    assert cache.get("a") is not None
    assert len(cache) == 6
    assert cache.is_unknown("made-up-999")
    assert not cache.is_unknown("made-up-994")


def test_a_key_is_stale_for_its_time_after_the_store_gave_it() -> None:
    clock = Clock()
    cache = KeyCache(clock, ttl=1.0, max_stale=300.0)
    assert cache.get_stale("a") is None
    cache.put("a", key("a"))
    clock.advance(1)
    assert cache.get("a") is None
    assert cache.get_stale("a") == key("a")
    clock.advance(298.9)
    assert cache.get_stale("a") == key("a")
    clock.advance(0.1)
    assert cache.get_stale("a") is None
    assert len(cache) == 0


def test_giving_it_does_not_prolong_it_and_the_store_does() -> None:
    clock = Clock()
    cache = KeyCache(clock, ttl=1.0, max_stale=10.0)
    cache.put("a", key("a"))
    clock.advance(9)
    assert cache.get_stale("a") is not None
    cache.put("a", key("a"))
    clock.advance(9)
    assert cache.get_stale("a") is not None
    clock.advance(1)
    assert cache.get_stale("a") is None


def test_without_staleness_nothing_is_given_after_its_time() -> None:
    clock = Clock()
    cache = KeyCache(clock, ttl=1.0)
    cache.put("a", key("a"))
    assert cache.get_stale("a") is None
    assert cache.get("a") == key("a")


def test_a_key_that_is_believed_for_longer_is_not_dropped_for_being_stale() -> None:
    clock = Clock()
    cache = KeyCache(clock, ttl=600.0, max_stale=10.0)
    cache.put("a", key("a"))
    clock.advance(11)
    assert cache.get_stale("a") is None
    assert cache.get("a") == key("a")


def test_what_is_doubted_is_stale_and_no_longer_fresh() -> None:
    clock = Clock()
    cache = KeyCache(clock, ttl=60.0, max_stale=300.0)
    cache.put("a", key("a"))
    cache.put("b", None)
    cache.doubt()
    assert cache.get("a") is None
    assert cache.get_stale("a") == key("a")
    assert not cache.is_unknown("b")
    cache.put("a", key("a"))
    assert cache.get("a") == key("a")


def test_an_answer_that_is_doubted_is_stale_at_once() -> None:
    cache = KeyCache(Clock(), max_stale=300.0)
    cache.doubt()
    cache.put_doubted("a", key("a"))
    assert cache.get("a") is None
    assert cache.get_stale("a") == key("a")
    cache.put_doubted("a", None)  # before the doubt it was gone already
    assert cache.get_stale("a") is None


def test_an_answer_that_is_doubted_is_less_than_a_later_one() -> None:
    cache = KeyCache(Clock(), max_stale=300.0)
    cache.doubt()
    cache.put("a", key("a"))
    cache.put("b", None)
    cache.put_doubted("a", None)
    cache.put_doubted("b", key("b"))
    assert cache.get("a") == key("a")
    assert cache.is_unknown("b")
    assert cache.get_stale("b") is None


def test_what_is_forgotten_or_known_not_to_exist_is_not_stale() -> None:
    cache = KeyCache(Clock(), max_stale=300.0)
    cache.put("a", key("a"))
    cache.forget("a")
    assert cache.get_stale("a") is None
    cache.put("b", key("b"))
    cache.put("b", None)
    assert cache.get_stale("b") is None


def test_stale_keys_are_bounded_too() -> None:
    clock = Clock()
    cache = KeyCache(clock, max_entries=3, max_stale=300.0)
    for name in "abcde":
        cache.put(name, key(name))
        clock.advance(2)
        assert cache.get_stale("a") is not None  # used all the time
    assert len(cache) == 3
    assert [name for name in "abcde" if cache.get_stale(name)] == ["a", "d", "e"]
